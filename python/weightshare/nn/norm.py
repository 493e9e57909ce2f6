"""Normalisation layers whose number of channels follows a search space."""

from weightshare.nn.batch_norm import BatchNorm1d, BatchNorm2d, GroupNorm
from weightshare.nn.layer_norm import LayerNorm, RMSNorm

__all__ = ["BatchNorm1d", "BatchNorm2d", "GroupNorm", "LayerNorm", "RMSNorm"]
