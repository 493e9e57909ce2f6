"""Builds what this machine can build, and never fails an install for want of a compiler.

WEIGHTSHARE_BUILD=auto|none|cpu|cuda  what to build (auto: CPU, and CUDA where nvcc is found)
WEIGHTSHARE_CUDA_ARCHS=80,90a,100a    GPU targets of the CUDA library
WEIGHTSHARE_SANITIZE=address,undefined  instrument the CPU library (make asan)
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
MODE = os.environ.get("WEIGHTSHARE_BUILD", "auto")
ARCHS = os.environ.get("WEIGHTSHARE_CUDA_ARCHS", "80,90a,100a").split(",")
SANITIZE = os.environ.get("WEIGHTSHARE_SANITIZE", "")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
if MODE not in {"auto", "none", "cpu", "cuda"}:
    sys.exit(f"WEIGHTSHARE_BUILD={MODE!r}: expected auto, none, cpu or cuda")


def say(text: str) -> None:
    """Tell the person who installs, once, what is left out and why."""
    print(f"weightshare-kernels: {text}", file=sys.stderr)


def sources(suffix: str) -> list[str]:
    """Bindings of one device; a new op adds a file and no line here."""
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(f"csrc/bindings/*_{suffix}.*"))


def extensions() -> tuple[list, dict]:
    """The native libraries this machine can build, and the command that builds them."""
    if MODE == "none":
        say("no native code (WEIGHTSHARE_BUILD=none); PyTorch references and Triton are used")
        return [], {}
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        say("no C++ compiler found; installing without native code. `info` repeats this")
        return [], {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        say("torch cannot be imported at build time; installing without native code")
        return [], {}

    flags = ["-O3", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden"]
    link = ["-Wl,-s"]
    if SANITIZE:
        flags = [*flags, f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g", "-O1"]
        link = [f"-fsanitize={SANITIZE}"]
    common = {"include_dirs": [str(ROOT / "csrc")], "extra_link_args": link}
    found = [
        CppExtension(
            "weightshare_kernels._C_cpu",
            sources("cpu"),
            extra_compile_args=[*flags, STABLE_ABI],
            optional=MODE == "auto",
            **common,
        )
    ]
    cuda = cuda_extension(flags, common) if MODE in {"auto", "cuda"} and sources("cuda") else None
    if cuda is not None:
        found.append(cuda)

    class Build(BuildExtension.with_options(no_python_abi_suffix=True)):
        def get_export_symbols(self, ext):
            return []

    return found, {"build_ext": Build}


def cuda_extension(flags: list[str], common: dict):
    """The CUDA library; it needs nvcc but neither a GPU nor a CUDA build of torch."""
    from torch.utils import cpp_extension

    if shutil.which("nvcc") is None and cpp_extension.CUDA_HOME is None:
        say("no nvcc found; the CUDA library is left out (Triton still serves CUDA tensors)")
        return None
    if cpp_extension.CUDA_HOME is None:
        cpp_extension.CUDA_HOME = str(Path(shutil.which("nvcc")).resolve().parent.parent)
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
    nvcc = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xptxas=-v", *gencode]
    return cpp_extension.CUDAExtension(
        "weightshare_kernels._C_cuda",
        sources("cuda"),
        extra_compile_args={
            "cxx": [*flags, STABLE_ABI, "-DUSE_CUDA"],
            "nvcc": [*nvcc, STABLE_ABI, "-DUSE_CUDA"],
        },
        optional=MODE == "auto",
        **common,
    )


ext_modules, cmdclass = extensions()
if ext_modules:
    from wheel.bdist_wheel import bdist_wheel

    class Wheel(bdist_wheel):
        """Tag py3-none-<platform>: the stable ABI serves every Python and torch."""

        def get_tag(self):
            return ("py3", "none", super().get_tag()[2])

    cmdclass["bdist_wheel"] = Wheel
setup(ext_modules=ext_modules, cmdclass=cmdclass)
