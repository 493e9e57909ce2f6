"""Embedding and TiedHead: equal to nn.Embedding and nn.Linear on columns cut by hand."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from weightshare.nn import Embedding, TiedHead
from weightshare.space import SearchSpace

NUM, D = 30, (8, 12, 20)


def make(**options):
    torch.manual_seed(0)
    space = SearchSpace(embed=list(D))
    return space, Embedding(NUM, space["embed"], dtype=torch.float64, **options)


def tokens():
    return torch.randint(0, NUM, (2, 7), generator=torch.Generator().manual_seed(1))


def same(got, want, leaves):
    """Outputs, and gradients under a fixed output gradient, agree."""
    torch.testing.assert_close(got, want)
    g = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(3))
    ours, theirs = (torch.autograd.grad(y, leaves, g, retain_graph=True) for y in (got, want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("embed", D)
def test_every_width_equals_nn_embedding(embed, options):
    space, table = make(**options)
    space.activate({"embed": embed})
    ids = tokens()
    ids[0, :3] = 3
    want = F.embedding(ids, table.weight[:, :embed], **options)
    same(table(ids), want, [table.weight])
    assert table(ids).shape == (2, 7, embed)
    assert table(torch.tensor(4)).shape == (embed,)


def test_sparse_gradients_stay_sparse():
    space, table = make(sparse=True)
    space.activate({"embed": 8})
    ids = tokens()
    table(ids).sum().backward()
    assert table.weight.grad.is_sparse
    want = torch.zeros(NUM, 20, dtype=torch.float64)
    want[:, :8] = torch.bincount(ids.flatten(), minlength=NUM)[:, None].double()
    torch.testing.assert_close(table.weight.grad.to_dense(), want)


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Numbers of elements of all tensors made."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and func is not torch.ops.aten.detach.default:
            self.made.append((func.__name__, out.numel()))
        return out


@pytest.mark.parametrize("mixed", [False, True])
def test_no_pass_copies_the_table(mixed):
    """Backward makes its gradient, once."""
    torch.manual_seed(0)
    space = SearchSpace(embed=[8, 16])
    table = Embedding(1000, space["embed"])
    space.activate(space.smallest())
    if mixed:
        space.mix({"embed": torch.tensor([0.3, 0.7], requires_grad=True)})
    with Sizes() as sizes:
        y = table(tokens())
        forward = list(sizes.made)
        y.sum().backward()
    assert all(n < 1000 for _, n in forward), forward
    assert sum(n >= 8000 for _, n in sizes.made) == 1, sizes.made


def mixture(space):
    logits = torch.randn(3, dtype=torch.float64, requires_grad=True)
    alpha = logits.softmax(0)
    space.mix({"embed": alpha})
    return logits, alpha


def padded(table, alpha):
    """The mixed table, every choice padded and summed."""
    return sum(a * F.pad(table[:, :n], (0, max(D) - n)) for n, a in zip(D, alpha, strict=True))


def test_mixture_equals_pad_and_sum():
    space, table = make(padding_idx=3)
    logits, alpha = mixture(space)
    ids = tokens()
    ids[0, :2] = 3
    want = F.embedding(ids, padded(table.weight, alpha), padding_idx=3)
    same(table(ids), want, [table.weight, logits])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", ["sliced", "mixed"])
def test_tied_head_shares_the_table(mode, bias):
    space, table = make()
    head = TiedHead(table, bias)
    assert head.weight is table.weight
    space.activate({"embed": 12})
    logits, weight, width = None, table.weight[:, :12], 12
    if mode == "mixed":
        logits, alpha = mixture(space)
        weight, width = padded(table.weight, alpha), 20
    x = torch.randn(2, 5, width, dtype=torch.float64, requires_grad=True)
    leaves = [x, *head.parameters(), *([logits] if logits is not None else [])]
    same(head(x), F.linear(x, weight, head.bias), leaves)


def test_gradients_of_both_uses_add_up():
    space, table = make()
    model = nn.ModuleDict({"embed": table, "head": TiedHead(table)})
    assert [n for n, _ in model.named_parameters()] == ["embed.weight"]
    assert list(model.state_dict()) == ["embed.weight", "head.weight"]
    space.activate({"embed": 12})
    ids = tokens()
    part = table.weight[:, :12]
    want = F.linear(F.embedding(ids, part).tanh(), part)
    same(model["head"](table(ids).tanh()), want, [table.weight])
    twin = copy.deepcopy(model)
    assert twin["head"].weight is twin["embed"].weight is not table.weight


def test_export_is_plain_and_separate():
    space, table = make(padding_idx=3)
    head = TiedHead(table, bias=True)
    space.activate({"embed": 12})
    table.eval().weight.requires_grad_(False)
    plain = table.export()
    assert type(plain) is nn.Embedding and plain.padding_idx == 3 and not plain.training
    assert tuple(plain.weight.shape) == (NUM, 12) and not plain.weight.requires_grad
    assert torch.equal(plain(tokens()), table(tokens()))
    x = torch.randn(4, 12, dtype=torch.float64)
    alone, tied = head.export(), head.export(plain)
    assert type(alone) is nn.Linear and tied.weight is plain.weight
    for linear in (alone, tied):
        torch.testing.assert_close(linear(x), head(x))
    storages = {t.untyped_storage().data_ptr() for t in (plain.weight, alone.weight, table.weight)}
    assert len(storages) == 3
    with pytest.raises(ValueError, match=r"embedding: its table is \(30, 20\)"):
        head.export(table)


def test_drop_in_and_taken_over():
    plain = nn.Embedding(NUM, 20, padding_idx=0, scale_grad_by_freq=True).eval()
    space = SearchSpace(embed=list(D))
    ours = Embedding.from_embedding(plain, space["embed"])
    assert ours.weight is plain.weight and ours.padding_idx == 0 and ours.scale_grad_by_freq
    assert not ours.training and list(ours.state_dict()) == list(plain.state_dict())
    torch.manual_seed(1)
    fixed = Embedding(NUM, 20)
    torch.manual_seed(1)
    assert torch.equal(fixed(tokens()), nn.Embedding(NUM, 20)(tokens()))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(tokens()), ours(tokens()))


def test_few_graphs_serve_all_widths(traced):
    space, table = make()
    model = nn.Sequential(table, TiedHead(table))
    compiled = traced(model)
    for embed in (8, 20, 12, 20, 8):
        space.activate({"embed": embed})
        torch.testing.assert_close(compiled(tokens()), model(tokens()))
    assert len(traced.graphs) <= 2  # the whole width is contiguous, a part of the columns is not


def test_bad_input_is_refused():
    space = SearchSpace(embed=list(D))
    with pytest.raises(ValueError, match="max_norm"):
        Embedding(NUM, space["embed"], max_norm=1.0)
    with pytest.raises(ValueError, match="max_norm"):
        Embedding.from_embedding(nn.Embedding(NUM, 20, max_norm=1.0), space["embed"])
    with pytest.raises(ValueError, match="embed: up to 20, but the table has 16 columns"):
        Embedding.from_embedding(nn.Embedding(NUM, 16), space["embed"])
    with pytest.raises(TypeError, match=r"expected an nn.Embedding, got Linear"):
        Embedding.from_embedding(nn.Linear(3, 4), space["embed"])
