"""Layers that run on a part of their weights; drop-in for those of ``torch.nn``."""

from weightshare.nn.linear import EntangledLinear, SlicedLinear

__all__ = ["EntangledLinear", "SlicedLinear"]
