"""The main job end to end: results, interruption, damaged checkpoints, export without us."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the demo's data come with scikit-learn")
pytest.importorskip("matplotlib", reason="the demo draws with matplotlib")
console = pytest.importorskip("rich.console", reason="the demo prints with rich")

from weightshare.demo import CheckpointError, Interrupted, Settings, checkpoint, run  # noqa: E402
from weightshare.demo.data import batch, load_digits  # noqa: E402
from weightshare.demo.model import Subnet, Supernet  # noqa: E402
from weightshare.demo.train import accuracy, new_supernet, sandwich_loss  # noqa: E402

SMALL = Settings(steps=6, search_steps=12, widths=(8, 12, 16), depths=(1, 3), rounds=1)
TIMES = {"seconds", "step", "sliced_us", "exported_us"}


def quiet():
    return console.Console(file=open(os.devnull, "w"), force_terminal=False)


def go(out, settings=SMALL, **options):
    return run(settings, out, console=quiet(), **options)


def timeless(found):
    """Results without what is measured by the clock."""
    if isinstance(found, dict):
        return {k: timeless(v) for k, v in found.items() if k not in TIMES}
    return [timeless(v) for v in found] if isinstance(found, list) else found


@pytest.fixture(scope="module", name="whole")
def _whole(tmp_path_factory):
    """Folder and results of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    return out, go(out)


