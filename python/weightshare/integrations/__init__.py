"""Weightshare's kernels inside the models of other libraries."""
