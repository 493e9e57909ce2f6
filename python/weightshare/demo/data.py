"""Handwritten digits (8 x 8 pixels, 1797 images), from the files that scikit-learn ships."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

FEATURES, CLASSES = 64, 10


class Split(NamedTuple):
    """Images ``[n, 64]``, standardised by the training images' mean and deviation, and labels."""

    x: Tensor
    y: Tensor


class Digits(NamedTuple):
    """Three disjoint splits, each with the same share of every class."""

    train: Split
    val: Split
    test: Split


def load_digits() -> Digits:
    """Load and split the images: half to train, a fifth to validate, the rest to test.

    The split is the same in every run, whatever the seed.
    """
    from sklearn.datasets import load_digits as read
    from sklearn.model_selection import train_test_split

    pixels, labels = read(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32)
    y = torch.tensor(labels, dtype=torch.int64)
    every = range(len(y))
    train, rest = train_test_split(every, train_size=0.5, stratify=labels, random_state=0)
    val, test = train_test_split(rest, train_size=0.4, stratify=labels[rest], random_state=0)
    x = (x - x[train].mean()) / x[train].std()
    return Digits(*(Split(x[part], y[part]) for part in (train, val, test)))


def batch(split: Split, number: int, size: int, seed: int) -> Split:
    """Minibatch ``number`` of an endless shuffled stream, the same whoever asks for it."""
    per_epoch = max(len(split.y) // size, 1)
    order = _order(len(split.y), seed, number // per_epoch)
    start = number % per_epoch * size
    chosen = order[start : start + size]
    return Split(split.x[chosen], split.y[chosen])


@lru_cache(maxsize=8)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)
