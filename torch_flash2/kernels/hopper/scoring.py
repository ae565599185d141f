"""A warpgroup's scores: from products of queries and keys to weights over the bases of its rows.

A tile has 64 rows and N keys. What threads hold of rows is [64, 4]: each of the four threads of a row has its own.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..device import bands
from . import lanes
from .pipeline import matrix, read_task, steps_of

# The base of a row that has seen no key: below all scores, so that the first one makes it move.
LOWEST = gl.constexpr(-(2.0**126))
# Between the terms that a slope is split into. Its product with a column's number is within fp16's range.
TILT = gl.constexpr(256.0)


@gluon.jit
def spread(x, tile):
    """What threads hold for their rows [64, 4], as a tile like `tile`; this moves no data between threads."""
    M: gl.constexpr = tile.shape[0]
    N: gl.constexpr = tile.shape[1]
    L: gl.constexpr = tile.type.layout
    split = gl.reshape(tile, [M, N // 8, 4, 2])
    ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, split.type.layout))
    x = gl.convert_layout(x, ROWS, assert_trivial=True)
    wide, _ = gl.broadcast(gl.expand_dims(gl.expand_dims(x, 1), 3), split)
    return gl.convert_layout(gl.reshape(wide, [M, N]), L, assert_trivial=True)


@gluon.jit
def _most(s):
    """The largest score of each row that a thread holds [64, 4]."""
    M: gl.constexpr = s.shape[0]
    N: gl.constexpr = s.shape[1]
    return gl.max(gl.max(gl.reshape(s, [M, N // 8, 4, 2]), 3), 1)


@gluon.jit
def _columns(N: gl.constexpr, L: gl.constexpr):
    """The columns of a tile [rows, N] seen as [rows, N / 8, 8]: multiples of 8, constants to a thread, and the rest."""
    eights = gl.arange(0, N // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, L))) * 8
    ones = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))
    return eights[None, :, None], ones[None, None, :]


@gluon.jit
def shift(task, SHAPE: gl.constexpr):
    """Where a segment's row 0 stands among its keys."""
    return task.used_k - task.used_q if SHAPE.BOTTOM_RIGHT else task.used_k * 0


@gluon.jit
def scores_of(s, n0, place, steps, rule, WG: gl.constexpr, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """Scores [64, BLOCK_N] of the tile of keys at n0 from its products, the steps applied; `place` is where the task's
    row 0 stands. ALiBi alone under a causal mask is in the products and in `softmax`."""
    M: gl.constexpr = s.shape[0]
    N: gl.constexpr = s.shape[1]
    COUNT: gl.constexpr = len(STEPS.VALUE) - SHAPE.TILTED
    if COUNT == 0:
        return s
    else:
        split = gl.reshape(s, [M, N // 8, 8])
        L: gl.constexpr = split.type.layout
        eights, ones = _columns(N, L)
        m = WG * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))
        distance = (place - n0 + m).to(gl.float32)[:, None, None] - ones.to(gl.float32) - eights.to(gl.float32)
        split = split * rule.scoring.first
        # Only biases, which this kernel has not, need positions in tensors.
        for i in gl.static_range(COUNT):
            split = STEPS.VALUE[i](split, steps[i], None, None, distance, None)
        return gl.convert_layout(gl.reshape(split, [M, N]), s.type.layout, assert_trivial=True)


@gluon.jit
def _factor(rule, SHAPE: gl.constexpr):
    """From what `scores_of` returns to log2 units."""
    if SHAPE.TILTED:
        return rule.scoring.first * rule.scoring.scale2
    else:
        return rule.scoring.scale2


@gluon.jit
def _slope(steps, rule):
    """What ALiBi takes from scores for each key that they are away, in log2 units."""
    return steps[0] * rule.scoring.scale2


@gluon.jit
def _fall(n0, place, steps, rule, SHAPE: gl.constexpr):
    """What ALiBi takes (log2 units) from all scores of the tile of keys at n0, which have its columns' part already.

    Distances are those from the last row of the task, for all rows: what that takes from all scores of a row is `lead`.
    Keys after that row are masked.
    """
    return (place + (64 * SHAPE.GROUPS - 1) - n0).to(gl.float32) * _slope(steps, rule)


@gluon.jit
def prepare(h, task, rule, DTYPE: gl.constexpr, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """What the score steps need of query head h of a task; where tilted, ALiBi's part of the left operand too.

    That is [64, 16], for the right operand of `tilt`: ALiBi's slope over the scale in three terms, as many as fp32's 24
    bits need in bf16. In fp16 it ends at 1.6e7, where the scale would have to be below 1e-5 for the next key to count.
    """
    steps = steps_of(h, task, rule, STEPS)
    if SHAPE.TILTED:
        ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SHAPE.BLOCK_N, 16])
        L: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
        slope = gl.full([64, 16], 0.0, gl.float32, L) + steps[0] / rule.scoring.first
        if DTYPE == gl.float16:
            slope = gl.where(gl.abs(slope) > 2.0**23, gl.where(slope > 0, 2.0**23, -(2.0**23)), slope)
        high = (slope * (1 / TILT)).to(DTYPE)
        rest = slope - high.to(gl.float32) * TILT
        middle = rest.to(DTYPE)
        low = ((rest - middle.to(gl.float32)) * TILT).to(DTYPE)
        column = gl.arange(0, 16, layout=gl.SliceLayout(0, L))[None, :]
        zero = gl.zeros([64, 16], DTYPE, L)
        terms = gl.where(column == 0, high, gl.where(column == 1, middle, gl.where(column == 2, low, zero)))
        return steps + (terms,)
    else:
        return steps


