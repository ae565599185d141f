"""The Hopper forward from the host's side: what it can run, its configurations, its launch.

B segments, H query heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton

from ... import masks
from ...problem import Call, Problem
from ..bundles import Strided, coded
from ..triton import launching, recording, splitting
from . import calls, reach
from .calls import descriptor, hides, order
from .forward_kernel import attention_forward
from .pipeline import COUNTERS, Aside, Parted, Plain, Shape

# Weights are handed to the tensor core in the values' dtype. Where bf16 lets them be large, bases move seldom: data
# whose scores grow by 17 powers of two with every tile took 1.03 times as long as FlashAttention-3 needs, 1.06 with
# 2^40 (H200, 2026-11-21, head dim 128, causal, 4k). Values over about 1e11 can overflow fp32 on such data.
LIMITS = {torch.float16: 2.0**12, torch.bfloat16: 2.0**80}

# What combining the splits of keys takes, in tiles of keys.
COMBINING = 4


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
    APART: bool
    HELD: bool


def why_not(problem: Problem) -> Iterator[str]:
    """Why this kernel cannot run the problem."""
    yield from calls.why_not(problem)


def rather_not(problem: Problem) -> Iterator[str]:
    """Why another kernel is likely the faster one."""
    few = 2 * _tiles(problem, 2) < problem.hardware.multiprocessors
    if few and key_splits(problem, config(problem)) > 1:
        return
    if problem.seqlen_q * packed(problem, 2) <= 64:
        yield "with 64 query rows or fewer half of its tiles would be empty"
    elif few:
        yield "its tiles of 128 query rows would keep less than half of the GPU busy, and its keys are too few to split"


def config(problem: Problem) -> Config:
    """The row of configs.json for the next head dims, with or without a mask, before all for a score step or dropout
    that the call has, for the most keys that it has. A row may ask for rows of the query, and for tiles of them for
    each multiprocessor: large tiles do not pay where the last ones keep few of the GPU's busy."""
    masked = bool(problem.mask.bands or problem.lengths)
    steps = (*problem.steps, "dropout") if problem.dropout else problem.steps
    task_keys = _task_keys(problem)
    fitting = [
        row
        for row in calls.table("configs.json")
        if problem.head_dim <= row["head_dim"]
        and problem.head_dim_v <= row["head_dim_v"]
        and row["masked"] in (None, masked)
        and row["step"] in (None, *steps)
        and row["seqlen_k"] <= problem.seqlen_k
        and row.get("seqlen_q", 0) <= problem.seqlen_q
        and row.get("tiles", 0) <= _tiles_each(problem, row["config"]["GROUPS"])
        and row.get("task_keys", math.inf) >= task_keys
    ]
    narrowest = min((row["head_dim"], row["head_dim_v"]) for row in fitting)
    rows = [row for row in fitting if (row["head_dim"], row["head_dim_v"]) == narrowest]

    def rank(row: dict[str, Any]) -> tuple[bool, float, int]:
        return row["step"] is not None, -row.get("task_keys", math.inf), row["seqlen_k"]

    return Config(**max(rows, key=rank)["config"])


def packed(problem: Problem, groups: int) -> int:
    """How many query heads of a group share a tile. Of up to 64 rows a tile has several heads' where there are fewer
    tiles then: they read the same keys. Not with what differs from head to head inside a loop."""
    if problem.seqlen_q > 64 or problem.packed_q or problem.dropout or "alibi" in problem.steps:
        return 1
    return _sharing(problem.group, problem.seqlen_q, 64 * groups)


