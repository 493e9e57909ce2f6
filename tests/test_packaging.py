"""What a stranger's install does: wheels, missing libraries, load orders, honest reports."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import weightshare_kernels
from weightshare_kernels import _config, _register
from weightshare_kernels.info import main as info

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(weightshare_kernels.__file__).parent
LIBRARY = PACKAGE / "_C_cpu.so"
needs_library = pytest.mark.skipif(
    not LIBRARY.exists(), reason="the CPU library is not built (WEIGHTSHARE_BUILD=none)"
)


def run(*command, path=(), cwd=None, **variables):
    """Run a command with only the WEIGHTSHARE_* variables given."""
    env = {k: v for k, v in os.environ.items() if k not in {*_config.TABLE, "TRITON_INTERPRET"}}
    path = [*path, os.environ.get("PYTHONPATH", "")]  # where nothing is installed, all there is
    env |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [*map(str, command)], env=env, cwd=cwd, capture_output=True, text=True, timeout=300
    )


def python(*arguments, **options):
    return run(sys.executable, *arguments, **options)


@pytest.fixture
def package(tmp_path):
    """A copy of the installed package without native libraries, to import from ``tmp_path``."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=ignore)
    return tmp_path


def facts(folder, **variables):
    """The JSON of ``info`` run on the package in a folder."""
    result = python(
        "-m", "weightshare_kernels.info", "--json", path=[folder], cwd=folder, **variables
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_versions_agree():
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert stated[1] == weightshare_kernels.__version__


def test_schemas_have_no_fixed_sizes():
    assert _register.OPS
    for name, schema in _register.OPS.items():
        assert not re.search(r"\bint\b", schema), f"{name}: declare sizes SymInt: {schema}"


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("csrc/cpu/bad.h", "#include <torch/types.h>"),
        ("weightshare_kernels/ops/bad/__init__.py", '    "bad(Tensor x, int width) -> Tensor",'),
        ("weightshare_kernels/ops/bad/__init__.py", '    "Tensor x, int[] widths, int n) -> ()",'),
    ],
)
def test_bans(tmp_path, file, line):
    """``make lint-bans`` passes on the tree as it is and stops what it is there to stop."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in ("csrc/common", "csrc/cpu", "csrc/cuda", "weightshare_kernels/ops"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    clean = run("make", "-s", "lint-bans", cwd=tmp_path)
    assert clean.returncode == 0, clean.stdout + clean.stderr
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(line + "\n")
    caught = run("make", "-s", "lint-bans", cwd=tmp_path)
    assert caught.returncode != 0 and Path(file).name in caught.stdout


def test_tools_are_pinned():
    files = [ROOT / "constraints" / name for name in ("tools.txt", "peers.txt")]
    pinned = re.findall(r"^([\w-]+)==", "".join(f.read_text() for f in files), re.M)
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    wanted = re.findall(r'"([\w-]+)', extras.split("\n[")[0])
    assert len(wanted) > 10
    assert set(wanted) <= set(pinned)


def test_info_describes_this_process(capsys):
    assert info(["--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["versions"]["weightshare-kernels"] == weightshare_kernels.__version__
    assert set(told["environment"]) == set(_config.TABLE)
    for name in _register.OPS:
        assert told["ops"][name]["cpu"] == _register.backend_of(name, "cpu")
    for form in ([], ["--brief"]):
        assert info(form) == 0
        assert weightshare_kernels.__version__ in capsys.readouterr().out


def test_missing_library_is_reported(package):
    told = facts(package)
    assert not told["libraries"]["cpu"]["built"]
    assert "not built" in told["libraries"]["cpu"]["reason"]
    assert {op["cpu"] for op in told["ops"].values()} == {"reference"}
    assert any("PyTorch references" in hint for hint in told["hints"])
    forced = python(
        "-c", "import weightshare_kernels", path=[package], cwd=package, WEIGHTSHARE_BACKEND="cpu"
    )
    assert forced.returncode != 0
    assert "ImportError: WEIGHTSHARE_BACKEND=cpu" in forced.stderr


def test_broken_library_is_reported(package):
    (package / PACKAGE.name / LIBRARY.name).write_bytes(b"not a library")
    told = facts(package)["libraries"]["cpu"]
    assert told["built"] and not told["loaded"]
    assert "refused" in told["reason"]


@needs_library
def test_reference_is_chosen_on_request(package):
    shutil.copy(LIBRARY, package / PACKAGE.name)
    told = facts(package)
    assert told["libraries"]["cpu"]["loaded"]
    assert {op["cpu"] for op in told["ops"].values()} == {"cpu"}
    told = facts(package, WEIGHTSHARE_BACKEND="reference")
    assert told["libraries"]["cpu"]["built"] and not told["libraries"]["cpu"]["loaded"]
    assert {op["cpu"] for op in told["ops"].values()} == {"reference"}
    assert any("WEIGHTSHARE_BACKEND=reference" in hint for hint in told["hints"])


def test_bogus_backend_is_refused():
    result = python("-c", "import weightshare_kernels", path=[ROOT], WEIGHTSHARE_BACKEND="bogus")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: WEIGHTSHARE_BACKEND='bogus'")
    assert all(name in last for name in _config.BACKENDS)


LIBRARY_FIRST = """
import torch
torch.ops.load_library({library!r})
import weightshare_kernels
"""
DEFINITION_FIRST = """
import os, torch
os.environ["WEIGHTSHARE_BACKEND"] = "reference"
import weightshare_kernels
from weightshare_kernels import _register
assert _register.backend_of("sliced_linear", "cpu") == "reference"
torch.ops.load_library({library!r})
"""
THEN = """
from weightshare_kernels import _register
assert all(_register.backend_of(name, "cpu") == "cpu" for name in _register.OPS)
x, w = torch.randn(3, 4, requires_grad=True), torch.randn(6, 8, requires_grad=True)
y = weightshare_kernels.sliced_linear(x, w, out=5, in_=4)
torch.testing.assert_close(y, x @ w[:5, :4].t())
y.sum().backward()
torch.testing.assert_close(w.grad[:5, :4], x.detach().sum(0).expand(5, 4))
assert w.grad[5:].eq(0).all() and w.grad[:, 4:].eq(0).all()
"""


@needs_library
@pytest.mark.parametrize("first", [LIBRARY_FIRST, DEFINITION_FIRST], ids=["library", "definition"])
def test_either_load_order(first):
    code = first.format(library=str(LIBRARY)) + THEN
    result = python("-c", code, path=[ROOT])
    assert result.returncode == 0, result.stderr


@pytest.fixture
def checkout(tmp_path):
    """The files a build reads, in a folder of their own: builds leave the repository alone."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for folder in ("csrc", "python", "weightshare_kernels"):
        shutil.copytree(ROOT / folder, tmp_path / "source" / folder, ignore=ignore)
    for file in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path / "source")
    return tmp_path / "source"


