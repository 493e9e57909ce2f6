"""QKV and MultiheadAttention: equal to plain PyTorch on weights sliced or padded by hand."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from weightshare.nn import QKV, MultiheadAttention
from weightshare.sizes import Blocks, points
from weightshare.space import SearchSpace

D, H, HEAD = (8, 12, 20), (2, 3, 4), 6
KINDS = {
    "fused": {},
    "interleaved": {"layout": "interleaved"},
    "separate": {"fused": False},
    "no_bias": {"bias": False, "proj_bias": False},
    "interleaved_no_bias": {"layout": "interleaved", "bias": False},
}


def make(kind="fused", **more):
    torch.manual_seed(0)
    space = SearchSpace(embed=list(D), heads=list(H))
    options = {"dtype": torch.float64, **KINDS[kind], **more}
    return space, MultiheadAttention(space["embed"], space["heads"], HEAD, **options)


def values_of(space):
    for point in points(space.dims.values()):
        yield {dim.name: value for dim, value in point.items()}


def attend(x, projections, proj, heads, attn_mask=None, is_causal=False):
    """Attention in the plainest PyTorch; projections are pairs (weight, bias)."""
    q, k, v = (F.linear(x, *p).unflatten(-1, (-1, HEAD)).transpose(1, 2) for p in projections)
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / HEAD**0.5
    if is_causal:
        attn_mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), *proj)


def elements(*pieces):
    """Indices of (start, heads) pieces, in their order."""
    return torch.cat([torch.arange(s * HEAD, (s + n) * HEAD) for s, n in pieces])


def indices(layer, heads, kv_heads, most, most_kv):
    """Rows of weight and of bias for each of q, k and v, and columns of the output's projection."""
    if getattr(layer, "layout", None) == "interleaved":
        n = heads * HEAD
        rows = [torch.arange(i, 3 * n, 3) for i in range(3)]
        return rows, [torch.arange(i * n, (i + 1) * n) for i in range(3)], torch.arange(n)
    per_group = most // most_kv
    q = elements(*[(g * per_group, heads // kv_heads) for g in range(kv_heads)])
    starts = (most, most + most_kv) if layer.fused else (0, 0)
    rows = [q, *(elements((s, kv_heads)) for s in starts)]
    return rows, rows, q


def projections(layer):
    return [layer.qkv] * 3 if layer.fused else [layer.q_proj, layer.k_proj, layer.v_proj]


def by_hand(layer, x, embed, heads, kv_heads=None, most=4, most_kv=None, **options):
    """The subnet that plain indexing cuts out of a module."""
    rows, biases, q = indices(layer, heads, kv_heads or heads, most, most_kv or most)
    parts = [
        (p.weight[r][:, :embed], None if p.bias is None else p.bias[b])
        for p, r, b in zip(projections(layer), rows, biases, strict=True)
    ]
    proj = layer.proj if layer.fused else layer.o_proj
    last = proj.weight[:embed][:, q], None if proj.bias is None else proj.bias[:embed]
    return attend(x, parts, last, heads, **options)


def same(got, want, leaves):
    """Outputs, and gradients under a fixed output gradient, agree."""
    torch.testing.assert_close(got, want)
    g = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(3))
    ours, theirs = (torch.autograd.grad(y, leaves, g, retain_graph=True) for y in (got, want))
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, msg=lambda m, n=number: f"gradient {n}: {m}")


def x_of(embed):
    return torch.randn(2, 5, embed, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_subnet_equals_plain_attention(kind):
    space, layer = make(kind)
    for values in values_of(space):
        space.activate(values)
        x = x_of(values["embed"])
        same(layer(x), by_hand(layer, x, **values), [x, *layer.parameters()])
    mask = (torch.rand(5, 5) < 0.5).fill_diagonal_(True)
    for options in ({"is_causal": True}, {"attn_mask": mask}):
        torch.testing.assert_close(layer(x, **options), by_hand(layer, x, **values, **options))


def grouped(kind, **options):
    """A space, a layer with grouped queries, and the most heads of q and of k."""
    torch.manual_seed(0)
    options = {"dtype": torch.float64, **options}
    if kind == "fixed_group":  # the number of groups follows the heads
        space = SearchSpace(embed=list(D), kv=[1, 2])
        heads, kv, most = space["kv"] * 2, space["kv"], (4, 2)
    elif kind == "both_elastic":
        space = SearchSpace(embed=list(D), kv=[1, 2], per=[1, 3])
        heads, kv, most = space["kv"] * space["per"], space["kv"], (6, 2)
    else:
        space = SearchSpace(embed=list(D), heads=[2, 4])
        heads, kv, most = space["heads"], *((1, (4, 1)) if kind == "multi_query" else (2, (4, 2)))
    return space, MultiheadAttention(space["embed"], heads, HEAD, kv, **options), most


GROUPED = ("multi_query", "fixed_kv", "fixed_group", "both_elastic")


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
@pytest.mark.parametrize("kind", GROUPED)
def test_grouped_queries_equal_plain_attention(kind, fused):
    space, layer, (most, most_kv) = grouped(kind, fused=fused)
    for values in values_of(space):
        space.activate(values)
        heads = layer.heads.value
        kv = layer.kv_heads if isinstance(layer.kv_heads, int) else layer.kv_heads.value
        x = x_of(values["embed"])
        want = by_hand(layer, x, values["embed"], heads, kv, most, most_kv)
        same(layer(x), want, [x, *layer.parameters()])
        torch.testing.assert_close(layer.export()(x), want)


def mixed_projections(layer, alphas, most, most_kv, counts):
    """Weights and biases padded for every choice and summed; rows of q, k and v apart."""
    parts = [[0, 0] for _ in range(3)]
    last = [0, 0]
    proj = layer.proj if layer.fused else layer.o_proj
    whole, *_ = indices(layer, most, most_kv, most, most_kv)
    for e, alpha_e in zip(D, alphas["embed"], strict=True):
        for (heads, kv), alpha_h in zip(counts, alphas["heads"], strict=True):
            rows, biases, q = indices(layer, heads, kv, most, most_kv)
            for part, p, r, b, w in zip(
                parts, projections(layer), rows, biases, whole, strict=True
            ):
                at = torch.stack(
                    [(w == i).nonzero()[0, 0] for i in r]
                )  # place of a row in its block
                padded = torch.zeros(len(w), max(D), dtype=torch.float64)
                bias = torch.zeros(len(w), dtype=torch.float64)
                wide = F.pad(p.weight[r][:, :e], (0, max(D) - e))
                part[0] = part[0] + alpha_e * alpha_h * padded.index_add(0, at, wide)
                part[1] = part[1] + alpha_e * alpha_h * bias.index_add(0, at, p.bias[b])
            padded = torch.zeros(max(D), proj.weight.shape[1], dtype=torch.float64)
            tall = F.pad(proj.weight[:e][:, q], (0, 0, 0, max(D) - e))
            last[0] = last[0] + alpha_e * alpha_h * padded.index_add(1, q, tall)
            last[1] = last[1] + alpha_e * alpha_h * F.pad(proj.bias[:e], (0, max(D) - e))
    return parts, last


@pytest.mark.parametrize("kind", ["fused", "interleaved", "separate", "multi_query", "fixed_kv"])
def test_mixture_equals_pad_and_sum(kind):
    """Each block is padded by itself: padding [q; k; v] at its end would misalign the heads."""
    if kind in KINDS:
        (space, layer), most, most_kv = make(kind), 4, 4
        counts = [(h, h) for h in H]
    else:
        space, layer, (most, most_kv) = grouped(kind)
        counts = [(h, most_kv) for h in (2, 4)]
    logits = [
        torch.randn(len(dim.choices)).double().requires_grad_() for dim in space.dims.values()
    ]
    # By logits: biases are mixed by the alphas of the rows alone, the same where alphas sum to 1.
    alphas = {name: lg.softmax(0) for name, lg in zip(space.dims, logits, strict=True)}
    space.mix(alphas)
    x = x_of(max(D))
    parts, last = mixed_projections(layer, alphas, most, most_kv, counts)
    same(layer(x), attend(x, parts, last, most), [x, *layer.parameters(), *logits])


def one_hot(space, values):
    """Mixture weights that leave one choice."""
    return {
        n: F.one_hot(torch.tensor(d.index(values[n])), len(d.choices)).double()
        for n, d in space.dims.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_one_hot_mixture_is_the_padded_subnet(kind):
    space, layer = make(kind)
    for values in list(values_of(space))[::2]:
        x = x_of(values["embed"]).detach()
        space.activate(values)
        want = F.pad(layer(x), (0, max(D) - values["embed"]))
        space.mix(one_hot(space, values))
        torch.testing.assert_close(layer(F.pad(x, (0, max(D) - values["embed"]))), want)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
def test_groups_of_both_numbers_mix(fused):
    """Neither choice holds the other: one group of three heads, two groups of one."""
    space, layer, _ = grouped("both_elastic", fused=fused)
    for values in values_of(space):
        space.activate(values)
        x = x_of(values["embed"]).detach()
        want = F.pad(layer(x), (0, max(D) - values["embed"]))
        space.mix(one_hot(space, values))
        torch.testing.assert_close(layer(F.pad(x, (0, max(D) - values["embed"]))), want)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
def test_groups_mix_within_some_of_the_key_value_heads(fused):
    torch.manual_seed(0)
    space = SearchSpace(kv=[2, 4], per=[1, 2])
    heads = space["kv"] * space["per"]
    layer = MultiheadAttention(20, heads, HEAD, space["kv"], fused=fused, dtype=torch.float64)
    x = x_of(20).detach()
    space.activate({"kv": 2, "per": 1})
    want = layer(x)
    space.activate({"kv": 2, "per": 2})
    space.mix({"per": torch.tensor([1.0, 0.0], dtype=torch.float64)})
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("kind", ["fused", "interleaved", "separate"])
@pytest.mark.parametrize("mixed", ["embed", "heads"])
def test_sizes_that_are_not_mixed_keep_their_choice(kind, mixed):
    space, layer = make(kind)
    space.activate({"embed": 12, "heads": 3})
    alphas = one_hot(space, {"embed": 8, "heads": 2})
    space.mix({mixed: alphas[mixed]})
    x = x_of(max(D) if mixed == "embed" else 12).detach()
    got = layer(x)
    space.activate({"embed": 12, "heads": 3, mixed: {"embed": 8, "heads": 2}[mixed]})
    want = layer(x[..., :8] if mixed == "embed" else x)
    torch.testing.assert_close(got, F.pad(want, (0, got.shape[-1] - want.shape[-1])))


@pytest.mark.parametrize("kind", KINDS)
def test_export_is_plain_and_separate(kind):
    space, layer = make(kind, qk_norm=partial(nn.LayerNorm, dtype=torch.float64), dropout=0.5)
    space.activate({"embed": 12, "heads": 2})
    plain = layer.eval().export()
    x = x_of(12)
    torch.testing.assert_close(plain(x), layer(x))
    leaves = [type(m) for m in plain.modules() if not list(m.children())]
    assert set(leaves) == {nn.Linear, nn.LayerNorm}
    assert not plain.training and plain.dropout == 0.5
    shapes = [tuple(p.shape) for p in plain.parameters()]
    assert (36, 12) in shapes or (12, 12) in shapes
    assert list(plain.state_dict()) == list(layer.state_dict())
    ours = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    assert not ours & {p.untyped_storage().data_ptr() for p in plain.parameters()}


def test_state_dict_is_that_of_plain_layers():
    _, layer = make()
    qkv, proj = nn.Linear(20, 72), nn.Linear(24, 20)
    plain = nn.ModuleDict({"qkv": qkv, "proj": proj}).double()
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.qkv.weight, qkv.weight)
    _, layer = make("separate")
    names = {k.split(".")[0] for k in layer.state_dict()}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("kind", ["fused", "interleaved", "separate"])
def test_made_of_existing_layers(kind):
    _, source = make(kind)
    linears = {n: c.export() for n, c in source.named_children()}
    for linear in linears.values():
        linear.eval()
    space = SearchSpace(embed=list(D), heads=list(H))
    layout = {"layout": source.layout} if source.fused else {}
    norm = partial(nn.RMSNorm, dtype=torch.float64)
    layer = MultiheadAttention.from_linears(
        linears, space["embed"], space["heads"], HEAD, qk_norm=norm, **layout
    )
    assert layer.q_norm.weight.device.type == "cpu" and not layer.training
    for name, linear in linears.items():
        assert getattr(layer, name).weight is linear.weight
        assert getattr(layer, name).bias is linear.bias
    space.activate({"embed": 8, "heads": 2})
    assert layer(torch.randn(1, 3, 8, dtype=torch.float64)).shape == (1, 3, 8)


def test_ints_make_a_plain_module():
    layer = MultiheadAttention(20, 4, HEAD, 2, dtype=torch.float64)
    x = x_of(20)
    same(layer(x), by_hand(layer, x, 20, 4, 2, 4, 2), [x, *layer.parameters()])


def test_hooks_and_dropout():
    torch.manual_seed(0)
    space, layer = make(qk_norm=partial(nn.RMSNorm, dtype=torch.float64), dropout=0.5)
    space.activate({"embed": 12, "heads": 2})
    x, seen = x_of(12), []

    def rotary(q, k):
        seen.extend((q.shape, k.shape))
        return q.flip(-1), k.flip(-1)

    layer.eval()
    torch.testing.assert_close(layer(x, rotary=rotary), layer(x))  # a rotation keeps products
    assert seen == [(2, 2, 5, HEAD)] * 2
    with torch.no_grad():
        layer.q_norm.weight.zero_()
    v = layer.qkv(x)[..., -2 * HEAD :].mean(1, keepdim=True).expand(2, 5, -1)
    torch.testing.assert_close(layer(x), layer.proj(v))  # queries of zero attend to all alike
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("kind", ["fused", "interleaved", "separate"])
def test_copies_and_pickles(kind):
    space, layer = make(kind)
    space.activate({"embed": 12, "heads": 2})
    x = x_of(12)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x), layer(x))
    assert "heads=" in repr(layer)


