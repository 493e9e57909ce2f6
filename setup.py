"""Builds what this machine can build, and never fails an install for want of a compiler.

WEIGHTSHARE_BUILD=auto|none|cpu|cuda    auto: CPU, and CUDA for a CUDA build of torch, less what
    fails to build; cpu, and cuda (which is both): a failure is an error
WEIGHTSHARE_CUDA_ARCHS=80,90a,100a      GPU targets of the CUDA library
WEIGHTSHARE_SANITIZE=address,undefined  instrument the CPU library (make asan)
"""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
MODE = os.environ.get("WEIGHTSHARE_BUILD", "auto")
ARCHS = os.environ.get("WEIGHTSHARE_CUDA_ARCHS", "80,90a,100a").split(",")
ABI = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
FLAGS = ["-O3", *ABI, "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden"]
LINK = ["-Wl,-s", "-Wl,--exclude-libs,ALL", "-Wl,--no-as-needed", "-ltorch"]
if sanitize := os.environ.get("WEIGHTSHARE_SANITIZE"):
    FLAGS += ["-O1", "-g", f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"]
    LINK = [f"-fsanitize={sanitize}"]


def leave_out(library, why):
    """Say what is left out; an error if it was asked for by name."""
    message = f"weightshare-kernels: no {library} library: {why}"
    if MODE != "auto":
        sys.exit(message)
    print(message, file=sys.stderr)


def extension(device, flags, include=(), **options):
    """One library of all bindings of a device; a new op adds a file and no line here."""
    bindings = (ROOT / "csrc/bindings").glob(f"*_{device}.*")
    return cpp_extension.CppExtension(
        f"weightshare_kernels._C_{device}",
        sorted(str(p.relative_to(ROOT)) for p in bindings if p.suffix in (".cpp", ".cu")),
        include_dirs=[str(ROOT / "csrc"), *include],
        extra_compile_args=flags,
        extra_link_args=LINK,
        optional=MODE == "auto",
        py_limited_api=True,  # nothing here knows Python: no link against libtorch_python
        **options,
    )


def cuda_extension():
    """The CUDA library; neither a GPU nor a CUDA build of torch is needed to build it."""
    nvcc = Path(shutil.which("nvcc") or "nvcc").resolve()  # may be a wrapper, far from the toolkit
    homes = [Path(os.environ.get("CUDA_HOME", nvcc.parents[1])), Path("/usr/local/cuda")]
    home = next((h for h in homes if (h / "bin/nvcc").exists() and (h / "lib64").exists()), None)
    if home is None:
        return leave_out("CUDA", "nvcc not found; Triton serves CUDA tensors")
    cpp_extension.CUDA_HOME = str(home)
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
    return extension(
        "cuda",
        {"cxx": [*FLAGS, "-DUSE_CUDA"], "nvcc": ["-O3", *ABI, "-DUSE_CUDA", *gencode]},
        include=[str(home / "include")],
        library_dirs=[str(home / "lib64")],
        libraries=["cudart_static", "dl", "rt", "pthread"],  # static: fits any CUDA torch
    )


options, compiler = {}, os.environ.get("CXX", "c++").split()[0]
if MODE not in ("auto", "none", "cpu", "cuda"):
    sys.exit(f"WEIGHTSHARE_BUILD={MODE!r}: expected auto, none, cpu or cuda")
if MODE != "none" and (shutil.which(compiler) is None or find_spec("torch") is None):
    leave_out("native", f"it takes a C++ compiler ({compiler}; set CXX) and torch at build time")
elif MODE != "none":
    from torch.utils import cpp_extension
    from torch.version import cuda as torch_cuda

    modules = [extension("cpu", FLAGS)]
    if MODE == "cuda" or (MODE == "auto" and torch_cuda):
        modules += filter(None, [cuda_extension()])

    class Build(cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)):
        def build_extensions(self):
            for module in modules:  # apart, so that one that fails does not take the other along
                self.extensions = [module]
                try:
                    super().build_extensions()
                except (Exception, SystemExit) as error:
                    leave_out(module.name, error)
            self.extensions = modules

    class Wheel(bdist_wheel):
        def get_tag(self):  # the stable ABI serves every Python and torch
            return ("py3", "none", super().get_tag()[2])

    options = {"ext_modules": modules, "cmdclass": {"build_ext": Build, "bdist_wheel": Wheel}}

setup(**options)
