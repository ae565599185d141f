"""The command line: python -m torch_flash2 {demo,doctor,explain,bench}."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

from . import UnsupportedError, __version__
from .cli import bench, demo, doctor, explain

COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "demo": (demo, "train a small GPT twice, with math attention and with this library"),
    "doctor": (doctor, "show versions, GPUs, which kernels run here and what is missing"),
    "explain": (explain, "show which kernel a call described in words runs on, and why"),
    "bench": (bench, "run the benchmarks of a checkout; arguments go to python -m benchmarks"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status, 2 for a caller's mistake."""
    parser = argparse.ArgumentParser(prog="python -m torch_flash2", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"torch_flash2 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        # bench has no options of its own, so that all of them, --help too, reach the benchmarks.
        command = commands.add_parser(name, help=text, description=text, add_help=name != "bench", allow_abbrev=False)
        module.add_arguments(command)
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        status: int = COMMANDS[arguments.command][0].main(arguments)
    except (ValueError, OSError, UnsupportedError) as error:
        print(f"torch_flash2 {arguments.command}: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