@functools.lru_cache
def _sharing(group: int, seqlen_q: int, rows: int) -> int:
    """How many heads of a group share tiles of so many rows so that they have the fewest: each launch asks for it."""
    fitting = (heads for heads in (1, 2, 4, 8) if group % heads == 0)
    return min(fitting, key=lambda heads: group // heads * triton.cdiv(seqlen_q, rows // heads))


def _tiles(problem: Problem, groups: int) -> int:
    """Tiles of query rows, of documents that are not packed."""
    heads = packed(problem, groups)
    return problem.batch * problem.heads // heads * triton.cdiv(problem.seqlen_q, 64 * groups // heads)


def _tiles_each(problem: Problem, groups: int) -> float:
    """Tiles of query rows for each multiprocessor."""
    return _tiles(problem, groups) / problem.hardware.multiprocessors


def _task_keys(problem: Problem) -> float:
    """The keys of a task where no multiprocessor has more than one, with keys split evenly; else inf. Such tasks do
    best where nothing is prepared for a next one."""
    tiles, slots = _tiles(problem, 2), problem.hardware.multiprocessors
    return problem.seqlen_k * tiles / slots if tiles <= slots and not problem.packed_q else math.inf


def key_splits(problem: Problem, config: Config) -> int:
    """Into how many parts the keys of each tile of query rows are split, so that few tiles keep the GPU busy. Windows'
    are not: their rows see few."""
    if problem.packed_q or problem.mask.bounds_left or problem.head_dim_v % config.WIDTH_V:
        return 1
    tiles, slots = _tiles(problem, config.GROUPS), problem.hardware.multiprocessors
    if tiles >= slots:
        return 1
    keys = triton.cdiv(problem.seqlen_k, config.BLOCK_N)
    return splitting.even_splits(tiles, slots, keys, max(keys // splitting.LEAST_TILES, 1), COMBINING)


def candidates(problem: Problem) -> Iterator[Config]:
    """Configurations worth measuring: those whose buffers fit and whose accumulators leave room for the scores."""
    base = config(problem)
    columns = triton.cdiv(problem.head_dim, base.WIDTH_D) * base.WIDTH_D
    columns_v = triton.cdiv(problem.head_dim_v, base.WIDTH_V) * base.WIDTH_V
    either = (False, True)
    for groups, block_n, stages, q_stages, turns, late, apart, held in itertools.product(
        (2, 3), (64, 128), (2, 3, 4), (1, 2), either, either, either, either
    ):
        found = base._replace(
            GROUPS=groups, BLOCK_N=block_n, STAGES=stages, Q_STAGES=q_stages, TURNS=turns, LATE=late, APART=apart,
            HELD=held,
        )  # fmt: skip
        # Registers of a thread, of half a row each: fp32 scores and accumulators; weights, fp32 beside the scores or,
        # in three warpgroups, the last tile's in 16 bits; queries in 16 bits.
        registers = block_n // 2 + columns_v // 2 + block_n // (4 if groups == 3 else 2) + held * columns // 4
        fits = shared_bytes(problem, found) <= problem.hardware.shared_memory
        # Three warpgroups have 160 registers a thread, two 240.
        if fits and registers <= (128 if groups == 3 else 208):
            yield found


def shared_bytes(problem: Problem, config: Config) -> int:
    """What the buffers of a program take, with 1 KB for barriers and the ring of tasks."""
    return _loaded_bytes(problem, config) + _stored_bytes(config, _width_out(problem, config))


def _loaded_bytes(problem: Problem, config: Config) -> int:
    D = triton.cdiv(problem.head_dim, config.WIDTH_D) * config.WIDTH_D
    Dv = triton.cdiv(problem.head_dim_v, config.WIDTH_V) * config.WIDTH_V
    queries = config.GROUPS * 64 * config.Q_STAGES * D
    return 2 * (queries + config.STAGES * config.BLOCK_N * (D + Dv)) + 1024


def _stored_bytes(config: Config, width: int) -> int:
    return 2 * config.GROUPS * 64 * width


def _width_out(problem: Problem, config: Config) -> int:
    """The columns that a warpgroup stores at once: those of an accumulator, or of a part of it where shared memory has
    no room for more."""
    room = problem.hardware.shared_memory - _loaded_bytes(problem, config)
    widths = (width for width in (256, 128, 64) if width <= config.WIDTH_V)
    return next((width for width in widths if _stored_bytes(config, width) <= room), min(config.WIDTH_V, 64))


def shape(problem: Problem, config: Config) -> Shape:
    """The compile-time numbers of a launch."""
    tilted = "alibi" in problem.steps and any(isinstance(band, masks.Causal) for band in problem.mask.bands)
    return Shape(
        config.GROUPS,
        config.BLOCK_N,
        config.STAGES,
        config.Q_STAGES,
        config.WIDTH_D,
        triton.cdiv(problem.head_dim, config.WIDTH_D),
        config.WIDTH_V,
        triton.cdiv(problem.head_dim_v, config.WIDTH_V),
        _width_out(problem, config),
        problem.mask.bounds_left,
        tilted,
        problem.mask.align == "bottom-right",
        config.TURNS,
        config.LATE,
        config.APART,
        config.HELD,
        # Warpgroups that take turns have equal numbers of them.
        config.Q_STAGES == 1
        and not config.TURNS
        and config.BLOCK_N < 64 * config.GROUPS == 128
        and bool(problem.mask.bands),
        LIMITS[problem.dtype] if tilted or max(problem.head_dim, problem.head_dim_v) > 64 else None,
        packed(problem, config.GROUPS),
    )


def _order(problem: Problem, config: Config, call: Call) -> tuple[int, int]:
    heads = packed(problem, config.GROUPS)
    together, kept = order(problem, call, 64 * config.GROUPS // heads)
    return max(together // heads, 1), kept


def _count(problem: Problem, config: Config, call: Call) -> int:
    """Splits of a launch. Who gives a number for calls of few query rows gets results that depend on nothing else."""
    return key_splits(problem, config) if call.num_splits is None else 1


def _grid(problem: Problem, config: Config, call: Call) -> tuple[int, int]:
    """Programs of a launch, and tasks that they share."""
    heads = packed(problem, config.GROUPS)
    rows = 64 * config.GROUPS // heads
    tiles = launching.programs(call.cu_q, problem.batch, problem.heads // heads, call.query.shape[2], rows)
    tasks = tiles * _count(problem, config, call)
    return min(tasks, problem.hardware.multiprocessors), tasks


def _workspace(problem: Problem, config: Config, call: Call) -> int:
    """How many zeros a launch takes: two counters, and where bands or lengths hide keys flags for careful.note_nan."""
    programs, tasks = _grid(problem, config, call)
    return COUNTERS + (programs + config.GROUPS * tasks if hides(problem) else 0)


def launch(problem: Problem, config: Config, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Run it: out [B, H, M, Dv] in the query's dtype, laid out in memory as the query; lse fp32 [B, H, M]."""
    out, lse = launching.outputs(call)
    if problem.batch == 0 or 0 in call.query.shape or 0 in call.key.shape:
        return out.zero_(), lse.fill_(-torch.inf)
    workspace = launching.zeros(call.query.device, _workspace(problem, config, call))
    numbers = shape(problem, config)
    spans, sizes, rules, scoring, operands = launching.bundle(problem, call)
    splits = splitting.left_by(_count(problem, config, call), lse, problem.head_dim_v)
    if splits is not None:
        # Sinks join the denominator where splits are combined.
        operands = operands._replace(sinks=None)
    arguments: tuple[Any, ...] = (
        descriptor(call.query, 64 // numbers.PACKED, config.WIDTH_D, numbers.PACKED),
        descriptor(call.key, config.BLOCK_N, config.WIDTH_D),
        descriptor(call.value, config.BLOCK_N, config.WIDTH_V),
        descriptor(out, 64 // numbers.PACKED, numbers.WIDTH_OUT, numbers.PACKED),
        Plain(*map(Strided.of, (call.query, call.key, call.value, out))),
        lse,
        Aside(
            workspace,
            workspace if hides(problem) else None,
            reach.norms(problem, call) if reach.pays(problem, numbers.TILTED) else None,
            None if splits is None else Parted(splits.count, splits.out, splits.lse2),
        ),
        tuple(map(coded, _order(problem, config, call))),
        spans,
        sizes,
        rules,
        scoring,
        operands,
        numbers,
        launching.steps(problem),
    )
    programs, _ = _grid(problem, config, call)
    launching.launch(attention_forward, programs, call.query.device, arguments, num_warps=4)
    if splits is not None:
        splitting.combine_rows(splits, out, lse, call, sizes)
    return out, lse


def record(
    problem: Problem, config: Config, call: Call
) -> tuple[tuple[torch.Tensor, torch.Tensor], recording.Recording | None]:
    """Run it, and record it for calls alike."""
    if 0 not in call.query.shape:
        # Zeros that are there already are not computed while the launch is recorded.
        launching.keep_zeros(call.query.device, _workspace(problem, config, call))
    return recording.record(launch, problem, config, call)