@pytest.mark.parametrize("kind", ["fused", "interleaved", "separate", "fixed_kv", "fixed_group"])
def test_few_graphs_serve_all_widths(kind, traced):
    space, layer = make(kind)[:2] if kind in KINDS else grouped(kind)[:2]
    compiled = traced(layer)
    for values in values_of(space):
        space.activate(values)
        x = x_of(values["embed"])
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(traced.graphs) <= (2 if kind == "fixed_kv" else 1)  # groups that are whole


BAD = {
    "not_integral": (
        {"heads": [2, 3], "kv_heads": 2},
        r"heads: 3 do not fit 2 kv_heads \(heads=3\); allowed: \[2\]",
    ),
    "fewer_than_groups": ({"heads": [1, 4], "kv_heads": 2}, r"heads: 1 .* allowed: \[2, 4\]"),
    "no_groups": ({"heads": [2, 4], "kv_heads": 0}, "at least 1"),
    "interleaved_groups": ({"heads": [2], "kv_heads": 1, "layout": "interleaved"}, "layout: "),
    "unknown_layout": ({"heads": [2], "layout": "rows"}, r"layout: is 'rows'"),
    "separate_interleaved": (
        {"heads": [2], "layout": "interleaved", "fused": False},
        "needs fused=True",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sizes_are_refused_when_built(name):
    options, message = BAD[name]
    space = SearchSpace(heads=options.pop("heads"))
    with pytest.raises(ValueError, match=message):
        MultiheadAttention(20, space["heads"], HEAD, **options)


def test_groups_may_not_outgrow_the_largest():
    """Heads beyond a group would need another key-value head than in the largest subnet."""
    space = SearchSpace(heads=[2, 4], kv=[1, 2])
    with pytest.raises(ValueError, match=r"4 do not fit 1 kv_heads \(heads=4, kv=1\).* \[1, 2\]"):
        QKV(20, space["heads"], HEAD, space["kv"])


def test_bad_layers_are_refused():
    space = SearchSpace(heads=[1, 2])
    with pytest.raises(ValueError, match=r"heads: the most of them make 36 rows, .* has 40"):
        QKV.from_linear(nn.Linear(20, 40), 20, space["heads"], HEAD)
    with pytest.raises(ValueError, match="in_features: up to 30"):
        QKV.from_linear(nn.Linear(20, 36), 30, space["heads"], HEAD)
    with pytest.raises(ValueError, match="linears: expected qkv, proj"):
        MultiheadAttention.from_linears({"qkv": nn.Linear(20, 36)}, 20, space["heads"], HEAD)
    layer = QKV(20, space["heads"], HEAD)
    assert isinstance(layer.rows, Blocks)
    with pytest.raises(TypeError, match="search space"):
        layer.set_active(3)
