"""Sparse mixtures of experts: layers, load balancing, expert parallelism."""

from weightshare.moe.balance import (
    LoadBalancer,
    max_violation,
    sequence_balance_loss,
    update_balance_bias_,
)
from weightshare.moe.exchange import parallel_moe_mlp
from weightshare.moe.layer import Experts, MoE, MoEOutput, Router
from weightshare.moe.parallel import (
    ParallelExperts,
    average_gradients_,
    clip_gradients_,
    expert_parameters,
    parallelize_experts,
)

__all__ = [
    "Experts",
    "LoadBalancer",
    "MoE",
    "MoEOutput",
    "ParallelExperts",
    "Router",
    "average_gradients_",
    "clip_gradients_",
    "expert_parameters",
    "max_violation",
    "parallel_moe_mlp",
    "parallelize_experts",
    "sequence_balance_loss",
    "update_balance_bias_",
]
