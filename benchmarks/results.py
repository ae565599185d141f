"""Results on disk: measurements in <suite>.csv, what holds within a run in <suite>_ratios.csv.

Rows are appended as they are measured, so that a killed run keeps what it has; `compact` then keeps
the newest of each kind.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

COLUMNS = (
    "date", "commit", "device", "driver", "torch", "triton", "suite", "case", "direction", "dtype",
    "head_dim", "causal", "seqlen", "provider", "ms", "tflops", "gbps", "peak_mib",
)  # fmt: skip
# kind is "speed" (time of `versus` over the provider's), "cost" (the provider's time over its own
# in the case `versus`), "error" (relative, of the result `versus`) or "refused" (note says why).
RATIO_COLUMNS = (
    "date", "commit", "device", "suite", "case", "direction", "dtype", "head_dim", "causal",
    "seqlen", "provider", "kind", "versus", "value", "low", "high", "note",
)  # fmt: skip
LOSS_COLUMNS = ("date", "commit", "device", "driver", "torch", "triton", "case", "step", "provider", "loss")
_IDENTITY = ("suite", "case", "direction", "dtype", "provider", "kind", "versus")
Row = dict[str, str]


def environment(device: torch.device) -> Row:
    """The columns that are the same in all rows of a run."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = ""
    cuda = device.type == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu {platform.machine()}",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else "",
        "torch": torch.__version__,
        "triton": triton,
    }


def _output(*command: str) -> str:
    """The first line that a command prints; empty where it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def _commit() -> str:
    """The checkout's commit; BENCH_COMMIT says it for a copy whose git is absent or older than its files."""
    if said := os.environ.get("BENCH_COMMIT"):
        return said
    commit = _output("git", "rev-parse", "--short", "HEAD")
    if not commit:
        return "unknown"
    return commit + ("-dirty" if _output("git", "status", "--porcelain") else "")


class Table:
    """A CSV file that rows are appended to."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path, self.columns = path, columns
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            self._write("w", [])

    def append(self, row: Row) -> None:
        """Write a row at once; columns that it lacks stay empty."""
        self._write("a", [row])

    def replace(self, rows: list[Row]) -> None:
        """Write these rows, and no others."""
        self._write("w", rows)

    def rows(self) -> list[Row]:
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def compact(self) -> None:
        """Of rows on the same measurement keep the newest, in the place of the oldest."""
        newest: dict[tuple[str, ...], Row] = {}
        for row in self.rows():
            identity = [row.get(name, "") for name in _IDENTITY]
            if row.get("kind") == "error":
                # It has run since: an older refusal holds no more.
                newest.pop((*identity[:-2], "refused", ""), None)
            newest[tuple(identity)] = row
        temporary = self.path.with_suffix(".tmp")
        self._write("w", list(newest.values()), temporary)
        temporary.replace(self.path)

    def _write(self, mode: str, rows: list[Row], path: Path | None = None) -> None:
        with (path or self.path).open(mode, newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", lineterminator="\n")
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)
