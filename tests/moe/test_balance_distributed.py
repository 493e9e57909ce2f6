"""Two processes balance as one does, and one that stays away is an error, not a hang."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import balance_job

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="this torch has no torch.distributed"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found, from one ``torchrun``."""
    path = tmp_path_factory.mktemp("job") / "found"
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    job = [*run, balance_job.__file__, str(path)]
    done = subprocess.run(job, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{path}.{rank}", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone():
    """One process with all tokens."""
    return balance_job.train(balance_job.make(), lambda x, step: [x])


@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp"])
def test_two_processes_equal_one(kind, found, alone):
    """In ``plain`` a rank has no token in one step; in ``ddp`` all passes of a step broadcast."""
    for rank in found:
        buffers, state = rank[kind]
        biases = {n.removeprefix("module."): b for n, b in buffers.items() if "bias" in n}
        assert len(biases) == 3
        assert all(torch.equal(biases[name], alone[0][name]) for name in biases)
        assert str(state) == str(alone[1])


def test_a_sharded_bias_is_refused(found):
    assert all("ignored_params" in rank["sharded"] for rank in found)


def test_without_a_group_each_goes_its_own_way(found):
    biases = [rank["alone"][0]["first.balance_bias"] for rank in found]
    assert not torch.equal(*biases)


def test_one_all_reduce_per_step_serves_all_layers(found):
    assert [rank["reduces"] for rank in found] == [balance_job.STEPS] * 2


def test_the_function_reduces_a_copy(found):
    """Together the counts are 2, 4, 7: of mean 13 / 3."""
    for number, rank in enumerate(found):
        bias, counts = rank["function"]
        assert bias.tolist() == [0.5, 0.5, -0.5]
        assert counts.tolist() == [1, 2, 3 + number]


def test_a_rank_that_stays_away_is_an_exception(found):
    message, seconds, kept, bias = found[0]["away"]
    assert "every rank of the group" in message and "timeout" in message
    assert seconds < 20
    assert kept and not bias.any()  # nothing was lost: it can be tried again
