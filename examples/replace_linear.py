"""Make an existing PyTorch model elastic by one line per layer.

A model with plain ``nn.Linear`` layers becomes a supernet: the same parameters, the same state
dict, and a hidden width that can be chosen at every call. Run it (a few seconds)::

    python examples/replace_linear.py
"""

import torch
from torch import nn
from torch.nn import functional as F
from weightshare.nn import SlicedLinear

WIDTHS = (256, 128, 64, 32)


def elastic(model: nn.Module) -> nn.Module:
    """Replace every ``nn.Linear``; parameters are taken over, not copied."""
    for name, child in model.named_children():
        if type(child) is nn.Linear:
            setattr(model, name, SlicedLinear.from_linear(child))  # the one line
        else:
            elastic(child)
    return model


def set_width(model: nn.Sequential, width: int) -> nn.Sequential:
    """Choose the hidden width of a two-layer network."""
    model[0].set_active(out=width)
    model[2].set_active(in_=width)
    return model


def spirals(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points ``[count, 2]`` on two interleaved spirals, and which one each is on."""
    label = torch.arange(count) % 2
    turn = 3 * torch.rand(count).sqrt() * torch.pi
    angle = turn + label * torch.pi
    points = torch.stack([turn * angle.cos(), turn * angle.sin()], 1) / (3 * torch.pi)
    return points + 0.01 * torch.randn(count, 2), label


def main() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(2, 256), nn.ReLU(), nn.Linear(256, 2))
    with torch.no_grad():
        plain[0].weight.mul_(8)  # the spirals are finer than the default weights can see
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)  # made before: it goes on working
    model = elastic(plain)
    print(model)

    for _ in range(600):
        x, y = spirals(256)
        # All widths in one step: the weight gradients of all slices are summed in one buffer.
        loss = sum(F.cross_entropy(set_width(model, width)(x), y) for width in WIDTHS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    x, y = spirals(2000)
    for width in WIDTHS:
        set_width(model, width)
        small = nn.Sequential(model[0].export(), nn.ReLU(), model[2].export())
        accuracy = (small(x).argmax(1) == y).float().mean().item()
        count = sum(p.numel() for p in small.parameters())
        print(f"width {width:3}: accuracy {100 * accuracy:5.1f} %, {count} parameters on its own")


if __name__ == "__main__":
    main()
