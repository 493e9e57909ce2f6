"""Sparse mixtures of experts: layers, load balancing, expert parallelism."""

from weightshare.moe.balance import (
    LoadBalancer,
    max_violation,
    sequence_balance_loss,
    update_balance_bias_,
)
from weightshare.moe.layer import Experts, MoE, MoEOutput, Router

__all__ = [
    "Experts",
    "LoadBalancer",
    "MoE",
    "MoEOutput",
    "Router",
    "max_violation",
    "sequence_balance_loss",
    "update_balance_bias_",
]
