"""Modules, search spaces and jobs for networks that share one set of weights."""

from weightshare_kernels import __version__

__all__ = ["__version__"]
