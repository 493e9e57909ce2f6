"""The ops: one folder and one import line each."""

from weightshare_kernels.ops.entangle import entangle
from weightshare_kernels.ops.entangled_linear import entangled_linear, entangled_linear_independent
from weightshare_kernels.ops.sliced_linear import sliced_linear

__all__ = ["entangle", "entangled_linear", "entangled_linear_independent", "sliced_linear"]
