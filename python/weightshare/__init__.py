"""Modules, search spaces and jobs for networks that share one set of weights."""

from weightshare.compiling import one_graph
from weightshare.convert import convert
from weightshare.export import export
from weightshare.rules import Rule
from weightshare.space import ArchConfig, PerLayer, SearchSpace
from weightshare_kernels import __version__

__all__ = [
    "ArchConfig",
    "PerLayer",
    "Rule",
    "SearchSpace",
    "__version__",
    "convert",
    "export",
    "one_graph",
]
