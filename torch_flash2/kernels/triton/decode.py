"""Decoding: few query rows against many keys, at the memory's speed; Triton, sm80 and up.

B segments, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
The H / G * M query rows that read one key head are packed into tiles (row m * H / G + j is row m of the group's head
j), and keys are split among programs: each leaves a normalised output and its lse, which a second kernel combines
(flash-decoding; Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html; see splitting.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ...problem import Call, Problem, key_value, stored_keys
from ..bundles import Head, Mode, Rows, Strided, Tile
from ..device import bands, scores, tiles
from . import launching, recording, splitting, tables
from .common import attend_carefully, load_and_score, visible_keys
from .tables import Config

# Query rows from which on the forward's tiles are full enough.
MOST_ROWS = 16
# Warps that a multiprocessor is taken to hold, where splits are chosen.
RESIDENT_WARPS = 10


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
    total = 0
    if splits.wanted is not None:
        total = splitting.all_tiles(spans.used_k, sizes.B, splitting.most_counted(splits, sizes), MODE.BLOCK_N)
    start, stop = splitting.part_of(span, split, splits, total, MODE.BLOCK_N)
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


def work(problem: Problem, config: Config) -> splitting.Work:
    """What choosing splits counts with."""
    width = problem.head_dim + (0 if _shared(problem) else problem.head_dim_v)
    tile_bytes = config.BLOCK_N * width * problem.dtype.itemsize
    held = max(config.num_stages - 1, 1) * tile_bytes
    resident = max(1, min(problem.hardware.shared_memory // held, RESIDENT_WARPS // config.num_warps))
    return splitting.Work(config.BLOCK_M, config.BLOCK_N, tile_bytes, resident)


def launch(problem: Problem, config: Config, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Run it: out [B, H, M, Dv] in the query's dtype, laid out in memory as the query; lse fp32 [B, H, M]."""
    out, lse = launching.outputs(call)
    if problem.batch == 0 or 0 in call.query.shape or stored_keys(call) == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    splits, count = splitting.prepare(problem, work(problem, config), call, lse)
    spans, sizes, rules, scoring, operands = launching.bundle(problem, call)
    arguments = (
        *_tensors(problem, config, call), Strided.of(out), lse, splits, spans, sizes, rules, scoring, operands,
        _mode(problem, config), launching.steps(problem),
    )  # fmt: skip
    programs = splitting.programs(problem, config.BLOCK_M) * count
    launching.launch(attention_decode, programs, call.query.device, arguments, **config.options)
    if count > 1:
        splitting.combine(splits, out, lse, call, sizes)
    return out, lse


def record(
    problem: Problem, config: Config, call: Call
) -> tuple[tuple[torch.Tensor, torch.Tensor], recording.Recording | None]:
    """Run it, and record it for calls alike."""
    return recording.record(launch, problem, config, call)


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
