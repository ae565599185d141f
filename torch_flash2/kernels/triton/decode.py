"""Decoding: few query rows against many keys, at the memory's speed; Triton, sm80 and up.

B segments, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value,
S splits.
The H / G * M query rows that read one key head are packed into tiles (row m * H / G + j is row m of the group's head
j), and keys are split among programs: each leaves a normalised output and its lse, which a second kernel combines
(flash-decoding; Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Where the caller gives S,
how keys are split depends on S and the segment's own length alone: its bits are the same whatever else is in its batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ... import masks
from ...problem import MOST_SPLITS, Call, Problem, key_value, stored_keys
from ..bundles import Head, Mode, Rows, Sizes, Strided, Tile, coded
from ..device import bands, scores, tiles
from . import launching, tables
from .common import attend_carefully, load_and_score, visible_keys
from .tables import Config

# Query rows from which on the forward's tiles are full enough.
MOST_ROWS = 16
# Where the library chooses, a split has at least this many tiles of keys.
LEAST_TILES = 4
# What choosing counts with: warps that a multiprocessor holds, and the time to start and end a program, in tiles.
RESIDENT_WARPS = 10
START_TILES = 2
# Where lengths differ: waves of programs grow with the root of a multiprocessor's tiles over those of a start, times
# this, up to a limit.
STARTS_PER_WAVE = 6
MOST_WAVES = 8


class Splits(NamedTuple):
    """How many splits a segment has at most, and the least number of tiles in one; all numbers coded as sizes are.

    Where lengths differ, `wanted` splits of all segments together are shared out by length, of which at most `reach`
    keys of a segment count; None: each segment has `count`. Where there are several, what they leave for
    `decode_combine`, fp32: out [B * H * M, S, Dv] and lse in log2 units [B * H * M, S].
    """

    count: Any
    least: Any
    wanted: Any = None
    reach: Any = None
    out: Any = None
    lse2: Any = None


@triton.jit
def _attend(q, q_rest, keys, keys_rest, values, tile, start, stop, head, MODE: tl.constexpr, STEPS: tl.constexpr):
    """The online softmax over keys start .. stop: sums [BLOCK_M, Dv], maxima in log2 units and totals [BLOCK_M].

    Every tile is masked: beside the loads that costs nothing.
    """
    BLOCK_M: tl.constexpr = MODE.BLOCK_M
    BLOCK_DV: tl.constexpr = MODE.BLOCK_DV
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    # Page numbers are loaded a tile ahead, so that the loads of keys need not wait for them.
    pages = tiles.page_numbers(keys, start, tile.N, MODE.BLOCK_N, MODE.PAGE)
    for n0 in tl.range(start, stop, MODE.BLOCK_N):
        next_pages = tiles.page_numbers(keys, n0 + MODE.BLOCK_N, tile.N, MODE.BLOCK_N, MODE.PAGE)
        k, s = load_and_score(q, q_rest, keys, keys_rest, pages, n0, tile, head, MODE, STEPS)
        n = n0 + tl.arange(0, MODE.BLOCK_N)
        s = tl.where(visible_keys(tile, n, head.dense, MODE.LEFT), s, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1) * head.scale2)
        # A row that has seen no key yet keeps -inf as its maximum; subtracting it gives NaN.
        base = tl.where(new_max == -float("inf"), 0.0, new_max)
        p = tl.exp2(s * head.scale2 - base[:, None])
        decay = tl.exp2(row_max - base)
        row_sum = row_sum * decay + tl.sum(p, 1)
        row_max = new_max
        if MODE.SHARED:
            v = k[0]
        else:
            v = tiles.load_keys_of(values, pages, n0, tile.N, True, MODE.BLOCK_N, MODE.BLOCK_DV, MODE)[0]
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=MODE.PRECISION)
        pages = next_pages
    return acc, row_max, row_sum


@triton.jit
def _all_tiles(used, B, limit, BLOCK: tl.constexpr):
    """How many tiles of keys all segments have, each at most `limit` keys."""
    total = tl.zeros([128], tl.int32)
    for b0 in tl.range(0, B, 128):
        b = b0 + tl.arange(0, 128)
        length = tl.load(used + b, mask=b < B, other=0)
        total += tl.cdiv(tl.minimum(tl.maximum(length, 0), limit), BLOCK)
    return tl.sum(total)


@triton.jit
def _part(span, index, splits, used, sizes, BLOCK: tl.constexpr):
    """The keys [start, stop) of a split: equal parts of the span, in whole tiles, of at least `splits.least` tiles."""
    count = tl.cdiv(span.stop - span.start, BLOCK)
    parts = tiles.decoded(splits.count)
    if splits.wanted is not None:
        limit = tl.minimum(tiles.decoded(splits.reach), sizes.N)
        part = tl.maximum(tl.cdiv(_all_tiles(used, sizes.B, limit, BLOCK), tiles.decoded(splits.wanted)), 1)
        parts = tl.minimum(tl.maximum((count + part // 2) // part, 1), parts)
    part = tl.maximum(tl.cdiv(count, parts), tiles.decoded(splits.least)) * BLOCK
    start = tl.minimum(span.start + index * part, span.stop)
    return start, tl.minimum(start + part, span.stop)


@triton.jit
def _load_queries(q, b, h, m, stored, COLS: tl.constexpr):
    """Rows m [BLOCK_M] of heads h [BLOCK_M]."""
    c = tl.arange(0, COLS)
    at = tl.cast(b, tl.int64) * q.batch + h.to(tl.int64) * q.head + m.to(tl.int64) * q.row
    inside = stored[:, None] & (c < q.cols)[None, :]
    return tl.load(q.ptr + (at[:, None] + c.to(tl.int64)[None, :] * q.col), mask=inside, other=0.0)


@triton.jit
def _run(
    q, q_rest, k, k_rest, v, v_plain, out, lse_ptr, splits, spans, sizes, scored, share, tile,
    MODE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A tile's share of keys: `share` is the segment, key head, heads and stored rows [BLOCK_M], the split, and its
    keys start .. stop; `scored` are Rules, Scoring and Operands."""
    rules, scoring, operands = scored
    b, hk, h, stored, split, start, stop = share
    m = tile.at

    # Operands of the scores are those of each row's head.
    h_column = h[:, None]
    steps = scores.prepare(operands.steps, b, h_column, 0, 0, STEPS)
    dense = None
    if rules.dense is not None:
        dense = tiles.dense_at(rules.dense, b, h_column, 0, 0)
    head = Head(scoring.first, scoring.scale2, steps, None, dense)
    # Pieces, of which there is one.
    q_tile = (_load_queries(q, b, h, m, stored, MODE.BLOCK_D),)
    rest_tile = None
    keys_rest = None
    if MODE.REST > 0:
        rest_tile = _load_queries(q_rest, b, h, m, stored, MODE.REST)
    if MODE.PAGE > 0:
        keys = tiles.paged_rows(k, b, hk, spans.paging)
        values = keys
        if not MODE.SHARED:
            values = tiles.paged_rows(v, b, hk, spans.paging)
        plain = values
        if MODE.REST > 0:
            keys_rest = tiles.paged_rows(k_rest, b, hk, spans.paging)
    else:
        keys = Rows(k, b, hk, 0)
        values = keys
        if not MODE.SHARED:
            values = Rows(v, b, hk, 0)
        plain = Rows(v_plain, b, hk, 0)
        if MODE.REST > 0:
            keys_rest = Rows(k_rest, b, hk, 0)
    acc, row_max, row_sum = _attend(q_tile, rest_tile, keys, keys_rest, values, tile, start, stop, head, MODE, STEPS)

    none = (row_sum == 0.0) | (m >= tile.M)
    row = (tl.cast(b, tl.int64) * sizes.H + h) * sizes.M + m
    if splits.out is None:
        if operands.sinks is not None:
            sink = tl.load(operands.sinks + h).to(tl.float32) * scores.LOG2E
            new_max = tl.maximum(row_max, sink)
            decay = tl.exp2(row_max - new_max)
            acc = acc * decay[:, None]
            row_sum = row_sum * decay + tl.exp2(sink - new_max)
            row_max = new_max
        lse2 = tl.where(none, -float("inf"), row_max + tl.log2(tl.where(none, 1.0, row_sum)))
        tl.store(lse_ptr + row, lse2 * scores.LN2, mask=stored)
        col = out.col
        cols = out.cols
        at = out.ptr + (tl.cast(b, tl.int64) * out.batch + h.to(tl.int64) * out.head + m.to(tl.int64) * out.row)
        written = stored
    else:
        lse2 = tl.where(none, -float("inf"), row_max + tl.log2(tl.where(none, 1.0, row_sum)))
        place = row * tiles.decoded(splits.count) + split
        tl.store(splits.lse2 + place, lse2, mask=stored)
        col = 1
        cols = out.cols
        at = splits.out + place * cols
        written = stored & ~none
    acc = tl.where(none[:, None], 0.0, acc * (1.0 / tl.where(none, 1.0, row_sum))[:, None])
    c = tl.arange(0, MODE.BLOCK_DV)
    tl.store(
        at[:, None] + c.to(tl.int64)[None, :] * col,
        acc.to(at.dtype.element_ty),
        mask=written[:, None] & (c < cols)[None, :],
    )
    if len(STEPS.KEYS) > 0 or rules.dense is not None:
        # NaN here may come from a value that no row of the tile sees.
        if tl.max((acc != acc).to(tl.int32)) > 0:
            attend_carefully(
                (at, col), written, lse2, q_tile, rest_tile, keys, keys_rest, plain, tile, start, stop, head, 1.0,
                MODE, STEPS,
            )  # fmt: skip


