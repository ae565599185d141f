"""dQ of a tile of rows on the device: for the portable kernel, and for what computes marked tiles of others anew.

M query rows, N keys, D head dim of query and key, Dv head dim of value. dS = P * (dO V^T - delta), dQ = scale dS K.
"""

import triton
import triton.language as tl

from ..bundles import Dropout, Head, Rows
from ..device import bands, philox, scores, tiles
from .common import add_columns, load_stats, query_tile, score_gradient, sums_of, turned, visible_keys


@triton.jit
def _score_gradient(
    q, do, q_rows, do_rows, lse2, delta, k, keys, values, n0, tile, head, inverse_keep,
    MODE: tl.constexpr, STEPS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dS [BLOCK_M, BLOCK_N] of a tile of rows and keys n0 .. n0 + BLOCK_N, with respect to scale * product."""
    m = tile.at
    n = n0 + tl.arange(0, MODE.BLOCK_N)
    v = tiles.load_pieces(values, n0, tile.N, MASKED, MODE.BLOCK_N, MODE.BLOCK_DV, MODE)
    again = tl.minimum(n0, 0)
    if MODE.AGAIN:
        s = tiles.dot_rows(
            q_rows, tile.first + again, tile.M, MODE.BLOCK_M, keys, n0, tile.N, MODE.BLOCK_N, MODE.BLOCK_D, MODE
        )
    else:
        s = tiles.dot_pieces(q, k, MODE)
    inside = (m < tile.M)[:, None] & (n < tile.N)[None, :]
    s, slope = score_gradient(s, m[:, None], n[None, :], tile.shift, inside, head, STEPS)
    p = tl.exp2(s * head.scale2 - lse2[:, None])
    if MODE.AGAIN:
        dp = tiles.dot_rows(
            do_rows, tile.first + again, tile.M, MODE.BLOCK_M, values, n0, tile.N, MODE.BLOCK_N, MODE.BLOCK_DV, MODE
        )
    else:
        dp = tiles.dot_pieces(do, v, MODE)
    if head.dropout is not None:
        kept = philox.keep_tile(head.dropout, m, n0, MODE.BLOCK_M, MODE.BLOCK_N)
        dp = tl.where(kept, dp * inverse_keep, 0.0)
    ds = p * (dp - delta[:, None]) * slope
    if MASKED:
        # A masked key or value may be NaN, and 0 * NaN is NaN.
        ds = tl.where(visible_keys(tile, n, head.dense, MODE.LEFT), ds, 0.0)
    return ds


@triton.jit
def _accumulate_carefully(
    grad, q_rows, do_rows, lse2, delta, keys, values, place, tile, span, head, scoring,
    MODE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """dQ again where some key is NaN or infinite: keys made finite, and an element NaN only where its row sees one that
    was not.

    Sixteen columns at a time, because registers that this path needs would be spilled in the main loops.
    """
    BLOCK_M: tl.constexpr = MODE.BLOCK_M
    TURNED: tl.constexpr = turned(keys.x.ptr.dtype.element_ty, MODE.PRECISION)
    q = tiles.load_pieces(q_rows, place.row, tile.M, True, BLOCK_M, MODE.BLOCK_D, MODE)
    do = tiles.load_pieces(do_rows, place.row, tile.M, True, BLOCK_M, MODE.BLOCK_DV, MODE)
    for column in tl.range(0, grad.x.cols, 16, num_stages=1):
        acc = tl.zeros([16, BLOCK_M] if TURNED else [BLOCK_M, 16], tl.float32)
        taint = tl.zeros([16, BLOCK_M] if TURNED else [BLOCK_M, 16], tl.float32)
        for n0 in tl.range(span.start, span.stop, MODE.BLOCK_N, num_stages=1):
            k = tiles.load_pieces(keys, n0, tile.N, True, MODE.BLOCK_N, MODE.BLOCK_D, MODE)
            ds = _score_gradient(
                q,
                do,
                q_rows,
                do_rows,
                lse2,
                delta,
                k,
                keys,
                values,
                n0,
                tile,
                head,
                scoring.inverse_keep,
                MODE,
                STEPS,
                True,
            )
            part, bad = tiles.finite(tiles.load_rows(keys, n0, tile.N, True, MODE.BLOCK_N, 16, True, column))
            visible = visible_keys(tile, n0 + tl.arange(0, MODE.BLOCK_N), head.dense, MODE.LEFT)
            acc, taint = add_columns(acc, taint, ds, part, visible, bad, TURNED, MODE)
        acc = tl.where(taint > 0, float("nan"), acc * scoring.scale)
        tiles.store_columns(grad, place.row, tile.M, column, acc.T if TURNED else acc, BLOCK_M, 16)


@triton.jit
def _accumulate_queries(
    dq, q_rows, do_rows, lse2, delta, keys, values, tile, span, head, inverse_keep,
    MODE: tl.constexpr, STEPS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dQ (before the scale) of a tile of rows, over the key tiles of a span that need a mask (MASKED) or need none."""
    if MASKED:
        count = bands.masked_tiles(span, MODE.BLOCK_N)
    else:
        count = (span.full_stop - span.full_start) // MODE.BLOCK_N
    q = tiles.load_pieces(q_rows, tile.first, tile.M, True, MODE.BLOCK_M, MODE.BLOCK_D, MODE)
    do = tiles.load_pieces(do_rows, tile.first, tile.M, True, MODE.BLOCK_M, MODE.BLOCK_DV, MODE)
    for i in tl.range(0, count):
        if MASKED:
            n0 = bands.masked_tile(span, i, MODE.BLOCK_N)
        else:
            n0 = span.full_start + i * MODE.BLOCK_N
        k = tiles.load_pieces(keys, n0, tile.N, MASKED, MODE.BLOCK_N, MODE.BLOCK_D, MODE)
        ds = _score_gradient(
            q, do, q_rows, do_rows, lse2, delta, k, keys, values, n0, tile, head, inverse_keep, MODE, STEPS, MASKED
        )
        if MODE.AGAIN:
            dq = tiles.add_dot_rows(dq, ds, keys, n0 + tl.minimum(n0, 0), tile.N, MODE.BLOCK_N, MODE)
        else:
            dq = tiles.add_dot(dq, ds.to(k[0].dtype), k, MODE)
    return dq


@triton.jit
def _load_sums(sums, stride, row, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, MODE: tl.constexpr):
    """Rows row .. row + BLOCK_M, a multiple of 16, of the sums that fused.py left, in pieces."""
    COLS: tl.constexpr = min(WIDTH, MODE.PIECE)
    block = row // 16 + tl.arange(0, BLOCK_M // 16)
    pieces = ()
    for i in tl.static_range(WIDTH // COLS):
        at = block.to(tl.int64)[:, None] * (16 * stride) + i * COLS * 16 + tl.arange(0, COLS * 16)[None, :]
        x = tl.reshape(tl.load(sums + at), BLOCK_M // 16, COLS // 8, 2, 2, 8, 4)
        pieces = pieces + (tl.reshape(tl.permute(x, 0, 2, 4, 1, 5, 3), BLOCK_M, COLS),)
    return pieces


@triton.jit
def query_gradient(
    pid, q, k, v, grad_out, stats, grad_q, sum_q, spans, coded_sizes, rules, scoring, operands,
    MODE: tl.constexpr, STEPS: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of query rows of one head, CAREFUL: on the path for NaN. Returns whether dQ has a NaN."""
    BLOCK_M: tl.constexpr = MODE.BLOCK_M
    BLOCK_D: tl.constexpr = MODE.BLOCK_D
    sizes = tiles.sizes_of(coded_sizes)
    h, b, place, tile, span = query_tile(pid, spans, sizes, rules, MODE, STEPS)
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

    q_rows = Rows(q, place.batch_q, h, place.start_q)
    do_rows = Rows(grad_out, place.batch_q, h, place.start_q)
    grad = Rows(grad_q, place.batch_q, h, place.start_q)
    lse2, delta = load_stats(stats, place.batch_q * sizes.H + h, place.start_q + tile.at)
    if CAREFUL:
        _accumulate_carefully(
            grad, q_rows, do_rows, lse2, delta, keys, values, place, tile, span, head, scoring, MODE, STEPS
        )
        found = False
    else:
        if sum_q is None:
            # The query tile, its output gradient and its row statistics stay; the loops stream keys and values.
            dq = tiles.zero_pieces(BLOCK_M, BLOCK_D, MODE)
            dq = _accumulate_queries(
                dq, q_rows, do_rows, lse2, delta, keys, values, tile, span, head, scoring.inverse_keep,
                MODE, STEPS, True,
            )  # fmt: skip
            if rules.dense is None:
                dq = _accumulate_queries(
                    dq, q_rows, do_rows, lse2, delta, keys, values, tile, span, head, scoring.inverse_keep,
                    MODE, STEPS, False,
                )  # fmt: skip
        else:
            sums = sums_of(sum_q, place.batch_q * sizes.H + h, place.start_q, b, spans.cu_q)
            dq = _load_sums(sums, sum_q.row, place.row, BLOCK_M, BLOCK_D, MODE)
        used = (tile.at < tile.M)[:, None]
        dq = tiles.keep_pieces(used, tiles.scale_pieces(dq, scoring.scale))
        tiles.store_pieces(grad, place.row, place.stored, dq, BLOCK_M)
        found = tiles.any_nan(dq)
    return found
