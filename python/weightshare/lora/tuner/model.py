"""The tuner: pools of all adapters, and the modules that use them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from weightshare.lora.plan import ShardPlan
from weightshare.lora.pool import ShardPool
from weightshare.lora.tuner.checks import PARTS, check_tensors
from weightshare.lora.tuner.config import MoSConfig
from weightshare.lora.tuner.layer import MoSLayer, Running, widths
from weightshare.lora.tuner.mixed import BASE, Key, MixedBatch, Stack, stacked

LOW = (torch.float16, torch.bfloat16)


class MoSModel(BaseTuner):
    """Mixture of Shards in a model, as PEFT's other tuners; made by ``peft.get_peft_model``.

    Batches of several adapters (``adapter_names=``, one name per sequence or ``"__base__"``) work
    in inference and in training, by one kernel call per module. An adapter learns where its
    parameters require gradients: those of the active adapters do, see ``set_requires_grad``.

    Attributes:
        mos_pools: the :class:`weightshare.lora.ShardPool` of each adapter and projection type.

    Source: MoS (Wang et al., ICLR 2025, arXiv 2410.00938).
    """

    uses_shared_state = True
    prefix = "mos_pool_"
    tuner_layer_cls = MoSLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    mos_pools: nn.ModuleDict

    def pools_of(self, adapter_name: str) -> dict[str, ShardPool]:
        """The pools of an adapter by projection type."""
        pools = cast(nn.ModuleDict, self.mos_pools[adapter_name])
        return cast(dict[str, ShardPool], dict(pools.items()))

    # -- Injection -----------------------------------------------------------------------------

    def _pre_injection_hook(self, model, config, adapter_name) -> None:
        self.mos_pools = nn.ModuleDict()
        self._running = Running()
        self._stacks: tuple[tuple, dict[Key, Stack]] | None = None

    def inject_adapter(self, model, adapter_name, *args, **kwargs) -> None:
        """Put an adapter into the model; other adapters stay trainable or frozen as they are."""
        before = [(p, p.requires_grad) for p in self.mos_pools.parameters()]
        self._adding = adapter_name
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            if adapter_name in self.mos_pools:
                del self.mos_pools[adapter_name]
            raise
        finally:
            for parameter, flag in before:
                parameter.requires_grad = flag

    def _prepare_model(self, peft_config, model) -> None:
        """Make the pools, once it is known how many modules share each; all is checked here."""
        config: Any = _maybe_include_all_linear_layers(peft_config, model)
        found = self._targets(config, model)
        shapes: dict[str, list[int]] = {}
        self._numbers: dict[str, int] = {}
        for name, base in found.items():
            kind = name.rpartition(".")[2]
            shape = widths(name, base)
            count, *known = shapes.get(kind, (0, *shape))
            if tuple(known) != shape:
                raise ValueError(
                    f"{name} is {shape[0]} -> {shape[1]}, but other modules named {kind} are "
                    f"{known[0]} -> {known[1]}: modules of one type share a pool and must have one "
                    "shape; narrow target_modules or use exclude_modules"
                )
            self._numbers[name] = count
            shapes[kind] = [count + 1, *shape]
        config.check_base(shapes)
        firsts = {name.rpartition(".")[2]: base for name, base in reversed(found.items())}
        self.mos_pools[self._adding] = nn.ModuleDict(
            {kind: _pool(config, kind, shape, firsts[kind]) for kind, shape in shapes.items()}
        )

    def _targets(self, config: MoSConfig, model: nn.Module) -> dict[str, nn.Module]:
        """The modules to adapt by name, in the model's order.

        Raises:
            ValueError: a target module is nowhere in the model.
        """
        found, names, inside = {}, [], "\n"
        for name, module in model.named_modules():
            if name.startswith(inside):
                continue
            if isinstance(module, MoSLayer):
                inside = name + "."
            names.append(name)
            if name and self._check_target_module_exists(config, name):
                found[name] = getattr(module, "base_layer", module)
        if isinstance(config.target_modules, set):
            unknown = [
                target
                for target in sorted(config.target_modules)
                if not any(name == target or name.endswith(f".{target}") for name in names)
            ]
            if unknown:
                ends = sorted({name.rpartition(".")[2] for name in names if name})
                raise ValueError(
                    f"target_modules: {unknown} not found in the base model; its modules are named "
                    f"{[end for end in ends if not end.isdigit()]}"
                )
        return found

    def _create_and_replace(
        self, peft_config: Any, adapter_name, target, target_name, parent, current_key, *_: Any
    ) -> None:
        kind = current_key.rpartition(".")[2]
        layer = target
        if not isinstance(target, MoSLayer):
            layer = MoSLayer(target, kind, self._running, **get_quantization_kwargs(self.model))
            self._replace_module(parent, target_name, layer, target)
        pool = self.pools_of(adapter_name)[kind]
        scale = peft_config.alpha / peft_config.r
        layer.add(adapter_name, pool, self._numbers[current_key], scale, peft_config.dropout)

    def _cast_adapter_dtype(self, adapter_name, autocast_adapter_dtype=True) -> None:
        for pool in self.pools_of(adapter_name).values() if autocast_adapter_dtype else ():
            if pool.a.dtype in LOW:
                pool.float()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and free its pools."""
        super().delete_adapter(adapter_name)
        del self.mos_pools[adapter_name]
        self._stacks = None

    # -- Files ---------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls, model, config, adapter_name, state_dict, unwanted_adapter_names
    ) -> dict[str, Tensor]:
        # Not by filtering keys: an adapter may have the name of a type or of a tensor.
        prefix, own = _state_of(model, adapter_name)
        return {prefix + key: state_dict.get(prefix + key, value) for key, value in own.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        _, found, rest = key.partition(f"mos_pools.{adapter_name}.")
        return rest if found else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model, config, adapter_name, state_dict
    ) -> dict[str, Tensor]:
        tuner = _tuner(model)
        prefix, _ = _state_of(model, adapter_name)
        ours = {key: value for key, value in state_dict.items() if is_ours(key)}
        check_tensors(ours, tuner.pools_of(adapter_name))
        return {(prefix + key if key in ours else key): v for key, v in state_dict.items()}

    # -- Batches of several adapters -----------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            if torch.is_grad_enabled():  # an evaluation may come between a pass and its backward
                self._running.mixed = False
            yield
            return
        batch = self._mixed_batch(names)
        self._running.mixed = self._running.mixed or torch.is_grad_enabled()
        undo = self._hooks(batch, list(names), kwargs)
        self._running.batch = batch
        try:
            yield
        finally:
            self._running.batch = None
            for call in undo:
                call()

    def _mixed_batch(self, names) -> MixedBatch:
        """Which adapter each sequence uses, and the pools of all that are named.

        Raises:
            TypeError: names are not a list of strings.
            ValueError: an adapter does not exist.
        """
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"adapter_names: expected a list of strings, got {names!r}")
        used = [name for name in dict.fromkeys(names) if name != BASE]
        unknown = [name for name in used if name not in self.mos_pools]
        if unknown or not names:
            raise ValueError(
                f"adapter_names: {unknown or 'no name'} given, but the adapters are "
                f"{list(self.mos_pools)}, and {BASE!r} for none"
            )
        pools: dict[str, dict[Key, ShardPool]] = {
            name: {(k, p.in_features, p.out_features): p for k, p in self.pools_of(name).items()}
            for name in used
        }
        configs: dict[str, Any] = {name: self.peft_config[name] for name in used}
        scales = {name: config.alpha / config.r for name, config in configs.items()}
        dropouts = {name: config.dropout for name, config in configs.items()}
        device = next(self.parameters()).device
        return MixedBatch(names, pools, scales, dropouts, device, self._stacked(pools))

    def _stacked(self, pools) -> dict[Key, Stack]:
        """The pools side by side: anew where gradients go through, else kept while they last.

        What is kept is a copy of the pools; :class:`weightshare.lora.AdapterBank` needs none.
        """
        tensors = [
            getattr(p, part) for mine in pools.values() for p in mine.values() for part in PARTS
        ]
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if learns or any(t.is_inference() for t in tensors):  # these have no version
            return stacked(pools)
        versions = [(id(t), t._version, t.data_ptr()) for t in tensors]
        state = torch.is_inference_mode_enabled(), *pools, *versions
        if self._stacks is None or self._stacks[0] != state:
            self._stacks = state, stacked(pools)
        return self._stacks[1]

    def _hooks(self, batch: MixedBatch, names: list[str], kwargs: dict[str, Any]) -> list:
        """Tell modules that are trained whole which adapter each row uses, and layers that are
        computed anew in backward which batch it was; returns what undoes it.
        """
        undo = []
        repeated = [name for name in names for _ in range(kwargs.get("num_beams") or 1)]

        def named(module, args, inputs):
            return args, inputs | {"adapter_names": repeated}

        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                undo.append(module.register_forward_pre_hook(named, with_kwargs=True).remove)
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None:
                module._gradient_checkpointing_func = partial(self._recomputed, batch, function)
                undo.append(partial(setattr, module, "_gradient_checkpointing_func", function))
        return undo

    def _recomputed(self, batch, checkpoint, function, *args, **kwargs):
        """Checkpoint a function that uses the batch, now and in backward."""

        def run(*inputs, **named):
            before, self._running.batch = self._running.batch, batch
            try:
                return function(*inputs, **named)
            finally:
                self._running.batch = before

        return checkpoint(run, *args, **kwargs)