@triton.jit
def attention_decode(
    q, q_rest, k, k_rest, v, v_plain, out, lse_ptr, splits, spans, coded_sizes, rules, scoring, operands,
    MODE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One split of a tile of packed rows: out and lse, or the split's part of them where there are several."""
    KEYS: tl.constexpr = STEPS.KEYS
    BLOCK_M: tl.constexpr = MODE.BLOCK_M
    sizes = tiles.sizes_of(coded_sizes)

    # Splits come last: those that a short segment leaves empty run when nothing else is left to run.
    rows = sizes.M * sizes.group
    count = tl.cdiv(rows, BLOCK_M)
    index = tl.program_id(0) % count
    rest = tl.program_id(0) // count
    hk = rest % (sizes.H // sizes.group)
    rest = rest // (sizes.H // sizes.group)
    b = rest % sizes.B
    split = rest // sizes.B
    _, _, _, used_q = tiles.extent(b, None, spans.used_q, sizes.B, sizes.M)
    _, _, _, used_k = tiles.extent(b, None, spans.used_k, sizes.B, sizes.N)
    r = index * BLOCK_M + tl.arange(0, BLOCK_M)
    stored = r < rows
    r = tl.minimum(r, rows - 1)
    m = r // sizes.group
    h = hk * sizes.group + r % sizes.group

    # Rows past the end see nothing and widen nothing.
    shift = used_k - used_q if MODE.BOTTOM_RIGHT else used_k * 0
    lo, hi = bands.intersect(tl.minimum(m, used_q - 1), used_k, used_q, used_k, shift, rules.numbers, KEYS)
    hi = tl.where(m < used_q, hi, lo)
    span = bands.tile_span(lo, hi, used_k, MODE.BLOCK_N, True)
    start, stop = _part(span, split, splits, spans.used_k, sizes, MODE.BLOCK_N)
    tile = Tile(m, index, lo, hi, shift, used_q, used_k)
    share = (b, hk, h, stored, split, start, stop)
    scored = (rules, scoring, operands)
    if splits.out is None:
        _run(q, q_rest, k, k_rest, v, v_plain, out, lse_ptr, splits, spans, sizes, scored, share, tile, MODE, STEPS)
    elif start < stop:
        _run(q, q_rest, k, k_rest, v, v_plain, out, lse_ptr, splits, spans, sizes, scored, share, tile, MODE, STEPS)
    else:
        row = (tl.cast(b, tl.int64) * sizes.H + h) * sizes.M + m
        at = splits.lse2 + (row * tiles.decoded(splits.count) + split)
        tl.store(at, tl.full([BLOCK_M], -float("inf"), tl.float32), mask=stored)


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


def _shared(problem: Problem) -> bool:
    """Whether keys and values are read once: the value is in the key, and one tile of it is enough for both."""
    return problem.value_in_key and not problem.wide


def why_not(problem: Problem) -> Iterator[str]:
    """Why this kernel cannot run the problem."""
    shared = _shared(problem)
    yield from launching.why_not(_narrow(problem) if shared else problem)
    if problem.packed_q or problem.packed_k:
        yield "it has no packed documents"
    if problem.dropout:
        yield "it has no dropout"
    if problem.seqlen_q > MOST_ROWS and not (shared and problem.head_dim > 512):
        yield f"it is for up to {MOST_ROWS} query rows, got {problem.seqlen_q}"


def _narrow(problem: Problem) -> Problem:
    """Where the value is in the key: the key's columns that the value has."""
    return dataclasses.replace(problem, head_dim=problem.head_dim_v)


def config(problem: Problem) -> Config:
    """The measured or nearest configuration."""
    shared = _shared(problem)
    row = tables.lookup("decode_shared" if shared else "decode", _narrow(problem) if shared else problem)
    assert row is not None
    rows = max(16, 1 << (problem.seqlen_q * problem.group - 1).bit_length())
    uneven = problem.page_size is not None or "used_k" in problem.lengths
    if not shared and row.num_warps == 8 and (rows > 16 or uneven):
        # More rows leave less room; uneven work is evened out by more programs on a multiprocessor.
        row = row._replace(BLOCK_N=row.BLOCK_N // 2, num_warps=4)
    return row._replace(BLOCK_M=min(row.BLOCK_M, rows))


def candidates(problem: Problem) -> Iterator[Config]:
    """Configurations worth measuring."""
    default = config(problem)
    for candidate in tables.sweep(problem):
        if candidate.BLOCK_M == max(default.BLOCK_M, 32):
            yield candidate._replace(BLOCK_M=default.BLOCK_M)


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


def _programs(problem: Problem, config: Config) -> int:
    """How many programs one split of every segment takes."""
    return problem.batch * problem.heads_kv * triton.cdiv(problem.seqlen_q * problem.group, config.BLOCK_M)


@functools.lru_cache(maxsize=4096)
def choose_splits(problem: Problem, config: Config, keys: int) -> Splits:
    """Splits that keep the GPU's multiprocessors evenly busy with segments of up to that many keys."""
    width = problem.head_dim + (0 if _shared(problem) else problem.head_dim_v)
    held = max(config.num_stages - 1, 1) * config.BLOCK_N * width * problem.dtype.itemsize
    resident = max(1, min(problem.hardware.shared_memory // held, RESIDENT_WARPS // config.num_warps))
    slots, programs = problem.hardware.multiprocessors * resident, _programs(problem, config)
    reach = _reach(problem.mask, keys)
    count = triton.cdiv(reach, config.BLOCK_N)
    most = min(MOST_SPLITS, max(count // LEAST_TILES, 1))
    if "used_k" not in problem.lengths:
        return Splits(coded(_even_splits(programs, slots, count, most)), coded(LEAST_TILES))
    # Many short splits even out what lengths differ, and each costs a start and an end.
    part = 2 * config.BLOCK_M * problem.head_dim_v * 4
    start = START_TILES + part / (config.BLOCK_N * width * problem.dtype.itemsize)
    waves = min(max(round((programs * count / slots / start / STARTS_PER_WAVE) ** 0.5), 1), MOST_WAVES)
    if problem.batch == 1:
        waves = 1
    most = min(most, triton.cdiv(min(problem.batch, 3) * slots * waves, programs))
    wanted = slots * waves * problem.batch // programs
    if 2 * wanted < 5 * problem.batch:
        # The segments alone keep the multiprocessors busy.
        return Splits(coded(1), coded(LEAST_TILES))
    return Splits(coded(most), coded(LEAST_TILES), coded(wanted), coded(reach))


def _even_splits(programs: int, slots: int, count: int, most: int) -> int:
    """How many splits of segments of `count` tiles fill the slots best."""

    def cost(splits: int) -> int:
        # In tiles of one program: its keys, its start and end, and the second kernel.
        waves = triton.cdiv(programs * splits, slots)
        return waves * (triton.cdiv(count, splits) + START_TILES) + (START_TILES if splits > 1 else 0)

    return min(range(1, most + 1), key=cost)


def launch(problem: Problem, config: Config, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Run it: out [B, H, M, Dv] in the query's dtype, laid out in memory as the query; lse fp32 [B, H, M]."""
    out, lse = launching.outputs(call)
    keys = stored_keys(call)
    if problem.batch == 0 or 0 in call.query.shape or keys == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    if call.num_splits is None:
        splits = choose_splits(problem, config, min(keys, call.max_k or keys))
    else:
        splits = Splits(coded(call.num_splits), coded(1))
    B, H, M, Dv = out.shape
    count = (splits.count - 3) // 2
    if count > 1:
        splits = splits._replace(out=lse.new_empty(B * H * M, count, Dv), lse2=lse.new_empty(B * H * M, count))
    spans, sizes, rules, scoring, operands = launching.bundle(problem, call)
    arguments = (
        *_tensors(problem, config, call), Strided.of(out), lse, splits, spans, sizes, rules, scoring, operands,
        _mode(problem, config), launching.steps(problem),
    )  # fmt: skip
    programs = _programs(problem, config) * count
    launching.launch(attention_decode, programs, call.query.device, arguments, **config.options)
    if count > 1:
        _combine(splits, out, lse, call, sizes)
    return out, lse


def _combine(splits: Splits, out: torch.Tensor, lse: torch.Tensor, call: Call, sizes: Sizes) -> None:
    block_dv = tables.block_dim(out.shape[3])
    most = triton.next_power_of_2(splits.lse2.shape[1])
    block_s = min(max(4096 // block_dv, 1), most)
    arguments = (splits, Strided.of(out), lse, call.sinks, sizes, most, block_s, block_dv)
    launching.launch(decode_combine, lse.numel(), call.query.device, arguments, num_warps=4)


def _mode(problem: Problem, config: Config) -> Mode:
    mode = launching.mode(problem, config)
    if not _shared(problem):
        return mode
    rest = problem.head_dim - problem.head_dim_v
    block_rest = tables.block_dim(rest) if rest else 0
    return mode._replace(BLOCK_D=mode.BLOCK_DV, EVEN=mode.EVEN and block_rest == rest, SHARED=True, REST=block_rest)


def _tensors(problem: Problem, config: Config, call: Call) -> tuple[Any, ...]:
    """q, q_rest, k, k_rest, v, v_plain as the kernel takes them."""
    key, value = key_value(call)
    query, query_rest, key_rest = call.query, None, None
    if _shared(problem):
        query, key = query[..., : value.shape[3]], value
        if problem.head_dim > problem.head_dim_v:
            query_rest, key_rest = (t[..., value.shape[3] :] for t in (call.query, key_value(call)[0]))
    mode = _mode(problem, config)
    if mode.PAGE:
        config = config._replace(tma=False)
    return (
        Strided.of(query),
        None if query_rest is None else Strided.of(query_rest),
        launching.load(config, key, config.BLOCK_N, mode.BLOCK_D),
        None if key_rest is None else launching.load(config, key_rest, config.BLOCK_N, mode.REST),
        None if mode.SHARED else launching.load(config, value, config.BLOCK_N, mode.BLOCK_DV),
        Strided.of(value),
    )
