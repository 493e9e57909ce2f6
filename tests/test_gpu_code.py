"""GPU kernels compiled ahead of time, without a GPU: what a bad kernel would show is gated here."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

from weightshare_kernels import _gpu_code, _triton

RESULTS = Path(__file__).parent.parent / "benchmarks/results/gpu_static.json"
# The report covers both dtypes on all targets; here the costlier half is sampled.
GRID = [(torch.bfloat16, name) for name in _gpu_code.TARGETS] + [(torch.float32, "sm_90")]
CASES = [
    pytest.param(example, dtype, _gpu_code.TARGETS[name], id=f"{name}-{dtype}-{example.name}")
    for dtype, name in GRID
    for example in _gpu_code.examples(dtype)
]


@pytest.mark.parametrize(("example", "dtype", "target"), CASES)
def test_triton_kernel(example, dtype, target):
    launches = _gpu_code.record(example.call, target)
    assert launches, "the example launched no kernel"
    for launch in launches:
        binary = _gpu_code.compile_for(launch, target)
        used = binary.resources
        assert used.spilled == 0, f"{launch.name} spills {used.spilled} bytes a thread"
        assert used.shared <= target.shared_per_block, launch.name
        assert used.blocks(target) >= 1, launch.name
    main = _gpu_code.compile_for(launches[0], target)
    if example.bound == "memory":
        assert main.wide_loads, f"{launches[0].name} has no 16-byte loads"
    elif dtype == torch.bfloat16:
        wanted = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}[target.name]
        assert main.matrix == wanted, f"{launches[0].name} multiplies with {main.matrix}"


@pytest.mark.skipif(_gpu_code.nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("target", _gpu_code.TARGETS.values(), ids=_gpu_code.TARGETS)
@pytest.mark.parametrize("source", _gpu_code.cuda_sources(), ids=lambda path: path.stem)
def test_cuda_kernel(source, target):
    kernels = _gpu_code.compile_cuda(source, target)
    assert kernels
    for name, binary in kernels.items():
        assert binary.resources.spilled == 0, f"{name} spills"
        assert binary.resources.shared <= target.shared_per_block, name
        assert binary.resources.blocks(target) >= 1, name


def test_blocks_of_any_alignment():
    """Blocks of k that start on multiples of 8 are read in 16 bytes, the others by the element."""
    from weightshare_kernels.ops.entangled_linear.triton import forward

    x, weight = (torch.empty(n, 256, dtype=torch.bfloat16, device="meta") for n in (8, 512))
    rows, cols = (torch.empty(n, dtype=torch.int32, device="meta") for n in (512, 256))
    grid = torch.empty(4, 3, device="meta")
    target = _gpu_code.TARGETS["sm_90"]
    (launch, *_) = _gpu_code.record(lambda: forward(x, weight, None, grid, rows, cols))
    ptx = _gpu_code.compile_for(launch, target).ptx
    asynchronous = len(re.findall(r"cp\.async\.c[ag]\.shared\.global", ptx))
    assert asynchronous, "the aligned branch is not pipelined"
    assert _gpu_code.wide_loads(ptx) == asynchronous, "the other branch reads 16 bytes, too"
    assert re.search(r"ld\.global(\.L1\S*)?\.b16", ptx)


def test_sizes_share_a_binary():
    """Widths of one divisibility and all token counts specialise alike."""

    def forms(tokens, out):
        from weightshare_kernels.ops.sliced_linear.triton import forward

        x = torch.empty(tokens, 320, device="meta")
        index = torch.empty(out, dtype=torch.int64, device="meta")
        weight = torch.empty(640, 320, device="meta")
        (launch,) = _gpu_code.record(lambda: forward(x, weight, None, index, None))
        return repr(_gpu_code.specialise(launch))

    assert forms(197, 320) == forms(976, 480) == forms(1000, 16)


def test_small_kernels_share_a_binary():
    """A mixture's number of blocks is a run-time argument."""
    from weightshare_kernels.ops.entangled_linear.triton import forward

    def forms(blocks):
        x, weight = (torch.empty(n, 256, device="meta") for n in (8, 256))
        classes = torch.empty(256, dtype=torch.int32, device="meta")
        grid = torch.empty(*blocks, device="meta")
        launch, *_ = _gpu_code.record(lambda: forward(x, weight, None, grid, classes, classes))
        signature, constants, _ = _gpu_code.specialise(launch)
        return signature, {k: str(v) for k, v in constants.items()}

    assert forms((4, 3)) == forms((7, 5))


def test_wide_loads_are_told_from_narrow_ones():
    assert _gpu_code.wide_loads("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];") == 1
    assert _gpu_code.wide_loads("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;")
    assert not _gpu_code.wide_loads("ld.global.b16 %rs1, [%rd1];")
    assert not _gpu_code.wide_loads(
        "cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;"
    )


def test_occupancy_by_hand():
    """128 registers, 8 warps, 72 KiB a block: registers and memory of a Hopper allow 2."""
    used = _gpu_code.Resources(registers=128, spilled=0, shared=72 * 1024, warps=8)
    assert used.blocks(_gpu_code.TARGETS["sm_90"]) == 2
    alone = _gpu_code.Resources(registers=32, spilled=0, shared=200 * 1024, warps=4)
    assert alone.blocks(_gpu_code.TARGETS["sm_90"]) == 1


def test_tuned_configurations_are_read(tmp_path, monkeypatch):
    row = {"kernel": "product", "itemsize": 2, "tile": {"m": 128, "n": 256, "k": 64, "warps": 8}}
    (tmp_path / "some_gpu_80gb.json").write_text(json.dumps({"tiles": [row]}))
    monkeypatch.setattr(_triton, "_CONFIGS", tmp_path)
    found = _triton._tuned.__wrapped__("Some GPU 80GB")
    assert found == {("product", 2): _triton.Tile(128, 256, 64, warps=8)}
    assert _triton._tuned.__wrapped__("Another GPU") == {}


def test_committed_table_is_of_these_kernels():
    """The static table lists every example of today and no spill."""
    rows = json.loads(RESULTS.read_text())["triton"]
    listed = {(row["launch"], row["dtype"]) for row in rows}
    for dtype in (torch.bfloat16, torch.float32):
        for example in _gpu_code.examples(dtype):
            assert (example.name, str(dtype).removeprefix("torch.")) in listed, "make gpu-report"
    assert not [row for row in rows if row["spilled"]]
    assert not re.search("nan|inf", RESULTS.read_text().lower())
