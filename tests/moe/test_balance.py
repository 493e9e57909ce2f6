"""The balance rules against their equations, the published simulation and the assignment LP."""

from statistics import mean

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weightshare.moe.balance import (
    DEFAULT_RATES,
    max_violation,
    sequence_balance_loss,
    update_balance_bias_,
)

RULES = tuple(DEFAULT_RATES)


def expected(bias, counts, rule, rate, step, recentre):
    """The equations of the docstring, one expert after the other."""
    if counts.sum() == 0:
        return bias
    moved = bias.double().clone()
    average = counts.double().mean()
    for i, count in enumerate(counts.double()):
        relative = 1 - count / average
        moved[i] += {
            "sign": rate * relative.sign(),
            "proportional": rate * relative,
            "inverse": rate / step * relative,
            "inverse_sqrt": rate / step**0.5 * relative,
        }[rule]
    return moved - moved.mean() if recentre else moved


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_the_update_is_the_equation(data):
    rule = data.draw(st.sampled_from(RULES))
    layers, experts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    rows = st.lists(st.integers(0, 2**40), min_size=experts, max_size=experts)
    counts = torch.tensor(data.draw(st.lists(rows, min_size=layers, max_size=layers)))
    step, recentre = data.draw(st.integers(1, 1000)), data.draw(st.booleans())
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    bias = torch.randn(layers, experts, dtype=dtype)
    options = dict(rule=rule, rate=0.3, recentre=recentre)
    wanted = [expected(b, c, step=step, **options) for b, c in zip(bias, counts, strict=True)]
    for number in (step, torch.tensor(step)):
        for given_counts in (counts, counts.double()):
            got = bias.clone()
            assert update_balance_bias_(got, given_counts, step=number, **options) is got
            # float32 rounds the sum b + move, of at most 2 + rate * experts, a few times.
            room = 4 * torch.finfo(dtype).eps * (bias.abs().max().item() + 0.3 * experts + 1)
            torch.testing.assert_close(
                got.double(), torch.stack(wanted).double(), atol=room, rtol=0
            )


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_without_counts_stays_bitwise(rule):
    bias = torch.tensor([[0.1, 0.2, 0.7], [0.3, 0.3, 0.3], [1.0, 2.0, 4.0]])
    counts = torch.tensor([[0, 0, 0], [1, 2, 3], [0, 0, 0]])
    before = bias.clone()
    update_balance_bias_(bias, counts, rule=rule, step=1)
    assert torch.equal(bias[::2], before[::2])
    assert not torch.equal(bias[1], before[1]) and bias.isfinite().all()
    bias, counts = before.clone(), counts.float()
    counts[0] = torch.nan
    counts[2, 0] = torch.inf
    update_balance_bias_(bias, counts, rule=rule, step=1)
    assert torch.equal(bias[::2], before[::2]) and bias.isfinite().all()


@pytest.mark.parametrize("rule", RULES)
def test_scale_of_the_counts_does_not_matter(rule):
    counts = torch.randint(1, 50, (16,))
    biases = [torch.zeros(16) for _ in range(3)]
    for bias, factor in zip(biases, (1, 1024, 2**40), strict=True):
        update_balance_bias_(bias, counts * factor, rule=rule, step=3)
    assert torch.equal(biases[0], biases[1]) and torch.equal(biases[0], biases[2])


def test_a_rate_tensor_freezes_at_zero():
    bias = torch.tensor([0.1, 0.25, 0.7])
    before = bias.clone()
    update_balance_bias_(bias, torch.tensor([3, 2, 1]), rate=torch.tensor(0.0))
    assert torch.equal(bias, before)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
def test_nothing_is_read_back(rule, kind):
    """Meta tensors have no data: whatever needed a number of them would raise."""
    bias = torch.zeros(3, 8, device="meta")
    counts = torch.ones(3, 8, device="meta", dtype=kind)
    step = torch.ones((), device="meta", dtype=torch.int64)
    update_balance_bias_(bias, counts, rule=rule, step=step, rate=torch.ones((), device="meta"))
    assert max_violation(counts).shape == (3,)
    scores = torch.rand(12, 8, device="meta", requires_grad=True)
    mask = torch.zeros(12, device="meta", dtype=torch.bool)
    for sequences in (3, [5, 7]):
        options = dict(alpha=0.1, sequences=sequences, padding_mask=mask)
        sequence_balance_loss(scores, 2, **options).backward()


# -- The simulation ----------------------------------------------------------------------------


