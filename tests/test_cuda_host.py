"""The shim that runs CUDA kernels on the host, and what nvcc says about the kernels."""

import ctypes
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_host
import pytest
import torch
from cuda_host import _build, routing

from weightshare_kernels.ops.entangle import reference
from weightshare_kernels.ops.route import reference as routing_reference

pytestmark = pytest.mark.skipif(_build.compiler() is None, reason="no C++ compiler on this machine")
ROOT = Path(__file__).parents[1]
THREADS = 96  # of a block of shim.cpp


def shim(name, *arguments):
    _build.call(getattr(_build.load("shim"), f"run_{name}"), *arguments)


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def order(request):
    """Run the threads of a block from first to last, and from last to first."""
    for name in ("shim", "entangle", "route"):
        _build.load(name).run_descending(int(request.param))
    yield request.param
    for name in ("shim", "entangle", "route"):
        _build.load(name).run_descending(0)


# ---- the shim: correct kernels ------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 5])
def test_block_sum(order, blocks):
    values = torch.arange(1000, dtype=torch.float32)
    out = torch.full((blocks,), float("nan"))
    shim("block_sum", pointer(values), pointer(out), 1000, blocks)
    index = torch.arange(1000) // THREADS % blocks
    assert torch.equal(out, torch.zeros(blocks).index_add(0, index, values))


def test_missing_barrier_shows(order):
    """Poisoned shared memory makes a race visible in at least one order; here in the first."""
    out = torch.zeros(1)
    shim("block_sum_without_barrier", pointer(out))
    assert torch.isnan(out).item() is not order


@pytest.mark.parametrize("count", [1, 95, 96, 97, 1000])
def test_every_index_once(order, count):
    times = torch.zeros(count + 1, dtype=torch.int32)
    shim("visit", pointer(times), count, -(-count // THREADS))
    assert times.tolist() == [1] * count + [0]


def test_atomics(order):
    out = torch.tensor([0, 0, 500, 0, -1, 0, 0], dtype=torch.int32)
    shim("atomics", pointer(out))
    total, largest, smallest, bits, cleared, exchanged, compared = out.tolist()
    assert (total, largest, smallest) == (2 * 2 * THREADS, THREADS - 1, 0)
    assert (bits, cleared, exchanged) == (255, -256, 7)
    # Ascending, each thread finds its own number and raises it; descending, only thread 0 does.
    assert compared == (2 if order else THREADS)


@pytest.mark.parametrize("width", [8, 32])
def test_shuffles_and_votes(order, width):
    out = torch.zeros(THREADS, 7, dtype=torch.int32)
    shim("warp_results", pointer(out), width)
    thirds = sum(1 << lane for lane in range(0, 32, 3))
    for thread, got in enumerate(out.tolist()):
        lane = thread % 32
        first = lane // width * width
        up = lane - 3 if lane - 3 >= first else lane
        down = lane + 3 if lane + 3 < first + width else lane
        assert got[:4] == [first + 1, up, down, lane ^ 5]
        assert got[4] & 0xFFFFFFFF == thirds
        assert got[5:] == [1, 1]


def test_matches_and_integer_reductions(order):
    out = torch.zeros(64, 3, dtype=torch.int32)
    _build.call(_build.load("route").run_warp_integers, pointer(out))
    for thread, (match, largest, smallest) in enumerate(out.tolist()):
        same = [lane for lane in range(32) if lane % 5 == thread % 32 % 5]
        assert match & 0xFFFFFFFF == sum(1 << lane for lane in same)
        assert largest & 0xFFFFFFFF == (31 if thread < 32 else 63) << 24  # unsigned
        assert smallest == (7 if thread < 32 else 39)


def test_half_warps_meet_apart(order):
    out = torch.zeros(THREADS, dtype=torch.int32)
    shim("half_warps", pointer(out))
    assert out.tolist() == [16 if t % 32 < 16 else 116 for t in range(THREADS)]


def test_block_votes(order):
    out = torch.zeros(3, dtype=torch.int32)
    shim("block_votes", pointer(out))
    assert out.tolist() == [40, 1, 1]


def test_shared_memory_is_poisoned_before_each_block():
    out = torch.zeros(6, dtype=torch.int32)
    shim("poison", pointer(out), 3, 256)
    assert out.tolist() == [-1] * 6


def test_half_and_bfloat16_round_as_torch_does():
    roundtrip = _build.load("shim").half_roundtrip
    bits = torch.arange(1 << 16).to(torch.int32).to(torch.int16)
    finite = torch.isfinite(bits.view(torch.float16))
    every = [b & 0xFFFF for b, ok in zip(bits.tolist(), finite.tolist(), strict=True) if ok]
    assert [roundtrip(b) for b in every] == every
    values = torch.cat([torch.randn(2000) * 10.0**e for e in range(-9, 7)])
    ties = (torch.arange(1, 4096).float() + 0.5) * 2.0**-24  # midway between subnormal halves
    edges = torch.tensor([0.0, -0.0, 65504, 65519.996, 65520, 1e30, float("inf"), 2.0**-25])
    values = torch.cat([values, ties, edges, -edges])
    for name, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16)):
        convert = getattr(_build.load("shim"), f"{name}_from_float")
        got = [convert(ctypes.c_float(v)) for v in values.tolist()]
        assert got == [b & 0xFFFF for b in values.to(dtype).view(torch.int16).tolist()]


