"""A module of the base model with the updates of its adapters."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from weightshare.lora.pool import ShardPool
from weightshare.lora.tuner.mixed import MixedBatch
from weightshare_kernels import _checks, shard_lora


class Running:
    """What the forward pass at hand uses; one object for all layers of a model."""

    def __init__(self) -> None:
        self.batch: MixedBatch | None = None
        self.mixed = False  # whether the last pass of training was of a mixed batch


def widths(name: str, module: nn.Module) -> tuple[int, int]:
    """d_in and d_out of a module that can be adapted.

    Raises:
        TypeError: it is not linear.
    """
    sizes: Any = [getattr(module, side, None) for side in ("in_features", "out_features")]
    if isinstance(module, Conv1D):
        sizes = list(module.weight.shape)
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"target module {name} is the projection of an nn.MultiheadAttention, which reads its "
            "weight and never calls it; leave it out with exclude_modules"
        )
    if not all(isinstance(size, int) for size in sizes):
        raise TypeError(
            f"target module {name} is {type(module).__name__}, but MoS adapts linear layers "
            "(in_features, out_features); narrow target_modules or use exclude_modules"
        )
    return sizes[0], sizes[1]


class MoSLayer(nn.Module, BaseTunerLayer):
    """The base module, which is only called, plus ``alpha / r * x A^T B^T`` of the active adapters.

    The pools belong to the tuner, which holds the parameters once for all layers; the layers know
    them without listing them among their own.
    """

    adapter_layer_names = ("mos_pools",)
    other_param_names = ("mos_dropout", "mos_layer", "mos_scale")

    base_layer: Any
    mos_pools: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, kind: str, running: Running, **quantization: Any):
        super().__init__()
        self.base_layer = base_layer
        # bitsandbytes lays 4-bit weights out anew when such a CPU first evaluates, and from then on
        # passes no gradient to the layer's input (as of 0.50).
        if hasattr(base_layer, "support_avx512bf16_for_cpu"):
            self.base_layer.support_avx512bf16_for_cpu = False
        self.in_features, self.out_features = widths(kind, base_layer)
        self.key = (kind, self.in_features, self.out_features)
        self.running = running
        self.__dict__["mos_pools"] = nn.ModuleDict()  # not registered, see above
        self.mos_dropout = nn.ModuleDict()
        self.mos_layer: dict[str, int] = {}
        self.mos_scale: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self.quantization_backend = resolve_quantization_backend(base_layer, **quantization)
        self._active_adapter: str | list[str] = []
        self._kept: Any = None

    def add(self, name: str, pool: ShardPool, number: int, scale: float, dropout: float) -> None:
        """Take in an adapter, of whose pool this is the layer of that number."""
        self.mos_pools[name] = pool
        self.mos_layer[name], self.mos_scale[name] = number, scale
        self.set_dropout(name, dropout)

    def set_dropout(self, name: str, dropout: float) -> None:
        """Drop that share of an adapter's inputs in training."""
        module = nn.Dropout(dropout) if dropout else nn.Identity()
        self.mos_dropout[name] = module.train(self.training)

    def pool_of(self, name: str) -> ShardPool:
        """The pool of an adapter that this layer uses."""
        return cast(ShardPool, self.mos_pools[name])

    @property
    def transposed(self) -> bool:
        """Whether the base module keeps its weight as ``[d_in, d_out]``."""
        return isinstance(self.get_base_layer(), Conv1D)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer to x ``[..., d_in]``."""
        if self._disable_adapters:
            self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        if self.running.batch is not None:
            return self._mixed(x, y, self.running.batch)
        lost = self.running.mixed and not torch.compiler.is_compiling()
        if lost and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "a layer is computed anew in backward, but which adapters its rows use is not "
                "known any more; checkpoint with model.gradient_checkpointing_enable() of "
                "transformers"
            )
        if self.merged_adapters:
            return y
        for name in self.active_adapters:
            if name in self.mos_pools:
                pool, number = self.pool_of(name), self.mos_layer[name]
                tables = pool.a_index[number], pool.b_index[number]
                dropped = _fitting(self.mos_dropout[name](x), pool.a)
                y = _added(dropped, y, pool.a, pool.b, *tables, self.mos_scale[name])
        return y

    def _mixed(self, x: Tensor, y: Tensor, batch: MixedBatch) -> Tensor:
        """Each row with the update of its adapter."""
        if self.merged_adapters:
            raise ValueError(
                f"adapter_names cannot be used while {self.merged_adapters} are merged; call "
                "unmerge_adapter() first"
            )
        numbers = tuple(self.mos_layer.get(name, -1) for name in batch.adapters)
        groups = batch.groups(x)
        if all(number < 0 for number in numbers):
            return y
        stack = batch.stacks[self.key]
        if self.training:
            x = batch.dropped(x)
        x = _fitting(x, stack.a)
        pools = stack.a, stack.b, *stack.tables(numbers)
        return _added(x, y, *pools, batch.scales(x), groups)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the weight, in the weight's layout."""
        delta = self.pool_of(adapter).delta(self.mos_layer[adapter], self.mos_scale[adapter])
        return delta.t() if self.transposed else delta

    def get_base_weight(self) -> Tensor:
        """The weight of the base module, as floats."""
        base: Any = self.get_base_layer()
        if self.quantization_backend is not None:
            # bitsandbytes lays 4-bit weights out anew when it infers on a CPU. Asking for the state
            # undoes that, but (as of 0.50) leaves scales that were not quantised as a matrix.
            base.state_dict()
            state = getattr(base.weight, "quant_state", None)
            if state is not None and state.absmax.dim() == 2:
                state.absmax = state.absmax.t().reshape(-1).float()
        return super().get_base_weight()

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add updates to the weight of the base module; what it was is kept for :meth:`unmerge`.

        Raises:
            ValueError: with ``safe_merge``, the sum is not finite; nothing is changed then.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.mos_pools]
        if not names:
            return
        kept = self._kept or _Kept(self)  # before the weight is looked at, see get_base_weight
        total = self.get_base_weight()
        dtype = total.dtype
        for name in names:
            total = total + self.get_delta_weight(name).to(total.device)
        if safe_merge and not total.isfinite().all():
            if self._kept is None:
                kept.restore(self)
            raise ValueError(
                f"merging {names} into {self.key[0]} gives weights that are not finite"
            )
        self._kept = kept
        if self.quantization_backend is None:
            self.weight.copy_(total)
        else:
            self.set_base_weight(total.to(dtype))
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the weight as it was before the first :meth:`merge`, bit by bit."""
        if self._kept is not None:
            self._kept.restore(self)
            self._kept = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Every adapter is a LoRA; ``weightshare.lora.export_lora`` converts without loss."""
        return True

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device=None) -> None:
        where = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if adapter_name in self.mos_pools and where is not None:
            self.mos_pools[adapter_name].to(where)

    def __repr__(self) -> str:
        return "mos." + super().__repr__()


