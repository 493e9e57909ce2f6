"""The examples with images and language models, run briefly."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from peers import peer

pytest.importorskip("matplotlib", reason="the examples draw with matplotlib")
pytest.importorskip("rich", reason="the examples print with rich")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(name="example")
def _example(monkeypatch):
    """Import an example as its user's Python would, from its own folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def check_files(found, out, name):
    assert {p.name for p in out.iterdir()} == {f"{name}.json", f"{name}.png"}
    assert json.loads((out / f"{name}.json").read_text()) == json.loads(json.dumps(found))
    assert (out / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# ---- autoformer_digits


@pytest.fixture(name="digits")
def _digits(example):
    pytest.importorskip("sklearn", reason="the images come with scikit-learn")
    pytest.importorskip("optuna", reason="the search runs on Optuna")
    return example("autoformer_digits")


def vit_parameters(arch):
    """Parameters of a vision transformer of 8 x 8 patches, 16 tokens and 10 classes."""
    e = arch["embed"]
    count = (64 * e + e) + 16 * e + 2 * e + (10 * e + 10)
    for layer in range(arch["depth"]):
        inner, hidden = 16 * arch[f"heads.{layer}"], e * arch[f"ratio.{layer}"]
        count += 4 * e + (e + 1) * 3 * inner + (inner + 1) * e
        count += (e + 1) * hidden + (hidden + 1) * e
    return count


def test_autoformer_digits(digits, tmp_path):
    found = digits.main(["--quick", "--out", str(tmp_path)])
    check_files(found, tmp_path, "autoformer_digits")
    rows, trials = found["subnets"], found["trials"]
    names = [row["name"] for row in rows]
    assert [*names[:2], names[-1]] == ["smallest", "found 1", "largest"]
    for row in rows:
        assert row["parameters"] == vit_parameters(row["arch"])
    assert rows[-1]["test"] < 75  # guessing is wrong in 90 %; a few steps give about 50 %
    assert len(trials) == found["settings"]["trials"]
    front = [
        (size, error)
        for size, error in trials
        if not any(s <= size and e <= error and (s, e) != (size, error) for s, e in trials)
    ]
    assert sorted(set(front)) == sorted(found["front"])
    # What the search measured in the shared weights is what the exported subnets do.
    for row in rows[1:-1]:
        assert any(
            row["parameters"] == size and row["val"] == pytest.approx(error)
            for size, error in found["front"]
        )


def test_autoformer_digits_repeats(digits):
    first, second = (digits.run(2, 4, 3) for _ in range(2))
    for found in (first, second):
        del found["cpu_seconds"]
    assert first == second


def test_autoformer_digits_splits_are_disjoint(digits):
    splits = [{tuple(x.flatten().tolist()) for x in part.x} for part in digits.load()]
    assert [len(s) for s in splits] == [len(part.y) for part in digits.load()]
    assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]


# ---- matformer_llama


@pytest.fixture(name="llama")
def _llama(example):
    peer("transformers.models.llama")
    return example("matformer_llama")


def llama_parameters(ffn):
    """Parameters of a Llama of width 96 with these widths of its feed-forward blocks."""
    per_layer = (4 * 96 * 96 + 3 * 96 * width + 2 * 96 for width in ffn)
    return 128 * 96 + 96 + sum(per_layer)


def test_matformer_llama(llama, tmp_path):
    found = llama.main(["--quick", "--out", str(tmp_path)])
    check_files(found, tmp_path, "matformer_llama")
    rows = found["subnets"]
    assert [row["ffn"] for row in rows] == [48, 96, 192, 384, llama.MIXES[0]]
    for row in rows:
        ffn = [row["ffn"]] * 4 if isinstance(row["ffn"], int) else row["ffn"]
        assert row["parameters"] == llama_parameters(ffn)
        assert 0 < row["shared"] < 6 and 0 < row["alone"] < 6  # guessing costs 7 bits per byte
    for row in rows[:4]:
        assert row["export_difference"] < 1e-4


def test_matformer_llama_loss_is_bits_per_byte(llama):
    tokens = torch.randint(llama.VOCABULARY, (5, llama.CONTEXT + 1))
    model = llama.make_llama(48)
    torch.nn.init.zeros_(model.lm_head.weight)  # tied: every byte is equally likely
    assert llama.validate(model, tokens) == pytest.approx(math.log2(llama.VOCABULARY))


def test_matformer_llama_sampler(llama):
    space = llama.make_supernet(0).space
    joint, turns = (llama.Granularities(space, joint) for joint in (True, False))
    archs = [space.arch(ffn=ffn) for ffn in (384, 192, 96, 48)]
    assert [draw.arch for draw in joint.sample(7)] == archs
    assert [draw.arch for step in range(4) for draw in turns.sample(step)] == archs
