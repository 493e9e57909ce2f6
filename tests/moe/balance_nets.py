"""Small networks with layers to balance, ours and some written as those of transformers."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from weightshare.moe import MoE, Router

EXPERTS, K, DIM, TOKENS = 6, 2, 8, 10


class Ours(nn.Module):
    """Our router; its gates scale the tokens, so that it takes part in the gradient."""

    def __init__(self, experts=EXPERTS):
        super().__init__()
        self.router = Router(DIM, experts, K)

    def forward(self, x):
        routing, _ = self.router(x)
        return x * routing.gates.sum(1, keepdim=True).to(x.dtype) + routing.gates[:, :1]


class Gate(nn.Module):
    """As transformers writes them."""

    def __init__(self, experts=EXPERTS):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, DIM))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(experts))

    def forward(self, x):
        scores = (x @ self.weight.to(x.dtype).T).sigmoid().float()
        chosen = (scores + self.e_score_correction_bias).topk(K, sorted=False).indices
        return scores, scores.gather(1, chosen), chosen


class Scaling(nn.Module):
    def forward(self, x, top_k_index, top_k_weights):
        return x * top_k_weights.sum(1, keepdim=True).to(x.dtype)


class Theirs(nn.Module):
    """A block with a bias that nothing updates; ``experts`` is a module, or a list of them."""

    def __init__(self, experts=EXPERTS, listed=False):
        super().__init__()
        self.gate, self.listed = Gate(experts), listed
        self.experts = nn.ModuleList([Scaling()]) if listed else Scaling()

    def forward(self, x):
        _, weights, chosen = self.gate(x)
        return (self.experts[0] if self.listed else self.experts)(x, chosen, weights)


class Net(nn.Module):
    """A linear layer before a layer with experts, checkpointed or not."""

    def __init__(self, layer, reentrant=None):
        super().__init__()
        self.linear, self.layer, self.reentrant = nn.Linear(DIM, DIM), layer, reentrant

    def body(self, x):
        return self.layer(self.linear(x)).tanh()

    def forward(self, x, attention_mask=None):
        shape, x = x.shape, x.flatten(0, -2)
        if self.reentrant is None:
            return self.body(x).view(shape)
        options = dict(use_reentrant=self.reentrant, preserve_rng_state=False)
        return checkpoint(self.body, x, **options).view(shape)


KINDS = {
    "ours": Ours,
    "moe": lambda: MoE(DIM, 4, EXPERTS, K),
    "theirs": Theirs,
    "listed": lambda: Theirs(listed=True),
}


def tokens(*shape):
    return torch.randn(*(shape or (TOKENS,)), DIM, requires_grad=True)


def pending(balancer):
    return [int(layer.counts.sum()) for layer in balancer._layers]
