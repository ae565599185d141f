"""The Hopper backward from the host's side: what it can run, its configurations, its launches.

B segments, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ... import problem as problem_module
from ...problem import Call, Gradients, Problem, Saved
from ..bundles import RowStats, Strided, coded
from ..triton import launching, recording, tables
from ..triton.statistics import CLEARED, launch_stats, sink_gradient
from . import calls
from .backward_keys import backward_keys
from .backward_pipeline import BackwardShape, KeyOutputs, QueryOutputs
from .backward_queries import backward_queries
from .calls import descriptor
from .repair import finish_queries, repair_queries

# Programs of the kernel that looks for marked tiles, for each multiprocessor.
REPAIRERS = 4


class Config(NamedTuple):
    """One way to run a kernel: consumer warpgroups, positions of a streamed tile, buffers of queries or keys and of
    output gradients or values, the columns of a tile of D and of Dv; of dK and dV, whether two warpgroups share 64
    keys, whether S of the next tile is issued before dS of this one, whether dQ's products have a warpgroup of their
    own; how many times 64 columns of keys and of values (for dQ of output gradients) stay in registers too; of how many
    tasks keys and values are on the chip: 2 where programs claim tasks, one after the other; whether atomic additions
    to a row of dQ have one order; and whether a warp of its own has TMA make them, from shared memory. For dQ, `AHEAD`
    is S of the next tile too."""

    GROUPS: int
    BLOCK: int
    STAGES: int
    STAGES_V: int
    WIDTH_D: int
    WIDTH_V: int
    SHARED: bool = False
    AHEAD: bool = False
    APART: bool = False
    KEPT: int = 0
    KEPT_V: int = 0
    TASKS: int = 1
    ORDERED: bool = False
    CARRIED: bool = False


class BackwardConfig(NamedTuple):
    """One way to run the backward: the kernel of dK and dV, and that of dQ; or with `atomics`, where there is one,
    `fused`, which makes dK and dV and sums dQ by atomic additions, whose order varies unless it is `ORDERED`."""

    keys: Config
    queries: Config
    fused: Config | None = None
    atomics: bool = False


def why_not(problem: Problem) -> Iterator[str]:
    """Why this kernel cannot run the problem."""
    yield from calls.why_not(problem)
    if problem.head_dim % 8 != 0:
        yield "TMA needs multiples of 16 bytes, which a gradient's rows have where D is a multiple of 8"
    rows = 2 * problem.batch * problem.heads * (problem.seqlen_q + 256)
    if rows >= 2**31:
        yield "the call has more query rows over all heads than TMA can count"


def rather_not(problem: Problem) -> Iterator[str]:
    """Why another kernel is likely the faster one."""
    if min(problem.seqlen_q, problem.seqlen_k) <= 64:
        yield "with 64 query rows or keys or fewer half of its tiles would be empty"
    elif 2 * problem.batch * problem.heads_kv * triton.cdiv(problem.seqlen_k, 128) < problem.hardware.multiprocessors:
        yield "its tiles of 128 keys would keep less than half of the GPU busy"


def config(problem: Problem) -> BackwardConfig:
    """The row of backward_configs.json for the next head dims, with atomics where they are allowed and pay: in one
    order, if PyTorch's deterministic algorithms are on."""
    row = next(
        row
        for row in calls.table("backward_configs.json")
        if problem.head_dim <= row["head_dim"] and problem.head_dim_v <= row["head_dim_v"]
    )
    keys, queries = Config(**row["keys"]), Config(**row["queries"])
    if (problem.steps or problem.dropout) and "stepped" in row:
        # They and dropout take the registers of operands kept there, and of longer tiles.
        changes = row["stepped"]
        keys, queries = keys._replace(**changes["keys"]), queries._replace(**changes["queries"])
    if row["fused"] is None:
        return BackwardConfig(keys, queries)
    fused = Config(**row["fused"])
    if any(_tma_cannot_add(problem, fused)):
        fused = fused._replace(CARRIED=False)
    # A mask leaves about half of the keys that a row could see, and of the rows that see a key.
    share = 2 if problem.mask.bands else 1
    if problem.lengths:
        # Between these products rows past a document's end are cleared, and ptxas has them wait for one another.
        fused = fused._replace(AHEAD=False)
    if problem.steps or problem.dropout:
        # They take the registers of operands kept there, and of the next tile's products.
        fused = fused._replace(KEPT=0, KEPT_V=0, AHEAD=False)
    elif _stops_early(problem):
        fused = fused._replace(**row["stopping"]) if fused.CARRIED else fused
    else:
        # Where tasks are short, what comes before and after one takes its share: it goes on beside another task.
        rows = problem.seqlen_q * problem.group
        fused = fused._replace(**next((c["changes"] for c in row["claimed"] if rows <= c["rows"] * share), {}))
    # Sums cost by the row, a second kernel by the key that a row sees; of some score steps accumulators would spill.
    pays = problem.seqlen_k >= row["fused_keys"] * share and set(problem.steps) <= set(row["fused_steps"])
    if problem.deterministic:
        pays = pays and row["ordered"] is not None and _order_pays(problem, row["ordered"]["tiles"] * share)
        fused = fused._replace(**row["ordered"]["changes"], ORDERED=True) if pays else fused
    return BackwardConfig(keys, queries, fused, pays)


