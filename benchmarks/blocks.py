"""Whole transformer blocks: a random subnet per step, a mixture, and one compiled graph for all."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from weightshare.compiling import one_graph
from weightshare.nn import MLP, MultiheadAttention
from weightshare.nn.norm import LayerNorm
from weightshare.space import ArchConfig, SearchSpace

from weightshare_kernels._cases import Case, Inputs, Maker, Workload

HEAD = 64


class Block(nn.Module):
    """A pre-norm transformer block; :meth:`export` is the active subnet as plain layers."""

    def __init__(self, norm1: nn.Module, attn: nn.Module, norm2: nn.Module, mlp: nn.Module):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = norm1, attn, norm2, mlp

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """Tokens ``[batch, tokens, embed]``."""
        x = x + self.attn(self.norm1(x), is_causal=causal)
        return x + self.mlp(self.norm2(x))

    def export(self) -> Block:
        """A copy of the active part."""
        return Block(*(child.export() for child in self.children()))


def elastic(space: SearchSpace, statistics: str, dtype: torch.dtype, device: str) -> Block:
    """A block whose sizes are dims of a space."""
    e, kind = space["embed"], {"dtype": dtype, "device": device}
    return Block(
        LayerNorm(e, statistics=statistics, **kind),
        MultiheadAttention(e, space["heads"], HEAD, **kind),
        LayerNorm(e, statistics=statistics, **kind),
        MLP(e, e * space["ratio"], **kind),
    )


def inputs_of(
    choices: Mapping[str, list], lead: tuple[int, int], statistics: str, archs: int
) -> Callable[[Maker], Inputs]:
    """Tokens of the largest width, the block and its parameters, and random architectures."""

    def make(m: Maker) -> Inputs:
        torch.manual_seed(0)
        space = SearchSpace(**choices)
        block = elastic(space, statistics, m.dtype, m.device)
        draw = random.Random(0)
        return {
            "x": m.randn(*lead, max(choices["embed"])),
            "block": block,
            "space": space,
            "archs": [space.sample(draw) for _ in range(archs)],
            **{name.replace(".", "_"): p for name, p in block.named_parameters()},
        }

    return make


# -- A random subnet per step ------------------------------------------------------------------


def sliced(x: Tensor, arch: Mapping, p: Mapping[str, Tensor], joined: bool = False) -> Tensor:
    """A subnet as eager PyTorch slices it: views of the weights and ``F.linear``.

    ``joined`` copies the rows of q, k and v together, for one product instead of three.
    """
    e, n = arch["embed"], arch["heads"] * HEAD
    hidden = int(e * arch["ratio"])
    y = F.layer_norm(x, (e,), p["norm1_weight"][:e], p["norm1_bias"][:e])
    weight = p["attn_qkv_weight"].unflatten(0, (3, -1))[:, :n, :e]
    bias = p["attn_qkv_bias"].unflatten(0, (3, -1))[:, :n]
    if joined:
        y = F.linear(y, weight.flatten(0, 1), bias.flatten())
        q, k, v = y.unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
    else:
        q, k, v = (
            F.linear(y, weight[i], bias[i]).unflatten(-1, (-1, HEAD)).transpose(1, 2)
            for i in range(3)
        )
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + F.linear(y, p["attn_proj_weight"][:e, :n], p["attn_proj_bias"][:e])
    y = F.layer_norm(x, (e,), p["norm2_weight"][:e], p["norm2_bias"][:e])
    y = F.gelu(F.linear(y, p["mlp_fc1_weight"][:hidden, :e], p["mlp_fc1_bias"][:hidden]))
    return x + F.linear(y, p["mlp_fc2_weight"][:e, :hidden], p["mlp_fc2_bias"][:e])


def each_subnet(
    x: Tensor, archs: list[ArchConfig], run: Callable[[int, Tensor], Tensor], leaves: list[Tensor]
) -> Workload:
    """One training step per architecture; ``run`` takes its number and the tokens.

    Each step drops the gradients of the one before, as training does.
    """
    xs = [x.detach()[..., : arch["embed"]].contiguous().requires_grad_() for arch in archs]
    grads = [torch.randn_like(x) for x in xs]

    def forward() -> list[Tensor]:
        return [run(number, x) for number, x in enumerate(xs)]

    def step() -> None:
        for number, (x, grad) in enumerate(zip(xs, grads, strict=True)):
            for leaf in (x, *leaves):
                leaf.grad = None
            run(number, x).backward(grad)

    return Workload(forward, [*xs, *leaves], step)


def ours(inputs: Inputs) -> Workload:
    """Our block; the subnet is switched within the step."""
    block, space, archs = inputs["block"], inputs["space"], inputs["archs"]

    def run(number: int, x: Tensor) -> Tensor:
        space.activate(archs[number])
        return block(x)

    return each_subnet(inputs["x"], archs, run, list(block.parameters()))


def eager(inputs: Inputs, joined: bool = False) -> Workload:
    """Views of the same parameters."""
    archs, leaves = inputs["archs"], list(inputs["block"].parameters())
    return each_subnet(inputs["x"], archs, lambda n, x: sliced(x, archs[n], inputs, joined), leaves)


def alone(inputs: Inputs) -> list[Block]:
    """The same subnets as plain blocks with weights of their own."""
    blocks = []
    for arch in inputs["archs"]:
        inputs["space"].activate(arch)
        blocks.append(inputs["block"].export())
    return blocks


def dense(inputs: Inputs) -> Workload:
    """The floor: stand-alone blocks, built beforehand."""
    blocks = alone(inputs)
    leaves = [p for block in blocks for p in block.parameters()]
    return each_subnet(inputs["x"], inputs["archs"], lambda n, x: blocks[n](x), leaves)


def subnets(x: Tensor, archs: list[ArchConfig], run: Callable[[ArchConfig, Tensor], Tensor]):
    """Outputs of all subnets in one tensor, for the check."""
    return torch.cat([run(arch, x[..., : arch["embed"]]).flatten() for arch in archs])


def call_subnets(x, block, space, archs, **parameters) -> Tensor:
    def run(arch: ArchConfig, x: Tensor) -> Tensor:
        space.activate(arch)
        return block(x)

    return subnets(x, archs, run)


def define_subnets(x, block, space, archs, **parameters) -> Tensor:
    return subnets(x, archs, lambda arch, x: sliced(x, arch, parameters))


def flops_of(embed: int, heads: int, ratio: float, lead: tuple[int, int]) -> int:
    """Multiplications and additions of one forward pass."""
    rows, n, hidden = lead[0] * lead[1], heads * HEAD, int(embed * ratio)
    return 2 * rows * (4 * embed * n + 2 * embed * hidden + 2 * lead[1] * n)


# -- A mixture of all choices ------------------------------------------------------------------


def pad_and_sum(weight: Tensor, choices: list[tuple[int, ...]], alpha: Tensor) -> Tensor:
    """``sum_k alpha_k Pad(W[choice_k])`` over the last dimensions, each term materialised."""
    terms = []
    for a, choice in zip(alpha, choices, strict=True):
        part = weight[(..., *(slice(n) for n in choice))]
        short = [w - n for w, n in zip(weight.shape[::-1], reversed(choice), strict=False)]
        terms.append(a * F.pad(part, [v for s in short for v in (0, s)]))
    return sum(terms)  # type: ignore[return-value]


def mixed_block(x, space, embed, heads, ratio, p, causal=True) -> Tensor:
    """The block on mixed weights, as the papers' code computes them."""
    es, hs, rs = (space[name].choices for name in ("embed", "heads", "ratio"))
    by_heads = [(h * HEAD, e) for h in hs for e in es], (heads[:, None] * embed).flatten()
    by_ratio = [(int(e * r), e) for e in es for r in rs], (embed[:, None] * ratio).flatten()
    swapped = [(e, n) for n, e in by_ratio[0]], by_ratio[1]
    of_heads = [(h * HEAD,) for h in hs], heads
    of_embed = [(e,) for e in es], embed

    def norm(x: Tensor, name: str) -> Tensor:
        affine = (pad_and_sum(p[f"{name}_{kind}"], *of_embed) for kind in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:], *affine)

    weight = pad_and_sum(p["attn_qkv_weight"].unflatten(0, (3, -1)), *by_heads).flatten(0, 1)
    bias = pad_and_sum(p["attn_qkv_bias"].unflatten(0, (3, -1)), *of_heads).flatten()
    y = F.linear(norm(x, "norm1"), weight, bias)
    q, k, v = y.unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
    proj = [(e, n) for n, e in by_heads[0]], by_heads[1]
    bias = pad_and_sum(p["attn_proj_bias"], *of_embed)
    x = x + F.linear(y, pad_and_sum(p["attn_proj_weight"], *proj), bias)
    bias = pad_and_sum(p["mlp_fc1_bias"], [(n,) for n, _ in by_ratio[0]], by_ratio[1])
    y = F.linear(norm(x, "norm2"), pad_and_sum(p["mlp_fc1_weight"], *by_ratio), bias)
    bias = pad_and_sum(p["mlp_fc2_bias"], [(e,) for e, _ in swapped[0]], swapped[1])
    return x + F.linear(F.gelu(y), pad_and_sum(p["mlp_fc2_weight"], *swapped), bias)


