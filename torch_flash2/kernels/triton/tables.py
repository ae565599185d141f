"""Configurations of the portable kernels: plain data in configs.json, each row with its provenance.

D head dim of query and key, Dv of value. A row holds for one direction, one class of GPU, one element size and one
bucket of head dims; head dims between buckets take the next.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ...hardware import Hardware
from ...problem import Problem

BUCKETS = (64, 128, 256, 512)


class Config(NamedTuple):
    """One way to run a kernel. `tma`: load tiles by tensor descriptors where the strides allow it; `piece`: the most
    columns of one accumulator where warps multiply alone, 0 for as many as it has rows."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    tma: bool = False
    piece: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """What Triton's launch takes."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


class Fused(NamedTuple):
    """One way to run fused.py's kernel: see fused.Shape."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    STAGES: int
    WARPS_S: int
    WARPS_K: int
    WARPS_Q: int


class BackwardConfig(NamedTuple):
    """One way to run the backward: the kernels of dK and dV, of dQ, and of the bias's gradient.

    Where `v` is given, dK and dV are two launches, of kv and of v: one product more, and half the accumulators. Where
    the table has `fused`, it computes both instead of two launches; and dQ too where `atomics` are allowed, since it is
    the fastest then.
    """

    kv: Config
    q: Config
    bias: Config
    v: Config | None = None
    fused: Fused | None = None
    atomics: bool = False


def block_dim(head_dim: int) -> int:
    """The tile width of a head dim: the next power of two from 16 on."""
    return max(16, 1 << (head_dim - 1).bit_length())


def gpu_class(hardware: Hardware) -> str:
    """Which rows of the table a GPU uses: by generation and by the shared memory of a block."""
    if hardware.shared_memory >= 227 * 1024 and hardware.capability >= (10, 0):
        return "blackwell"
    if hardware.shared_memory >= 227 * 1024:
        return "hopper"
    return "ampere" if hardware.shared_memory >= 160 * 1024 else "small"


@functools.cache
def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((Path(__file__).parent / "configs.json").read_text())
    return rows


@functools.cache
def _row(kernel: str, gpu: str, bits: int, bucket: int) -> dict[str, Any] | None:
    wanted = (kernel, gpu, bits, bucket)
    matches = [row for row in _rows() if (row["kernel"], row["gpu"], row["bits"], row["bucket"]) == wanted]
    if not matches and kernel in ("backward_v", "backward_fused"):
        return None
    assert len(matches) == 1, f"configs.json needs one row for {wanted}, has {len(matches)}"
    config: dict[str, Any] = matches[0]["config"]
    return config


def _find(kernel: str, problem: Problem) -> dict[str, Any] | None:
    bits = problem.dtype.itemsize * 8
    width = max(block_dim(problem.head_dim), block_dim(problem.head_dim_v))
    bucket = next(size for size in BUCKETS if width <= size)
    # Without unit stride on D there are no wide loads, and tiles take shared memory of another shape: the rows for
    # least memory.
    # So do dense masks beside wide heads, whose own tiles are loaded ahead too.
    wide_dense = problem.dense and width > 128
    small = problem.hardware.type != "cuda" or problem.layout == "strided" or wide_dense
    return _row(kernel, "small" if small else gpu_class(problem.hardware), bits, bucket)


def lookup(kernel: str, problem: Problem) -> Config | None:
    """The row for a kernel: "forward", "backward_kv", "backward_v", "backward_q" or "backward_bias". Only backward_v
    may have none: then dK and dV are one launch."""
    found = _find(kernel, problem)
    if found is None:
        return None
    config = Config(**found)
    if problem.hardware.type == "cpu":
        # Triton's interpreter: small tiles and pieces find more edges, and the cost is per tile.
        config = config._replace(BLOCK_M=min(config.BLOCK_M, 32), BLOCK_N=min(config.BLOCK_N, 32), piece=32)
    return config


def forward(problem: Problem) -> Config:
    """The configuration of the forward."""
    return _known("forward", problem)


def backward(problem: Problem) -> BackwardConfig:
    """The configurations of the backward."""
    kv, q, bias = (_known(f"backward_{part}", problem) for part in ("kv", "q", "bias"))
    fused = _find("backward_fused", problem)
    return BackwardConfig(kv, q, bias, lookup("backward_v", problem), Fused(**fused) if fused else None)


def _known(kernel: str, problem: Problem) -> Config:
    config = lookup(kernel, problem)
    assert config is not None, kernel
    return config


def sweep(problem: Problem) -> Iterator[Config]:
    """Configurations worth measuring, one kernel."""
    hopper = problem.hardware.capability >= (9, 0)
    for block_m, block_n, warps, stages in itertools.product((32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3)):
        if block_m >= block_n // 2:
            yield from (Config(block_m, block_n, warps, stages, tma) for tma in ((False, True) if hopper else (False,)))


def sweep_fused() -> Iterator[Fused]:
    """Configurations of fused.py's kernel worth measuring."""
    for block_m, block_n, warps, stages in itertools.product((32, 64), (64, 128), (4, 8), (1, 2)):
        for warps_s, warps_k in itertools.product((2, 4), (2, 4)):
            yield Fused(block_m, block_n, warps, stages, warps_s, warps_k, 2)
