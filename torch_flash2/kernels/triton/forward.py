"""The portable forward: FlashAttention-2's loop (Dao 2023, arXiv 2307.08691) in Triton, sm80 and up.

B segments, H query heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
One program computes BLOCK_M query rows of one head. Tiles of keys that the bands rule out are never visited; those at
an edge of the bands are masked (first loop), those inside are not (second loop).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ...problem import Call, Problem, key_value, stored_keys
from ..bundles import Dropout, Head, Rows, Strided
from ..device import bands, philox, scores, tiles
from . import launching, recording, tables
from .common import attend_carefully, query_tile, tile_scores, visible_keys
from .tables import Config


@triton.jit
def _attend(
    acc, row_max, row_sum, q, keys, values, tile, span, head,
    MODE: tl.constexpr, STEPS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The online softmax over the tiles of a span that need a mask (MASKED) or over those that need none.

    row_max is in units of log2, after scale2.
    """
    if MASKED:
        count = bands.masked_tiles(span, MODE.BLOCK_N)
    else:
        count = (span.full_stop - span.full_start) // MODE.BLOCK_N
    for i in tl.range(0, count):
        if MASKED:
            n0 = bands.masked_tile(span, i, MODE.BLOCK_N)
        else:
            n0 = span.full_start + i * MODE.BLOCK_N
        n = n0 + tl.arange(0, MODE.BLOCK_N)
        k = tiles.load_keys(keys, n0, tile.N, MASKED, MODE.BLOCK_N, MODE.BLOCK_D, MODE)
        s = tile_scores(q, k, n, tile, head, MODE, STEPS)
        if MASKED:
            s = tl.where(visible_keys(tile, n, head.dense, MODE.LEFT), s, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1) * head.scale2)
        base = new_max
        if MASKED or len(STEPS.VALUE) > 0:
            # A row that has seen no key yet, or only biases of -inf, keeps -inf as its maximum; subtracting it gives
            # NaN.
            base = tl.where(new_max == -float("inf"), 0.0, new_max)
        p = tl.exp2(s * head.scale2 - base[:, None])
        decay = tl.exp2(row_max - base)
        row_sum = row_sum * decay + tl.sum(p, 1)
        row_max = new_max
        if head.dropout is not None:
            p = tl.where(philox.keep_tile(head.dropout, tile.at, n0, MODE.BLOCK_M, MODE.BLOCK_N), p, 0.0)
        v = tiles.load_keys(values, n0, tile.N, MASKED, MODE.BLOCK_N, MODE.BLOCK_DV, MODE)
        acc = tiles.add_dot(tiles.scale_pieces(acc, decay[:, None]), p.to(v[0].dtype), v, MODE)
    return acc, row_max, row_sum


