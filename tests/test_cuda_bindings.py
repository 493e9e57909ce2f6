"""The CUDA bindings, run on the host: what the kernels' own tests there leave out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_host import _build, bindings

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(_build.compiler() is None, reason="no C++ compiler on this machine")


@pytest.mark.parametrize("op", bindings.ops())
def test_op_through_its_binding(op):
    """In a process of its own: a fault there, as on a GPU, would take this one along."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_ops.py"]
    command += ["--backend", "cuda-bindings", "-k", f"{op}- and not gradcheck"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert " passed" in done.stdout
