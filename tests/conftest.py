"""Chooses the backend under test before the library is imported.

``pytest --backend triton`` runs the Triton kernels in the interpreter on CPU tensors (on the GPU
where there is one); ``--backend cuda-host`` runs the CUDA kernels through tests/cuda_host, and
``--backend cuda-bindings`` their bindings, too.
"""

import os
import sys
from pathlib import Path

import pytest

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda", "cuda-host", "cuda-bindings")


def pytest_addoption(parser):
    parser.addoption("--backend", default="auto", choices=BACKENDS)


def pytest_configure(config):
    backend = config.getoption("--backend")
    on_host = backend in ("cuda-host", "cuda-bindings")
    os.environ["WEIGHTSHARE_BACKEND"] = "reference" if on_host else backend
    if on_host:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if backend == "triton" and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(min(2, torch.get_num_threads()))
    import weightshare_kernels  # noqa: F401  (registers the ops of the chosen backend)

    if on_host:
        sys.path.insert(0, str(Path(__file__).parent))
        import cuda_host
        from cuda_host import bindings

        (cuda_host if backend == "cuda-host" else bindings).register()


def pytest_report_header(config):
    import torch

    from weightshare_kernels import _register

    device = "cuda" if torch.cuda.is_available() else "cpu"
    served = {name: _register.backend_of(name, device) for name in _register.OPS}
    return [f"weightshare on {device}: " + ", ".join(f"{k}={v}" for k, v in served.items())]


@pytest.fixture
def traced():
    """Compile a module whole, once for all its subnets; ``traced.graphs`` is what that took."""
    import torch
    from weightshare import one_graph

    def compile_whole(module):
        return torch.compile(module, backend=backend, dynamic=True, fullgraph=True)

    def backend(graph, _):
        compile_whole.graphs.append(graph)
        return graph.forward

    compile_whole.graphs = []
    torch._dynamo.reset()
    with torch.compiler.config.patch(dynamic_sources=""):
        one_graph()
        yield compile_whole
    torch._dynamo.reset()
