"""Modules that replace PyTorch's, layer for layer."""

from weightshare.nn.linear import EntangledLinear, Linear, SlicedLinear

__all__ = ["EntangledLinear", "Linear", "SlicedLinear"]