def mixture_inputs(choices: Mapping[str, list], lead: tuple[int, int]):
    """As :func:`inputs_of`, with mixture weights instead of architectures."""
    make_block = inputs_of(choices, lead, "max", 0)

    def make(m: Maker) -> Inputs:
        inputs = make_block(m)
        del inputs["archs"]
        return inputs | {name: m.alpha(len(values)) for name, values in choices.items()}

    return make


def call_mixture(x, block, space, embed, heads, ratio, **parameters) -> Tensor:
    space.mix({"embed": embed, "heads": heads, "ratio": ratio})
    return block(x, causal=True)


def define_mixture(x, block, space, embed, heads, ratio, **parameters) -> Tensor:
    return mixed_block(x, space, embed, heads, ratio, parameters)


def largest(inputs: Inputs) -> Workload:
    """The floor: a plain block of the largest sizes."""
    inputs["space"].mix(None)
    inputs["space"].activate(inputs["space"].largest())
    block, x = inputs["block"].export(), inputs["x"].detach().clone().requires_grad_()
    return Workload(lambda: block(x, causal=True), [x, *block.parameters()])


def of_all(function: Callable[..., Tensor], inputs: Inputs) -> Workload:
    """A workload whose leaves are all inputs that want a gradient."""
    found = [v for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad]
    return Workload(lambda: function(**inputs), found)