def simulate(rule, steps, drift=0.0):
    """MaxVio at each step of a router of 64 experts, top 6, of skewed sigmoid scores."""
    generator = torch.Generator().manual_seed(0)
    skew, away = torch.randn(2, 64, generator=generator) * 0.15
    bias, found = torch.zeros(64), []
    for n in range(1, steps + 1):
        logits = 0.28 * torch.randn(8192, 64, generator=generator) + skew + drift * n * away
        counts = (logits.sigmoid() + bias).topk(6, sorted=False).indices.flatten().bincount()
        counts = torch.nn.functional.pad(counts, (0, 64 - len(counts)))
        found.append(max_violation(counts).item())
        update_balance_bias_(bias, counts, rule=rule, step=n)
    return found


def test_sign_needs_a_hundred_steps():
    found = simulate("sign", 105)
    assert 5 < found[0] < 6
    assert found[60] > 1
    assert mean(found[98:]) < 0.12  # 8192 tokens drawn anew leave about 0.08 of noise


def test_inverse_sqrt_is_fast():
    found = simulate("inverse_sqrt", 60)
    assert found[8] < 0.3
    assert mean(found[30:]) < 0.1


def test_under_drift_inverse_freezes_and_inverse_sqrt_follows():
    frozen, following = (mean(simulate(r, 200, 0.01)[-20:]) for r in ("inverse", "inverse_sqrt"))
    assert frozen > 1
    assert following < 0.16


# -- The assignment problem --------------------------------------------------------------------


def dual(scores, bias, k):
    """D(b) of the specification: the mean sum of the top k less the price of the capacity."""
    top = (scores + bias).topk(k).values.sum(-1).mean()
    return (top - k / scores.shape[1] * bias.sum()).item()


def assignment(scores, k):
    """Optimum of the LP, per token: k experts for a token, tokens * k / E tokens for an expert."""
    tokens, experts = scores.shape
    optimize, sparse = pytest.importorskip("scipy.optimize"), pytest.importorskip("scipy.sparse")
    each = sparse.kron(sparse.eye(tokens), np.ones((1, experts)))
    load = sparse.hstack([sparse.eye(experts)] * tokens)
    limits = np.concatenate([np.full(tokens, k), np.full(experts, tokens * k / experts)])
    found = optimize.linprog(
        -scores.numpy().ravel(),
        A_eq=sparse.vstack([each, load]).tocsr(),
        b_eq=limits,
        bounds=(0, 1),
    )
    assert found.success
    return -found.fun / tokens, torch.from_numpy(-found.eqlin.marginals[tokens:])


@pytest.mark.parametrize("rule", RULES)
def test_the_fixed_point_solves_the_assignment_problem(rule):
    torch.manual_seed(3)
    k, experts = 2, 8
    skew = 0.5 * torch.randn(experts, dtype=torch.float64)
    scores = (torch.randn(128, experts, dtype=torch.float64) + skew).sigmoid()
    best, prices = assignment(scores, k)
    # The LP's prices are a bias of the same value, which is the least there is.
    assert dual(scores, -prices, k) == pytest.approx(best, rel=1e-9)
    bias = torch.zeros(experts, dtype=torch.float64)
    start = dual(scores, bias, k) - best
    for n in range(1, 1001):
        counts = (scores + bias).topk(k).indices.flatten().bincount(minlength=experts)
        update_balance_bias_(bias, counts, rule=rule, step=n)
        assert dual(scores, bias, k) >= best - 1e-9  # weak duality, all along
    gap = dual(scores, bias, k) - best
    assert gap < 0.005 * start
    assert abs(bias.sum()) < 1e-12


# -- Metrics and the loss of a sequence --------------------------------------------------------


def test_max_violation():
    counts = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [0, 0, 0, 0], [6, 4, 4, 2]])
    assert max_violation(counts).tolist() == [0, 3, 0, 0.5]
    assert max_violation(counts.double()).dtype == torch.float64
    assert max_violation(counts[:, :0]).tolist() == [0] * 4
    assert max_violation(torch.tensor([2**40, 0])).item() == 1


def loss_by_hand(scores, k, alpha, lengths, padding):
    """Equations 17 to 20 of the report, in loops."""
    losses, begin = [], 0
    for length in lengths:
        tokens = [t for t in range(begin, begin + length) if not padding[t]]
        begin += length
        if not tokens:
            continue
        experts, total = scores.shape[1], 0
        for i in range(experts):
            f = sum(int(i in scores[t].topk(k).indices) for t in tokens)
            p = sum(scores[t, i] / scores[t].sum() for t in tokens) / len(tokens)
            total = total + experts / (k * len(tokens)) * f * p
        losses.append(alpha * total)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("lengths", [[12], [4, 4, 4], [3, 0, 7, 2]])
