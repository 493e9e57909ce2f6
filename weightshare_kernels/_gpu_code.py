"""What a GPU kernel compiles to, read on a machine without a GPU.

Each op's Triton module lists ``examples(dtype)``: launches of real size on the meta device. They
are recorded instead of run, specialised as the launcher would specialise them, and compiled for
several targets. Registers, spills and shared memory are read from the machine code; the matrix
instruction and the width of loads from the PTX.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from weightshare_kernels import _triton

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Target:
    """A GPU generation: what it offers one multiprocessor and one block."""

    name: str
    capability: int
    nvcc: str
    shared_per_block: int
    shared_per_processor: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65536


KIB = 1024
TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", 80, "sm_80", 163 * KIB, 164 * KIB),
        Target("sm_90", 90, "sm_90a", 227 * KIB, 228 * KIB),
        Target("sm_100", 100, "sm_100a", 227 * KIB, 228 * KIB),
    )
}


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    kernel: triton.runtime.JITFunction
    programs: tuple[int, ...]
    arguments: tuple
    tile: _triton.Tile

    @property
    def name(self) -> str:
        """Name of the kernel function."""
        return self.kernel.__name__


@dataclass(frozen=True)
class Resources:
    """What one block of a kernel takes; ``spilled`` is local memory per thread, in bytes."""

    registers: int
    spilled: int
    shared: int
    warps: int

    def blocks(self, target: Target) -> int:
        """Blocks that fit one multiprocessor at a time."""
        per_warp = -(-self.registers * 32 // 256) * 256
        limits = [
            target.blocks,
            target.warps // self.warps,
            target.registers // (per_warp * self.warps),
            target.shared_per_processor // (self.shared + KIB),  # 1 KiB is the system's
        ]
        return min(limits)


@dataclass(frozen=True)
class Binary:
    """A kernel compiled for a target."""

    resources: Resources
    ptx: str

    @property
    def matrix(self) -> str:
        """Matrix instruction in use: wgmma, tcgen05, mma or none."""
        return matrix_instruction(self.ptx)

    @property
    def wide_loads(self) -> int:
        """Number of 16-byte loads from global memory in the code."""
        return wide_loads(self.ptx)


def matrix_instruction(ptx: str) -> str:
    """Matrix instruction that PTX code uses."""
    for name, mark in (
        ("wgmma", "wgmma.mma_async"),
        ("tcgen05", "tcgen05.mma"),
        ("mma", "mma.sync"),
    ):
        if mark in ptx:
            return name
    return "none"


def wide_loads(ptx: str) -> int:
    """16-byte loads from global memory in PTX code, to registers or to shared memory."""
    plain = r"ld\.global[\w:.]*\.(?:v4\.[bfus]32|v2\.[bfus]64|v8\.b16)"
    asynchronous = r"cp\.async\.c[ag]\.shared\.global[\w:.]* \[[^]]*\], \[[^]]*\], (?:0x10|16)\b"
    return len(re.findall(plain, ptx)) + len(re.findall(asynchronous, ptx))


def examples(dtype: torch.dtype) -> Iterator[_triton.Example]:
    """Examples of every op that has a Triton module, and of what ops share."""
    import weightshare_kernels.ops as ops
    from weightshare_kernels import _sums

    yield from _sums.examples(dtype)
    for module in pkgutil.iter_modules(ops.__path__):
        name = f"{ops.__name__}.{module.name}.triton"
        if module.ispkg and importlib.util.find_spec(name) is not None:
            yield from importlib.import_module(name).examples(dtype)


def record(call: Callable[[], object], target: Target = TARGETS["sm_90"]) -> list[Launch]:
    """Kernel launches that a call makes, as it would on a target; none of them runs.

    Raises:
        RuntimeError: under TRITON_INTERPRET there are no kernels to compile.
    """
    if _triton.interpreted():
        raise RuntimeError("TRITON_INTERPRET=1: kernels cannot be compiled; unset it")
    _triton.recording, assumed = [], _triton.assumed_capability
    _triton.assumed_capability = target.capability
    try:
        call()
        return [Launch(*launch) for launch in _triton.recording]
    finally:
        _triton.recording, _triton.assumed_capability = None, assumed


def specialise(launch: Launch) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes the just-in-time compiler would choose."""
    signature, constants, attributes = {}, {}, {}
    for at, (parameter, value) in enumerate(
        zip(launch.kernel.params, launch.arguments, strict=True)
    ):
        if isinstance(value, tuple) and not parameter.is_constexpr:
            some = [_specialised(item, parameter) for item in value]
            signature[parameter.name] = tuple(kind for kind, _ in some)
            found = [
                ((at, n), item, form)
                for n, (item, form) in enumerate(zip(value, some, strict=True))
            ]
        else:
            form = _specialised(value, parameter)
            signature[parameter.name] = form[0]
            found = [((at,), value, form)]
        for path, item, (kind, aligned) in found:
            if kind == "constexpr":
                constants[path] = item
            elif aligned:
                attributes[path] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _specialised(value, parameter) -> tuple[str, bool]:
    """Type of one argument, and whether it is known to be divisible by 16."""
    special = not parameter.do_not_specialize
    if parameter.is_constexpr or value is None or (_is_int(value) and value == 1 and special):
        return "constexpr", False
    if isinstance(value, TensorDescriptor):
        box = ",".join(map(str, value.block_shape))
        return f"tensordesc<{_TYPES[value.base.dtype]}[{box}]>", False
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}", special and value.data_ptr() % 16 == 0
    return ("i32" if abs(value) < 2**31 else "i64"), special and value % 16 == 0


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32",
}  # fmt: skip


