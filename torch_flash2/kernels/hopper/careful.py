"""The output of a tile again, where NaN or infinite values lie behind a mask: slow, and seldom needed.

M query rows, N keys, D head dim of query and key, Dv head dim of value.
A masked score has weight 0, and 0 * NaN is NaN. Here values are made finite first, and an element is NaN only where its
row sees one that was not. Queries, keys and values come by pointer, products are Ampere's mma: few registers, so that
the main loops keep theirs.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from ..bundles import Dropout, Rows
from ..device import bands, philox, scores, tiles
from .pipeline import own_rows
from .storing import first_row, lse2_of_split, rows_of_split

COLUMNS = gl.constexpr(32)
KEYS_AT_ONCE = gl.constexpr(16)


@gluon.jit
def note_nan(tile, flags, place):
    """Set this program's flag and that at `place` to the program's number + 1 where a thread holds NaN (or infinities
    of both signs in one row). No thread waits for another here. `flags` are zeros, and what reads them clears them."""
    M: gl.constexpr = tile.shape[0]
    N: gl.constexpr = tile.shape[1]
    sums = gl.sum(gl.reshape(tile, [M, N // 8, 4, 2]), 1)  # [64, 4, 2]: what each thread holds
    nan = sums != sums
    mark = gl.program_id(0) + 1 + nan.to(gl.int32) * 0
    gl.store(flags + gl.program_id(0) + nan.to(gl.int32) * 0, mark, mask=nan)
    gl.store(flags + gl.num_programs(0) + place + nan.to(gl.int32) * 0, mark, mask=nan)


@gluon.jit
def _load(rows, r, c, limit, L: gl.constexpr):
    """Elements (r, c) of a segment's rows below limit, 0 outside; r and c broadcast to the tile, layout L."""
    inside = (r < limit) & (c < rows.x.cols)
    at = tiles.base_of(rows, 0) + (r.to(gl.int64) * rows.x.row + c.to(gl.int64) * rows.x.col)
    return gl.load(at, mask=inside, other=0.0)


@gluon.jit
def attend_carefully(first, h, task, steps, rule, plain, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """Store out for a warpgroup's rows of head h, from row `first` of a task's segment, or what its split leaves of it;
    their lse is known. `steps` are prepared operands."""
    M: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8])
    LEFT_OPERAND: gl.constexpr = gl.DotOperandLayout(0, M, 2)
    RIGHT_OPERAND: gl.constexpr = gl.DotOperandLayout(1, M, 2)
    TALL: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    KEYS: gl.constexpr = STEPS.KEYS
    N16: gl.constexpr = KEYS_AT_ONCE
    WIDE: gl.constexpr = COLUMNS
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    group_head = h // rule.sizes.group
    # Rows after them are another warpgroup's.
    limit = gl.minimum(task.stored, first + own_rows(SHAPE))
    q = Rows(plain.q, task.batch_q, h, task.start_q)
    k = Rows(plain.k, task.batch_k, group_head, task.start_k)
    v = Rows(plain.v, task.batch_k, group_head, task.start_k)
    if rule.splits is None:
        out = Rows(plain.out, task.batch_q, h, task.start_q)
    else:
        out = rows_of_split(task, h, rule, plain.out.cols, SHAPE)
    DTYPE: gl.constexpr = plain.q.ptr.dtype.element_ty
    ROWS: gl.constexpr = gl.SliceLayout(1, M)
    shift = task.used_k - task.used_q if SHAPE.BOTTOM_RIGHT else task.used_k * 0
    m = first + gl.arange(0, 64, layout=ROWS)
    lo, hi = bands.intersect(
        gl.minimum(m, task.used_q - 1), task.used_k, task.used_q, task.used_k, shift, rule.rules.numbers, KEYS
    )
    hi = gl.where(m < task.used_q, hi, lo)
    if rule.splits is None:
        lse_at = first_row(task, h, rule)
        lse = gl.load(rule.lse + lse_at + m, mask=m < limit, other=0.0)
        lse2 = gl.where(lse == -float("inf"), float("inf"), lse * scores.LOG2E)
    else:
        lse2 = gl.load(lse2_of_split(m, task, h, rule, SHAPE), mask=m < limit, other=0.0)
        lse2 = gl.where(lse2 == -float("inf"), float("inf"), lse2)
    start = task.top - (task.count - 1) * BLOCK_N
    stop = gl.minimum(task.top + BLOCK_N, task.used_k)
    r = (first + gl.arange(0, 64, layout=gl.SliceLayout(1, TALL)))[:, None]
    for column in range(0, plain.out.cols, WIDE):
        acc = gl.zeros([64, WIDE], gl.float32, M)
        taint = gl.zeros([64, WIDE], gl.float32, M)
        for n0 in range(start, stop, N16):
            s = gl.zeros([64, N16], gl.float32, M)
            keys = (n0 + gl.arange(0, N16, layout=gl.SliceLayout(0, TALL)))[None, :]
            for d in range(0, plain.q.cols, 16):
                across = (d + gl.arange(0, 16, layout=gl.SliceLayout(0, TALL)))[None, :]
                down = (d + gl.arange(0, 16, layout=gl.SliceLayout(1, TALL)))[:, None]
                left = _load(q, r, across, task.used_q, TALL)
                right = _load(k, keys, down, task.used_k, TALL)
                s = mma_v2(gl.convert_layout(left, LEFT_OPERAND), gl.convert_layout(right, RIGHT_OPERAND), s)
            n = (n0 + gl.arange(0, N16, layout=gl.SliceLayout(0, M)))[None, :]
            visible = (n >= lo[:, None]) & (n < hi[:, None])
            if len(STEPS.VALUE) > 0:
                at = m[:, None]
                s = scores.apply(s * rule.scoring.first, steps, at, n, at + shift - n, visible, STEPS)
            p = gl.exp2(gl.where(visible, s, -float("inf")) * rule.scoring.scale2 - lse2[:, None])
            if rule.operands.seed is not None:
                dropout = Dropout(philox.load_key(rule.operands.seed), task.b, h, philox.threshold_of(rule.scoring))
                p = gl.where(philox.keep_elements(dropout, m[:, None], n), p, 0.0)
            rows = (n0 + gl.arange(0, N16, layout=gl.SliceLayout(1, TALL)))[:, None]
            columns = (column + gl.arange(0, WIDE, layout=gl.SliceLayout(0, TALL)))[None, :]
            value, bad = tiles.finite(_load(v, rows, columns, task.used_k, TALL))
            weight = gl.convert_layout(p.to(DTYPE), LEFT_OPERAND)
            acc = mma_v2(weight, gl.convert_layout(value.to(DTYPE), RIGHT_OPERAND), acc)
            seen = gl.convert_layout(visible.to(DTYPE), LEFT_OPERAND)
            taint = mma_v2(seen, gl.convert_layout(bad.to(DTYPE), RIGHT_OPERAND), taint)
        c = (column + gl.arange(0, WIDE, layout=gl.SliceLayout(0, M)))[None, :]
        tile = gl.where(taint > 0, float("nan"), acc * rule.scoring.inverse_keep)
        at = tiles.base_of(out, 0) + (m.to(gl.int64)[:, None] * out.x.row + c.to(gl.int64) * out.x.col)
        gl.store(at, tile.to(at.dtype.element_ty), mask=(m < limit)[:, None] & (c < plain.out.cols))
