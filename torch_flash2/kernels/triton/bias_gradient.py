"""The gradient of an additive bias that broadcasts over any of B, H, M, N: deterministic, no atomics.

B segments, H query heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
One program owns a tile of the bias and loops over all that the bias was broadcast over, recomputing dS there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...problem import Call, Problem
from ..bundles import Dropout, Head, Rows, RowStats, Sizes, Strided, Tile
from ..device import bands, philox, scores, tiles
from . import launching, tables
from .common import load_stats, score_gradient, visible_keys


@triton.jit
def _tile_gradient(
    q, do, k, v, tile, n0, lse2, delta, head, inverse_keep, MODE: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    """dS [BLOCK_M, BLOCK_N] of loaded tiles; positions before the segment are negative, and nothing is visible
    there."""
    m = tile.at
    n = n0 + tl.arange(0, MODE.BLOCK_N)
    exists = (m >= 0) & (m < tile.M)
    inside = exists[:, None] & ((n >= 0) & (n < tile.N))[None, :]
    s = tl.dot(q, k.T, input_precision=MODE.PRECISION)
    s, slope = score_gradient(s, m[:, None], n[None, :], tile.shift, inside, head, STEPS)
    p = tl.exp2(s * head.scale2 - lse2[:, None])
    dp = tl.dot(do, v.T, input_precision=MODE.PRECISION)
    if head.dropout is not None:
        # Documents need not start at a multiple of 4 here, so every element computes its own word.
        dp = tl.where(philox.keep_elements(head.dropout, m[:, None], n[None, :]), dp * inverse_keep, 0.0)
    visible = visible_keys(tile, n, head.dense, True) & (n >= 0)[None, :]
    return tl.where(visible, p * (dp - delta[:, None]), 0.0)


@triton.jit
def bias_gradient(
    q, k, v, grad_out, stats, grad_bias, spans, coded_sizes, rules, scoring, operands, coded_loops,
    MODE: tl.constexpr, STEPS: tl.constexpr, VARIES: tl.constexpr,
):  # fmt: skip
    """One tile of the bias's gradient. VARIES says in which of (B, H, M, N) the bias varies; the loops count its other
    segments, heads, row tiles and key tiles, 1 where it varies."""
    BLOCK_M: tl.constexpr = MODE.BLOCK_M
    BLOCK_N: tl.constexpr = MODE.BLOCK_N
    KEYS: tl.constexpr = STEPS.KEYS
    sizes = tiles.sizes_of(coded_sizes)
    loops = tiles.sizes_of(coded_loops)
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(sizes.N, BLOCK_N) if VARIES[3] else 1
    tiles_m = tl.cdiv(sizes.M, BLOCK_M) if VARIES[2] else 1
    heads = sizes.H if VARIES[1] else 1
    tile_n = pid % tiles_n
    tile_m = pid // tiles_n % tiles_m
    h0 = pid // tiles_n // tiles_m % heads
    b0 = pid // tiles_n // tiles_m // heads
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # What the bias was broadcast over, in a fixed order; tiles lie on the stored tensors, across segments.
    for i in tl.range(0, loops.B * loops.H * loops.M * loops.N, num_stages=1):
        h = h0 + i // loops.N // loops.M % loops.H
        b = b0 + i // loops.N // loops.M // loops.H
        batch_q, start_q, _, used_q = tiles.extent(b, spans.cu_q, spans.used_q, sizes.B, sizes.M)
        batch_k, start_k, _, used_k = tiles.extent(b, spans.cu_k, spans.used_k, sizes.B, sizes.N)
        shift = used_k - used_q if MODE.BOTTOM_RIGHT else used_k * 0
        first = (tile_m + i // loops.N % loops.M) * BLOCK_M - start_q
        n0 = (tile_n + i % loops.N) * BLOCK_N - start_k
        m = first + tl.arange(0, BLOCK_M)
        lo, hi = bands.intersect(m, used_k, used_q, used_k, shift, rules.numbers, KEYS)
        hi = tl.where((m >= 0) & (m < used_q), hi, lo)
        tile = Tile(m, first, lo, hi, shift, used_q, used_k)
        dense = None
        if rules.dense is not None:
            dense = tiles.dense_at(rules.dense, b, h, start_q, start_k)
        dropout = None
        if operands.seed is not None:
            dropout = Dropout(philox.load_key(operands.seed), b, h, philox.threshold_of(scoring))
        head = Head(
            scoring.first, scoring.scale2, scores.prepare(operands.steps, b, h, start_q, start_k, STEPS), dropout, dense
        )
        lse2, delta = load_stats(stats, batch_q * sizes.H + h, start_q + m)
        if tl.max(hi, 0) > n0 and (n0 + BLOCK_N > 0 and first + BLOCK_M > 0):
            q_tile = tiles.load_rows(
                Rows(q, batch_q, h, start_q), first, used_q, True, BLOCK_M, MODE.BLOCK_D, MODE.WIDE
            )
            do = tiles.load_rows(
                Rows(grad_out, batch_q, h, start_q), first, used_q, True, BLOCK_M, MODE.BLOCK_DV, MODE.WIDE
            )
            hk = h // sizes.group
            k_tile = tiles.load_rows(Rows(k, batch_k, hk, start_k), n0, used_k, True, BLOCK_N, MODE.BLOCK_D, MODE.WIDE)
            v_tile = tiles.load_rows(Rows(v, batch_k, hk, start_k), n0, used_k, True, BLOCK_N, MODE.BLOCK_DV, MODE.WIDE)
            total += _tile_gradient(
                q_tile, do, k_tile, v_tile, tile, n0, lse2, delta, head, scoring.inverse_keep, MODE, STEPS
            )  # fmt: skip
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    base = grad_bias.ptr + (tl.cast(b0, tl.int64) * grad_bias.batch + tl.cast(h0, tl.int64) * grad_bias.head)
    if not VARIES[2]:
        total = tl.sum(total, 0)[None, :]
        m = tl.arange(0, 1)
    if not VARIES[3]:
        total = tl.sum(total, 1)[:, None]
        n = tl.arange(0, 1)
    inside = (m < (sizes.M if VARIES[2] else 1))[:, None] & (n < (sizes.N if VARIES[3] else 1))[None, :]
    at = base + (m.to(tl.int64)[:, None] * grad_bias.row + n.to(tl.int64)[None, :] * grad_bias.col)
    tl.store(at, total.to(grad_bias.ptr.dtype.element_ty), mask=inside)


def launch(
    problem: Problem, config: tables.Config, call: Call, grad_out: torch.Tensor, stats: RowStats,
    grad_bias: torch.Tensor | None,
) -> None:  # fmt: skip
    """Fill the bias's gradient."""
    assert grad_bias is not None and problem.bias_dims is not None
    varies = problem.bias_dims
    mode = launching.mode(problem, config)
    M, N = call.query.shape[2], call.key.shape[2]
    counts = (problem.batch, problem.heads, triton.cdiv(M, config.BLOCK_M), triton.cdiv(N, config.BLOCK_N))
    b, h, m, n = (1 if fixed else count for fixed, count in zip(varies, counts, strict=True))
    programs = 1
    for fixed, count in zip(varies, counts, strict=True):
        programs *= count if fixed else 1
    arguments = (
        *map(Strided.of, (call.query, call.key, call.value, grad_out)),
        stats,
        Strided.of(grad_bias),
        *launching.bundle(problem, call),
        Sizes.coded(b, h, 1, m, n),
        mode,
        launching.steps(problem),
        varies,
    )
    launching.launch(bias_gradient, programs, call.query.device, arguments, num_warps=config.num_warps, num_stages=1)