def compile_for(launch: Launch, target: Target) -> Binary:
    """Compile a recorded launch; the same specialisation is compiled once."""
    signature, constants, attributes = specialise(launch)
    frozen = (
        tuple(signature.items()),
        tuple(constants.items()),
        tuple((k, tuple(map(tuple, v))) for k, v in attributes.items()),
    )
    return _compile(launch.kernel, *frozen, launch.tile.warps, launch.tile.stages, target)


@functools.cache
def _compile(kernel, signature, constants, attributes, warps, stages, target: Target) -> Binary:
    source = ASTSource(
        fn=kernel,
        signature=dict(signature),
        constexprs=dict(constants),
        attrs={k: [list(pair) for pair in v] for k, v in attributes},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", target.capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    registers, local, static = cubin_usage(compiled.asm["cubin"])
    # The launch asks for the whole shared memory at run time; the cubin itself shows none of it.
    shared = max(compiled.metadata.shared, static)
    resources = Resources(registers, local, shared, compiled.metadata.num_warps)
    return Binary(resources, compiled.asm["ptx"])


def cubin_usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers per thread, local memory per thread and static shared memory of a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    registers, stack, shared, local = map(int, found.groups())
    return registers, stack + local, shared


def nvcc() -> str | None:
    """Path of the CUDA compiler, or None."""
    return shutil.which("nvcc")


def cuda_sources() -> list[Path]:
    """The CUDA bindings of a source checkout; each instantiates its op's kernels."""
    return sorted((ROOT / "csrc/bindings").glob("*_cuda.cu"))


@functools.cache
def compile_cuda(source: Path, target: Target) -> dict[str, Binary]:
    """Every kernel that a CUDA source instantiates, by its readable name.

    Raises:
        RuntimeError: nvcc refused the source; carries its messages.
    """
    include = Path(torch.__file__).parent / "include"
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc() or "nvcc", "-cubin", "-Xptxas=-v", "-std=c++20", "-O3",
            "--expt-relaxed-constexpr", f"-arch={target.nvcc}", "-DUSE_CUDA",
            "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}", f"-I{include}",
            f"-I{include}/torch/csrc/api/include", "--keep", f"--keep-dir={folder}",
            str(source), "-o", f"{folder}/out.cubin",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc refused {source.name}:\n{done.stderr}")
        ptx = entries(next(Path(folder).glob("*.ptx")).read_text())
    return {
        readable(symbol): Binary(Resources(*used, -(-_threads(ptx[symbol]) // 32)), ptx[symbol])
        for symbol, used in ptxas_usage(done.stderr).items()
    }


def ptxas_usage(log: str) -> dict[str, tuple[int, int, int]]:
    """Registers, spilled bytes per thread and static shared memory, by kernel symbol."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        symbol = part.split("'", 1)[0]
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        spilled = max(int(stack), int(stores), int(loads))
        found[symbol] = registers, spilled, int(shared.group(1)) if shared else 0
    return found


def entries(ptx: str) -> dict[str, str]:
    """PTX of each kernel of a module."""
    parts = re.split(r"\.visible \.entry (\w+)\(", ptx)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _threads(ptx: str) -> int:
    """Most threads of a block, as the kernel declares them."""
    found = re.search(r"\.(?:maxntid|reqntid) (\d+)", ptx)
    if found is None:
        raise RuntimeError("a CUDA kernel declares no __launch_bounds__; its occupancy is unknown")
    return int(found.group(1))


def readable(symbol: str) -> str:
    """``function<types>`` of a mangled symbol, where a demangler is installed."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return symbol
    text = subprocess.run([tool, symbol], capture_output=True, text=True, check=True).stdout
    text = re.sub(r"weightshare::cuda::|\(int\)|^void ", "", text.strip())
    return re.sub(r"\(.*", "", text, flags=re.DOTALL)
