"""Linear layers whose weight is made for each architecture: a mixture of experts' weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from weightshare.nn.elastic import Axis, copy, selection, total, widen
from weightshare.nn.linear import Linear
from weightshare.sizes import Blocks, Dim, Interleaved, Joint, Size
from weightshare_kernels import expert_mixture_linear


class Encoding:
    """The active architecture as a vector: each field of a space over its largest choice.

    A field of one dim per layer counts with the mean of its layers. The vector is kept up to
    date by the dims, as sizes are, and not computed where it is read: a compiled graph reads it
    as a tensor and serves all architectures.

    Attributes:
        values: features ``[fields of the space]``, float32 on the CPU; changes in place.

    Source: Mixture-of-Supernets (Jawahar et al., 2023, arXiv 2306.04845), section 3.
    """

    def __init__(self, space: Mapping[str, Dim | tuple[Dim, ...]]):
        fields = [f if isinstance(f, tuple) else (f,) for f in space.values()]
        if not fields:
            raise ValueError("space: has no dimension to encode")
        self.values = torch.ones(len(fields))
        for number, dims in enumerate(fields):
            _Feature(self, number, dims)

    @classmethod
    def of(cls, space: Mapping[str, Dim | tuple[Dim, ...]]) -> Encoding:
        """The encoding of a space: one object for all that read it."""
        for field in space.values():
            for dependent in (field[0] if isinstance(field, tuple) else field).dependents:
                if isinstance(dependent, _Feature):
                    return dependent.encoding
        return cls(space)


class _Feature(Size):
    """One element of an encoding; the dims of its field keep it up to date."""

    def __init__(self, encoding: Encoding, number: int, dims: tuple[Dim, ...]):
        self.encoding, self.number, self.most = encoding, number, dims[0].choices[-1] or 1
        super().__init__(dims)

    def refresh(self) -> None:
        """Take over the active values of the dims."""
        mean = sum(dim.value for dim in self.dims) / len(self.dims)
        self.encoding.values[self.number] = mean / self.most


def encode(space: Mapping[str, Dim | tuple[Dim, ...]]) -> Tensor:
    """The active architecture as a vector of its own; see :class:`Encoding`."""
    return Encoding.of(space).values.clone()


class ArchRouter(nn.Module):
    """Mixture weights of experts, computed from the active architecture.

    ``softmax(Linear(relu(Linear(encoding))))`` over the experts. Neuron-wise it makes one mixture
    for each output neuron, and only the active ones are computed.

    Args:
        space: its active architecture is what is encoded.
        experts: number of experts M.
        out_features: outputs O of the layer it is for: a size, or an int.
        level: ``"neuron"``, or ``"layer"`` for one mixture of whole experts.
        hidden: width of the hidden layer.
        device: where the parameters live.
        dtype: of the parameters.

    Raises:
        ValueError: the level is unknown or there is no expert.
        TypeError: ``out_features`` is interleaved.

    Source: Mixture-of-Supernets (Jawahar et al., 2023, arXiv 2306.04845), section 3.
    """

    def __init__(
        self,
        space: Mapping[str, Dim | tuple[Dim, ...]],
        experts: int,
        out_features: Axis,
        level: str = "neuron",
        hidden: int = 128,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if level not in ("layer", "neuron"):
            raise ValueError(f"level: expected 'layer' or 'neuron', got {level!r}")
        if experts < 1:
            raise ValueError(f"experts: expected at least 1, got {experts}")
        self.encoding = Encoding.of(space)
        self.experts, self.level = experts, level
        rows = experts if level == "layer" else _per_expert(out_features, experts)
        self.fc1 = nn.Linear(len(self.encoding.values), hidden, device=device, dtype=dtype)
        self.fc2 = Linear(hidden, rows, device=device, dtype=dtype)

    def forward(self) -> Tensor:
        """Mixture weights ``[M]`` (layer-wise) or ``[M, active O]`` (neuron-wise)."""
        weight = self.fc1.weight
        # A copy: backward needs these values, and the next architecture overwrites them.
        code = self.encoding.values.to(weight.device, weight.dtype, copy=True)
        logits = self.fc2(self.fc1(code[None]).relu())
        if self.level == "layer":
            return logits[0].softmax(0)
        return logits.view(self.experts, -1).softmax(0)

    def extra_repr(self) -> str:
        """Number of experts and level."""
        return f"experts={self.experts}, level={self.level!r}"


class ExpertMixtureLinear(nn.Module):
    """A linear layer whose weight mixes M experts, sliced: ``sum_m diag(p^m) E^m[:out, :in]``.

    The mixture weights p come from the router, that is from the active architecture, or with the
    call. No mixed weight is made.

    The experts start as one linear layer plus deviations that sum to zero, so that their even
    mixture is that layer. Independent experts would average out: their mixture has ``1/M`` of the
    variance the layer should start with. Exact copies would leave the router without a gradient,
    and nearly equal ones let it settle on one mixture for all architectures.

    Args:
        in_features: a size, or an int where it is fixed.
        out_features: likewise.
        experts: number of experts M.
        bias: whether to add a learned bias, mixed as the weights are.
        router: the layer's own :class:`ArchRouter`; None if calls bring the mixture.
        noise: deviation of the experts from each other, relative to that of the weight.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        Input ``[..., in]``, output ``[..., out]``: the active sizes.

    Source: Mixture-of-Supernets (Jawahar et al., 2023, arXiv 2306.04845).

    Example::

        space = SearchSpace(hidden=[384, 768], ffn=[1536, 3072])
        router = ArchRouter(space, 2, space["ffn"])
        fc1 = ExpertMixtureLinear(space["hidden"], space["ffn"], experts=2, router=router)
        space.activate({"hidden": 384, "ffn": 1536})
        y = fc1(torch.randn(8, 384))  # [8, 1536]
    """

    experts: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: Axis,
        out_features: Axis,
        experts: int,
        bias: bool = True,
        router: ArchRouter | None = None,
        *,
        noise: float = 1.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if experts < 1:
            raise ValueError(f"experts: expected at least 1, got {experts}")
        if router is not None and router.experts != experts:
            raise ValueError(f"router: mixes {router.experts} experts, but the layer has {experts}")
        self.rows, self.cols, self.router = out_features, in_features, router
        linear = nn.Linear(total(in_features), total(out_features), bias, device, dtype)
        self._copy_from(linear, experts, noise)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        in_features: Axis,
        out_features: Axis,
        experts: int,
        router: ArchRouter | None = None,
        *,
        noise: float = 0.0,
    ) -> ExpertMixtureLinear:
        """Make this layer out of an ``nn.Linear``, copied into every expert.

        Args:
            linear: layer to replace.
            in_features: size of its columns; its largest is what the layer has.
            out_features: size of its rows, likewise.
            experts: number of experts M.
            router: as in the constructor.
            noise: likewise; without any the layer computes at first what ``linear`` does, and the
                router learns once the experts have come apart.

        Raises:
            TypeError: it is no ``nn.Linear``.
            ValueError: the sizes are not the layer's.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        for name, size, whole in (
            ("in_features", in_features, linear.in_features),
            ("out_features", out_features, linear.out_features),
        ):
            if total(size) != whole:
                raise ValueError(f"{name}: up to {total(size)}, but the layer has {whole}")
        bias = linear.bias is not None
        layer = cls(in_features, out_features, experts, bias, router, device="meta")
        layer._copy_from(linear, experts, noise)
        return layer.train(linear.training)

    def _copy_from(self, linear: nn.Linear, experts: int, noise: float) -> None:
        for name, part in (("experts", linear.weight), ("bias", linear.bias)):
            if part is None:
                self.register_parameter(name, None)
                continue
            copies = part.detach().expand(experts, *part.shape).clone()
            if noise and name == "experts" and experts > 1:
                apart = torch.randn_like(copies)
                apart -= apart.mean(0)
                copies += noise * part.detach().std() * (experts / (experts - 1)) ** 0.5 * apart
            setattr(self, name, nn.Parameter(copies, part.requires_grad))

    def forward(self, x: Tensor, mix: Tensor | None = None) -> Tensor:
        """Linear layer of the active part of the mixed experts.

        Args:
            x: input ``[..., active in]``.
            mix: mixture weights ``[M]`` or ``[M, active out]``; None asks the router.

        Raises:
            ValueError: there is neither a mixture nor a router.
            RuntimeError: a dim of its sizes carries mixture weights.
        """
        mix = self._mix(mix)
        if mix.dim() == 2:  # the op takes a mixture of all rows and selects
            mix = widen(mix, self.rows, self.experts.shape[1])
        rows, cols = selection(self.rows), selection(self.cols)
        return expert_mixture_linear(x, self.experts, self.bias, mix, out=rows, in_=cols)

    def _mix(self, mix: Tensor | None) -> Tensor:
        if any(isinstance(axis, Size) and axis.mixed for axis in (self.rows, self.cols)):
            raise RuntimeError(
                "ExpertMixtureLinear: its sizes are mixed, but experts are chosen for one "
                "architecture; activate one with space.activate(arch)"
            )
        if mix is None and self.router is None:
            raise ValueError("mix: is None and there is no router; pass mixture weights or set one")
        return self.router() if mix is None else mix  # type: ignore[misc]

    @torch.no_grad()
    def export(self) -> nn.Linear:
        """Mix and copy the active part into a plain ``nn.Linear``."""
        mix = self._mix(None)
        mix = mix.to(torch.promote_types(self.experts.dtype, torch.float32))
        mix = mix[:, None] if mix.dim() == 1 else mix
        experts = copy(self.experts, Joint(len(self.experts), self.rows, self.cols))
        weight = (mix[..., None] * experts).sum(0).to(experts.dtype)
        linear = nn.Linear(weight.shape[1], weight.shape[0], self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, self.experts.requires_grad)
        if self.bias is not None:
            bias = copy(self.bias, Joint(len(self.bias), self.rows))
            bias = (mix * bias).sum(0).to(bias.dtype)
            linear.bias = nn.Parameter(bias, self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Number of experts and their whole size."""
        count, out, in_ = self.experts.shape
        return f"{in_}, {out}, experts={count}, bias={self.bias is not None}"


def _per_expert(size: Axis, experts: int) -> Blocks:
    """The rows of all experts laid end to end."""
    if isinstance(size, Interleaved):
        raise TypeError("out_features: interleaved rows have no router; use Blocks")
    if isinstance(size, Blocks):
        return Blocks([*size.parts] * experts, [*size.totals] * experts)
    return Blocks([size] * experts, [total(size)] * experts)