def test_division_is_exact():
    divide = _build.load("shim").divide
    result = (ctypes.c_int64 * 2)()
    rng = random.Random(0)
    divisors = [1, 2, 3, 7, 49, 2**31 - 1, 2**31, *(rng.randrange(1, 2**40) for _ in range(500))]
    for b in divisors:
        top = 2**52 // b
        for q in (0, 1, top - 1, rng.randrange(top + 1)):
            for a in (q * b - 1, q * b, q * b + 1, q * b + b - 1):
                if 0 <= a < 2**52:
                    divide(ctypes.c_int64(a), ctypes.c_int64(b), result)
                    assert tuple(result) == divmod(a, b)


# ---- the shim: wrong kernels are reported -------------------------------------------------------

WRONG = [
    (r"block \(0,0,0\) .*__syncthreads \(.*: thread \(64,0,0\) waits at __syncthreads \("),
    (r"block \(1,0,0\) thread \(0,0,0\): .*__syncthreads .*thread \(70,0,0\) has exited"),
    (r"__shfl_sync with mask 0xffffffff .*thread \(8,0,0\) waits at __shfl_xor_sync"),
    (r"thread \(32,0,0\): .*__shfl_down_sync .*thread \(37,0,0\) has exited"),
    (r"__shfl_up_sync .*thread \(5,0,0\) waits at __syncthreads"),
    (r"thread \(31,0,0\): __syncwarp: the calling lane is not in its own mask"),
    (r"__syncwarp with mask 0xffffffff: thread \(3,0,0\) waits at __syncwarp with mask 0x0000000f"),
    (r"__shfl_sync: lane 8 is outside width 8"),
    (r"__shfl_up_sync: width 12 is not a power of two"),
    (r"__shfl_sync reads lane 4, which is not in the mask"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_kernels_are_reported(number):
    with pytest.raises(RuntimeError, match=WRONG[number]):
        shim("wrong", number)


def test_a_report_leaves_the_shim_usable():
    with pytest.raises(RuntimeError):
        shim("wrong", 0)
    test_block_sum(False, 2)


def test_writing_past_shared_memory_is_reported():
    with pytest.raises(RuntimeError, match="wrote dynamic shared memory at byte 100 of 100"):
        shim("past_shared", 100)


@pytest.mark.parametrize(
    "blocks, threads, shared", [(0, 32, 16), (1, 1025, 16), (1, 0, 16), (1, 32, 49 * 1024)]
)
def test_launches_a_gpu_would_refuse(blocks, threads, shared):
    with pytest.raises(RuntimeError, match="refused: CUDA error 9"):
        shim("launch", ctypes.c_int64(blocks), threads, shared)
    shim("launch", ctypes.c_int64(1), 32, 16)


# ---- entangle -----------------------------------------------------------------------------------


def entangle_inputs(shape, blocks, dtype, sort=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grad, weight = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grid = torch.randn(blocks, generator=generator).to(wide)
    classes = []
    for size, count in zip(shape, blocks, strict=True):
        index = torch.randint(0, count + 1, (size,), generator=generator, dtype=torch.int32)
        classes.append(index.sort().values if sort else index)
    return grad, weight, grid, *classes


def check(inputs, **options):
    _, weight, grid, *classes = inputs
    out = cuda_host.entangle(weight, grid, *classes)
    dweight, dgrid = cuda_host.entangle_backward(*inputs, **options)
    assert torch.equal(out, reference.forward(weight, grid, *classes))
    want_weight, want_grid = reference.backward(*inputs)
    assert torch.equal(dweight, want_weight)
    torch.testing.assert_close(dgrid, want_grid, rtol=2e-5, atol=2e-5 * weight.numel() ** 0.5)
    return dgrid


SHAPES = [
    ((64, 96, 1), (3, 4, 1)),  # a matrix of whole vectors: one row a band
    ((40, 37, 1), (3, 4, 1)),  # odd rows: vectors span two of them
    ((19, 5, 9), (2, 2, 3)),  # short rows, several to a warp
    ((11, 8, 49), (2, 2, 6)),
    ((300, 1, 49), (4, 1, 3)),  # depthwise: read as one long row
    ((517, 1, 1), (4, 1, 1)),
    ((517, 2, 1), (4, 2, 1)),  # rows shorter than a vector
    ((1, 700, 1), (1, 4, 1)),
    ((600, 130, 1), (3, 3, 1)),  # several chunks and flushes
]


@pytest.mark.parametrize("dtype", cuda_host.DTYPES, ids=str)
@pytest.mark.parametrize("shape, blocks", SHAPES, ids=str)
def test_entangle_shapes(order, shape, blocks, dtype):
    check(entangle_inputs(shape, blocks, dtype))


@pytest.mark.parametrize("dtype", cuda_host.DTYPES, ids=str)
def test_entangle_unsorted_classes(dtype):
    """Every row of another class: sums are flushed at each."""
    check(entangle_inputs((50, 72, 9), (5, 6, 4), dtype, sort=False))


@pytest.mark.parametrize("cells", [(12, 20, 4), (40, 60, 3), (90, 100, 1), (120, 129, 1)], ids=str)
def test_entangle_many_cells(cells):
    """More cells than 8, 4, 2 warps' tables fit in shared memory, and more than any fits."""
    check(entangle_inputs((130, 136, 4), cells, torch.float32), processors=1)


def test_entangle_unaligned():
    grad, weight, grid, *classes = entangle_inputs((30, 64, 1), (3, 3, 1), torch.float32)
    shifted = torch.zeros(weight.numel() + 1)[1:].view_as(weight).copy_(weight)
    assert shifted.data_ptr() % 16
    check((grad, shifted, grid, *classes))


def test_entangle_ignores_what_is_outside():
    """A NaN outside every choice reaches neither output nor gradients."""
    grad, weight, grid, *classes = entangle_inputs((48, 64, 9), (3, 3, 2), torch.float32)
    inside = reference.forward(torch.ones_like(weight), torch.ones_like(grid), *classes) > 0
    assert 0 < inside.sum() < inside.numel()
    clean = check((grad * inside, weight * inside, grid, *classes))
    nan = torch.tensor(float("nan"))
    dirty = [torch.where(inside, t, nan) for t in (grad, weight)]
    out = cuda_host.entangle(dirty[1], grid, *classes)
    dweight, dgrid = cuda_host.entangle_backward(*dirty, grid, *classes)
    assert torch.isfinite(out).all() and torch.isfinite(dweight).all()
    assert torch.equal(dgrid, clean)


def test_entangle_repeats_bitwise_in_any_thread_order():
    inputs = entangle_inputs((200, 136, 9), (3, 4, 3), torch.float32)
    results = []
    for descending in (0, 1, 0):
        _build.load("entangle").run_descending(descending)
        results.append(cuda_host.entangle_backward(*inputs))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("columns", [4100, 4099])
def test_entangle_counts_beyond_32_bits(columns):
    rows = 2**20 + 4
    classes = [torch.zeros(n, dtype=torch.int32) for n in (rows, columns, 1)]
    size, blocks = (ctypes.c_int64 * 3)(rows, columns, 1), (ctypes.c_int64 * 3)(1, 1, 1)
    pointers = [ctypes.addressof(size), ctypes.addressof(blocks), *(c.data_ptr() for c in classes)]
    end, row = ctypes.c_int64(), ctypes.c_int64()
    last = _build.load("entangle").entangle_last
    last(cuda_host.Arguments(*pointers), ctypes.byref(end), ctypes.byref(row))
    assert rows * columns > 2**32
    assert (end.value, row.value) == (rows * columns, rows - 1)


def stays_inside(module, count):
    """Random cases on memory fenced by forbidden pages, in a process that may die of it."""
    paths = [ROOT, ROOT / "python", ROOT / "tests", os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-m", f"cuda_host.{module}", "0", str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(count)]


def test_entangle_stays_inside_its_memory():
    """Random shapes and any class values."""
    stays_inside("guarded", 60)


# ---- route --------------------------------------------------------------------------------------


def routed(scores, *, padding=None, k=8, groups=(1, 1), processors=2):
    """Outputs of the routing kernels, forward and backward."""
    options = "sigmoid", *groups, 2, True, 1.0
    out = routing.route(scores, None, padding, k, *options, processors=processors)
    return *out, routing.route_grad(out[1], scores, out[0], padding, "sigmoid", True, 1.0)


def test_route_does_not_depend_on_blocks_or_thread_order():
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(500, 48, generator=generator) * 4).round() / 4  # with ties
    padding = torch.rand(500, generator=generator) < 0.2
    results = []
    for number, processors in enumerate((1, 2, 3, 7)):
        _build.load("route").run_descending(number % 2)
        results.append(routed(scores, padding=padding, groups=(6, 3), processors=processors))
    _build.load("route").run_descending(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "experts, k, dtype",
    [(1, 1, torch.float32), (1024, 64, torch.bfloat16), (2048, 40, torch.float64)],
)
def test_route_sizes(experts, k, dtype):
    """As many experts as leave a block of 16, 8 and 1 warps."""
    scores = torch.randn(70, experts, generator=torch.Generator().manual_seed(1)).to(dtype)
    ids, gates, *tables, _ = routed(scores, k=k)
    wanted = scores.double().sigmoid().float() if dtype != torch.float64 else scores.sigmoid()
    assert torch.equal(ids, wanted.sort(dim=-1, descending=True, stable=True).indices[:, :k])
    torch.testing.assert_close(gates.sum(1), torch.ones(70, dtype=gates.dtype))
    for got, want in zip(tables, routing_reference.tables(ids, None, experts), strict=True):
        assert torch.equal(got, want)


def test_route_refuses_more_experts_than_fit():
    with pytest.raises(RuntimeError, match="refused"):
        routed(torch.zeros(3, 20000))


def test_route_stays_inside_its_memory():
    stays_inside("guarded_route", 60)


# ---- nvcc ---------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
@pytest.mark.parametrize("arch", ["80", "90a", "100a"])
def test_entangle_does_not_spill(arch, tmp_path):
    source = Path(__file__).parent / "cuda_host" / "entangle_instances.cu"
    command = ["nvcc", "-std=c++20", "-O3", "-cubin", f"-I{ROOT / 'csrc'}", "-Xptxas=-v"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command += [str(source), "-o", str(tmp_path / "entangle.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    if "Unsupported gpu architecture" in done.stderr:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    frames = re.findall(r"(\d+) bytes stack frame", done.stderr)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    # Four dtypes, wide and scalar, forward and backward, and the reduction in fp32 and fp64.
    assert len(registers) == len(spills) == len(frames) == 4 * 2 * 2 + 2
    assert set(spills) == {("0", "0")} and set(frames) == {"0"}
    assert max(registers) <= 96, "fewer than 5 warps of each scheduler would be resident"
