"""The examples on text: their quick mode to the end, and what they claim about their parts."""

import importlib
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from weightshare.supernet import SearchSpace, Supernet, count_parameters

pytest.importorskip("matplotlib", reason="the examples draw pictures")
pytest.importorskip("rich", reason="the examples print tables")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def example(monkeypatch):
    """Import an example by name, as running its file would."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module
    for name in ("_text", "_search_report", "nano_gpt_search", "mixture_of_supernets"):
        sys.modules.pop(name, None)


def read(folder: Path, name: str) -> dict:
    """What the example wrote; the picture must be one."""
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / f"{name}.json").read_text())


def test_text_is_split_by_file(example):
    text = example("_text").load()
    total = sum(map(len, text))
    assert total > 1_000_000
    assert len(text.train) > 0.6 * total
    assert all(int(part.max()) < 128 for part in text)
    assert not torch.equal(text.search[:2000], text.valid[:2000])


def test_windows_are_stretches_of_the_text(example):
    line = torch.arange(1000)
    found = example("_text").windows(line, 50, 7, torch.Generator().manual_seed(0))
    assert found.shape == (50, 7)
    assert (found.diff(dim=1) == 1).all()
    assert found.min() >= 0 and len(found[:, 0].unique()) > 20


def test_nano_gpt_search_runs(example, tmp_path):
    nano = example("nano_gpt_search")
    nano.main(["--quick", "--out", str(tmp_path)])
    result = read(tmp_path, "nano_gpt_search")
    found, *others, largest = result["models"]
    assert [row["name"] for row in result["models"]] == ["found", "random 1", "largest"]
    space = nano.new_space()
    for row in result["models"]:
        space.arch(row["arch"])  # raises if it is outside
        assert len(row["loss"]) == 2 and all(0 < loss < 6 for loss in row["loss"])
    assert largest["arch"] == dict(space.largest())
    assert all(abs(row["parameters"] / found["parameters"] - 1) < 0.08 for row in others)
    assert all(sum(p) == pytest.approx(1, abs=1e-5) for p in result["alpha"].values())
    assert result["alpha"].keys() == space.dims.keys()


def one_hot(space, arch):
    return {
        name: torch.tensor([float(choice == arch[name]) for choice in dim.choices])
        for name, dim in space.dims.items()
    }


def test_nano_gpt_price_is_the_number_of_parameters(example):
    nano = example("nano_gpt_search")
    space = nano.new_space()
    supernet = Supernet(nano.GPT(*space.values()), space)
    for seed in range(8):
        arch = space.sample(random.Random(seed))
        space.mix(one_hot(space, arch))
        expected = nano.expected_parameters(space).item()
        space.mix(None)
        assert expected == count_parameters(supernet, arch)
    big, small = space.largest(), space.smallest()
    half = {n: (a + one_hot(space, small)[n]) / 2 for n, a in one_hot(space, big).items()}
    space.mix(half)
    assert count_parameters(supernet, small) < nano.expected_parameters(space)
    assert nano.expected_parameters(space) < count_parameters(supernet, big)


def test_nano_gpt_on_numbers_is_the_subnet(example):
    nano = example("nano_gpt_search")
    space = nano.new_space()
    supernet = Supernet(nano.GPT(*space.values()), space)
    tokens = torch.randint(nano.VOCABULARY, (2, 9))
    for seed in range(3):
        arch = space.sample(random.Random(seed))
        alone, subnet = nano.alone(arch), supernet.get_active_subnet(arch)
        alone.load_state_dict(subnet.state_dict())  # strict: the same keys and shapes
        supernet.set_active_subnet(arch)
        with torch.no_grad():
            torch.testing.assert_close(alone(tokens), supernet.model(tokens))


def test_nano_gpt_sees_no_later_byte(example):
    nano = example("nano_gpt_search")
    space = nano.new_space()
    model = nano.GPT(*space.values()).eval()
    tokens = torch.randint(nano.VOCABULARY, (1, 12))
    other = tokens.clone()
    other[:, 8:] = (tokens[:, 8:] + 1) % nano.VOCABULARY
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :8], model(other)[:, :8])
        assert not torch.allclose(model(tokens)[:, 8:], model(other)[:, 8:])


def test_mixture_of_supernets_runs(example, tmp_path):
    mixture = example("mixture_of_supernets")
    mixture.main(["--quick", "--out", str(tmp_path)])
    result = read(tmp_path, "mixture_of_supernets")
    assert result["losses"].keys() == {"alone", *mixture.METHODS}
    for rows in result["losses"].values():
        assert len(rows) == 2 and all(0 < loss < 6 for row in rows for loss in row)
    assert len(result["summary"]) == 3


def test_mixture_of_supernets_repeats(example):
    mixture = example("mixture_of_supernets")
    options = mixture.parse(["--quick", "--steps", "3"])
    text = mixture.load()
    runs = [mixture.train_supernet("neuron", 0, text, options) for _ in range(2)]
    assert runs[0] == runs[1]
    assert mixture.train_supernet("neuron", 1, text, options) != runs[0]


@pytest.mark.parametrize("level", [None, "layer", "neuron"])
def test_mixture_exports_what_trains_alone(example, level):
    """Experts are a price of the supernet only: its subnets are as large as without them."""
    mixture = example("mixture_of_supernets")
    space = SearchSpace(width=mixture.WIDTHS)
    supernet = Supernet(mixture.ByteNet(space["width"], space, level), space)
    x = torch.randint(mixture.VOCABULARY, (5, mixture.CONTEXT))
    for width in mixture.WIDTHS:
        supernet.set_active_subnet({"width": width})
        alone = mixture.ByteNet(width)
        alone.load_state_dict(supernet.get_active_subnet().state_dict())
        with torch.no_grad():
            torch.testing.assert_close(alone(x), supernet.model(x))


def test_gaps_and_their_errors(example):
    mixture = example("mixture_of_supernets")
    alone = [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]
    found = {"alone": alone}
    for number, name in enumerate(mixture.METHODS):
        found[name] = [[a + number for a in alone[0]], [a + number + 0.5 for a in alone[1]]]
    gap = mixture.gaps(found)
    assert gap["shared"] == [[0.0, 0.5]] * 5  # four widths and their mean
    assert gap["neuron-wise"] == [[2.0, 2.5]] * 5
    centre, error = mixture.mean_error(gap["shared"][0])
    assert centre == 0.25 and error == pytest.approx(0.25)
    assert math.isnan(mixture.mean_error([1.0])[1])


def test_no_verdict_without_evidence(example):
    mixture = example("mixture_of_supernets")
    alone = [[1.0] * 4] * 3
    noise = [[1.0 + n] * 4 for n in (0.1, 0.5, 0.3)]
    clear = [[1.0 + n - 0.05] * 4 for n in (0.1, 0.5, 0.3)]
    found = {"alone": alone, "shared": noise, "layer-wise": noise[::-1], "neuron-wise": clear}
    lines = mixture.summary(found)
    assert "no difference" in lines[1]
    assert "narrows it by 17%" in lines[2]
    assert "no difference" in mixture.summary({n: rows[:1] for n, rows in found.items()})[2]
