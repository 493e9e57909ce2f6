"""Samplers: what they draw, how often, and that all processes draw the same."""

import collections
import math
import pickle

import pytest
from weightshare.space import PerLayer, SearchSpace
from weightshare.supernet import FairSampler, SandwichSampler, UniformSampler, shrink


@pytest.fixture
def space():
    return SearchSpace(width=[8, 12, 16], depth=PerLayer([1, 2], 2))


def samplers(space):
    return [
        UniformSampler(space, 3, seed=7),
        FairSampler(space, seed=7),
        SandwichSampler(space, seed=7),
    ]


@pytest.mark.parametrize("number", range(3), ids=["uniform", "fair", "sandwich"])
class TestAll:
    def test_a_step_is_a_function_of_seed_and_number(self, space, number):
        first, second = samplers(space)[number], pickle.loads(pickle.dumps(samplers(space)[number]))
        later = [first.sample(step) for step in range(20)]
        assert [second.sample(step) for step in reversed(range(20))] == later[::-1]
        assert len({tuple(draws) for draws in later}) > 10

    def test_seeds_differ(self, space, number):
        first, second = samplers(space)[number], samplers(space)[number]
        for inner in (second, getattr(second, "_random", second)):
            inner.seed = 8
        assert [first.sample(s) for s in range(9)] != [second.sample(s) for s in range(9)]

    def test_drawing_does_not_touch_the_global_generator(self, space, number):
        import random

        random.seed(0)
        before = random.getstate()
        samplers(space)[number].sample(0)
        assert random.getstate() == before

    def test_only_allowed_choices_are_drawn(self, space, number):
        sampler = samplers(space)[number]
        space.restrict("width", [8, 12])
        space.restrict("depth", [2])
        drawn = {draw.arch for step in range(30) for draw in sampler.sample(step)}
        assert drawn == {space.arch(width=w, depth=2) for w in (8, 12)}


def test_a_known_draw_stays_the_same(space):
    """Runs must resume the same on other machines and releases: this is what seed 7 draws."""
    (draw,) = UniformSampler(space, seed=7).sample(3)
    assert dict(draw.arch) == KNOWN


KNOWN = {"width": 8, "depth.0": 2, "depth.1": 2}


class TestUniform:
    def test_log_probabilities_match_counts(self, space):
        sampler, steps = UniformSampler(space, 4), 1500
        draws = [draw for step in range(steps) for draw in sampler.sample(step)]
        counts = collections.Counter(draw.arch for draw in draws)
        assert len(counts) == space.count == 12
        for draw in draws:
            expected = len(draws) * math.exp(draw.log_prob)
            assert abs(counts[draw.arch] - expected) < 5 * math.sqrt(expected)

    def test_a_constraint_holds_and_leaves_the_rest_uniform(self, space):
        sampler = UniformSampler(space, accept=lambda arch: arch["width"] * arch["depth.0"] <= 16)
        counts = collections.Counter(sampler.sample(step)[0].arch for step in range(4000))
        wanted = {a for a in all_archs(space) if a["width"] * a["depth.0"] <= 16}
        assert set(counts) == wanted
        expected = 4000 / len(wanted)
        assert all(abs(n - expected) < 5 * math.sqrt(expected) for n in counts.values())

    def test_an_impossible_constraint_is_an_error(self, space):
        with pytest.raises(ValueError, match=r"accept: refused 50 subnets in a row; .*restrict"):
            UniformSampler(space, accept=lambda arch: False, tries=50).sample(0)

    @pytest.mark.parametrize("bad", [{"count": 0}, {"tries": 0}])
    def test_bad_numbers(self, space, bad):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected 1 or more, got 0"):
            UniformSampler(space, **bad)


def all_archs(space):
    return [space.arch(width=w, depth=(a, b)) for w in (8, 12, 16) for a in (1, 2) for b in (1, 2)]


class TestFair:
    def test_a_step_uses_each_choice_of_the_widest_dim_once(self, space):
        for step in range(10):
            widths = [draw.arch["width"] for draw in FairSampler(space).sample(step)]
            assert sorted(widths) == [8, 12, 16]

    @pytest.mark.parametrize("count", [None, 1, 2, 5])
    def test_every_choice_is_used_equally_often(self, space, count):
        sampler = FairSampler(space, count)
        draws = [draw.arch for step in range(6) for draw in sampler.sample(step)]
        for name, dim in space.dims.items():
            whole = len(draws) // len(dim.choices) * len(dim.choices)
            used = collections.Counter(arch[name] for arch in draws[:whole])
            assert set(used.values()) == {whole // len(dim.choices)}

    def test_dims_are_independent_and_single_draws_uniform(self, space):
        sampler = FairSampler(space)
        draws = [draw for step in range(2000) for draw in sampler.sample(step)]
        counts = collections.Counter(draw.arch for draw in draws)
        assert len(counts) == 12
        expected = len(draws) * math.exp(draws[0].log_prob)
        assert all(abs(n - expected) < 5 * math.sqrt(expected) for n in counts.values())


class TestSandwich:
    def test_ends_and_random_ones(self, space):
        largest, smallest, *rest = SandwichSampler(space, random=3).sample(4)
        assert largest == (space.largest(), 0.0)
        assert smallest == (space.smallest(), 0.0)
        assert rest == UniformSampler(space, 3).sample(4)
        assert len(SandwichSampler(space, random=0).sample(0)) == 2
        with pytest.raises(ValueError, match="random: expected 0 or more"):
            SandwichSampler(space, random=-1)


def test_shrinking_allows_more_and_more(space):
    phases = {0: {"width": [16], "depth": [2]}, 10: {"depth": [1, 2]}, 20: {"width": [8, 12, 16]}}
    counts = []
    for step in (0, 9, 10, 19, 20, 25):
        shrink(space, phases, step)
        counts.append(space.count)
    assert counts == [1, 1, 4, 4, 12, 12]
    with pytest.raises(ValueError, match="depht: no such dimension"):
        shrink(space, {0: {"depht": [1]}}, 0)
    with pytest.raises(ValueError, match=r"width: 9 is none of the choices"):
        shrink(space, {0: {"width": [9]}}, 0)
