"""LoRA with shared pools of shards (Mixture of Shards): layers, PEFT tuner, serving."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from weightshare.lora.linear import MoSLinear
from weightshare.lora.plan import ShardPlan
from weightshare.lora.pool import ShardPool

if TYPE_CHECKING:
    from weightshare.lora.bank import AdapterBank, CapacityError, ResidentBytes
    from weightshare.lora.tuner.export import export_lora
    from weightshare.lora.tuner.parallel import average_pool_gradients_, pool_parameters
    from weightshare.lora.tuner.register import MoSConfig, MoSModel
    from weightshare.lora.tuner.swap import swap_adapter

__all__ = [
    "AdapterBank",
    "CapacityError",
    "MoSConfig",
    "MoSLinear",
    "MoSModel",
    "ResidentBytes",
    "ShardPlan",
    "ShardPool",
    "average_pool_gradients_",
    "export_lora",
    "pool_parameters",
    "swap_adapter",
]

# Imported when first asked for: the tuner needs PEFT, which is an extra.
_LAZY = {
    "AdapterBank": "bank",
    "CapacityError": "bank",
    "ResidentBytes": "bank",
    "MoSConfig": "tuner.register",
    "MoSModel": "tuner.register",
    "average_pool_gradients_": "tuner.parallel",
    "export_lora": "tuner.export",
    "pool_parameters": "tuner.parallel",
    "swap_adapter": "tuner.swap",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"{__name__}.{_LAZY[name]}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "peft":
            raise
        raise ImportError(
            f"weightshare.lora.{name} needs PEFT 0.21 or later: pip install "
            "'weightshare-kernels[peft]'; ShardPool, MoSLinear and AdapterBank work without"
        ) from error
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
