"""The supernet handle: what is active, plain subnets, checkpoints, costs."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from weightshare.nn import Linear
from weightshare.nn.embedding import Embedding, TiedHead
from weightshare.space import SearchSpace
from weightshare.supernet import (
    SandwichSampler,
    Supernet,
    UniformSampler,
    count_flops,
    count_parameters,
    latency,
)


class Net(nn.Module):
    """Two elastic layers of a hidden axis each, and a plain norm before them."""

    def __init__(self, space, dtype=torch.float32):
        super().__init__()
        width, ratio = space["width"], space["ratio"]
        self.norm = nn.BatchNorm1d(6, dtype=dtype)
        self.fc1 = Linear(6, width, dtype=dtype)
        self.fc2 = Linear(width, width * ratio, dtype=dtype)
        self.fc3 = Linear(width * ratio, 3, dtype=dtype)

    def forward(self, x):
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(self.norm(x))))))


def make(seed=0, **choices):
    torch.manual_seed(seed)
    space = SearchSpace(**({"width": [8, 12, 16], "ratio": [1.5, 2]} | choices))
    return Supernet(Net(space), space)


@pytest.fixture
def supernet():
    return make()


@pytest.fixture
def x():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


class TestActive:
    def test_the_active_subnet_runs(self, supernet, x):
        arch = supernet.set_active_subnet({"width": 8})
        assert dict(arch) == {"width": 8, "ratio": 2}
        net = supernet.model
        h = F.gelu(F.linear(net.norm(x), net.fc1.weight[:8], net.fc1.bias[:8]))
        h = F.gelu(F.linear(h, net.fc2.weight[:16, :8], net.fc2.bias[:16]))
        torch.testing.assert_close(net(x), F.linear(h, net.fc3.weight[:, :16], net.fc3.bias))

    def test_outside_the_space_is_refused(self, supernet):
        with pytest.raises(ValueError, match=r"width: 10 is none of the choices \[8, 12, 16\]"):
            supernet.set_active_subnet({"width": 10})

    def test_sampling(self, supernet):
        drawn = [supernet.sample_active_subnet(random.Random(3)) for _ in range(2)]
        assert drawn[0] == drawn[1] == supernet.space.active
        assert supernet.sample_active_subnet() in all_archs(supernet)
        sampler = UniformSampler(supernet.space, seed=4)
        for step in range(5):
            arch = supernet.sample_active_subnet(sampler, step)
            assert arch == sampler.sample(step)[0].arch == supernet.space.active
        assert supernet.sample_active_subnet(SandwichSampler(supernet.space)) == (
            supernet.space.largest()
        )


def all_archs(supernet):
    space = supernet.space
    return [space.arch(width=w, ratio=r) for w in (8, 12, 16) for r in (1.5, 2)]


class TestSubnets:
    def test_every_subnet_stands_alone(self, supernet, x):
        whole = sum(p.untyped_storage().nbytes() for p in supernet.model.parameters())
        theirs = {p.untyped_storage().data_ptr() for p in supernet.model.parameters()}
        supernet.model.eval()
        for arch in all_archs(supernet):
            subnet = supernet.get_active_subnet(arch)
            supernet.set_active_subnet(arch)
            torch.testing.assert_close(subnet(x), supernet.model(x))
            assert not [m for m in subnet.modules() if isinstance(m, Linear)]
            stored = {p.untyped_storage().data_ptr() for p in subnet.parameters()}
            assert not stored & theirs
            size = sum(p.untyped_storage().nbytes() for p in subnet.parameters())
            assert size == 4 * sum(p.numel() for p in subnet.parameters()) <= whole

    def test_the_active_one_stays_active(self, supernet):
        active = supernet.set_active_subnet({"width": 12})
        supernet.get_active_subnet({"width": 8})
        assert supernet.space.active == active
        with pytest.raises(ValueError, match="width"):
            supernet.get_active_subnet({"width": 9})
        assert supernet.space.active == active

    def test_while_mixed_it_is_the_chosen_one(self, supernet, x):
        supernet.set_active_subnet({"width": 8})
        alpha = torch.tensor([0.2, 0.3, 0.5])
        supernet.space.mix({"width": alpha})
        assert supernet.get_active_subnet().fc1.out_features == 8
        assert supernet.space["width"].alpha is alpha

    def test_wrappers_are_seen_through(self, supernet, x):
        wrapped = Supernet(torch.compile(supernet.model, backend="eager"), supernet.space)
        assert wrapped.module is supernet.model
        assert set(wrapped.get_active_subnet().state_dict()) == set(supernet.model.state_dict())

    def test_deepcopy_is_apart(self, supernet, x):
        twin = copy.deepcopy(supernet)
        twin.set_active_subnet({"width": 8})
        assert supernet.space["width"].value == 16
        assert twin.model.fc1(x).shape == (5, 8)
        assert supernet.model.fc1(x).shape == (5, 16)


class TestCheckpoints:
    def test_round_trip(self, supernet, x, tmp_path):
        path = tmp_path / "new" / "supernet.pt"
        arch = supernet.set_active_subnet({"width": 12, "ratio": 1.5})
        supernet.save(path)
        other = make(seed=1)
        other.load(path)
        assert other.space.active == arch
        torch.testing.assert_close(other.model.eval()(x), supernet.model.eval()(x))
        assert [p.name for p in path.parent.iterdir()] == ["supernet.pt"]

    @pytest.mark.parametrize(
        "other, message",
        [
            (dict(width=[8, 16]), r"width is .*\[8, 12, 16\].* there and .*\[8, 16\].* here"),
            (dict(depth=[1, 2]), r"depth is None there and .*\[1, 2\].* here"),
        ],
    )
    def test_another_space_is_refused(self, supernet, tmp_path, other, message):
        supernet.save(tmp_path / "s.pt")
        assert_refused(make(seed=1, **other), tmp_path / "s.pt", message)

    def test_another_model_is_refused(self, supernet, tmp_path):
        supernet.save(tmp_path / "s.pt")
        other = make(seed=1)
        other.model.fc1 = Linear(6, other.space["width"], bias=False)
        assert_refused(other, tmp_path / "s.pt", r"the model has no fc1\.bias")
        other = make(seed=1)
        other.model.extra = nn.Linear(2, 2)
        assert_refused(other, tmp_path / "s.pt", r"the checkpoint has no extra\.weight")
        other = make(seed=1)
        other.model.fc1 = Linear(7, other.space["width"])
        assert_refused(other, tmp_path / "s.pt", r"fc1\.weight is \(16, 6\) there and \(16, 7\)")

    def test_something_else_is_refused(self, supernet, tmp_path):
        torch.save({"weight": torch.ones(2)}, tmp_path / "s.pt")
        assert_refused(supernet, tmp_path / "s.pt", "no checkpoint of a supernet")
        supernet.save(tmp_path / "s.pt")
        (tmp_path / "s.pt").write_bytes((tmp_path / "s.pt").read_bytes()[:500])
        assert_refused(supernet, tmp_path / "s.pt", r"s\.pt cannot be read, it is damaged")
        with pytest.raises(FileNotFoundError):
            supernet.load(tmp_path / "none.pt")

    def test_a_failed_write_leaves_the_old_file(self, supernet, tmp_path, monkeypatch):
        path = tmp_path / "s.pt"
        supernet.save(path)
        before = path.read_bytes()

        def full(state, file):
            file.write(b"half")
            raise OSError("no space left")

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="no space"):
            supernet.save(path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["s.pt"]


def assert_refused(supernet, path, message):
    before = {name: value.clone() for name, value in supernet.model.state_dict().items()}
    active = supernet.space.active
    with pytest.raises(ValueError, match=message):
        supernet.load(path)
    assert supernet.space.active == active
    for name, value in supernet.model.state_dict().items():
        assert torch.equal(value, before[name]), name


class TestCosts:
    def test_parameters(self, supernet):
        for arch in all_archs(supernet):
            subnet = supernet.get_active_subnet(arch)
            wanted = sum(p.numel() for p in subnet.parameters())
            assert count_parameters(supernet, arch) == wanted
        assert count_parameters(supernet) == sum(p.numel() for p in supernet.model.parameters())

    def test_tied_parameters_count_once(self):
        space = SearchSpace(embed=[4, 8])
        tokens = Embedding(10, space["embed"])
        model = nn.Sequential(tokens, Linear(space["embed"], space["embed"]), TiedHead(tokens))
        supernet = Supernet(model, space)
        assert count_parameters(supernet, {"embed": 4}) == 10 * 4 + 4 * 4 + 4
        subnet = supernet.get_active_subnet({"embed": 4})
        assert sum(p.numel() for p in subnet.parameters()) == 10 * 4 + 4 * 4 + 4

    def test_counting_leaves_no_trace(self, supernet, x):
        supernet.model.eval()
        before = supernet.model(x)
        count_parameters(supernet, {"width": 8})
        count_flops(supernet, [x], {"width": 8})
        assert torch.equal(supernet.model(x), before)

    def test_flops(self, supernet, x):
        arch = {"width": 8, "ratio": 2}
        assert count_flops(supernet, [x], arch) == 2 * 5 * (6 * 8 + 8 * 16 + 16 * 3)
        assert count_flops(supernet, [x]) == 2 * 5 * (6 * 16 + 16 * 32 + 32 * 3)

    def test_latency(self, supernet, x):
        supernet.set_active_subnet({"width": 12})
        calls = []
        supernet.model.norm.register_forward_hook(lambda *a: calls.append(a[2].shape))
        seconds = latency(supernet, [x], {"width": 8}, repeats=3, warmup=2)
        assert 0 < seconds < 5
        assert len(calls) == 5
        assert supernet.space["width"].value == 12
        with pytest.raises(ValueError, match="repeats"):
            latency(supernet, [x], repeats=0)