def _pool(config: MoSConfig, kind: str, shape: list[int], base: nn.Module) -> ShardPool:
    """The pool of one type, where its first module is and in its dtype if that is a float one."""
    count, d_in, d_out = shape
    seed = zlib.crc32(f"{config.seed} {kind}".encode())  # types are drawn apart
    try:
        plan = ShardPlan(
            config.r, config.equivalent_rank, config.private_rank, config.shards, count, seed,
            config.dissociate,
        )  # fmt: skip
        plan.widths(d_in, d_out)
    except ValueError as error:
        raise ValueError(f"{kind} ({count} of {d_in} -> {d_out}): {error}") from error
    weight = next(base.parameters(), torch.empty(0))
    dtype = weight.dtype if weight.dtype in (*LOW, torch.float64) else torch.float32
    return ShardPool(d_in, d_out, plan, device=weight.device, dtype=dtype)


def _tuner(model: nn.Module) -> MoSModel:
    return next(module for module in model.modules() if isinstance(module, MoSModel))


def _state_of(model: nn.Module, adapter_name: str) -> tuple[str, dict[str, Tensor]]:
    """What precedes the keys of an adapter in the state dict of a model, and the tensors."""
    name = next(name for name, module in model.named_modules() if isinstance(module, MoSModel))
    pools = _tuner(model).mos_pools[adapter_name]
    return f"{name}.mos_pools.{adapter_name}.".lstrip("."), pools.state_dict()


def is_ours(key: str) -> bool:
    """Tell a tensor in pool format, ``type.part``, from those of modules that are saved whole."""
    kind, _, part = key.rpartition(".")
    return part in PARTS and "." not in kind