def _order_pays(problem: Problem, tiles: int) -> bool:
    """Whether additions in one order pay where there are so many tiles of keys for each multiprocessor: those of a head
    wait for one another, and the longest are the last to begin."""
    heads = problem.batch * problem.heads_kv
    enough = tiles * problem.hardware.multiprocessors
    return heads >= calls.TOGETHER and heads * triton.cdiv(problem.seqlen_k, 128) >= enough


def _stops_early(problem: Problem) -> bool:
    """Whether the rows that see a key may stop before the last one. At head dim 128 shared memory has no room for these
    numbers of a second task."""
    return problem.mask.bounds_left or bool(problem.lengths)


def _tma_cannot_add(problem: Problem, fused: Config) -> Iterator[str]:
    """What of a problem keeps TMA from adding to dQ's sums."""
    if problem.lengths or problem.steps or problem.dropout:
        yield "TMA adds where there are no lengths, score steps or dropout"
    if problem.batch * problem.heads * (problem.seqlen_q + 256) * fused.WIDTH_D >= 2**31:
        yield "TMA counts fewer than 2^31 numbers of dQ's sums"


def forbids(problem: Problem, config: BackwardConfig) -> Iterator[str]:
    """What the problem does not allow in a forced configuration."""
    fused = config.fused
    if config.atomics and problem.deterministic and not (fused is not None and fused.ORDERED):
        yield "atomics add in an order that varies, and PyTorch's deterministic algorithms are on"
    if config.atomics and fused is None:
        yield "it has no kernel with atomics for head dims above 128"
    if config.keys.TASKS > 1:
        yield "programs claim tasks in the kernel with atomics alone"
    if config.keys.ORDERED:
        yield "additions have an order in the kernel with atomics alone"
    if config.keys.CARRIED:
        yield "TMA adds in the kernel with atomics alone"
    if fused is None:
        return
    if fused.ORDERED and not (fused.APART and fused.TASKS > 1):
        yield "additions have an order where a warpgroup of its own makes them and programs claim tasks"
    if fused.CARRIED and (not fused.AHEAD or fused.APART or fused.TASKS > 1):
        yield "TMA adds where S of the next tile is issued early and a program has one task, not for a third warpgroup"
    if fused.CARRIED:
        yield from _tma_cannot_add(problem, fused)


def candidates(problem: Problem) -> Iterator[BackwardConfig]:
    """Configurations worth measuring."""
    base = config(problem)
    if base.fused is not None and base.atomics:
        for stages, stages_v, tasks in ((2, 2, 1), (2, 4, 1), (3, 3, 1), (4, 2, 1), (4, 4, 1), (2, 2, 2), (4, 4, 2)):
            fused = base.fused._replace(STAGES=stages, STAGES_V=stages_v, TASKS=tasks, CARRIED=False)
            yield base._replace(fused=fused)
        if base.fused.CARRIED:
            for stages in (3, 4):
                yield base._replace(fused=base.fused._replace(STAGES=stages))
    for block in (64, 128):
        for stages in (2, 3):
            buffers = {"STAGES": stages, "STAGES_V": stages}
            queries = base.queries._replace(BLOCK=block, **buffers)
            yield base._replace(keys=base.keys._replace(**buffers), queries=queries, atomics=False)