def test_results_are_complete(whole):
    out, found = whole
    names = {"demo.json", "demo.png", "subnet.pt", "subnet.py"}
    assert {p.name for p in out.iterdir()} == names  # and no checkpoint, no temporary file
    assert json.loads((out / "demo.json").read_text()) == json.loads(json.dumps(found))
    assert (out / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(found["subnets"]) == 6
    for row in found["subnets"]:
        assert row["sliced_us"] > 0 and row["exported_us"] > 0
        assert 0 < row["shared_test"] <= 1 and 0 < row["alone_test"] <= 1
    widths, depths = zip(*found["search"]["history"], strict=True)
    for alpha in (*widths, *depths):
        assert sum(alpha) == pytest.approx(1, abs=1e-5)
    assert found["step"]["ratio"] == pytest.approx(
        found["step"]["eager_us"] / found["step"]["ours_us"]
    )


def test_learns():
    """The default space after a short training is far above chance, and wider is better."""
    settings = Settings(steps=40)
    model, digits = new_supernet(settings), load_digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    before = accuracy(model, digits.val)
    for number in range(settings.steps):
        loss = sandwich_loss(
            model, [model.largest, model.smallest], *batch(digits.train, number, 64, 0)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    largest = accuracy(model.set_active(model.largest), digits.test)
    smallest = accuracy(model.set_active(model.smallest), digits.test)
    assert before < 0.3 and smallest > 0.5 and largest > 0.9


# Six subnets of six steps: the phases end after 6, 42 and 54 steps.
@pytest.mark.parametrize("steps", [1, 6, 20, 47, 54], ids=lambda n: f"after_{n}")
def test_resumes_bit_for_bit(whole, tmp_path, steps):
    left = [steps]

    def stop():
        left[0] -= 1
        return left[0] == 0

    with pytest.raises(Interrupted, match="stopped at step"):
        go(tmp_path, stop=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert timeless(go(tmp_path, stop=lambda: False)) == timeless(whole[1])
    assert equal_files(tmp_path / "subnet.pt", whole[0] / "subnet.pt")


def equal_files(one, other):
    one, other = (torch.load(p, weights_only=True) for p in (one, other))
    assert one["config"] == other["config"]
    return all(torch.equal(one["state"][k], other["state"][k]) for k in other["state"])


def command(out, *options):
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")])
    arguments = [sys.executable, "-m", "weightshare", "demo", "--out", str(out), *options]
    return subprocess.Popen(
        arguments,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
def test_ctrl_c_leaves_a_checkpoint(tmp_path):
    settings = Settings(steps=400, search_steps=400)  # takes longer than the signal
    process = command(tmp_path, "--steps", "400")
    path = tmp_path / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists(), process.communicate()[0]
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "The same command again goes on from there" in output
    state = checkpoint.load_run(path, settings.as_dict())
    assert state["phase"] == "shared" and 0 < state["progress"]["position"] < 400
    # It goes on from that very step.
    with pytest.raises(Interrupted, match=f"step {state['progress']['position'] + 1} of 400"):
        go(tmp_path, settings, stop=lambda: True)


def interrupted(out, settings=SMALL):
    with pytest.raises(Interrupted):
        go(out, settings, stop=lambda: True)
    return out / "checkpoint.pt"


def test_damaged_checkpoint_is_refused(tmp_path):
    path = interrupted(tmp_path)
    whole = path.read_bytes()
    for damaged in (b"", b"no checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"it is damaged .*--fresh"):
            go(tmp_path)
        assert path.read_bytes() == damaged  # never replaced unasked
    go(tmp_path, resume=False)
    assert not path.exists()


def test_foreign_checkpoint_is_refused(tmp_path):
    path = interrupted(tmp_path)
    state = torch.load(path, weights_only=True)
    for changed, message in (
        ({"weight": torch.ones(2)}, "is not a checkpoint of this demo"),
        (torch.ones(2), "is not a checkpoint of this demo"),
        (state | {"version": 99}, "has version 99, this demo reads 1"),
        ({k: v for k, v in state.items() if k != "results"}, "lacks results"),
        (state | {"progress": {}}, "does not fit this demo"),
    ):
        torch.save(changed, path)
        with pytest.raises(CheckpointError, match=message):
            go(tmp_path)


def test_other_settings_and_missing_checkpoint_are_refused(tmp_path):
    interrupted(tmp_path)
    with pytest.raises(CheckpointError, match="other settings: seed 0 instead of 7"):
        go(tmp_path, Settings(**{**SMALL.__dict__, "seed": 7}))
    with pytest.raises(CheckpointError, match="nothing to resume"):
        go(tmp_path / "elsewhere", resume=True)


def test_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = interrupted(tmp_path)
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"new": 1})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_exported_file_needs_only_torch(whole, tmp_path):
    """Loaded in a process that cannot import us, it computes what the results say."""
    out, found = whole
    test = load_digits().test
    torch.save({"x": test.x, "y": test.y}, tmp_path / "test.pt")
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("weightshare", "weightshare_kernels"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
try:
    import weightshare
except ImportError:
    pass
else:
    sys.exit("weightshare can be imported")
import torch
torch.set_num_threads(1)
sys.path.insert(0, {str(out)!r})
import subnet
test = torch.load({str(tmp_path / "test.pt")!r}, weights_only=True)
net = subnet.load({str(out / "subnet.pt")!r})
print((net(test["x"]).argmax(-1) == test["y"]).float().mean().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == found["search"]["test"]


@pytest.fixture(name="model")
def _model():
    torch.manual_seed(0)
    model = Supernet(6, 4, (4, 8, 12), (1, 2, 3))
    for parameter in model.parameters():  # norms, too, must matter
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_subnet_export_and_one_hot_mixture_agree(model):
    x = torch.randn(5, 6)
    counts = model.parameter_counts()
    for subnet in model.subnets:
        sliced = model.set_active(subnet)(x)
        network = model.export(subnet)
        torch.testing.assert_close(network(x), sliced)
        one_hot = [
            torch.tensor([float(size == chosen) for size in sizes])
            for sizes, chosen in zip((model.widths, model.depths), subnet, strict=True)
        ]
        torch.testing.assert_close(model.mix(x, *one_hot), sliced)
        assert sum(p.numel() for p in network.parameters()) == one_hot[0] @ counts @ one_hot[1]
        assert not any("weightshare" in type(m).__module__ for m in network.children())


def test_distillation_teaches_only_the_others(model):
    """The largest subnet's prediction is a target: no gradient flows through it."""
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
    small = Subnet(4, 1)
    loss = sandwich_loss(model, [model.largest, small], x, y)
    last = model.layers[2].weight  # only the largest of the two uses it
    got = torch.autograd.grad(loss, last)[0]
    model.set_active(model.largest)
    alone = torch.nn.functional.cross_entropy(model(x), y)
    torch.testing.assert_close(got, torch.autograd.grad(alone, last)[0])


def test_batches_do_not_depend_on_the_order_of_asking():
    train = load_digits().train
    later = batch(train, 40, 64, 3)
    for number in range(41):
        again = batch(train, number, 64, 3)
    assert torch.equal(later.x, again.x) and torch.equal(later.y, again.y)
    assert not torch.equal(later.y, batch(train, 40, 64, 4).y)
