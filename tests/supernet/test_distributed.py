"""Sandwich steps of two processes give what one process gives with the whole batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import sandwich_job

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="this torch has no torch.distributed"
)


KINDS = ("ddp", "fsdp", "ddp_norm")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process of each kind found, from one ``torchrun``."""
    path = tmp_path_factory.mktemp("job") / "found"
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    job = [*run, sandwich_job.__file__, str(path), *KINDS]
    done = subprocess.run(job, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return {
        kind: [torch.load(f"{path}.{kind}.{rank}", weights_only=True) for rank in range(2)]
        for kind in KINDS
    }


@pytest.fixture(scope="module")
def alone():
    return sandwich_job.train(sandwich_job.make(), *sandwich_job.batch())


def test_the_job_skips_layers_where_it_matters(alone):
    """Last in a step, so that under DDP the pass that talks would miss their gradients."""
    assert any(archs[-1]["depth"] < 3 for archs in alone["drawn"][:-1])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one(kind, found, alone):
    """``find_unused_parameters`` is left False, though most subnets skip layers."""
    ranks = found[kind]
    assert ranks[0]["drawn"] == ranks[1]["drawn"] == alone["drawn"]
    for rank in ranks:
        torch.testing.assert_close(rank["grads"], alone["grads"])
        torch.testing.assert_close(rank["weights"], alone["weights"])
    mean = (ranks[0]["losses"] + ranks[1]["losses"]) / 2
    torch.testing.assert_close(mean, alone["losses"])


def test_batch_norm_and_gradients_that_are_views(found):
    """Running statistics change in place between the first subnet's passes, and it is fine."""
    first, second = found["ddp_norm"]
    torch.testing.assert_close(first["grads"], second["grads"], rtol=0, atol=0)
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    assert not torch.equal(first["losses"], second["losses"])  # each has data of its own


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_two_processes(kind, found):
    for rank in found[kind]:
        torch.testing.assert_close(rank["loaded"], rank["weights"], rtol=0, atol=0)