def _shape(problem: Problem, config: Config) -> BackwardShape:
    return BackwardShape(
        config.GROUPS,
        config.BLOCK,
        config.STAGES,
        config.STAGES_V,
        config.WIDTH_D,
        triton.cdiv(problem.head_dim, config.WIDTH_D),
        config.WIDTH_V,
        triton.cdiv(problem.head_dim_v, config.WIDTH_V),
        problem.mask.bounds_left,
        problem.mask.align == "bottom-right",
        problem.group > 1,
        config.SHARED,
        config.AHEAD,
        config.APART,
        config.KEPT,
        config.KEPT_V,
        config.TASKS,
        config.CARRIED,
    )


def launch(problem: Problem, config: BackwardConfig, call: Call, saved: Saved) -> Gradients:
    """Run it; each gradient has the shape, dtype and dimension order of its tensor."""
    out, lse, grad_out, grad_lse, wanted = saved
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    elif not problem_module.tma_ready(grad_out):
        grad_out = grad_out.contiguous()
    tensors = (call.query, call.key, call.value, call.bias, call.sinks)
    found = Gradients(
        *(torch.empty_like(t) if want and t is not None else None for t, want in zip(tensors, wanted, strict=True))
    )
    if problem.batch == 0 or 0 in call.query.shape or 0 in call.key.shape:
        for gradient in found:
            if gradient is not None:
                gradient.zero_()
        return found
    fused = config.fused if config.atomics else None
    sums = None
    if fused is not None and found.query is not None and (found.key is not None or found.value is not None):
        sums = _sums(problem, fused, call)
    stats = launch_stats(call, out, lse, grad_out, grad_lse, sums)
    if fused is not None and sums is not None:
        _launch_keys(problem, fused, call, grad_out, stats, found, sums)
        _finish_queries(problem, fused, call, grad_out, stats, found.query, sums)
    else:
        if found.key is not None or found.value is not None:
            _launch_keys(problem, config.keys, call, grad_out, stats, found)
        if found.query is not None:
            _launch_queries(problem, config.queries, call, grad_out, stats, found.query)
    sink_gradient(call, lse, stats, found.sinks)
    return found


def record(
    problem: Problem, config: BackwardConfig, call: Call, saved: Saved
) -> tuple[Gradients, recording.Recording | None]:
    """Run it, and record it for calls alike."""
    if 0 not in call.query.shape:
        # Zeros that are there already are not computed while the launch is recorded; the smallest tiles have 64 rows.
        launching.keep_zeros(call.query.device, _tiles(problem, call, 64))
    return recording.record(launch, problem, config, call, saved)


def _inputs(config: Config, call: Call, grad_out: torch.Tensor, rows: int, keys: int) -> tuple[Any, ...]:
    """What a kernel loads by TMA, in tiles of so many rows and keys."""
    return (
        descriptor(call.query, rows, config.WIDTH_D),
        descriptor(call.key, keys, config.WIDTH_D),
        descriptor(call.value, keys, config.WIDTH_V),
        descriptor(grad_out, rows, config.WIDTH_V),
    )


def _launch_keys(
    problem: Problem, config: Config, call: Call, grad_out: torch.Tensor, stats: RowStats, found: Gradients,
    sums: torch.Tensor | None = None,
) -> None:  # fmt: skip
    key = torch.empty_like(call.key) if found.key is None else found.key
    value = torch.empty_like(call.value) if found.value is None else found.value
    keys = 64 * (1 if config.SHARED else config.GROUPS)
    vector = gl.NVMMASharedLayout(0, 32, 1)
    programs = launching.programs(call.cu_k, problem.batch, problem.heads_kv, call.key.shape[2], keys)
    counter = added = None
    if config.TASKS > 1:
        assert sums is not None
        counter = sums.view(torch.int32)[-4:]
    if config.ORDERED:
        assert counter is not None
        added = sums.view(torch.int32)[_tiles(problem, call, config.BLOCK) * config.BLOCK * config.WIDTH_D :]
    order = tuple(map(coded, (*calls.key_order(problem, call, keys, config.ORDERED), programs)))
    arguments = (
        *_inputs(config, call, grad_out, config.BLOCK, 64),
        # delta lies behind lse2.
        TensorDescriptor(stats.lse2, [2 * stats.lse2.numel()], [1], [config.BLOCK], vector),
        descriptor(key, 64, config.WIDTH_D),
        descriptor(value, 64, config.WIDTH_V),
        _sums_by_tma(sums, config) if sums is not None and config.CARRIED else None,
        KeyOutputs(Strided.of(key), Strided.of(value), stats, sums, counter, added, order),
        *launching.bundle(problem, call),
        _shape(problem, config),
        launching.steps(problem),
    )
    if config.TASKS > 1:
        programs = min(programs, problem.hardware.multiprocessors)
    launching.launch(backward_keys, programs, call.query.device, arguments, num_warps=4)


