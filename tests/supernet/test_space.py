"""Search spaces, architectures and the sizes that depend on them."""

import copy
import pickle
import random

import pytest
import torch
from weightshare.sizes import Blocks, Dim, Interleaved, Joint
from weightshare.space import ArchConfig, PerLayer, SearchSpace


@pytest.fixture
def space():
    return SearchSpace(embed=[32, 48, 64], heads=PerLayer([1, 2], 3), ratio=[2, 3.5])


class TestSizes:
    def test_products_follow_their_dims(self, space):
        embed, ratio = space["embed"], space["ratio"]
        hidden = embed * ratio
        assert (hidden.value, hidden.max) == (224, 224)
        space.activate(space.arch(embed=48, ratio=2))
        assert hidden.value == 96
        assert (2 * embed).value == 96

    def test_a_product_is_cut_not_rounded_and_survives_floating_point(self):
        ratio = Dim("ratio", [0.1, 3.5])
        assert (ratio * 33).value == 115  # 115.5
        assert (ratio * 30).at({ratio: 0.1}) == 3

    @pytest.mark.parametrize(
        "channels, want", [(4, 8), (17, 16), (18, 24), (20, 24), (11, 16), (8, 8)]
    )
    def test_rounding_to_a_divisor_never_loses_a_tenth(self, channels, want):
        assert Dim("width", [channels]).rounded(8).value == want

    def test_blocks_are_cut_each_by_itself(self):
        q, kv = Dim("q", [2, 4]), Dim("kv", [1, 2])
        axis = Blocks([q * 8, kv * 8, kv * 8], [32, 16, 16])
        assert axis.selection == (slice(0, 32), slice(32, 48), slice(48, 64))
        q.set(2)
        kv.set(1)
        assert axis.selection == (slice(0, 16), slice(32, 40), slice(48, 56))
        assert (axis.value, axis.max) == (32, 64)

    def test_interleaved_rows(self):
        heads = Dim("heads", [1, 2])
        axis = Interleaved(heads * 4, 3)
        heads.set(1)
        assert axis.value == 12
        assert axis.selection == (slice(0, 12, 3), slice(1, 12, 3), slice(2, 12, 3))

    def test_joint_mixture_of_shared_dims(self):
        embed, ratio = Dim("embed", [2, 4]), Dim("ratio", [1, 2])
        joint = Joint(embed * ratio, embed, 7)
        assert not joint.mixed
        embed.alpha, ratio.alpha = torch.tensor([0.25, 0.75]), torch.tensor([0.4, 0.6])
        choices, alpha = joint.mixture()
        assert choices == ((2, 2, 7), (4, 2, 7), (4, 4, 7), (8, 4, 7))
        torch.testing.assert_close(alpha, torch.tensor([0.1, 0.15, 0.3, 0.45]))

    def test_a_dim_without_alpha_counts_with_its_active_value(self):
        embed, ratio = Dim("embed", [2, 4]), Dim("ratio", [1, 2])
        joint = Joint(embed * ratio, embed)
        embed.alpha = torch.tensor([0.5, 0.5])
        assert joint.mixture().choices == ((4, 2), (8, 4))
        ratio.set(1)
        assert joint.mixture().choices == ((2, 2), (4, 4))

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
    def test_a_copy_has_a_space_of_its_own(self, space, clone):
        hidden = space["embed"] * 2
        twin_space, twin = clone((space, hidden))
        twin_space.activate(twin_space.smallest())
        assert (hidden.value, twin.value) == (128, 64)


class TestSpace:
    def test_fields_and_count(self, space):
        assert list(space.dims) == ["embed", "heads.0", "heads.1", "heads.2", "ratio"]
        assert space.count == 3 * 2**3 * 2
        assert space["heads"][1].name == "heads.1"

    def test_arch_fills_in_and_checks(self, space):
        arch = space.arch(embed=32, heads=[1, 2, 1])
        assert (arch["heads.0"], arch["ratio"]) == (1, 3.5)
        assert space.arch(heads=1) == space.arch({"heads.0": 1, "heads.1": 1, "heads.2": 1})
        assert type(space.arch(ratio=2.0)["ratio"]) is int, "a choice as the space has it"

    @pytest.mark.parametrize(
        "values, message",
        [
            ({"embed": 40}, r"embed: 40 is none of the choices \[32, 48, 64\]"),
            ({"width": 1}, "width: no such dimension; the space has embed, heads, ratio"),
            ({"heads": [1, 2]}, "heads: 2 values for 3 layers"),
            ({"heads.1": 3}, r"heads.1: 3 is none of the choices \[1, 2\]"),
            ({"embed": True}, "embed: True"),
        ],
    )
    def test_an_arch_outside_the_space_is_refused(self, space, values, message):
        before = space.active
        with pytest.raises(ValueError, match=message):
            space.activate(values)
        assert space.active == before

    @pytest.mark.parametrize(
        "choices, error, message",
        [
            ([], ValueError, "embed: has no choices"),
            ([1, 1], ValueError, "repeat"),
            ([-1], ValueError, "negative"),
            (["a"], TypeError, "no number"),
            (7, TypeError, "expected a sequence"),
        ],
    )
    def test_choices_are_checked(self, choices, error, message):
        with pytest.raises(error, match=message):
            SearchSpace(embed=choices)

    def test_restricting_narrows_samples_largest_and_count(self, space):
        space.restrict("embed", [32, 48])
        assert space.count == 2 * 2**3 * 2
        assert space.largest()["embed"] == 48
        draws = {space.sample(random.Random(seed))["embed"] for seed in range(40)}
        assert draws == {32, 48}
        with pytest.raises(ValueError, match=r"embed: 64 is not allowed, only \[32, 48\]"):
            space.arch(embed=64)
        with pytest.raises(ValueError, match="nothing is left"):
            space.restrict("embed", [])

    def test_an_arch_is_a_hashable_mapping_that_json_holds(self, space):
        arch = space.sample(random.Random(0))
        assert {arch: 1}[ArchConfig(dict(reversed(list(arch.items()))))] == 1
        assert space.from_json(arch.to_json()) == arch
        assert arch.replace(embed=32)["embed"] == 32

    def test_a_description_makes_the_same_space_and_finds_differences(self, space):
        assert SearchSpace.from_dict(space.to_dict()).to_dict() == space.to_dict()
        other = SearchSpace(embed=[32, 64], heads=PerLayer([1, 2], 3), ratio=[2, 3.5])
        with pytest.raises(ValueError, match=r"embed is .*32, 64.* there and .*32, 48, 64"):
            space.check_same(other.to_dict())

    def test_mixing_and_its_end(self, space):
        space.mix({"embed": torch.ones(3) / 3})
        assert space["embed"].alpha is not None and space["ratio"].alpha is None
        space.activate(space.smallest())
        assert space["embed"].alpha is None
        with pytest.raises(ValueError, match=r"embed: expected one weight for each of \[32"):
            space.mix({"embed": torch.ones(2)})
        with pytest.raises(ValueError, match="width: no such dimension"):
            space.mix({"width": torch.ones(2)})
