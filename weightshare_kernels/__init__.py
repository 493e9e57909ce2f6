"""Kernels for networks that share one set of weights among many models."""

from weightshare_kernels._collect import accumulate_in_place
from weightshare_kernels.ops import *  # noqa: F403
from weightshare_kernels.ops import __all__ as _ops

__version__ = "0.1.0"
__all__ = ["accumulate_in_place", *_ops]
