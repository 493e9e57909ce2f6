"""FSDP2 with replicated pools, on two processes, gives what one process gives."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("peft")
if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import fsdp_job


def test_processes_equal_one(tmp_path):
    path = tmp_path / "found"
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    job = [*run, fsdp_job.__file__, str(path)]
    done = subprocess.run(job, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(f"{path}.{rank}", weights_only=True) for rank in range(2)]
    for number, (mixed, _) in enumerate(fsdp_job.CASES):
        wanted = fsdp_job.step(fsdp_job.model(), mixed)
        for one, *others in zip(wanted, *[found[number] for found in ranks], strict=True):
            for name, value in one.items():
                for other in others:
                    torch.testing.assert_close(other[name], value)
                assert torch.equal(others[0][name], others[1][name])
        assert any(grad.abs().max() > 0 for grad in wanted[0].values())