def _sums(problem: Problem, config: Config, call: Call) -> torch.Tensor:
    """Room for the sums of dQ, fp32: for each tile of rows a tile of products; a number for each tile where
    additions have an order; and a number to claim tasks by."""
    each = config.BLOCK * config.WIDTH_D + config.ORDERED
    size = triton.cdiv(_tiles(problem, call, config.BLOCK) * each + 4, CLEARED.value) * CLEARED.value
    return torch.empty(size, dtype=torch.float32, device=call.query.device)


def _sums_by_tma(sums: torch.Tensor, config: Config) -> TensorDescriptor:
    """dQ's sums, in parts that a warpgroup makes."""
    part = config.BLOCK * config.WIDTH_D // config.GROUPS
    return TensorDescriptor(sums, [sums.numel()], [1], [part], gl.NVMMASharedLayout(0, 32, 1))


def _finish_queries(
    problem: Problem, config: Config, call: Call, grad_out: torch.Tensor, stats: RowStats, grad_q: torch.Tensor,
    sums: torch.Tensor,
) -> None:  # fmt: skip
    flags = _flags(problem, call, config.BLOCK)
    spans, sizes, _, scoring, _ = launching.bundle(problem, call)
    # How many parts, side by side, the warpgroups make.
    parts = 1 if config.APART else config.GROUPS
    arguments = (
        sums, Strided.of(grad_q), flags, spans, sizes, scoring, config.BLOCK, config.WIDTH_D // parts, parts
    )  # fmt: skip
    programs = _tiles(problem, call, config.BLOCK)
    launching.launch(finish_queries, programs, call.query.device, arguments, num_warps=4, num_stages=1)
    _repair_queries(problem, call, grad_out, stats, grad_q, flags, config.BLOCK)


def _tiles(problem: Problem, call: Call, rows: int) -> int:
    """How many tiles of so many query rows there are."""
    return launching.programs(call.cu_q, problem.batch, problem.heads, call.query.shape[2], rows)


def _flags(problem: Problem, call: Call, rows: int) -> torch.Tensor | None:
    """Zeros to mark tiles of so many rows in, or None where no NaN can lie behind a mask."""
    return launching.zeros(call.query.device, _tiles(problem, call, rows)) if calls.hides(problem) else None


def _launch_queries(
    problem: Problem, config: Config, call: Call, grad_out: torch.Tensor, stats: RowStats, grad_q: torch.Tensor
) -> None:  # fmt: skip
    rows = 64 * config.GROUPS
    flags = _flags(problem, call, rows)
    arguments = (
        *_inputs(config, call, grad_out, 64, config.BLOCK),
        descriptor(grad_q, 64, config.WIDTH_D),
        QueryOutputs(Strided.of(grad_q), stats, flags),
        tuple(map(coded, calls.order(problem, call, rows))),
        *launching.bundle(problem, call),
        _shape(problem, config),
        launching.steps(problem),
    )
    launching.launch(backward_queries, _tiles(problem, call, rows), call.query.device, arguments, num_warps=4)
    _repair_queries(problem, call, grad_out, stats, grad_q, flags, rows)


def _repair_queries(
    problem: Problem, call: Call, grad_out: torch.Tensor, stats: RowStats, grad_q: torch.Tensor,
    flags: torch.Tensor | None, rows: int,
) -> None:  # fmt: skip
    """dQ again of the marked tiles of so many rows."""
    if flags is None:
        return
    programs = _tiles(problem, call, rows)
    tensors = (Strided.of(tensor) for tensor in (call.query, call.key, call.value, grad_out))
    mode = launching.mode(problem, tables.backward(problem).q._replace(BLOCK_M=rows), rows)
    arguments = (
        flags,
        coded(programs),
        *tensors,
        stats,
        Strided.of(grad_q),
        *launching.bundle(problem, call),
        mode,
        launching.steps(problem),
    )
    repairers = min(programs, REPAIRERS * problem.hardware.multiprocessors)
    launching.launch(repair_queries, repairers, call.query.device, arguments, num_warps=rows // 16, num_stages=1)
