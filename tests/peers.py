"""Imports of libraries we are tested against; a test is skipped where one is missing."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

# Where `make test` puts them; only tests that ask for one see them.
sys.path.append(str(Path(sys.prefix) / "peers"))

# torchvision's plain wheel is a CUDA build, whose compiled ops do not load beside a CPU torch.
# Its Python code then fails at import, where it describes ops that nobody defined. Nothing here
# runs one of them; a schema is all that is missing.
_OPS = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library = torch.library.Library("torchvision", "FRAGMENT")


def peer(module):
    """The peer's module, or a skip that says what is missing."""
    try:
        return _import(module)
    except ImportError as error:
        pytest.skip(f"{module.split('.')[0]} cannot be imported: {error}", allow_module_level=True)


def _import(module):
    _torchvision()  # most peers import it, if it is there
    return importlib.import_module(module)


def _torchvision():
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError:
        for name, schema in _OPS.items():
            _library.define(name.split("::")[1] + schema)
        importlib.import_module("torchvision")