def test_wheel_is_complete(checkout, tmp_path):
    result = python(
        *("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--no-index", "-w", tmp_path, checkout),
        WEIGHTSHARE_BUILD="none",
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    wanted = {
        str(file.relative_to(base))
        for base in (checkout, checkout / "python")
        for pattern in ("weightshare*/**/*.py", "weightshare*/**/*.json", "weightshare*/py.typed")
        for file in base.glob(pattern)
    }
    assert {"weightshare/py.typed", "weightshare_kernels/py.typed"} <= wanted <= packed
    tops = {name.split("/")[0] for name in packed if ".dist-info" not in name}
    assert tops == {"weightshare", "weightshare_kernels"}
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import weightshare, weightshare.nn, "
        "weightshare_kernels as k; print(k.__file__); print(weightshare.__file__)"
    )
    result = python("-I", "-c", code, tmp_path / "site", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert all(str(tmp_path / "site") in line for line in result.stdout.split())


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"], ids=["absent", "broken"])
def test_build_without_a_working_compiler(checkout, compiler):
    """Left out and said so by default; an error where the native code was asked for."""
    build = ("setup.py", "-q", "build")
    result = python(*build, cwd=checkout, CXX=compiler, WEIGHTSHARE_BUILD="auto")
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^weightshare-kernels: no ", result.stderr, re.M)) == 1
    assert list(checkout.glob("build/lib*/weightshare_kernels/info.py"))
    assert not list(checkout.glob("build/lib*/weightshare_kernels/*.so"))
    result = python(*build, cwd=checkout, CXX=compiler, WEIGHTSHARE_BUILD="cpu")
    assert result.returncode != 0 and "weightshare-kernels: no " in result.stderr


@pytest.mark.parametrize(
    "page",
    ["README.md", "docs/tutorial.md", "docs/supernets.md", "docs/moe.md", "docs/lora.md"],
)
def test_documented_code_runs(page):
    """The Python blocks of a page run in order as one script."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    assert blocks
    result = python("-c", "".join(blocks), path=[ROOT, ROOT / "python"])
    assert result.returncode == 0, result.stderr
