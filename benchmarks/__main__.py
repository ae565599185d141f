"""The command line of the benchmarks.

python -m benchmarks --suite forward,backward --against fa2,cudnn
python -m benchmarks tune --kernel triton --direction forward
python -m benchmarks report benchmarks/results/h200 --readme README.md
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path


def words(text: str) -> tuple[str, ...]:
    """Names with commas between; commas inside a config, "...@a=1,b=2", belong to its provider."""
    names: list[str] = []
    for part in filter(None, text.split(",")):
        if "=" in part and "@" not in part and names:
            names[-1] += f",{part}"
        else:
            names.append(part)
    return tuple(names)


def parser() -> argparse.ArgumentParser:
    """All options; the suite run is what happens without a subcommand."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="cuda", help="cpu: a dry run, every shape tiny")
    common.add_argument("--dtype", default="bf16", help="of the grids: bf16, fp16 or fp32")
    common.add_argument("--filter", default="", metavar="REGEX", help="case names to keep")
    common.add_argument("--quick", action="store_true", help="fewer lengths")
    common.add_argument("--rounds", type=int, default=8)
    common.add_argument("--window-ms", type=float, default=5.0, help="of one entry in one round")
    common.add_argument("--arch", help="sm80: compile Triton kernels as for that GPU")
    commands = top.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", parents=[common], help="measure suites (the default)")
    run.add_argument(
        "--suite",
        type=words,
        required=True,
        help="forward,backward,features,models,memory,decode,matrix,train,kvcache,few,context_parallel",
    )
    run.add_argument("--ours", type=words, default=("torch_flash2",), help="see providers.py")
    run.add_argument("--against", type=words, help="peers; by default those of each case")
    run.add_argument("--without", type=words, default=(), help="peers to leave out")
    run.add_argument("--out", type=Path, help="by default benchmarks/results/<gpu>")

    tune = commands.add_parser("tune", parents=[common], help="measure a kernel's candidates")
    tune.add_argument("--suite", type=words, help="by default that of the direction")
    tune.add_argument("--kernel", default="triton")
    tune.add_argument("--direction", choices=("forward", "backward"), default="forward")
    tune.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    tune.add_argument("--out", type=Path, default=Path("tune.json"))

    report = commands.add_parser("report", help="Markdown and SVG from the CSV files")
    report.add_argument("folder", type=Path)
    report.add_argument("--readme", type=Path, help="fill its <!-- benchmarks:NAME --> blocks")
    return top


def main(argv: list[str]) -> int:
    if argv and argv[0] not in ("run", "tune", "report", "-h", "--help"):
        argv = ["run", *argv]
    arguments = parser().parse_args(argv)
    if arguments.command == "report":
        from .report import write

        write(arguments.folder, arguments.readme)
        return 0

    # Triton reads this when it is imported.
    if arguments.arch:
        os.environ["TRITON_OVERRIDE_ARCH"] = arguments.arch
    from . import runner

    options = runner.Options(
        device=arguments.device,
        out=arguments.out,
        dtype=arguments.dtype,
        pattern=arguments.filter,
        rounds=arguments.rounds,
        window_ms=arguments.window_ms,
        quick=arguments.quick,
    )
    if arguments.command == "tune":
        from . import tune

        suites = arguments.suite or (arguments.direction,)
        tune.run(list(suites), options, arguments.kernel, arguments.direction, arguments.processes)
        return 0
    options = dataclasses.replace(options, ours=arguments.ours, against=arguments.against, without=arguments.without)
    runner.run(list(arguments.suite), options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
