"""Statistics of BatchNorm for a subnet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def recalibrate_bn(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any], object] | None = None,
) -> None:
    """Estimate the running statistics of every BatchNorm anew, for the subnet that is active.

    The activations of a subnet are not those of the subnets it was trained among, so averages
    over all of them fit none: evaluate each subnet after this. Statistics are the plain average
    over the batches, each counting the same. Modes and momenta are afterwards as before; in
    between BatchNorm trains and all else, dropout for one, evaluates.

    Args:
        model: a supernet's module or any other; without BatchNorm nothing is done.
        batches: what ``forward`` takes, 10 to 100 batches of training data.
        forward: runs one batch; ``model`` itself if not given.

    Raises:
        ValueError: there are no batches.

    Source: Universally Slimmable Networks (Yu & Huang, 2019, arXiv 1903.05134).
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    count = 0
    try:
        model.eval()
        for norm in norms:
            _forget(norm)
            norm.momentum = None  # a cumulative average
            norm.train()
        with torch.no_grad():
            for batch in batches:
                (forward or model)(batch)
                count += 1
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if not count:
        raise ValueError("batches: expected at least one; none were given")


def _forget(norm: _BatchNorm) -> None:
    """Let the first batch replace the statistics: those of the active channels, no others."""
    for buffer in (norm.num_batches_tracked, norm.running_mean, norm.running_var):
        assert buffer is not None
        if buffer.is_floating_point():
            buffer.nan_to_num_()  # what diverged would survive being weighted by zero
        else:
            buffer.zero_()
