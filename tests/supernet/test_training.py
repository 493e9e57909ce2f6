"""The sandwich step, and calibration of BatchNorm."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from weightshare.nn import Linear
from weightshare.nn.norm import BatchNorm2d
from weightshare.space import SearchSpace
from weightshare.supernet import (
    SandwichSampler,
    Supernet,
    UniformSampler,
    kl_divergence,
    recalibrate_bn,
    sandwich_step,
)


def make():
    torch.manual_seed(0)
    space = SearchSpace(width=[4, 6, 8], hidden=[5, 9])
    width, hidden = space["width"], space["hidden"]
    model = nn.Sequential(
        Linear(6, width), nn.Tanh(), Linear(width, hidden), nn.Tanh(), Linear(hidden, 3)
    )
    return Supernet(model.double(), space)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(10, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (10,), generator=generator)


def plain(model, x, arch):
    """The subnet by eager slicing, which autograd pads and sums by itself."""
    first, second, third = model[0], model[2], model[4]
    w, h = arch["width"], arch["hidden"]
    x = torch.tanh(F.linear(x, first.weight[:w], first.bias[:w]))
    x = torch.tanh(F.linear(x, second.weight[:h, :w], second.bias[:h]))
    return F.linear(x, third.weight[:, :h], third.bias)


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value)


def by_hand(supernet, sampler, x, y, *, distill=None, teacher=None):
    """The losses of a step, from their definition."""
    first, *others = [plain(supernet.model, x, draw.arch) for draw in sampler.sample(5)]
    losses = [F.cross_entropy(first, y)]
    if teacher is not None:
        losses[0] = losses[0] + distill(first, teacher)
    target = first.detach() if teacher is None else teacher
    for out in others:
        losses.append(F.cross_entropy(out, y) if distill is None else distill(out, target))
    return losses


def soft_targets(student, teacher):
    """What distillation with temperature 1 descends, up to a constant."""
    return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")


class TestSandwichStep:
    @pytest.mark.parametrize("mode", ["default", "hard", "teacher"])
    def test_gradients_are_those_of_the_definition(self, data, mode):
        supernet, (x, y) = make(), data
        sampler = SandwichSampler(supernet.space, random=3, seed=2)
        teacher = torch.randn(10, 3, dtype=torch.float64) if mode == "teacher" else None
        distill = None if mode == "hard" else soft_targets
        wanted = by_hand(supernet, sampler, x, y, distill=distill, teacher=teacher)
        sum(wanted).backward()
        wanted_grads = gradients(supernet.model)
        active = supernet.set_active_subnet({"width": 6})
        losses = sandwich_step(
            supernet, sampler, 5, lambda: supernet.model(x), lambda out: F.cross_entropy(out, y),
            teacher=teacher, **({"distill": None} if mode == "hard" else {}),
        )  # fmt: skip
        torch.testing.assert_close(losses, [loss.detach() for loss in wanted])
        same(gradients(supernet.model), wanted_grads)
        assert supernet.space.active == active

    def test_gradients_add_to_what_is_there(self, data):
        supernet, (x, y) = make(), data
        sampler = SandwichSampler(supernet.space)
        step = functools.partial(
            sandwich_step, supernet, sampler, 0, lambda: supernet.model(x),
            lambda out: F.cross_entropy(out, y),
        )  # fmt: skip
        step()
        once = gradients(supernet.model)
        step()
        step()
        same(gradients(supernet.model), {name: 2 * grad for name, grad in once.items()})

    def test_a_single_path_is_an_ordinary_step(self, data):
        supernet, (x, y) = make(), data
        sampler = UniformSampler(supernet.space, seed=1)
        forward = lambda: supernet.model(x)  # noqa: E731
        (loss,) = sandwich_step(supernet, sampler, 3, forward, lambda out: F.cross_entropy(out, y))
        got = gradients(supernet.model)
        wanted = F.cross_entropy(plain(supernet.model, x, sampler.sample(3)[0].arch), y)
        wanted.backward()
        torch.testing.assert_close(loss, wanted.detach())
        same(got, gradients(supernet.model))

    def test_backward_can_be_a_scalers(self, data):
        supernet, (x, y) = make(), data
        sampler = SandwichSampler(supernet.space)
        run = functools.partial(
            sandwich_step, supernet, sampler, 0, lambda: supernet.model(x),
            lambda out: F.cross_entropy(out, y),
        )  # fmt: skip
        run()
        once = gradients(supernet.model)
        run(backward=lambda loss: (8 * loss).backward())
        same(gradients(supernet.model), {name: 8 * grad for name, grad in once.items()})

    def test_a_teacher_without_distillation_is_refused(self, data):
        supernet = make()
        with pytest.raises(ValueError, match="teacher: is not used without distill"):
            sandwich_step(
                supernet, SandwichSampler(supernet.space), 0, broken, broken,
                distill=None, teacher=data[0],
            )  # fmt: skip

    def test_what_was_active_is_so_after_an_error(self, data):
        supernet = make()
        active = supernet.set_active_subnet({"width": 6})
        with pytest.raises(RuntimeError, match="batch"):
            sandwich_step(supernet, SandwichSampler(supernet.space), 0, broken, F.cross_entropy)
        assert supernet.space.active == active

    def test_it_trains(self, data):
        supernet, (x, y) = make(), data
        sampler = SandwichSampler(supernet.space)
        optimizer = torch.optim.Adam(supernet.model.parameters(), 0.03)
        for step in range(60):
            optimizer.zero_grad()
            sandwich_step(
                supernet, sampler, step, lambda: supernet.model(x),
                lambda out: F.cross_entropy(out, y),
            )  # fmt: skip
            optimizer.step()
        for arch in (supernet.space.largest(), supernet.space.smallest()):
            supernet.set_active_subnet(arch)
            assert F.cross_entropy(supernet.model(x), y) < 0.35


def broken():
    raise RuntimeError("no batch")


class TestDistillation:
    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    def test_kl_divergence(self, temperature):
        student, teacher = torch.randn(2, 3, 4, 7, dtype=torch.float64)
        p, q = (t.div(temperature).softmax(-1) for t in (teacher, student))
        wanted = (p * (p.log() - q.log())).sum(-1).mean() * temperature**2
        torch.testing.assert_close(kl_divergence(student, teacher, temperature), wanted)

    def test_the_teacher_gets_no_gradient(self):
        student, teacher = torch.randn(2, 5, 3).unbind()
        student.requires_grad_(), teacher.requires_grad_()
        kl_divergence(student, teacher).backward()
        assert student.grad is not None and teacher.grad is None


class TestCalibration:
    def model(self, size=8):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 1), BatchNorm2d(size), nn.Dropout(0.5), nn.BatchNorm2d(8, momentum=0.2)
        )

    def batches(self):
        return list(torch.randn(4, 6, 3, 5, 5, generator=torch.Generator().manual_seed(2)) * 2 + 1)

    def test_statistics_are_averages_over_the_batches(self):
        model, batches = self.model(), self.batches()
        model[1].running_mean.fill_(float("nan"))  # an earlier run diverged
        recalibrate_bn(model, batches)
        with torch.no_grad():
            hidden = [model[0](b) for b in batches]
            mean = torch.stack([h.mean((0, 2, 3)) for h in hidden]).mean(0)
            var = torch.stack([h.var((0, 2, 3)) for h in hidden]).mean(0)
            torch.testing.assert_close(model[1].running_mean, mean)
            torch.testing.assert_close(model[1].running_var, var)
            # Dropout was off on the way to the second one.
            hidden = [F.batch_norm(h, None, None, training=True) for h in hidden]
            mean = torch.stack([h.mean((0, 2, 3)) for h in hidden]).mean(0)
            torch.testing.assert_close(model[3].running_mean, mean, atol=1e-6, rtol=0)

    def test_modes_momenta_and_weights_stay(self):
        model = self.model()
        model.train()
        model[3].eval()
        before = {n: p.clone() for n, p in model.named_parameters()}
        recalibrate_bn(model, self.batches())
        assert [m.training for m in model] == [True, True, True, False]
        assert (model[1].momentum, model[3].momentum) == (0.1, 0.2)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert all(p.grad is None for p in model.parameters())

    def test_only_the_active_channels_change(self):
        space = SearchSpace(width=[4, 8])
        width = space["width"]
        bn = BatchNorm2d(width)
        bn.running_mean.fill_(7.0)
        space.activate(space.smallest())
        batches = [torch.randn(5, 4, 2, 2) for _ in range(3)]
        recalibrate_bn(bn, batches)
        wanted = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
        torch.testing.assert_close(bn.running_mean[:4], wanted)
        assert (bn.running_mean[4:] == 7).all()

    def test_other_forms_of_batches(self):
        model = self.model()
        pairs = [(batch, 0) for batch in self.batches()]
        recalibrate_bn(model, iter(pairs), forward=lambda pair: model(pair[0]))
        other = self.model()
        recalibrate_bn(other, self.batches())
        torch.testing.assert_close(model.state_dict(), other.state_dict())

    def test_nothing_to_do_and_nothing_to_do_it_with(self):
        recalibrate_bn(nn.Linear(2, 2), [])
        recalibrate_bn(nn.BatchNorm2d(3, track_running_stats=False), [])
        with pytest.raises(ValueError, match="batches: expected at least one"):
            recalibrate_bn(self.model(), [])

    def test_errors_restore_too(self):
        model = self.model()
        with pytest.raises(RuntimeError):
            recalibrate_bn(model, [torch.randn(2, 2)])
        assert model[1].training and model[3].momentum == 0.2
