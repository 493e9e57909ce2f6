"""The main job: one weight-entangled network on handwritten digits, from training to export.

Trains one set of weights for 27 subnets, compares each with the same subnet trained alone,
searches an architecture by gradient, and exports what it found to plain PyTorch.
"""

from weightshare.demo.checkpoint import CheckpointError
from weightshare.demo.run import Interrupted, run
from weightshare.demo.settings import Settings

__all__ = ["CheckpointError", "Interrupted", "Settings", "run"]