@triton.jit
def _forward_tile(
    pid, q, k, v, out, lse_ptr, spans, coded_sizes, rules, scoring, operands,
    MODE: tl.constexpr, STEPS: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One tile of query rows of one head: out and lse; or, CAREFUL, out again. Returns whether out has a NaN."""
    sizes = tiles.sizes_of(coded_sizes)
    h, b, place, tile, span = query_tile(pid, spans, sizes, rules, MODE, STEPS)
    if MODE.PAGE > 0:
        keys = tiles.paged_rows(k, place.batch_k, h // sizes.group, spans.paging)
        values = tiles.paged_rows(v, place.batch_k, h // sizes.group, spans.paging)
    else:
        keys = Rows(k, place.batch_k, h // sizes.group, place.start_k)
        values = Rows(v, place.batch_k, h // sizes.group, place.start_k)
    segment = tl.minimum(b, sizes.B - 1)
    steps = scores.prepare(operands.steps, segment, h, place.start_q, place.start_k, STEPS)
    dropout = None
    if operands.seed is not None:
        dropout = Dropout(philox.load_key(operands.seed), b, h, philox.threshold_of(scoring))
    dense = None
    if rules.dense is not None:
        dense = tiles.dense_at(rules.dense, segment, h, place.start_q, place.start_k)
    head = Head(scoring.first, scoring.scale2, steps, dropout, dense)

    # The query tile stays; the loops stream keys and values.
    BLOCK_M: tl.constexpr = MODE.BLOCK_M
    lse_at = lse_ptr + (tl.cast(place.batch_q * sizes.H + h, tl.int64) * sizes.M + place.start_q + tile.at)
    out_rows = Rows(out, place.batch_q, h, place.start_q)
    q_rows = Rows(q, place.batch_q, h, place.start_q)
    q_tile = tiles.load_pieces(q_rows, place.row, tile.M, True, MODE.BLOCK_M, MODE.BLOCK_D, MODE)
    if CAREFUL:
        lse2 = tl.load(lse_at, mask=tile.at < place.stored, other=-float("inf")) * scores.LOG2E
        attend_carefully(
            (tiles.row_pointers(out_rows, place.row, BLOCK_M), out.col), tile.at < tile.M, lse2, q_tile, None, keys,
            None, values, tile, span.start, span.stop, head, scoring.inverse_keep, MODE, STEPS,
        )  # fmt: skip
        found = False
    else:
        acc = tiles.zero_pieces(MODE.BLOCK_M, MODE.BLOCK_DV, MODE)
        row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q_tile, keys, values, tile, span, head, MODE, STEPS, True
        )
        if rules.dense is None:
            acc, row_max, row_sum = _attend(
                acc, row_max, row_sum, q_tile, keys, values, tile, span, head, MODE, STEPS, False
            )

        # Sinks join the denominator of rows that see a key; rows that see none are 0, their lse -inf.
        none = (row_sum == 0.0) | (tile.at >= tile.M)
        if operands.sinks is not None:
            sink = tl.load(operands.sinks + h).to(tl.float32) * scores.LOG2E
            new_max = tl.maximum(row_max, sink)
            decay = tl.exp2(row_max - new_max)
            acc = tiles.scale_pieces(acc, decay[:, None])
            row_sum = row_sum * decay + tl.exp2(sink - new_max)
            row_max = new_max
        weight = scoring.inverse_keep / tl.where(none, 1.0, row_sum)
        acc = tiles.keep_pieces(~none[:, None], tiles.scale_pieces(acc, weight[:, None]))
        lse = tl.where(none, -float("inf"), (row_max + tl.log2(tl.where(none, 1.0, row_sum))) * scores.LN2)
        tl.store(lse_at, lse, mask=tile.at < place.stored)
        tiles.store_pieces(out_rows, place.row, place.stored, acc, MODE.BLOCK_M)
        found = tiles.any_nan(acc)
    return found


@triton.jit
def attention_forward(
    q, k, v, v_plain, out, lse_ptr, spans, coded_sizes, rules, scoring, operands, MODE: tl.constexpr, STEPS:
    tl.constexpr,
):  # fmt: skip
    """One tile of query rows of one head: out [BLOCK_M, Dv] and lse [BLOCK_M]."""
    pid = tl.program_id(0)
    found = _forward_tile(pid, q, k, v, out, lse_ptr, spans, coded_sizes, rules, scoring, operands, MODE, STEPS, False)
    if len(STEPS.KEYS) > 0 or rules.dense is not None:
        # NaN here may come from a value that no row of the tile sees. All is computed anew from the launch's arguments:
        # what this path shared with the loops above would take registers from them.
        if found:
            tl.debug_barrier()
            _forward_tile(
                pid + tl.minimum(pid, 0), q, k, v_plain, out, lse_ptr, spans, coded_sizes, rules, scoring, operands,
                MODE, STEPS, True,
            )  # fmt: skip


def why_not(problem: Problem) -> Iterator[str]:
    """Why this kernel cannot run the problem."""
    return launching.why_not(problem)


def config(problem: Problem) -> Config:
    """The measured or nearest configuration."""
    return tables.forward(problem)


def candidates(problem: Problem) -> Iterator[Config]:
    """Configurations worth measuring."""
    return tables.sweep(problem)


def launch(problem: Problem, config: Config, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Run it: out [B, H, M, Dv] in the query's dtype, laid out in memory as the query; lse fp32 [B, H, M]."""
    out, lse = launching.outputs(call)
    if problem.batch == 0 or 0 in call.query.shape or stored_keys(call) == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    mode = launching.mode(problem, config, config.BLOCK_M)
    key, value = key_value(call)
    if mode.PAGE:
        config = config._replace(tma=False)
    arguments = (
        Strided.of(call.query),
        launching.load(config, key, config.BLOCK_N, mode.BLOCK_D),
        launching.load(config, value, config.BLOCK_N, mode.BLOCK_DV),
        Strided.of(value),
        Strided.of(out),
        lse,
        *launching.bundle(problem, call),
        mode,
        launching.steps(problem),
    )
    programs = launching.programs(call.cu_q, problem.batch, problem.heads, problem.seqlen_q, config.BLOCK_M)
    launching.launch(attention_forward, programs, call.query.device, arguments, **config.options)
    return out, lse


def record(
    problem: Problem, config: Config, call: Call
) -> tuple[tuple[torch.Tensor, torch.Tensor], recording.Recording | None]:
    """Run it, and record it for calls alike."""
    return recording.record(launch, problem, config, call)