@gluon.jit
def tilt(DTYPE: gl.constexpr, SHAPE: gl.constexpr):
    """What ALiBi adds to K^T in shared memory [BLOCK_N, 16]: the columns' numbers, over TILT for the lowest of the three
    terms of `prepare` and TILT times for the highest."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    key = gl.arange(0, SHAPE.BLOCK_N, layout=gl.SliceLayout(1, L)).to(gl.float32)[:, None]
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, L))[None, :]
    times = gl.where(column == 0, TILT, gl.where(column == 1, 1.0, gl.where(column == 2, 1 / TILT, 0.0)))
    made = gl.allocate_shared_memory(DTYPE, [SHAPE.BLOCK_N, 16], matrix(16, 2))
    made.store((key * times).to(DTYPE))
    return made


@gluon.jit
def lead(task, at, rule, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """By how much (log2 units) the scores of rows `at` are larger than `scores_of` has them."""
    if SHAPE.TILTED:
        distance = (task.row + (64 * SHAPE.GROUPS - 1) - at).to(gl.float32)
        return distance * _slope(steps_of(task.h, task, rule, STEPS), rule)
    else:
        return gl.full(at.shape, 0.0, gl.float32, at.type.layout)


@gluon.jit
def masked(s, n0, done, rule, buffers, WG: gl.constexpr, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """Scores, -inf where a row does not see the key.

    Most tiles need no mask: callers branch around this, and the task is read here, so that its fields take no registers
    from those tiles.
    """
    KEYS: gl.constexpr = STEPS.KEYS
    M: gl.constexpr = s.shape[0]
    N: gl.constexpr = s.shape[1]
    split = gl.reshape(s, [M, N // 8, 8])
    L: gl.constexpr = split.type.layout
    eights, ones = _columns(N, L)
    task = read_task(buffers.tasks, done, 4)
    m = task.row + WG * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))
    start = shift(task, SHAPE)
    lo, hi = bands.intersect(
        gl.minimum(m, task.used_q - 1), task.used_k, task.used_q, task.used_k, start, rule.rules.numbers, KEYS
    )
    visible = eights < (hi - n0)[:, None, None] - ones
    if SHAPE.LEFT:
        visible = visible & (eights >= (lo - n0)[:, None, None] - ones)
    split = gl.where(visible, split, -float("inf"))
    return gl.convert_layout(gl.reshape(split, [M, N]), s.type.layout, assert_trivial=True)


@gluon.jit
def row_maxima(s, n0, place, steps, rule, SHAPE: gl.constexpr):
    """The rows' maxima [64, 4] in log2 units."""
    most = _most(s)
    row_max = gl.max(most, 1) * _factor(rule, SHAPE)
    if SHAPE.TILTED:
        row_max = row_max - _fall(n0, place, steps, rule, SHAPE)
    row_max, _ = gl.broadcast(gl.expand_dims(gl.maximum(row_max, LOWEST), 1), most)
    return row_max


@gluon.jit
def softmax(s, n0, place, steps, base, sums, rule, SHAPE: gl.constexpr):
    """P of a tile of scores; the rows' bases (log2 units), their sums, and the factors of what came before, each
    [64, 4].

    A row's base stays while its weights are small enough: most tiles need no maximum.
    """
    zero = gl.full([64, s.shape[1]], 0.0, gl.float32, s.type.layout)
    factor = zero + _factor(rule, SHAPE)
    bases = spread(base, s)
    if SHAPE.TILTED:
        p, tile_sums, bases = lanes.softmax_tilted(s, bases, factor, zero + _fall(n0, place, steps, rule, SHAPE))
    elif SHAPE.GROUPS == 3:
        p, tile_sums, bases = lanes.softmax_in_place(s, bases, factor)
    else:
        p, tile_sums, bases = lanes.softmax(s, bases, factor)
    new_base = _most(bases)
    decay = gl.exp2(base - new_base)
    return p, new_base, sums * decay + _most(tile_sums), decay
