"""The mixture of normalisations over nested slices, without normalising once per slice.

With ``m_k`` and ``r_k`` the mean and the inverse deviation of ``x[:n_k]``, the mixture is

    ``sum_k alpha_k Pad((x[:n_k] - m_k) r_k w[:n_k] + b[:n_k])_j
    = w_j (A_c x_j - B_c) + b_j u_c``,

where c is the segment between two slice ends that holds j, and A, B and u are the sums of
``alpha_k r_k``, ``alpha_k r_k m_k`` and ``alpha_k`` over the slices that reach beyond it. The
statistics of all slices come from one sum per segment, added up.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function


def mixed_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sizes: Sequence[int],
    alpha: Tensor,
    eps: float,
    centred: bool,
) -> Tensor:
    """Mixture of layer norms (or root-mean-square norms) over prefixes of the last dimension.

    Args:
        x: input ``[..., D]``.
        weight: scale ``[D]``, or None.
        bias: shift ``[D]``, or None.
        sizes: K prefix lengths, at most D; one of length 0 adds nothing.
        alpha: mixture weights ``[K]``.
        eps: added to the variance.
        centred: whether to subtract the mean: layer norm; else root-mean-square norm.

    Returns:
        ``[..., D]``, zero beyond the longest slice.

    Raises:
        ValueError: the weight's width is not that of x.
    """
    width = x.shape[-1]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape[0] != width:
            raise ValueError(
                f"x: last dimension is {width}, but a mixture runs at the full width, "
                f"{parameter.shape[0]} ({name})"
            )
    edges = sorted({*sizes, width} - {0})
    if list(sizes) != edges:
        none = alpha.new_zeros(())
        terms = [[a for n, a in zip(sizes, alpha.unbind(), strict=True) if n == e] for e in edges]
        alpha = torch.stack([sum(term, none) for term in terms])  # type: ignore[arg-type]
    return _MixedNorm.apply(x, weight, bias, alpha, edges, eps, centred)


class _MixedNorm(Function):
    """Saves its inputs alone: the statistics are cheap to compute again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, alpha, edges, eps, centred):
        parts = []
        for rows in _chunks(x):
            mixture = _Mixture(rows, alpha, edges, eps, centred)
            y = mixture.normalised()
            y = y if weight is None else y * weight
            parts.append(y if bias is None else y + bias * mixture.reach())
        return _joined(parts, x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.edges, ctx.eps, ctx.centred = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        # Plain operations on what is saved, so that second derivatives come by themselves.
        x, weight, bias, alpha = ctx.saved_tensors
        shared = weight, bias, alpha, ctx.edges, ctx.eps, ctx.centred
        pairs = zip(_chunks(x), _chunks(grad), strict=True)
        dx, *sums = zip(*(_gradients(*pair, *shared) for pair in pairs), strict=True)
        dweight, dbias, dalpha = (
            None if like is None else sum(parts[1:], parts[0]).to(like.dtype)
            for parts, like in zip(sums, (weight, bias, alpha), strict=True)
        )
        return _joined(dx, x), dweight, dbias, dalpha, None, None, None


def _gradients(x, grad, weight, bias, alpha, edges, eps, centred):
    """Gradients of x, weight, bias and alpha, of rows x ``[rows, D]``."""
    mixture = _Mixture(x, alpha, edges, eps, centred)
    grad = grad.to(mixture.x.dtype)
    dx, dalpha = mixture.gradients(grad if weight is None else grad * weight)
    dweight = None if weight is None else (grad * mixture.normalised()).sum(0)
    if bias is None:
        return dx, dweight, None, dalpha
    dbias = grad.sum(0)
    shares = (dbias * bias).split(mixture.lengths)
    dalpha = dalpha + torch.stack(list(_running([share.sum() for share in shares])))
    return dx, dweight, dbias * mixture.reach(), dalpha


_CHUNK = 2**20  # elements: 1.7 times as fast as 2,688 rows of 768 at once; 2**18 is slower again


def _chunks(x: Tensor) -> Sequence[Tensor]:
    """Rows ``[rows, D]`` of x: all at once where the compiler, or a GPU, sees to the rest."""
    rows = x.reshape(-1, x.shape[-1])
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return (rows,)
    return rows.split(max(1, _CHUNK // x.shape[-1]))


def _joined(chunks: Sequence[Tensor], like: Tensor) -> Tensor:
    rows = chunks[0] if len(chunks) == 1 else torch.cat(tuple(chunks))
    return rows.to(like.dtype).view(like.shape)


class _Mixture:
    """Statistics of the slices of x, and what follows from them; lists have one entry per edge."""

    def __init__(self, x: Tensor, alpha: Tensor, edges: Sequence[int], eps: float, centred: bool):
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, self.alpha = x.to(dtype), alpha.to(dtype).unbind()
        self.edges, self.centred = edges, centred
        self.lengths = [b - a for a, b in itertools.pairwise((0, *edges))]
        if centred:
            # Around the smallest slice's mean, E[x^2] - E[x]^2 is safe: it loses at most a factor
            # of 1 + n_k / n_1 in precision, as the means of two parts differ only with variance.
            x = x - x.narrow(-1, 0, edges[0]).mean(-1, keepdim=True)
        self.x, self.parts = x, x.split(self.lengths, -1)
        squares = [torch.linalg.vector_norm(p, dim=-1, keepdim=True).square() for p in self.parts]
        variances = [s / n for s, n in zip(_running(squares), edges, strict=True)]
        if centred:
            sums = _running([p.sum(-1, keepdim=True) for p in self.parts])
            self.means = [s / n for s, n in zip(sums, edges, strict=True)]
            moved = zip(variances, self.means, strict=True)
            variances = [(v - m.square()).clamp(min=0) for v, m in moved]
        self.roots = [(v + eps).rsqrt() for v in variances]
        weighted = [a * r for a, r in zip(self.alpha, self.roots, strict=True)]
        self.scales = _reaching(weighted)
        if centred:
            self.offsets = _reaching([w * m for w, m in zip(weighted, self.means, strict=True)])

    def normalised(self) -> Tensor:
        """``A x - B``: the mixture but for weight and bias."""
        parts = [p * s for p, s in zip(self.parts, self.scales, strict=True)]
        if self.centred:
            parts = [p - o for p, o in zip(parts, self.offsets, strict=True)]
        return torch.cat(parts, -1)

    def reach(self) -> Tensor:
        """Weight of all slices that hold an element: u ``[D]``."""
        spans = zip(_reaching(self.alpha), self.lengths, strict=True)
        return torch.cat([u.expand(n) for u, n in spans])

    def gradients(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and (but for the bias) of alpha, from that of :meth:`normalised`."""
        products = (grad * self.x).split(self.lengths, -1)
        grads = grad.split(self.lengths, -1)
        slopes = list(_running([p.sum(-1, keepdim=True) for p in products]))
        if self.centred:
            sums = list(_running([g.sum(-1, keepdim=True) for g in grads]))
            slopes = [h - m * s for h, m, s in zip(slopes, self.means, sums, strict=True)]
        dalpha = torch.stack([(r * h).sum() for r, h in zip(self.roots, slopes, strict=True)])
        each = list(zip(self.alpha, self.roots, slopes, self.edges, strict=True))
        tilts = [a * r**3 * h / n for a, r, h, n in each]
        triples = zip(grads, self.parts, self.scales, _reaching(tilts), strict=True)
        parts = [g * scale - part * tilt for g, part, scale, tilt in triples]
        if self.centred:
            shifts = [a * r * s / n for (a, r, _, n), s in zip(each, sums, strict=True)]
            moved = zip(shifts, tilts, self.means, strict=True)
            shifts = _reaching([s - t * m for s, t, m in moved])
            parts = [p - s for p, s in zip(parts, shifts, strict=True)]
        return torch.cat(parts, -1), dalpha


def _running(terms: Sequence[Tensor]) -> itertools.accumulate:
    """Sums of the first 1, 2, .. terms."""
    return itertools.accumulate(terms)


def _reaching(terms: Sequence[Tensor]) -> list[Tensor]:
    """Per segment, the sum over all slices that reach beyond it."""
    return list(itertools.accumulate(reversed(terms)))[::-1]
