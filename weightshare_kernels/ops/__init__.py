"""The ops: one folder and one import line each."""

from weightshare_kernels.ops.entangle import entangle
from weightshare_kernels.ops.entangled_linear import entangled_linear, entangled_linear_independent
from weightshare_kernels.ops.expert_mixture_linear import expert_mixture_linear
from weightshare_kernels.ops.grouped_sliced_linear import grouped_sliced_linear
from weightshare_kernels.ops.moe_mlp import moe_mlp
from weightshare_kernels.ops.route import Routing, route, routing_of
from weightshare_kernels.ops.shard_lora import (
    AdapterGroups,
    group_by_adapter,
    shard_index,
    shard_lora,
    shard_lora_group,
)
from weightshare_kernels.ops.sliced_linear import sliced_linear
from weightshare_kernels.ops.sliced_weight import sliced_weight

__all__ = [
    "AdapterGroups",
    "Routing",
    "entangle",
    "entangled_linear",
    "entangled_linear_independent",
    "expert_mixture_linear",
    "group_by_adapter",
    "grouped_sliced_linear",
    "moe_mlp",
    "route",
    "routing_of",
    "shard_index",
    "shard_lora",
    "shard_lora_group",
    "sliced_linear",
    "sliced_weight",
]
