"""Adapter folders: what is written is what is read, and a failed write changes nothing."""

import os
import stat

import pytest
import safetensors.torch
import torch
from weightshare.lora.tuner import files

CONFIG = {"peft_type": "MOS", "r": 4, "layers": {"q_proj": [2, 8, 8]}}


def tensors(value=1.0):
    shards = torch.full((6, 4), value)
    return {
        "q_proj.a": shards,
        "q_proj.b": shards.t().contiguous().t(),  # not contiguous, and not the same memory
        "q_proj.a_index": torch.arange(8, dtype=torch.int32).view(1, 4, 2),
        "q_proj.b_index": torch.arange(8, dtype=torch.int32).view(1, 4, 2),
    }


def test_round_trip(tmp_path):
    folder = tmp_path / "new" / "adapter"
    wanted = tensors()
    wanted["again"] = wanted["q_proj.a"]  # shares memory
    files.save_adapter(folder, CONFIG, wanted)
    config, found = files.load_adapter(folder)
    assert config == CONFIG and found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert sorted(p.name for p in folder.iterdir()) == [files.CONFIG, files.WEIGHTS]
    umask = os.umask(0)
    os.umask(umask)
    for name in (files.CONFIG, files.WEIGHTS):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("moment", ["half a file", "config", "fsync"])
def test_interrupted_save_leaves_the_old_files(tmp_path, monkeypatch, moment):
    files.save_adapter(tmp_path, CONFIG, tensors(1.0))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def half(whole, path, metadata=None):
        with open(path, "wb") as file:
            file.write(b"half of")
        raise OSError("disk full")

    def fail(*_):
        raise OSError("disk full")

    changed = {**CONFIG, "r": 8}
    if moment == "half a file":
        monkeypatch.setattr(safetensors.torch, "save_file", half)
    elif moment == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        changed["bad"] = object()
    with pytest.raises((OSError, TypeError)):
        files.save_adapter(tmp_path, changed, tensors(2.0))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"it has no {files.CONFIG}"):
        files.load_adapter(tmp_path)
    (tmp_path / files.CONFIG).write_text("{")
    with pytest.raises(FileNotFoundError, match=f"it has no {files.WEIGHTS}"):
        files.load_adapter(tmp_path)
    (tmp_path / files.WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not JSON"):
        files.load_adapter(tmp_path)
    (tmp_path / files.CONFIG).write_text("[]")
    with pytest.raises(ValueError, match="expected an object, got list"):
        files.load_adapter(tmp_path)
    (tmp_path / files.CONFIG).write_text("{}")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        files.load_adapter(tmp_path)
