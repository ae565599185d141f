"""What a warpgroup of the Hopper forward stores of a task: lse and the rows of out, or a split's part of them.

B segments, H query heads, M query rows, N keys, Dv head dim of value, S splits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from ..bundles import Rows, Strided
from ..device import scores, tiles
from . import compat
from .pipeline import head_in_tile, matrix, own_rows, parts, row_in_tile, rows_of, split_of
from .scoring import lead


@gluon.jit
def _log2(x):
    """log2 of normal numbers x > 0. The hardware's is exact to a part of its result, which may be 40 here; of [1, 2) to
    a part of 1."""
    bits = x.to(gl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(gl.float32, bitcast=True)
    return ((bits >> 23) - 127).to(gl.float32) + gl.log2(mantissa)


@gluon.jit
def totals(base, sums, task, rule, WG: gl.constexpr, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """Store lse [64] of a task's rows; the factors [64] from their accumulators to the output, 0 for rows that see no
    key."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SHAPE.WIDTH_V, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, ACC)
    r = gl.arange(0, 64, layout=ROWS)
    at = task.row + row_in_tile(r, WG, SHAPE)
    h = task.h
    if SHAPE.PACKED > 1:
        h += head_in_tile(r, SHAPE)
    row_sum = gl.convert_layout(gl.sum(sums, 1), ROWS)
    row_max = gl.convert_layout(gl.max(base, 1), ROWS) + lead(task, at, rule, SHAPE, STEPS)
    # Sinks join the denominator of rows that see a key; rows that see none are 0, their lse -inf.
    none = (row_sum == 0.0) | (at >= task.used_q)
    decay = gl.full([64], 1.0, gl.float32, ROWS)
    if rule.operands.sinks is not None:
        sink = gl.load(rule.operands.sinks + h).to(gl.float32) * scores.LOG2E
        new_max = gl.maximum(row_max, sink)
        decay = gl.exp2(row_max - new_max)
        row_sum = row_sum * decay + gl.exp2(sink - new_max)
        row_max = new_max
    total = gl.where(none, 1.0, row_sum)
    lse2 = row_max + _log2(total)
    if rule.splits is None:
        lse = gl.where(none, -float("inf"), lse2 * scores.LN2)
        lse_at = first_row(task, h, rule)
        gl.store(rule.lse + lse_at + at, lse, mask=at < task.stored)
    else:
        split_at = lse2_of_split(at, task, h, rule, SHAPE)
        gl.store(split_at, gl.where(none, -float("inf"), lse2), mask=at < task.stored)
    return gl.where(none, 0.0, decay * rule.scoring.inverse_keep / total)


@gluon.jit
def first_row(task, h, rule):
    """The number of the first row of a task's segment and head h among those of all batch entries and heads."""
    return gl.cast(task.batch_q * rule.sizes.H + h, gl.int64) * rule.sizes.M + task.start_q


@gluon.jit
def lse2_of_split(m, task, h, rule, SHAPE: gl.constexpr):
    """Where a split leaves the lse of rows m and head h of a task's segment, in log2 units."""
    split, _, count = split_of(task.index, rule.spans, rule.sizes, rule.splits, rows_of(SHAPE), SHAPE.PACKED)
    return rule.splits.lse2 + ((first_row(task, h, rule) + m) * count + split)


@gluon.jit
def rows_of_split(task, h, rule, cols, SHAPE: gl.constexpr):
    """Where a split leaves out, fp32, of a task's segment and head h."""
    split, _, count = split_of(task.index, rule.spans, rule.sizes, rule.splits, rows_of(SHAPE), SHAPE.PACKED)
    row = count * cols
    left = Strided(rule.splits.out + split * cols, rule.sizes.H * rule.sizes.M * row, rule.sizes.M * row, row, 1, cols)
    return Rows(left, task.batch_q, h, task.start_q)