def test_sequence_loss(lengths):
    torch.manual_seed(0)
    scores = torch.rand(12, 5, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(12, dtype=torch.bool)
    padding[[2, 3, 10, 11]] = True  # all of the last sequence, where there are several
    wanted = loss_by_hand(scores, 2, 0.1, lengths, padding)
    (slope,) = torch.autograd.grad(wanted, scores)
    equal = len(set(lengths)) == 1
    dirty = scores.detach().masked_fill(padding[:, None], torch.nan).requires_grad_()
    got = sequence_balance_loss(
        dirty, 2, alpha=0.1, sequences=len(lengths) if equal else lengths, padding_mask=padding
    )
    got.backward()
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(dirty.grad, slope)
    assert not dirty.grad[padding].any()
    logits = scores.detach().logit()
    options = dict(alpha=0.1, sequences=lengths, padding_mask=padding, score_fn="sigmoid")
    torch.testing.assert_close(sequence_balance_loss(logits, 2, **options), wanted)


def test_sequence_loss_of_nothing_and_of_even_scores():
    assert sequence_balance_loss(torch.rand(0, 4), 2, alpha=1.0).item() == 0
    every = torch.ones(4, dtype=torch.bool)
    assert sequence_balance_loss(torch.rand(4, 4), 2, alpha=1.0, padding_mask=every).item() == 0
    even = torch.eye(4, dtype=torch.bfloat16).repeat(3, 1) + 1
    loss = sequence_balance_loss(even, 1, alpha=0.5, sequences=3)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.5)


# -- Bad input ---------------------------------------------------------------------------------

BIAS, COUNTS = torch.zeros(4), torch.ones(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "words", "bias", "counts", "options"),
    [
        (TypeError, "float32", BIAS.bfloat16(), COUNTS, {}),
        (TypeError, "float32", BIAS.half(), COUNTS, {}),
        (TypeError, "floating-point", COUNTS, COUNTS, {}),
        (TypeError, "tensor", [0.0], COUNTS, {}),
        (TypeError, "tensor", BIAS, [1, 2, 3, 4], {}),
        (TypeError, "counts", BIAS, COUNTS.bool(), {}),
        (ValueError, "same shape", BIAS, COUNTS[:3], {}),
        (ValueError, "same shape", BIAS, COUNTS[None], {}),
        (ValueError, "same shape", BIAS.view(1, 1, 4), COUNTS.view(1, 1, 4), {}),
        (ValueError, "move one", BIAS, COUNTS.to("meta"), {}),
        (ValueError, "inverse_sqrt", BIAS, COUNTS, {"rule": "adam"}),
        (ValueError, "positive", BIAS, COUNTS, {"rate": 0}),
        (ValueError, "positive", BIAS, COUNTS, {"rate": -1e-3}),
        (ValueError, "positive", BIAS, COUNTS, {"rate": float("nan")}),
        (ValueError, "one number", BIAS, COUNTS, {"rate": torch.ones(2)}),
        (ValueError, "from 1", BIAS, COUNTS, {"step": 0}),
        (ValueError, "from 1", BIAS, COUNTS, {"step": torch.tensor(0)}),
        (ValueError, "one number", BIAS, COUNTS, {"step": torch.ones(2)}),
        (ValueError, "needs the number", BIAS, COUNTS, {"rule": "inverse"}),
    ],
)
def test_bad_updates(error, words, bias, counts, options):
    before = [torch.as_tensor(x).clone() for x in (bias, counts)]
    with pytest.raises(error, match=words):
        update_balance_bias_(bias, counts, **options)
    if not before[1].is_meta:
        assert torch.equal(torch.as_tensor(bias), before[0])


@pytest.mark.parametrize(
    ("words", "k", "options"),
    [
        ("1 to 5", 6, {}),
        ("1 to 5", 0, {}),
        ("equal length", 2, {"sequences": 5}),
        ("add up", 2, {"sequences": [6, 5]}),
        ("add up", 2, {"sequences": [-1, 13]}),
        ("sqrt_softplus", 2, {"score_fn": "relu"}),
        ("True for padding", 2, {"padding_mask": torch.ones(12)}),
        ("True for padding", 2, {"padding_mask": torch.ones(5, dtype=torch.bool)}),
    ],
)
def test_bad_losses(words, k, options):
    with pytest.raises(ValueError, match=words):
        sequence_balance_loss(torch.rand(12, 5), k, alpha=0.1, **options)
