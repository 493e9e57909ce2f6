"""Supernets: search spaces, training, architecture optimizers, search, and subnets."""

from weightshare.sizes import Dim
from weightshare.space import ArchConfig, PerLayer, SearchSpace
from weightshare.supernet.architect import (
    DARTS,
    GDAS,
    SPOS,
    ArchOptimizer,
    DrNAS,
    constant,
    cosine,
    linear,
)
from weightshare.supernet.bilevel import Bilevel, arch_gradient
from weightshare.supernet.calibration import recalibrate_bn
from weightshare.supernet.counters import count_flops, count_parameters, latency
from weightshare.supernet.importance import sort_by_importance
from weightshare.supernet.pareto import pareto_front, pareto_plot
from weightshare.supernet.samplers import (
    ArchSampler,
    Draw,
    FairSampler,
    SandwichSampler,
    UniformSampler,
    shrink,
)
from weightshare.supernet.search import SearchResult, Trial, search
from weightshare.supernet.supernet import Supernet
from weightshare.supernet.training import kl_divergence, sandwich_step

__all__ = [
    "DARTS",
    "GDAS",
    "SPOS",
    "ArchConfig",
    "ArchOptimizer",
    "ArchSampler",
    "Bilevel",
    "Dim",
    "DrNAS",
    "Draw",
    "FairSampler",
    "PerLayer",
    "SandwichSampler",
    "SearchResult",
    "SearchSpace",
    "Supernet",
    "Trial",
    "UniformSampler",
    "arch_gradient",
    "constant",
    "cosine",
    "count_flops",
    "count_parameters",
    "kl_divergence",
    "latency",
    "linear",
    "pareto_front",
    "pareto_plot",
    "recalibrate_bn",
    "sandwich_step",
    "search",
    "shrink",
    "sort_by_importance",
]
