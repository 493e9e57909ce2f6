"""``python -m weightshare``: the demo, what is installed, and the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import weightshare


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0, 1 for a failure that the message explains, 130 if interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # info and bench have parsers of their own and get their arguments unread.
    if arguments and arguments[0] in _PASSED_ON:
        return _PASSED_ON[arguments[0]](arguments[1:])
    return _demo(_parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="weightshare", description="Networks that share one set of weights."
    )
    parser.add_argument("--version", action="version", version=weightshare.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train, compare, search and export subnets of one network (about 2 minutes)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for results")
    demo.add_argument("--steps", type=_positive, help="optimizer steps of every training")
    demo.add_argument(
        "--seed", type=_natural, default=0, help="of initial weights, batches and random subnets"
    )
    demo.add_argument("--quick", action="store_true", help="a few seconds, to see it work")
    again = demo.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="go on from a checkpoint, which must be there"
    )
    again.add_argument(
        "--fresh", action="store_true", help="start again even if there is a checkpoint"
    )
    commands.add_parser("info", help="what is built, loaded and used, and why not")
    commands.add_parser("bench", help="run the benchmarks of a source checkout")
    return parser


def _natural(text: str, least: int = 0) -> int:
    if not text.isdecimal() or not least <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from {least} to 2**31 - 1, got {text!r}"
        )
    return int(text)


def _positive(text: str) -> int:
    return _natural(text, 1)


def _demo(arguments: argparse.Namespace) -> int:
    missing = [
        package
        for module, package in (
            ("sklearn", "scikit-learn"),
            ("matplotlib", "matplotlib"),
            ("rich", "rich"),
        )
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        return _fail(
            f"the demo needs {', '.join(missing)}: pip install 'weightshare-kernels[demo]'"
        )
    from weightshare.demo import CheckpointError, Interrupted, Settings, run

    changed: dict[str, Any] = (
        {"steps": 30, "search_steps": 30, "rounds": 10} if arguments.quick else {}
    )
    if arguments.steps:
        changed |= {"steps": arguments.steps, "search_steps": arguments.steps}
    settings = Settings(seed=arguments.seed, **changed)
    resume = True if arguments.resume else False if arguments.fresh else None
    try:
        run(settings, arguments.out, resume)
    except Interrupted as why:
        print(f"{why}. The same command again goes on from there; --fresh starts over.")
        return 130
    except KeyboardInterrupt:
        print("Interrupted. The same command again goes on from the last checkpoint.")
        return 130
    except CheckpointError as why:
        return _fail(str(why))
    except OSError as why:
        return _fail(f"{arguments.out} cannot hold the results: {why}")
    return 0


def _info(arguments: list[str]) -> int:
    from weightshare_kernels import info

    return info.main(arguments) or 0


def _bench(arguments: list[str]) -> int:
    """Run ``benchmarks/run.py``, which is part of a checkout and not of the package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "run.py").exists():
        return _fail(
            "the benchmarks are not part of the installed package; run this in a source checkout "
            "that is installed with: pip install -e '.[bench]'"
        )
    sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks.run").main(arguments) or 0


def _fail(why: str) -> int:
    print(f"weightshare: {why}", file=sys.stderr)
    return 1


_PASSED_ON = {"info": _info, "bench": _bench}