# -- One compiled graph ------------------------------------------------------------------------


def compiled(inputs: Inputs) -> Workload:
    """Our block, compiled once for all subnets; a few of them are timed.

    Raises:
        AssertionError: it took more than one graph.
    """
    archs, block, space = inputs["archs"], inputs["block"], inputs["space"]
    one_graph()
    fast = torch.compile(block, dynamic=True, fullgraph=True)

    def run(number: int, x: Tensor) -> Tensor:
        space.activate(archs[number])
        return fast(x)

    graphs = counters["stats"]["unique_graphs"]
    for number, arch in enumerate(archs):
        x = inputs["x"].detach()[..., : arch["embed"]].contiguous().requires_grad_()
        run(number, x).sum().backward()
    graphs = counters["stats"]["unique_graphs"] - graphs
    assert graphs == 1, f"{graphs} graphs for {len(archs)} subnets"
    return each_subnet(inputs["x"], archs[:TIMED], run, list(block.parameters()))


def static(inputs: Inputs) -> Workload:
    """The same, compiled for every subnet apart, with its shapes as constants."""
    archs = inputs["archs"][:TIMED]
    twins = []
    for arch in archs:
        inputs["space"].activate(arch)
        twin = copy.deepcopy(inputs["block"])  # with dims of its own, which nobody switches
        twins.append(torch.compile(twin, dynamic=False, fullgraph=True))
        x = inputs["x"].detach()[..., : arch["embed"]].contiguous().requires_grad_()
        with torch.compiler.config.patch(dynamic_sources=""):
            twins[-1](x).sum().backward()
    leaves = [p for twin in twins for p in twin.parameters()]
    return each_subnet(inputs["x"], archs, lambda n, x: twins[n](x), leaves)


TIMED = 4  # of the compiled subnets: the baseline compiles each for itself
AUTOFORMER_S = {"embed": [320, 384, 448], "heads": [5, 6, 7], "ratio": [3, 3.5, 4]}
NANOGPT = {"embed": [384, 576, 768], "heads": [6, 8, 12], "ratio": [2, 3, 4]}


def _random_subnets(batch: int, bars: Mapping[str, float]) -> Case:
    lead = (batch, 197)
    return Case(
        f"autoformer_s_random_subnets_{batch}x197",
        inputs_of(AUTOFORMER_S, lead, "slice", 4),
        call_subnets,
        define_subnets,
        {"dense": dense, "eager": eager, "eager_joined": partial(eager, joined=True)},
        ours=ours,
        flops=4 * flops_of(384, 6, 3.5, lead),
        bars=bars,
        tier="bench",
    )


def _mixture(batch: int, bars: Mapping[str, float]) -> Case:
    lead = (batch, 224)
    return Case(
        f"nanogpt_mixture_{batch}x224",
        mixture_inputs(NANOGPT, lead),
        call_mixture,
        define_mixture,
        {"dense": largest, "pad_and_sum": partial(of_all, define_mixture)},
        ours=partial(of_all, call_mixture),
        flops=flops_of(768, 12, 4, lead),
        bars=bars,
        tier="bench",
    )


CASES = [
    _random_subnets(1, {"eager": 1.25, "dense": 1 / 1.07}),
    _random_subnets(8, {"eager": 1.0, "dense": 1 / 1.03}),
    _mixture(12, {"pad_and_sum": 4.0, "saved:pad_and_sum": 0.4}),
    _mixture(4, {"saved:pad_and_sum": 0.4}),
    Case(
        "autoformer_s_compiled_50_subnets_1x197",
        inputs_of(AUTOFORMER_S, (1, 197), "slice", 50),
        call_subnets,
        define_subnets,
        {"static": static},
        ours=compiled,
        flops=TIMED * flops_of(384, 6, 3.5, (1, 197)),
        bars={"static": 0.95},
        tier="bench",
    ),
]