def _fitting(x: Tensor, pool: Tensor) -> Tensor:
    """X in the pool's dtype where the kernel wants that: it takes wider pools, not lower ones."""
    if x.dtype.itemsize > pool.dtype.itemsize and not _checks.autocasting(x.device.type):
        return x.to(pool.dtype)
    return x


def _added(x, y, a, b, a_index, b_index, scale, groups=None) -> Tensor:
    """Y plus the update of x, in y's dtype; pools on another device than x are copied there."""
    if a.device != x.device:
        a, b, a_index, b_index = [t.to(x.device) for t in (a, b, a_index, b_index)]
    if y.dtype == x.dtype or _checks.autocasting(x.device.type):
        return shard_lora(x, y, a, b, a_index, b_index, scale, adapters=groups)
    return y + shard_lora(x, None, a, b, a_index, b_index, scale, adapters=groups).to(y.dtype)


class _Kept:
    """The weight of a base module before a merge: a copy, or what a quantised one is made of."""

    def __init__(self, layer: MoSLayer):
        base: Any = layer.get_base_layer()
        self.plain = layer.quantization_backend is None
        self.base_layer, self.weight, self.values = layer.base_layer, base.weight, base.weight.data
        if self.plain:
            self.values = self.values.clone()
        else:  # merging makes a new parameter, but changes the states of the old one in place
            self.attributes = dict(base.weight.__dict__)
            if "quant_state" in self.attributes:
                self.attributes["quant_state"] = copy.copy(base.weight.quant_state)
            self.state = copy.copy(getattr(base, "state", None))

    def restore(self, layer: MoSLayer) -> None:
        if self.plain:
            self.weight.copy_(self.values)
            return
        layer.base_layer = self.base_layer
        base: Any = layer.get_base_layer()
        base.weight, base.weight.data = self.weight, self.values
        base.weight.__dict__.clear()
        base.weight.__dict__.update(self.attributes)
        if self.state is not None:
            base.state = self.state
