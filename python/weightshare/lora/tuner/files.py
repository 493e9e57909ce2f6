"""Adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors``, each whole.

The tensors are those of the pools, per projection type (the last part of a module's name):

* ``q_proj.a`` and ``q_proj.b``: shards ``[P, d_in / l]`` and ``[P, d_out / l]``;
* ``q_proj.a_index`` and ``q_proj.b_index``: int32 ``[layers, r, l]``, layers in the model's order.

The configuration is that of :class:`weightshare.lora.MoSConfig`: ``r``, ``equivalent_rank``,
``private_rank``, ``shards``, ``alpha``, ``dropout``, ``seed``, ``target_modules`` and, as the print
of the base model, ``layers`` with ``{type: [layers, d_in, d_out]}``.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(
    folder: str | os.PathLike, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write an adapter folder; a crash at any moment leaves each file old or new, never in parts.

    Both files are written beside the old ones, down to the disk, before either takes its place: new
    tensors can meet an old configuration only if the crash falls between two renamings.

    Args:
        folder: where to; made if need be.
        config: what JSON can hold.
        tensors: of any layout and device; tensors that share memory are written once each.

    Raises:
        TypeError: the configuration holds what JSON cannot.
        OSError: the files cannot be written.
    """
    text = _json(config)
    with _Replacements(folder) as files:
        files.add(WEIGHTS, lambda path: _write_tensors(path, tensors))
        files.add(CONFIG, lambda path: Path(path).write_text(text, encoding="utf-8"))


def write_config(folder: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Write the configuration alone, as :func:`save_adapter`."""
    text = _json(config)
    with _Replacements(folder) as files:
        files.add(CONFIG, lambda path: Path(path).write_text(text, encoding="utf-8"))


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file; a crash at any moment leaves the old one or the new one."""
    with _Replacements(Path(path).parent) as files:
        files.add(Path(path).name, lambda temporary: _write_tensors(temporary, tensors))


def load_adapter(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an adapter folder: its configuration and its tensors, on the CPU.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ImportError: safetensors is not installed.
        ValueError: a file is not what its name says.
    """
    SafetensorError, torch_files = _safetensors()
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no adapter folder: it has no {name}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG}: expected an object, got {type(config).__name__}")
    try:
        return config, torch_files.load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is not a safetensors file: {error}") from error


class _Replacements:
    """Files written under temporary names, which take their places together on a clean exit."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files: dict[str, str] = {}

    def __enter__(self) -> _Replacements:
        return self

    def add(self, name: str, write: Callable[[str], Any]) -> None:
        """Write a file under a temporary name, down to the disk."""
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=f".{name}.", suffix=".tmp")
        os.close(handle)
        self.files[name] = temporary
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # a temporary file is private; this one is not
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                for name in tuple(self.files):
                    os.replace(self.files[name], self.folder / name)
                    del self.files[name]
                _sync(self.folder)
        finally:
            for temporary in self.files.values():
                Path(temporary).unlink(missing_ok=True)


def _safetensors() -> tuple[type[Exception], Any]:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ImportError(
            "adapter folders need safetensors: pip install safetensors (it comes with PEFT and "
            "with transformers)"
        ) from error
    return safetensors.SafetensorError, safetensors.torch


def _json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _write_tensors(path: str, tensors: Mapping[str, Tensor]) -> None:
    _, torch_files = _safetensors()
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in whole.items():
        if tensor.numel() and tensor.untyped_storage().data_ptr() in seen:
            whole[name] = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
    torch_files.save_file(whole, path, metadata={"format": "pt"})


def _sync(folder: Path) -> None:
    """Make new names durable, where that is possible."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
