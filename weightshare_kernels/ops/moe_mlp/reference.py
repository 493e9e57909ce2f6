"""The experts of a sparse MoE in plain PyTorch: the definition of the op."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from weightshare_kernels import _checks

GATED = {"swiglu": True, "gelu": False, "relu2": False}


def activate(h: Tensor, activation: str) -> Tensor:
    """Hidden units ``[..., f]`` of pre-activations, gate and up side by side where gated."""
    if activation == "swiglu":
        gate, up = h.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up
    if activation == "gelu":
        return torch.nn.functional.gelu(h)
    return torch.relu(h).square()


def up_rows(weight: Tensor, activation: str, width: int) -> list[Tensor]:
    """Rows of one expert's up projection that a width uses, block by block (gate, then up)."""
    blocks = weight.chunk(2) if GATED[activation] else (weight,)
    return [block[:width] for block in blocks]


def widths_of(widths: Tensor | None, width: int, experts: int) -> list[int]:
    """Width of every expert, within 0..width."""
    return [width] * experts if widths is None else widths.clamp(0, width).tolist()


def define(x, gate_up, down, gates, offsets, permutation, widths, width, activation):
    """``sum_j gate_tj * expert_tj(x_t)``, differentiable; and the pre-activations ``h``."""
    k = gates.shape[1]
    bounds = offsets.tolist()
    kind = _checks.accumulate_dtype(x.dtype)
    y = torch.zeros(x.shape, dtype=kind, device=x.device)
    hidden = [x.new_empty(0, width * (2 if GATED[activation] else 1))]
    each = widths_of(widths, width, gate_up.shape[0])
    ups, downs = gate_up.unbind(), down.unbind()  # one gradient of the whole, not one per expert
    for expert, (start, stop) in enumerate(itertools.pairwise(bounds)):
        pairs, used = permutation[start:stop], each[expert]
        tokens = pairs // k
        parts = [
            x[tokens] @ rows.to(x.dtype).t() for rows in up_rows(ups[expert], activation, used)
        ]
        out = activate(torch.cat(parts, -1), activation) @ downs[expert][:, :used].to(x.dtype).t()
        y = y.index_add(0, tokens, gates.flatten()[pairs, None].to(kind) * out.to(kind))
        pad = torch.nn.functional.pad
        hidden.append(torch.cat([pad(part, (0, width - used)) for part in parts], -1))
    rest = permutation.shape[0] - bounds[-1]
    hidden.append(x.new_zeros(rest, hidden[0].shape[1]))
    return y.to(x.dtype), torch.cat(hidden)


def forward(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gates: Tensor,
    offsets: Tensor,
    permutation: Tensor,
    inverse: Tensor,
    widths: Tensor | None,
    width: int,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Output ``[T, d]`` and, if saved, ``h [T*k, 2*width]`` in the order of the permutation."""
    y, h = define(x, gate_up, down, gates, offsets, permutation, widths, width, activation)
    return y, h if save else x.new_empty(0)


def backward_(
    gate_up_buffer: Tensor | None,
    down_buffer: Tensor | None,
    grad: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    h: Tensor,
    gates: Tensor,
    offsets: Tensor,
    permutation: Tensor,
    inverse: Tensor,
    widths: Tensor | None,
    width: int,
    activation: str,
    add_gate_up: bool,
    add_down: bool,
    wants_x: bool,
) -> tuple[Tensor, Tensor]:
    """Adds to (or writes) the weights' gradients in place; returns those of x and the gates."""
    k, bounds = gates.shape[1], offsets.tolist()
    kind = _checks.accumulate_dtype(x.dtype)
    each = widths_of(widths, width, gate_up.shape[0])
    blocks = 2 if GATED[activation] else 1
    dx = torch.zeros(grad.shape, dtype=kind, device=x.device)
    dgates = torch.zeros_like(gates.flatten())
    for buffer, add in ((gate_up_buffer, add_gate_up), (down_buffer, add_down)):
        if buffer is not None and not add:
            buffer.zero_()
    for expert, (start, stop) in enumerate(itertools.pairwise(bounds)):
        pairs, used = permutation[start:stop], each[expert]
        tokens, gate = pairs // k, gates.flatten()[permutation[start:stop], None].to(kind)
        g = grad[tokens]
        with torch.enable_grad():
            parts = [part[:, :used] for part in h[start:stop].chunk(blocks, -1)]
            before = torch.cat(parts, -1).requires_grad_()
            hidden = activate(before, activation)
        across = g @ down[expert][:, :used].to(g.dtype)  # the gradient of hidden, less the gate
        dgates[pairs] = (across.to(kind) * hidden.detach().to(kind)).sum(-1).to(gates.dtype)
        scaled = (gate * across.to(kind)).to(g.dtype)
        (dh,) = torch.autograd.grad(hidden, before, scaled)
        if down_buffer is not None:
            weighted = (gate * hidden.detach().to(kind)).to(g.dtype)
            down_buffer[expert][:, :used] += g.t() @ weighted
        rows = up_rows(gate_up[expert], activation, used)
        for part, weight in zip(dh.chunk(blocks, -1), rows, strict=True):
            if wants_x:
                dx.index_add_(0, tokens, (part @ weight.to(part.dtype)).to(kind))
        if gate_up_buffer is not None:
            target = up_rows(gate_up_buffer[expert], activation, used)
            for part, to in zip(dh.chunk(blocks, -1), target, strict=True):
                to += part.t() @ x[tokens]
    return dx.to(grad.dtype) if wants_x else grad.new_empty(0), dgates.view(gates.shape)
