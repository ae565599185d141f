"""bench: `python -m benchmarks` of the checkout that this package lies in."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

import torch_flash2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: all arguments are those of the benchmarks."""


def main(arguments: argparse.Namespace) -> int:
    assert torch_flash2.__file__ is not None
    root = Path(torch_flash2.__file__).parents[1]
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise FileNotFoundError(f"the benchmarks are part of a checkout, not of the installed package: none in {root}")
    sys.path.insert(0, str(root))
    sys.argv = ["benchmarks", *arguments.rest]
    runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)
    return 0
