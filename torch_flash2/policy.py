"""Which calls of scaled_dot_product_attention are worth taking from PyTorch: by measurement, where there is one.

policy.json holds the measurements, each with its GPU, versions and date; `python -m benchmarks.sdpa` makes it. Where a
class of calls was not measured on this GPU, the rule is: calls that PyTorch would send to its math or
memory-efficient backend are taken, others are left to it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from .problem import Problem

POLICY = Path(__file__).parent / "policy.json"
WIDTHS = (64, 128, 256, 512)
# Backends of PyTorch that lose where nothing was measured.
SLOW = ("MATH", "EFFICIENT_ATTENTION")
# A measured gain below this is noise.
GAIN = 1.02


class CallClass(NamedTuple):
    """What calls have in common that measurements tell apart.

    `pass_` is "inference" or "training"; `width` a head dim's bucket; `kind` is "full", "causal", "lower-right" (causal
    and aligned at the end, M other than N), "mask" (bool) or "bias" (float); `rows` is "few" (up to 16 query rows),
    "short" (up to 1024 rows and keys) or "long".
    """

    pass_: str
    bits: int
    width: int
    kind: str
    rows: str
    grouped: bool
    dropout: bool

    def __str__(self) -> str:
        extra = [name for name in ("grouped", "dropout") if getattr(self, name)]
        return ", ".join([self.pass_, f"{self.bits} bits", f"D<={self.width}", self.kind, f"{self.rows} rows", *extra])


def class_of(problem: Problem) -> CallClass:
    """The class of a call of scaled_dot_product_attention."""
    width = max(problem.head_dim, problem.head_dim_v)
    kind = "mask" if problem.dense else "bias" if "bias" in problem.steps else "full"
    if kind == "full" and problem.mask.bands:
        shifted = problem.mask.align == "bottom-right" and problem.seqlen_q != problem.seqlen_k
        kind = "lower-right" if shifted else "causal"
    longest = max(problem.seqlen_q, problem.seqlen_k)
    return CallClass(
        "training" if problem.needs_grad else "inference",
        problem.dtype.itemsize * 8,
        next((size for size in WIDTHS if width <= size), width),
        kind,
        "few" if problem.seqlen_q <= 16 else "short" if longest <= 1024 else "long",
        problem.group > 1,
        problem.dropout,
    )


class Measured(NamedTuple):
    """One class on one GPU: the time of PyTorch's choice over ours, and where that is from."""

    gain: float
    stock: str
    source: str


@functools.cache
def table() -> dict[tuple[str, CallClass], Measured]:
    """The measurements by GPU and class."""
    rows: list[dict[str, Any]] = json.loads(POLICY.read_text())
    return {
        (row["gpu"], CallClass(**row["class"])): Measured(
            row["stock_ms"] / row["ours_ms"], row["stock"], f"{row['gpu']}, torch {row['torch']}, {row['date']}"
        )
        for row in rows
    }


@functools.cache
def fingerprint() -> str:
    """Tells one set of measurements from another."""
    return hashlib.sha256(POLICY.read_bytes()).hexdigest()[:8]


def measured(problem: Problem) -> Measured | None:
    """The measurement of a call's class, or of the same class without shared heads.

    Head dims between those measured have none: kernels round them up, each to sizes of its own.
    """
    found = class_of(problem)
    if not problem.head_dim == problem.head_dim_v == found.width:
        return None
    gpu = problem.hardware.name
    return table().get((gpu, found)) or table().get((gpu, found._replace(grouped=False)))


def faster(problem: Problem, stock: str) -> tuple[bool, str]:
    """Whether ours is the faster, as far as anyone knows, and why.

    Args:
        problem: of the forward; `needs_grad` says whether a backward follows.
        stock: the backend that PyTorch would choose, by its name in SDPBackend.
    """
    known = measured(problem)
    if known is not None and known.stock == stock:
        by = f"{stock} takes {known.gain:.2f} times as long as ours ({class_of(problem)}; {known.source})"
        return known.gain >= GAIN, f"measured: {by}"
    if stock in SLOW:
        return True, f"not measured on {problem.hardware}, and PyTorch would choose {stock}"
    return False, f"not measured on {problem.hardware}, and PyTorch would choose {stock}, which is fast"
