"""Tile functions that the portable forward and backward share.

M query rows, N keys, D head dim. A tile of scores is [BLOCK_M, BLOCK_N].
"""

import triton
import triton.language as tl

from ..bundles import Place, Tile
from ..device import bands, philox, scores, tiles


@triton.jit
def tile_scores(q, k, n, tile, head, MODE: tl.constexpr, STEPS: tl.constexpr):
    """Scores [BLOCK_M, BLOCK_N] of keys n: raw products where there are no steps, else after scale and steps."""
    return run_steps(tiles.dot_pieces(q, k, MODE), n, tile, head, STEPS)


@triton.jit
def run_steps(s, n, tile, head, STEPS: tl.constexpr):
    """Scores of keys n from raw products s, as `tile_scores` gives them."""
    if len(STEPS.VALUE) > 0:
        m = tile.at[:, None]
        inside = (m < tile.M) & (n < tile.N)[None, :]
        s = scores.apply(s * head.first, head.steps, m, n[None, :], m + tile.shift - n[None, :], inside, STEPS)
    return s


@triton.jit
def load_and_score(
    q, q_rest, keys, keys_rest, pages, n0, tile, head, MODE: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    """The tile of keys from n0 on, in pieces, and its scores; q_rest and keys_rest are None but for MODE.REST columns
    more."""
    k = tiles.load_keys_of(keys, pages, n0, tile.N, True, MODE.BLOCK_N, MODE.BLOCK_D, MODE)
    if MODE.REST > 0:
        BLOCK_M: tl.constexpr = MODE.BLOCK_M
        BLOCK_N: tl.constexpr = MODE.BLOCK_N
        rest = tiles.load_keys_of(keys_rest, pages, n0, tile.N, True, MODE.BLOCK_N, MODE.REST, MODE)
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # Always so. Of a product that another product follows, Triton has each warp group compute all rows; one in a
        # branch it divides among them.
        if n0 < tile.N:
            s = tiles.dot_pieces(q, k, MODE)
        s = tl.dot(q_rest, rest[0].T, s, input_precision=MODE.PRECISION)
    else:
        s = tiles.dot_pieces(q, k, MODE)
    return k, run_steps(s, n0 + tl.arange(0, MODE.BLOCK_N), tile, head, STEPS)


@triton.constexpr_function
def turned(dtype, precision):
    """Whether careful paths have products of 16 columns transposed: of 16-bit ones [BLOCK_M, 16] by warp groups, Triton
    3.6 reads shared memory out of range (H200, 2026-11-21)."""
    return dtype.primitive_bitwidth == 16 or precision in ("bf16x6", "bf16x3")


@triton.jit
def add_columns(acc, taint, weights, part, visible, bad, TURNED: tl.constexpr, MODE: tl.constexpr):
    """acc + weights part, for 16 columns [BLOCK_N, 16] of keys or values, and how many that are `bad` each row sees:
    both [BLOCK_M, 16], or TURNED."""
    if TURNED:
        acc = tl.dot(part.T, weights.to(part.dtype).T, acc, input_precision=MODE.PRECISION)
        taint = tl.dot(bad.to(part.dtype).T, visible.to(part.dtype).T, taint)
    else:
        acc = tl.dot(weights.to(part.dtype), part, acc, input_precision=MODE.PRECISION)
        taint = tl.dot(visible.to(part.dtype), bad.to(part.dtype), taint)
    return acc, taint


@triton.jit
def attend_carefully(
    out, stored, lse2, q, q_rest, keys, keys_rest, values, tile, start, stop, head, inverse_keep,
    MODE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The output again, given the lse in log2 units, where some value of keys start .. stop is NaN or infinite.

    A masked score has weight 0, and 0 * NaN is NaN: values are made finite here, and an element is NaN only where its
    row sees one that was not. Sixteen columns at a time, because registers that this path needs would be spilled in the
    main loops. `out` are pointers [BLOCK_M] to rows, of which those are `stored`, and their column stride.
    """
    BLOCK_M: tl.constexpr = MODE.BLOCK_M
    # Other threads stored these elements first: without a barrier theirs may land last (seen on an H200, 2026-11-21).
    tl.debug_barrier()
    lse2 = tl.where(lse2 == -float("inf"), float("inf"), lse2)
    pointers = out[0]
    cols = values.x.cols
    TURNED: tl.constexpr = turned(values.x.ptr.dtype.element_ty, MODE.PRECISION)
    for column in tl.range(0, cols, 16, num_stages=1):
        acc = tl.zeros([16, BLOCK_M] if TURNED else [BLOCK_M, 16], tl.float32)
        taint = tl.zeros([16, BLOCK_M] if TURNED else [BLOCK_M, 16], tl.float32)
        for n0 in tl.range(start, stop, MODE.BLOCK_N, num_stages=1):
            pages = tiles.page_numbers(keys, n0, tile.N, MODE.BLOCK_N, MODE.PAGE)
            k, s = load_and_score(q, q_rest, keys, keys_rest, pages, n0, tile, head, MODE, STEPS)
            visible = visible_keys(tile, n0 + tl.arange(0, MODE.BLOCK_N), head.dense, MODE.LEFT)
            p = tl.exp2(tl.where(visible, s, -float("inf")) * head.scale2 - lse2[:, None])
            if head.dropout is not None:
                p = tl.where(
                    philox.keep_tile(head.dropout, tile.at, n0, MODE.BLOCK_M, MODE.BLOCK_N), p * inverse_keep, 0.0
                )
            v = tiles.load_key_columns(values, pages, n0, tile.N, column, MODE.BLOCK_N, 16, MODE.PAGE)
            v, bad = tiles.finite(v)
            acc, taint = add_columns(acc, taint, p, v, visible, bad, TURNED, MODE)
        found = tl.where(taint > 0, float("nan"), acc)
        c = column + tl.arange(0, 16)
        tl.store(
            pointers[:, None] + c.to(tl.int64)[None, :] * out[1],
            (found.T if TURNED else found).to(pointers.dtype.element_ty),
            mask=stored[:, None] & (c < cols)[None, :],
        )


@triton.jit
def score_gradient(s, m, n, shift, inside, head, STEPS: tl.constexpr):
    """Scores from raw products, in units of head.scale2, and the derivative of a score in its own units with respect to
    scale * product; m and n broadcast to the tile."""
    slope = 1.0
    if len(STEPS.VALUE) > 0:
        s, slope = scores.apply_with_slope(s * head.first, head.steps, m, n, m + shift - n, inside, STEPS)
    return s, slope


@triton.jit
def load_stats(stats, bh, m):
    """lse in log2 units and delta of stored rows m of head and batch entry bh."""
    at = tl.cast(bh, tl.int64) * stats.pitch + m
    return tl.load(stats.lse2 + at), tl.load(stats.delta + at)


@triton.jit
def sums_of(sums, bh, start, b, cu):
    """Pointer to the sums of dQ of segment b, which starts at row `start`, of head and batch entry bh. Each segment
    starts at a multiple of 128 rows, so that tiles, which add more rows than the segment has, reach no other's."""
    at = sums.ptr + tl.cast(bh, tl.int64) * sums.head
    if cu is not None:
        at += tl.cast(start // 128 + b, tl.int64) * (128 * sums.row)
    return at


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
