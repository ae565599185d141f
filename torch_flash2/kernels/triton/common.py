"""Tile functions that the portable forward and backward share.

M query rows, N keys, D head dim. A tile of scores is [BLOCK_M, BLOCK_N].
"""

import triton
import triton.language as tl

from ..bundles import Place, Tile
from ..device import bands, scores, tiles


@triton.jit
def tile_scores(q, k, n, tile, head, MODE: tl.constexpr, STEPS: tl.constexpr):
    """Scores [BLOCK_M, BLOCK_N] of keys n: raw products where there are no steps, else after scale and steps."""
    s = tiles.dot_pieces(q, k, MODE)
    if len(STEPS.VALUE) > 0:
        m = tile.at[:, None]
        inside = (m < tile.M) & (n < tile.N)[None, :]
        s = scores.apply(s * head.scale, head.steps, m, n[None, :], m + tile.shift - n[None, :], inside, STEPS)
    return s


@triton.jit
def score_gradient(s, m, n, shift, inside, head, STEPS: tl.constexpr):
    """Scores from raw products, and the derivative of a score with respect to scale * product; m and n broadcast to the
    tile."""
    slope = 1.0
    if len(STEPS.VALUE) > 0:
        s, slope = scores.apply_with_slope(s * head.scale, head.steps, m, n, m + shift - n, inside, STEPS)
    return s, slope


@triton.jit
def load_stats(stats, bh, m):
    """lse in log2 units and delta of stored rows m of head and batch entry bh."""
    at = tl.cast(bh, tl.int64) * stats.pitch + m
    return tl.load(stats.lse2 + at), tl.load(stats.delta + at)


@triton.jit
def visible_keys(tile, n, dense, LEFT: tl.constexpr):
    """Which of keys n the tile's rows see, [BLOCK_M, BLOCK_N]."""
    visible = n[None, :] < tile.hi[:, None]
    if LEFT:
        visible = visible & (n[None, :] >= tile.lo[:, None])
    if dense is not None:
        visible = visible & (tiles.load_at(dense, tile.at[:, None], n[None, :], visible) != 0)
    return visible


@triton.jit
def query_tile(pid, spans, sizes, rules, MODE: tl.constexpr, STEPS: tl.constexpr):
    """Where a program that owns query rows works: (head, segment, Place, Tile, Span)."""
    KEYS: tl.constexpr = STEPS.KEYS
    index, h, b = tiles.locate(pid, spans.cu_q, sizes.B, sizes.H, sizes.M, MODE.BLOCK_M, True)
    batch_q, start_q, stored, used_q = tiles.extent(b, spans.cu_q, spans.used_q, sizes.B, sizes.M)
    batch_k, start_k, _, used_k = tiles.extent(b, spans.cu_k, spans.used_k, sizes.B, sizes.N)
    row0 = index * MODE.BLOCK_M
    m = row0 + tl.arange(0, MODE.BLOCK_M)
    shift = used_k - used_q if MODE.BOTTOM_RIGHT else used_k * 0
    # Rows past the end count as the last one, so that they widen nothing; a tile of nothing else sees no key.
    lo, hi = bands.intersect(tl.minimum(m, used_q - 1), used_k, used_q, used_k, shift, rules.numbers, KEYS)
    hi = tl.where(row0 < used_q, hi, lo)
    if rules.dense is not None:
        hi = tl.where(m < used_q, hi, lo)
    span = bands.tile_span(lo, hi, used_k, MODE.BLOCK_N, rules.dense is not None)
    tile = Tile(m, row0, lo, hi, shift, used_q, used_k)
    return h, b, Place(row0, batch_q, start_q, stored, batch_k, start_k), tile, span