@gluon.jit
def leave_nothing(task, rule, SHAPE: gl.constexpr):
    """The scheduler warp: lse of a split without keys; then nobody reads its out."""
    if task.row < task.stored:
        L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        for i in range(0, 64 * SHAPE.GROUPS, 32):
            r = i + gl.arange(0, 32, layout=L)
            m = task.row + r
            h = task.h
            if SHAPE.PACKED > 1:
                m = task.row + r % rows_of(SHAPE)
                h += r // rows_of(SHAPE)
            nothing = gl.full([32], -float("inf"), gl.float32, L)
            gl.store(lse2_of_split(m, task, h, rule, SHAPE), nothing, mask=m < task.stored)


@gluon.jit
def store(acc, weight, task, rule, inputs, buffers, WG: gl.constexpr, SHAPE: gl.constexpr):
    """Store out [64, Dv] of a task's rows: accumulators times the rows' weights, 0 in rows that see nothing."""
    if rule.splits is None:
        _store_rows(acc, weight, task, rule, inputs, buffers, WG, SHAPE)
    else:
        left = rows_of_split(task, task.h, rule, inputs.plain.out.cols, SHAPE)
        CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
        for c in gl.static_range(CHUNKS_V):
            tile = acc[c] * weight[:, None]
            _store_by_pointer(tile, task.row, c * SHAPE.WIDTH_V, task.stored, left, WG, SHAPE)


@gluon.jit
def _store_rows(acc, weight, task, rule, inputs, buffers, WG: gl.constexpr, SHAPE: gl.constexpr):
    WIDTH: gl.constexpr = SHAPE.WIDTH_OUT
    PARTS: gl.constexpr = SHAPE.WIDTH_V // WIDTH
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    OUT: gl.constexpr = inputs.out.dtype
    row = task.row + WG * own_rows(SHAPE)
    for c in gl.static_range(CHUNKS_V):
        tile = acc[c] * weight[:, None]
        if rule.spans.used_q is not None:
            # Rows of padding may hold anything, and 0 times an infinity is NaN.
            tile = gl.where((weight == 0.0)[:, None], 0.0, tile)
        tiles_out = parts(tile.to(OUT), WIDTH)
        if rule.spans.cu_q is None:
            for i in gl.static_range(PARTS):
                _store_by_tma(tiles_out[i], row, c * PARTS + i, task, inputs, buffers, WG, SHAPE)
        else:
            if row + 64 <= task.stored:
                for i in gl.static_range(PARTS):
                    _store_by_tma(tiles_out[i], row, c * PARTS + i, task, inputs, buffers, WG, SHAPE)
            else:
                # TMA would write over the next document's rows.
                rows = Rows(inputs.plain.out, task.batch_q, task.h, task.start_q)
                for i in gl.static_range(PARTS):
                    _store_by_pointer(tiles_out[i], task.row, (c * PARTS + i) * WIDTH, task.stored, rows, WG, SHAPE)


@gluon.jit
def _store_by_tma(tile, row, chunk, task, inputs, buffers, WG: gl.constexpr, SHAPE: gl.constexpr):
    """Store [64, WIDTH] at row `row` of a task's segment through shared memory."""
    WIDTH: gl.constexpr = tile.shape[1]
    staging = buffers.out.index(WG)
    compat.store_wait(0)
    staging.store(tile)
    fence_async_shared()
    compat.store(
        inputs.out,
        [task.batch_q, task.h, task.start_q + row, chunk * WIDTH],
        compat.view(staging, [1, SHAPE.PACKED, own_rows(SHAPE), WIDTH], matrix(WIDTH, 4)),
    )


@gluon.jit
def _store_by_pointer(tile, row, column, limit, rows, WG: gl.constexpr, SHAPE: gl.constexpr):
    """Store [64, WIDTH] as a warpgroup's rows of the tile that begins with row `row` of a segment, those below
    limit."""
    L: gl.constexpr = tile.type.layout
    in_tile = gl.arange(0, 64, layout=gl.SliceLayout(1, L))
    r = row + row_in_tile(in_tile, WG, SHAPE)
    c = column + gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, L))
    at = tiles.base_of(rows, 0) + (r.to(gl.int64)[:, None] * rows.x.row + c[None, :] * rows.x.col)
    if SHAPE.PACKED > 1:
        at += (head_in_tile(in_tile, SHAPE).to(gl.int64) * rows.x.head)[:, None]
    gl.store(at, tile, mask=(r < limit)[:, None] & (c < rows.x.cols)[None, :])
