"""``python -m weightshare``: arguments, exit statuses, messages."""

import importlib
import importlib.util
import sys
import types

import pytest
import weightshare
from weightshare import cli


def test_help_and_version(capsys):
    for arguments in (["--help"], ["demo", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 0
    output = capsys.readouterr().out
    assert all(word in output for word in ("demo", "info", "bench", weightshare.__version__))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train"],
        ["demo", "--steps", "0"],
        ["demo", "--steps", "many"],
        ["demo", "--seed", "-1"],
        ["demo", "--seed", "99999999999"],
        ["demo", "--resume", "--fresh"],
    ],
    ids=" ".join,
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_demo_names_missing_packages(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name)
    )
    assert cli.main(["demo"]) == 1
    assert "scikit-learn: pip install 'weightshare-kernels[demo]'" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="the demo prints with rich")
@pytest.mark.parametrize(
    ("options", "resume", "steps", "search_steps"),
    [
        ([], None, 1000, 600),
        (["--quick"], None, 30, 30),
        (["--steps", "5", "--fresh"], False, 5, 5),
        (["--resume", "--seed", "3"], True, 1000, 600),
    ],
)
def test_demo_options(monkeypatch, tmp_path, options, resume, steps, search_steps):
    import weightshare.demo

    calls = []
    monkeypatch.setattr(weightshare.demo, "run", lambda *a: calls.append(a))
    assert cli.main(["demo", "--out", str(tmp_path), *options]) == 0
    [(settings, out, chosen)] = calls
    assert (out, chosen) == (tmp_path, resume)
    assert (settings.steps, settings.search_steps) == (steps, search_steps)
    assert settings.seed == (3 if "--seed" in options else 0)


@pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="the demo prints with rich")
def test_demo_failures_are_messages(monkeypatch, tmp_path, capsys):
    import weightshare.demo
    from weightshare.demo import CheckpointError, Interrupted

    for error, status, words in (
        (Interrupted("stopped at step 3"), 130, "The same command again goes on"),
        (KeyboardInterrupt(), 130, "The same command again goes on"),
        (CheckpointError("checkpoint.pt is damaged"), 1, "checkpoint.pt is damaged"),
        (PermissionError("denied"), 1, "cannot hold the results: denied"),
    ):

        def fail(*arguments, error=error):
            raise error

        monkeypatch.setattr(weightshare.demo, "run", fail)
        assert cli.main(["demo", "--out", str(tmp_path)]) == status
        captured = capsys.readouterr()
        assert words in captured.out + captured.err


@pytest.mark.parametrize(
    ("command", "module"), [("info", "weightshare_kernels.info"), ("bench", "benchmarks.run")]
)
def test_passes_arguments_on(monkeypatch, tmp_path, command, module):
    calls = []
    other = types.ModuleType(module)
    other.main = calls.append
    parent, name = module.split(".")
    monkeypatch.setitem(sys.modules, module, other)
    if command == "info":
        monkeypatch.setattr(importlib.import_module(parent), name, other, raising=False)
    else:
        checkout(monkeypatch, tmp_path, "")
    assert cli.main([command, "--anything", "x"]) == 0
    assert calls == [["--anything", "x"]]


def checkout(monkeypatch, root, source):
    """Make the command believe that it lives in a checkout at ``root``."""
    (root / "benchmarks").mkdir()
    (root / "benchmarks" / "run.py").write_text(source)
    monkeypatch.setattr(cli, "__file__", str(root / "python" / "weightshare" / "cli.py"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_bench_outside_a_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "lib" / "weightshare" / "cli.py"))
    assert cli.main(["bench"]) == 1
    error = capsys.readouterr().err
    assert "source checkout" in error and "pip install -e '.[bench]'" in error
