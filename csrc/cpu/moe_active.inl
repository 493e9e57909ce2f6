// Activations of moe.h and their derivatives, in loops that compilers vectorise.

// ---- activations --------------------------------------------------------------------------------

// e^v within 1 ulp or so, in a form that compilers vectorise; double by the library.
inline float exp_of(float v) {
  const bool vanishes = v < -87.0f;
  v = v < -87.0f ? -87.0f : v;
  v = v > 88.0f ? 88.0f : v;
  const float shifted = v * 1.44269504f + 12582912.0f;  // the integer ends up in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return vanishes ? 0.0f : p * scale;
}
inline double exp_of(double v) { return std::exp(v); }

// 2 Phi(v), Phi the normal distribution; accurate relative to itself on both sides.
inline float twice_phi(float v) {
  const float z = std::fabs(v) * 0.70710678f;
  // erfc(z) = t exp(-z^2 + P(t)), t = 1 / (1 + z / 2): a Chebyshev fit, 1.2e-7 relative.
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const float tail = t * exp_of(p - z * z);
  return v < 0 ? tail : 2.0f - tail;
}
inline double twice_phi(double v) { return std::erfc(-v * 0.70710678118654752440); }

// Hidden unit of a gate (or the only) and an up pre-activation, and the derivatives to both.
template <Activation A, class S>
struct Active {
  S value, by_gate, by_up;

  Active(S g, S u) {
    if constexpr (A == Activation::swiglu) {
      const S e = exp_of(g < 0 ? g : -g), s = (g < 0 ? e : S(1)) / (S(1) + e);
      value = g * s * u;
      by_gate = s * (S(1) + g * (S(1) - s)) * u;
      by_up = g * s;
    } else if constexpr (A == Activation::gelu) {
      const S phi = S(0.5) * twice_phi(g);
      value = g * phi;
      by_gate = phi + g * S(0.39894228040143267794) * exp_of(S(-0.5) * g * g);
      by_up = 0;
    } else {
      const S v = g > 0 ? g : (g != g ? g : S(0));
      value = v * v;
      by_gate = 2 * v;
      by_up = 0;
    }
  }
};

template <class F>
void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::swiglu:
      return f(std::integral_constant<Activation, Activation::swiglu>());
    case Activation::gelu:
      return f(std::integral_constant<Activation, Activation::gelu>());
    case Activation::relu2:
      return f(std::integral_constant<Activation, Activation::relu2>());
  }
}

// Hidden units of n pre-activations.
template <Activation A, class S>
void activate_run(const S* __restrict gate, const S* __restrict up, int64_t n, S* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = Active<A, S>(gate[i], up[i]).value;
}

// Where `across` is the gradient of the hidden units of a line, less the gates `weight`.
template <class S>
struct GradLine {
  const S *across, *gate, *up, *weight;
  S *total, *by_gate, *by_up, *gated;
};

template <Activation A, class S>
void grad_run(const GradLine<S>& line, int64_t n) {
  const S* __restrict across = line.across, * __restrict gate = line.gate;
  const S* __restrict up = line.up, * __restrict weight = line.weight;
  S* __restrict total = line.total, * __restrict by_gate = line.by_gate;
  S* __restrict by_up = line.by_up, * __restrict gated = line.gated;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const Active<A, S> active(gate[i], up[i]);
    const S scaled = weight[i] * across[i];
    total[i] += across[i] * active.value;
    by_gate[i] = scaled * active.by_gate;
    by_up[i] = scaled * active.by_up;
    gated[i] = weight[i] * active.value;
  }
}
