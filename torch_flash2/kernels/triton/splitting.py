"""Splitting keys among programs, and combining what the splits leave: shared by the decoding kernels.

B segments, H query heads, M query rows, Dv head dim of value, S splits.
Where the caller gives S, how keys are split depends on S and the segment's own length alone: its bits are the same
whatever else is in its batch.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ... import masks
from ...problem import MOST_SPLITS, Call, Problem, stored_keys
from ..bundles import Sizes, Strided, coded
from ..device import scores, tiles
from . import launching, tables

# Where the library chooses, a split has at least this many tiles of keys.
LEAST_TILES = 4
# What choosing counts with: the time to start and end a program, in tiles.
START_TILES = 2
# Where lengths differ: waves of programs grow with the root of a multiprocessor's tiles over those of a start, times
# this, up to a limit.
STARTS_PER_WAVE = 6
MOST_WAVES = 8
# How many rows of tiles of query rows keep the GPU busy where a program combines several at a time.
MANY_ROWS = 2048


class Splits(NamedTuple):
    """How many splits a segment has at most, and the least number of tiles in one; all numbers coded as sizes are.

    Where lengths differ, `wanted` splits of all segments together are shared out by length, of which at most `reach`
    keys of a segment count; None: each segment has `count`. Where there are several, what they leave for
    `combine`, fp32: out [B * H * M, S, Dv] and lse in log2 units [B * H * M, S].
    """

    count: Any
    least: Any
    wanted: Any = None
    reach: Any = None
    out: Any = None
    lse2: Any = None


class Work(NamedTuple):
    """A kernel's programs: the packed rows and the keys of a tile, the bytes read for a tile of keys, and how many
    programs a multiprocessor holds."""

    rows: int
    keys: int
    tile_bytes: int
    resident: int


@triton.jit
def all_tiles(used, B, limit, BLOCK: tl.constexpr):
    """How many tiles of keys all segments have, each at most `limit` keys."""
    total = tl.zeros([128], tl.int32)
    for b0 in tl.range(0, B, 128):
        b = b0 + tl.arange(0, 128)
        length = tl.load(used + b, mask=b < B, other=0)
        total += tl.cdiv(tl.minimum(tl.maximum(length, 0), limit), BLOCK)
    return tl.sum(total)


@triton.jit
def most_counted(splits, sizes):
    """How many keys of a segment count where splits are shared out by length."""
    return tl.minimum(tiles.decoded(splits.reach), sizes.N)


@triton.jit
def part_of(span, index, splits, total, BLOCK: tl.constexpr):
    """The keys [start, stop) of a split: equal parts of the span, in whole tiles, of at least `splits.least` tiles;
    `total` is what `all_tiles` gives, where splits are shared out by length."""
    count = tl.cdiv(span.stop - span.start, BLOCK)
    parts = tiles.decoded(splits.count)
    if splits.wanted is not None:
        part = tl.maximum(tl.cdiv(total, tiles.decoded(splits.wanted)), 1)
        parts = tl.minimum(tl.maximum((count + part // 2) // part, 1), parts)
    part = tl.maximum(tl.cdiv(count, parts), tiles.decoded(splits.least)) * BLOCK
    start = tl.minimum(span.start + index * part, span.stop)
    return start, tl.minimum(start + part, span.stop)


@triton.jit
def decode_combine(
    splits, out, lse_ptr, sinks, coded_sizes, MOST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr
):  # fmt: skip
    """One row of out and lse from its splits. A split in which the row sees no key has lse -inf and left no output."""
    sizes = tiles.sizes_of(coded_sizes)
    count = tiles.decoded(splits.count)
    row = tl.program_id(0)
    m = row % sizes.M
    h = row // sizes.M % sizes.H
    b = row // sizes.M // sizes.H
    first = tl.cast(row, tl.int64) * count
    s = tl.arange(0, MOST)
    lse2 = tl.load(splits.lse2 + first + s, mask=s < count, other=-float("inf"))
    top = tl.max(lse2)
    sink = -float("inf")
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32) * scores.LOG2E
        top = tl.maximum(top, sink)
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp2(lse2 - base))
    stop = tl.max(tl.where(lse2 == -float("inf"), 0, s + 1))

    c = tl.arange(0, BLOCK_DV)
    s = tl.arange(0, BLOCK_S)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for s0 in tl.range(0, stop, BLOCK_S):
        own = tl.load(splits.lse2 + first + s0 + s, mask=s0 + s < count, other=-float("inf"))
        weight = tl.exp2(own - base)
        inside = (own != -float("inf"))[:, None] & (c < out.cols)[None, :]
        part = tl.load(splits.out + (first + s0 + s)[:, None] * out.cols + c[None, :], mask=inside, other=0.0)
        acc += tl.sum(part * weight[:, None], 0)
    none = total == 0.0
    if sinks is not None:
        total += tl.exp2(sink - base)
    acc = tl.where(none, 0.0, acc / tl.where(none, 1.0, total))
    lse = tl.where(none, -float("inf"), (base + tl.log2(tl.where(none, 1.0, total))) * scores.LN2)
    tl.store(lse_ptr + row, lse)
    at = tl.cast(b, tl.int64) * out.batch + tl.cast(h, tl.int64) * out.head + tl.cast(m, tl.int64) * out.row
    tl.store(out.ptr + (at + c.to(tl.int64) * out.col), acc.to(out.ptr.dtype.element_ty), mask=c < out.cols)


@triton.jit
def rows_combine(
    splits, out, lse_ptr, sinks, coded_sizes, total_rows, MOST: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_DV: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """As `decode_combine`, ROWS rows a program: for many rows and few splits. A program for each row of 4096, 4 splits,
    took about 20 us at head dim 128 (H200, 2026-11-22)."""
    sizes = tiles.sizes_of(coded_sizes)
    count = tiles.decoded(splits.count)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < tiles.decoded(total_rows)
    m = row % sizes.M
    h = row // sizes.M % sizes.H
    b = row // sizes.M // sizes.H
    first = row.to(tl.int64) * count
    s = tl.arange(0, MOST)[None, :]
    lse2 = tl.load(splits.lse2 + first[:, None] + s, mask=inside[:, None] & (s < count), other=-float("inf"))
    top = tl.max(lse2, 1)
    sink = tl.full([ROWS], -float("inf"), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32) * scores.LOG2E
        top = tl.maximum(top, sink)
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp2(lse2 - base[:, None]), 1)
    none = total == 0.0
    if sinks is not None:
        total += tl.exp2(sink - base)
    safe = tl.where(none, 1.0, total)

    c = tl.arange(0, BLOCK_DV)[None, :]
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for s0 in tl.range(0, count, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            own = tl.load(splits.lse2 + first + s0 + i, mask=inside & (s0 + i < count), other=-float("inf"))
            at = (first + s0 + i)[:, None] * out.cols + c
            part = tl.load(splits.out + at, mask=(own != -float("inf"))[:, None] & (c < out.cols), other=0.0)
            acc += part * tl.exp2(own - base)[:, None]
    acc = tl.where(none[:, None], 0.0, acc / safe[:, None])
    lse = tl.where(none, -float("inf"), (base + tl.log2(safe)) * scores.LN2)
    tl.store(lse_ptr + row, lse, mask=inside)
    at = b.to(tl.int64) * out.batch + h.to(tl.int64) * out.head + m.to(tl.int64) * out.row
    to = out.ptr + (at[:, None] + c.to(tl.int64) * out.col)
    tl.store(to, acc.to(out.ptr.dtype.element_ty), mask=inside[:, None] & (c < out.cols))


def programs(problem: Problem, rows: int) -> int:
    """How many programs one split of every segment takes, each with so many packed rows."""
    return problem.batch * problem.heads_kv * triton.cdiv(problem.seqlen_q * problem.group, rows)


def _reach(mask: masks.Mask, keys: int) -> int:
    """The most keys that a row sees."""
    found, left, right = keys, keys, keys
    for band in mask.bands:
        if isinstance(band, masks.Chunk):
            found = min(found, band.size)
        elif isinstance(band, masks.Window):
            left = min(left, keys if band.left is None else band.left)
            right = min(right, keys if band.right is None else band.right)
        elif isinstance(band, masks.Causal):
            right = 0
    return min(found, left + right + 1)


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, work: Work, keys: int) -> Splits:
    """Splits that keep the GPU's multiprocessors evenly busy with segments of up to that many keys."""
    slots, grid = problem.hardware.multiprocessors * work.resident, programs(problem, work.rows)
    reach = _reach(problem.mask, keys)
    count = triton.cdiv(reach, work.keys)
    most = min(MOST_SPLITS, max(count // LEAST_TILES, 1))
    if "used_k" not in problem.lengths:
        return Splits(coded(even_splits(grid, slots, count, most)), coded(LEAST_TILES))
    # Many short splits even out what lengths differ, and each costs a start and an end.
    part = 2 * work.rows * problem.head_dim_v * 4
    start = START_TILES + part / work.tile_bytes
    waves = min(max(round((grid * count / slots / start / STARTS_PER_WAVE) ** 0.5), 1), MOST_WAVES)
    if problem.batch == 1:
        waves = 1
    most = min(most, triton.cdiv(min(problem.batch, 3) * slots * waves, grid))
    wanted = slots * waves * problem.batch // grid
    if 2 * wanted < 5 * problem.batch and 2 * grid > slots:
        # The segments alone keep the multiprocessors busy.
        return Splits(coded(1), coded(LEAST_TILES))
    return Splits(coded(most), coded(LEAST_TILES), coded(wanted), coded(reach))


@functools.lru_cache(maxsize=4096)
def even_splits(programs: int, slots: int, count: int, most: int, combining: int = START_TILES) -> int:
    """How many splits of segments of `count` tiles fill the slots best; `combining` is what the second kernel takes, in
    tiles."""

    def cost(splits: int) -> int:
        # In tiles of one program: its keys, its start and end, and the second kernel.
        waves = triton.cdiv(programs * splits, slots)
        return waves * (triton.cdiv(count, splits) + START_TILES) + (combining if splits > 1 else 0)

    return min(range(1, most + 1), key=cost)


def prepare(problem: Problem, work: Work, call: Call, lse: torch.Tensor) -> tuple[Splits, int]:
    """The splits of a call, with memory for what they leave, and how many there are of each segment."""
    keys = stored_keys(call)
    if call.num_splits is None:
        splits = choose(problem, work, min(keys, call.max_k or keys))
    else:
        splits = Splits(coded(call.num_splits), coded(1))
    count = (splits.count - 3) // 2
    left = left_by(count, lse, problem.head_dim_v)
    if left is not None:
        splits = splits._replace(out=left.out, lse2=left.lse2)
    return splits, count


def left_by(count: int, lse: torch.Tensor, head_dim_v: int) -> Splits | None:
    """`count` splits with memory for what they leave of rows whose lse [B, H, M] is given; None for one."""
    if count == 1:
        return None
    rows = lse.numel()
    return Splits(coded(count), coded(1), out=lse.new_empty(rows, count, head_dim_v), lse2=lse.new_empty(rows, count))


def combine(splits: Splits, out: torch.Tensor, lse: torch.Tensor, call: Call, sizes: Sizes) -> None:
    """Launch `decode_combine`: out and lse from what the splits left."""
    block_dv = tables.block_dim(out.shape[3])
    most = triton.next_power_of_2(splits.lse2.shape[1])
    block_s = min(max(4096 // block_dv, 1), most)
    arguments = (splits, Strided.of(out), lse, call.sinks, sizes, most, block_s, block_dv)
    launching.launch(decode_combine, lse.numel(), call.query.device, arguments, num_warps=4)


def combine_rows(splits: Splits, out: torch.Tensor, lse: torch.Tensor, call: Call, sizes: Sizes) -> None:
    """As `combine`, for the rows of whole tiles."""
    block_dv = tables.block_dim(out.shape[3])
    rows = max(2048 // block_dv, 1)
    at_once = 4
    if lse.numel() < MANY_ROWS:
        rows, at_once = max(rows // 8, 1), 16
    most = triton.next_power_of_2(splits.lse2.shape[1])
    arguments = (splits, Strided.of(out), lse, call.sinks, sizes, coded(lse.numel()), most, rows, block_dv, at_once)
    launching.launch(rows_combine, triton.cdiv(lse.numel(), rows), call.query.device, arguments, num_warps=4)
