"""A warpgroup's scores: from products of queries and keys to weights over the bases of its rows.

A tile has 64 rows and N keys. What threads hold of rows is [64, 4]: each of the four threads of a row has its own.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..device import bands
from . import dropping, lanes
from .pipeline import read_task, row_in_tile, steps_of

# The base of a row that has seen no key: below all scores, so that the first one makes it move.
LOWEST = gl.constexpr(-(2.0**126))


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
    row 0 stands. ALiBi under a causal mask is left to `softmax`."""
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
def _factor(rule, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """From what `scores_of` returns to log2 units."""
    if SHAPE.TILTED and len(STEPS.VALUE) == 1:
        return rule.scoring.first * rule.scoring.scale2
    else:
        return rule.scoring.scale2


@gluon.jit
def _slope(steps, rule, STEPS: gl.constexpr):
    """What ALiBi takes from scores for each key that they are away, in log2 units."""
    return steps[len(STEPS.VALUE) - 1] * rule.scoring.scale2


@gluon.jit
def _offsets(s, n0, place, slope, SHAPE: gl.constexpr):
    """What ALiBi takes from scores of the first 8 columns, repeated over a tile like s: two values a thread.

    Distances are those from the last row of the task, for all rows: what that takes from all scores of a row is
    `lead`. Keys after that row are masked.
    """
    M: gl.constexpr = s.shape[0]
    N: gl.constexpr = s.shape[1]
    split = gl.reshape(s, [M, N // 8, 8])
    L: gl.constexpr = split.type.layout
    _, ones = _columns(N, L)
    offsets, _ = gl.broadcast((place + (64 * SHAPE.GROUPS - 1) - n0 - ones).to(gl.float32) * slope, split)
    return gl.convert_layout(gl.reshape(offsets, [M, N]), s.type.layout, assert_trivial=True)


@gluon.jit
def lead(task, at, rule, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """By how much (log2 units) the scores of rows `at` are larger than `scores_of` has them."""
    if SHAPE.TILTED:
        distance = (task.row + (64 * SHAPE.GROUPS - 1) - at).to(gl.float32)
        return distance * _slope(steps_of(task.h, task, rule, STEPS), rule, STEPS)
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
    m = task.row + row_in_tile(gl.arange(0, 64, layout=gl.SliceLayout(1, gl.SliceLayout(2, L))), WG, SHAPE)
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
def row_maxima(s, n0, place, steps, rule, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """The rows' maxima [64, 4] in log2 units."""
    M: gl.constexpr = s.shape[0]
    N: gl.constexpr = s.shape[1]
    factor = _factor(rule, SHAPE, STEPS)
    if SHAPE.TILTED:
        slope = _slope(steps, rule, STEPS)
        tilted = gl.reshape(s * factor - _offsets(s, n0, place, slope, SHAPE), [M, N // 8, 8])
        L: gl.constexpr = tilted.type.layout
        eights, _ = _columns(N, L)
        tilted = gl.reshape(tilted + eights.to(gl.float32) * slope, [M, N])
        most = _most(gl.convert_layout(tilted, s.type.layout, assert_trivial=True))
        row_max = gl.max(most, 1)
    else:
        most = _most(s)
        row_max = gl.max(most, 1) * factor
    row_max, _ = gl.broadcast(gl.expand_dims(gl.maximum(row_max, LOWEST), 1), most)
    return row_max


@gluon.jit
def softmax(s, n0, place, steps, draw, base, sums, rule, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """P of a tile of scores, after dropout if there is a draw; the rows' bases (log2 units), the sums of P before it,
    and the factors of what came before, each [64, 4].

    A row's base stays while its weights are small enough: most tiles need no maximum.
    """
    zero = gl.full([64, s.shape[1]], 0.0, gl.float32, s.type.layout)
    factor = zero + _factor(rule, SHAPE, STEPS)
    bases = spread(base, s)
    if SHAPE.TILTED:
        slope = _slope(steps, rule, STEPS)
        offsets = _offsets(s, n0, place, slope, SHAPE)
        p, tile_sums, bases = lanes.softmax_tilted(s, bases, zero + SHAPE.LIMIT, factor, zero + slope, offsets)
    elif SHAPE.GROUPS == 3:
        p, tile_sums, bases = lanes.softmax_in_place(s, bases, factor)
    elif SHAPE.LIMIT is None:
        p, tile_sums, bases = lanes.softmax_by_maxima(s, bases, factor)
    else:
        p, tile_sums, bases = lanes.softmax(s, bases, zero + SHAPE.LIMIT, factor)
    new_base = _most(bases)
    decay = gl.exp2(base - new_base)
    p = dropping.drop(p, dropping.kept(draw, n0, s.shape[1]))
    return p, new_base, sums * decay + _most(tile_sums), decay
