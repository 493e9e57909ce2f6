"""``torch.compile`` and sizes that change from step to step."""

from __future__ import annotations

import torch

# How traces name what a `Size`, or a layer with `set_active`, holds as its active part.
_PATTERN = r".*\._active\b.*"


def one_graph() -> None:
    """Let ``torch.compile`` take the active sizes of subnets as variables, in this process.

    PyTorch takes an int that a module holds as a constant and compiles anew when it changes.
    After this call ``torch.compile(block, dynamic=True)`` makes one graph for all widths of a
    block. What else modules hold (numbers of channels, head sizes) stays constant, so index
    arithmetic stays cheap, which ``torch.compiler.config.allow_unspec_int_on_nn_module`` would
    not leave it.

    A width of 0 or 1 has a graph of its own, and so has another number of layers: compile blocks,
    not the loop over them, where the depth varies.
    """
    config = torch.compiler.config
    patterns = [p for p in config.dynamic_sources.split(",") if p]
    if _PATTERN not in patterns:
        config.dynamic_sources = ",".join([*patterns, _PATTERN])
