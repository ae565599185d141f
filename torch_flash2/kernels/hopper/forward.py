"""The Hopper forward from the host's side: what it can run, its configurations, its launch.

B segments, H query heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...problem import Call, Problem
from ..bundles import Strided, coded
from ..triton import launching, recording
from .forward_kernel import attention_forward
from .pipeline import COUNTERS, Plain, Shape

# Keys and values of the heads that are worked on side by side should stay in L2, beside all else that passes through
# it: 50 MB on the H100 and the H200.
L2_BYTES = 32 << 20


class Config(NamedTuple):
    """One way to run the kernel: see pipeline.Shape."""

    GROUPS: int
    BLOCK_N: int
    STAGES: int
    Q_STAGES: int
    WIDTH_D: int
    WIDTH_V: int
    TURNS: bool
    LATE: bool


def why_not(problem: Problem) -> Iterator[str]:
    """Why this kernel cannot run the problem."""
    hardware = problem.hardware
    if hardware.type != "cuda" or hardware.capability != (9, 0):
        yield "it is for Hopper GPUs (compute capability 9.0)"
        return
    if launching.INTERPRETED and not hardware.name.startswith("simulated"):
        yield "Triton's interpreter cannot run Gluon"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        yield f"it has float16 and bfloat16, got {problem.dtype}"
    if problem.layout != "aligned" or problem.head_dim_v % 8 != 0:
        yield "TMA needs unit stride on D and multiples of 16 bytes everywhere else"
    if max(problem.head_dim, problem.head_dim_v) > 256:
        yield f"it has head dims up to 256, got {problem.head_dim} and {problem.head_dim_v}"
    if problem.dense or "bias" in problem.steps:
        yield "dense masks and biases stay on the portable kernel"
    if not problem.positive_scale:
        yield "a scale that is not positive stays on the portable kernel"
    if problem.dropout:
        yield "dropout stays on the portable kernel"
    if problem.page_size is not None:
        yield "it has no paged keys and values"
    if problem.batch * problem.heads * (problem.seqlen_q // 128 + 1) >= 2**30:
        yield "the call has more tiles than its counter can count"


def rather_not(problem: Problem) -> Iterator[str]:
    """Why another kernel is likely the faster one."""
    if problem.seqlen_q <= 64:
        yield "with 64 query rows or fewer half of its tiles would be empty"
    elif 2 * problem.batch * problem.heads * triton.cdiv(problem.seqlen_q, 128) < problem.hardware.multiprocessors:
        yield "its tiles of 128 query rows would keep less than half of the GPU busy"


@functools.cache
def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((Path(__file__).parent / "configs.json").read_text())
    return rows


def config(problem: Problem) -> Config:
    """The row of configs.json for the next head dims, with or without a mask, for the most keys that the call has."""
    masked = bool(problem.mask.bands or problem.lengths)
    fitting = [
        row
        for row in _rows()
        if problem.head_dim <= row["head_dim"]
        and problem.head_dim_v <= row["head_dim_v"]
        and row["masked"] in (None, masked)
        and row["seqlen_k"] <= problem.seqlen_k
    ]
    narrowest = min((row["head_dim"], row["head_dim_v"]) for row in fitting)
    rows = [row for row in fitting if (row["head_dim"], row["head_dim_v"]) == narrowest]
    return Config(**max(rows, key=lambda row: row["seqlen_k"])["config"])


def candidates(problem: Problem) -> Iterator[Config]:
    """Configurations worth measuring."""
    base = config(problem)
    for groups, block_n, stages, turns, late in itertools.product(
        (2, 3), (64, 128), (2, 3, 4), (False, True), (False, True)
    ):
        # Three warpgroups have 160 registers a thread, which hold P as 16 bits only.
        if groups == 2 or (base.WIDTH_D <= 64 and not late):
            yield base._replace(GROUPS=groups, BLOCK_N=block_n, STAGES=stages, TURNS=turns, LATE=late)


def shape(problem: Problem, config: Config) -> Shape:
    """The compile-time numbers of a launch."""
    return Shape(
        config.GROUPS,
        config.BLOCK_N,
        config.STAGES,
        config.Q_STAGES,
        config.WIDTH_D,
        triton.cdiv(problem.head_dim, config.WIDTH_D),
        config.WIDTH_V,
        triton.cdiv(problem.head_dim_v, config.WIDTH_V),
        problem.mask.bounds_left,
        problem.mask.align == "bottom-right",
        config.TURNS,
        config.LATE,
    )


def descriptor(tensor: torch.Tensor, rows: int, cols: int) -> TensorDescriptor:
    """How TMA sees a tensor [B, H, M, D] in tiles of rows x cols."""
    layout = gl.NVMMASharedLayout(min(cols * 2, 128), 16, 4)
    return TensorDescriptor(tensor, list(tensor.shape), launching.tma_strides(tensor), [1, 1, rows, cols], layout)


def swizzle(problem: Problem, call: Call) -> int:
    """How many heads go side by side. Without a mask all tiles are of one length: one head after the other."""
    if not problem.mask.bands and not problem.lengths:
        return 1
    key_bytes = call.key.shape[2] * (problem.head_dim + problem.head_dim_v) * 2
    heads = max(1, L2_BYTES // max(key_bytes, 1)) * problem.group
    return min(heads, problem.heads * (1 if problem.packed_q else problem.batch))


def _grid(problem: Problem, config: Config, call: Call) -> tuple[int, int]:
    """Programs of a launch, and tiles of query rows that they share."""
    tiles = launching.programs(call.cu_q, problem.batch, problem.heads, call.query.shape[2], 64 * config.GROUPS)
    return min(tiles, problem.hardware.multiprocessors), tiles


def _workspace(problem: Problem, config: Config, call: Call) -> int:
    """How many zeros a launch takes: two counters, and where bands or lengths hide keys flags for careful.note_nan."""
    programs, tiles = _grid(problem, config, call)
    return COUNTERS + (programs + config.GROUPS * tiles if hides(problem) else 0)


def hides(problem: Problem) -> bool:
    return bool(problem.mask.bands) or problem.packed_k or "used_k" in problem.lengths


def launch(problem: Problem, config: Config, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Run it: out [B, H, M, Dv] in the query's dtype, laid out in memory as the query; lse fp32 [B, H, M]."""
    out, lse = launching.outputs(call)
    if problem.batch == 0 or 0 in call.query.shape or 0 in call.key.shape:
        return out.zero_(), lse.fill_(-torch.inf)
    workspace = launching.zeros(call.query.device, _workspace(problem, config, call))
    arguments: tuple[Any, ...] = (
        descriptor(call.query, 64, config.WIDTH_D),
        descriptor(call.key, config.BLOCK_N, config.WIDTH_D),
        descriptor(call.value, config.BLOCK_N, config.WIDTH_V),
        descriptor(out, 64, config.WIDTH_V),
        Plain(*map(Strided.of, (call.query, call.key, call.value, out))),
        lse,
        workspace,
        workspace if hides(problem) else None,
        coded(swizzle(problem, call)),
        *launching.bundle(problem, call),
        shape(problem, config),
        launching.steps(problem),
    )
    programs, _ = _grid(problem, config, call)
    launching.launch(attention_forward, programs, call.query.device, arguments, num_warps=4)
    return out, lse


def record(
    problem: Problem, config: Config, call: Call
) -> tuple[tuple[torch.Tensor, torch.Tensor], recording.Recording | None]:
    """Run it, and record it for calls alike."""
    if 0 not in call.query.shape:
        # Zeros that are there already are not computed while the launch is recorded.
        launching.keep_zeros(call.query.device, _workspace(problem, config, call))
    return recording.record(launch, problem, config, call)
