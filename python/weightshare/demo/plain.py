"""A residual network in plain PyTorch; this file needs nothing but torch.

The demo writes a copy of it beside the subnet it exports: ``load("subnet.pt")`` is all it takes.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """Residual multilayer perceptron: stem, ``depth`` blocks ``x + relu(fc(norm(x)))``, head.

    Args:
        features: size of the input.
        classes: size of the output.
        width: size of the residual stream.
        depth: number of blocks.

    Shape:
        Input ``[..., features]``, output (logits) ``[..., classes]``.
    """

    def __init__(self, features: int, classes: int, width: int, depth: int):
        super().__init__()
        self.config = {"features": features, "classes": classes, "width": width, "depth": depth}
        self.stem = nn.Linear(features, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in range(depth))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[..., classes]`` of inputs ``[..., features]``."""
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x)).relu()
        return self.head(self.norm(x))


def load(path: str | Path) -> Network:
    """Rebuild an exported network from its file: ``{"config": ..., "state": ...}``."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    network = Network(**saved["config"])
    network.load_state_dict(saved["state"])
    return network.eval()


if __name__ == "__main__":
    found = load(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("subnet.pt"))
    count = sum(p.numel() for p in found.parameters())
    print(f"{found}\n{found.config}, {count:,} parameters")
