"""What a thread does with its scores of a tile of keys: weights over the bases of its two rows.

Called from lanes.py with all N scores [N] that a thread holds, in MMA order: those i with i & 2 are of its second row.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def soften(s, first, second, moved, scale2, slope, offsets):
    """Weights exp2(s * scale2 - base) [N], their sums [2] of each row, and the rows' bases [2]: `first` and `second`,
    or the rows' maxima where a warp has a sum that is large.

    `moved` is below 1 where the last tile's maxima became bases: scores that grew may grow again, and a warp then takes
    maxima before it weighs, lest it weigh twice. Where there is a slope, scores have less offsets[i & 1] and slope more
    for each column past the first eight: a thread's columns are two of every eight.
    """
    p, sums = s, (first, second)
    over = _exceeds(1.0 - moved, 0.0)
    if over == 0:
        p, sums = _weigh(s, first, second, scale2, slope, offsets)
        over = _exceeds(gl.maximum(sums[0], sums[1]), 4096.0)
    if over != 0:
        most = _scaled_maxima(s, scale2, slope, offsets)
        # Less than a sum of that size needs, so that what made the sum large moves the bases.
        if _exceeds(gl.maximum(most[0] - first, most[1] - second), 4.0) != 0:
            first = gl.maximum(first, _quad_max(most[0]))
            second = gl.maximum(second, _quad_max(most[1]))
        p, sums = _weigh(s, first, second, scale2, slope, offsets)
    return p, sums, (first, second)


@gluon.jit
def soften_in_place(s, first, second, scale2):
    """The same from the rows' maxima, which move bases where a weight would be over 256. The scores need no registers
    beside the weights then: three warpgroups have none for both."""
    most = _maxima(s)
    if _exceeds(gl.maximum(most[0] * scale2 - first, most[1] * scale2 - second), 8.0) != 0:
        first = gl.maximum(first, _quad_max(most[0]) * scale2)
        second = gl.maximum(second, _quad_max(most[1]) * scale2)
    p, sums = _weigh(s, first, second, scale2, None, None)
    return p, sums, (first, second)


@gluon.jit
def _maxima(s):
    """The largest of a thread's scores in each of its rows [2]."""
    a = gl.maximum(s[0], s[1])
    b = gl.maximum(s[2], s[3])
    for i in gl.static_range(4, len(s), 4):
        a = gl.maximum(a, gl.maximum(s[i], s[i + 1]))
        b = gl.maximum(b, gl.maximum(s[i + 2], s[i + 3]))
    return a, b


@gluon.jit
def _scaled_maxima(s, scale2, slope, offsets):
    """The same [2] in log2 units, with what `soften` says of a slope."""
    COUNT: gl.constexpr = len(s)
    if slope is None:
        most = _maxima(s)
        return most[0] * scale2, most[1] * scale2
    else:
        scaled = ()
        for i in gl.static_range(COUNT):
            scaled = scaled + (gl.fma(s[i], scale2, gl.fma(slope, i // 4 * 8.0, -offsets[i % 2])),)
        return _maxima(scaled)


@gluon.jit
def _weigh(s, first, second, scale2, slope, offsets):
    """Weights [N] and their sums [2]."""
    COUNT: gl.constexpr = len(s)
    if slope is None:
        taken = (first, first, second, second)
    else:
        taken = (first + offsets[0], first + offsets[1], second + offsets[0], second + offsets[1])
    p = ()
    for i in gl.static_range(COUNT):
        if slope is None:
            p = p + (gl.exp2(s[i] * scale2 - taken[i % 4]),)
        else:
            p = p + (gl.exp2(gl.fma(s[i], scale2, gl.fma(slope, i // 4 * 8.0, -taken[i % 4]))),)
    sums = (p[0], p[1], p[2], p[3])
    for i in gl.static_range(1, COUNT // 4):
        sums = (sums[0] + p[4 * i], sums[1] + p[4 * i + 1], sums[2] + p[4 * i + 2], sums[3] + p[4 * i + 3])
    return p, (sums[0] + sums[1], sums[2] + sums[3])


# Triton takes only "pure" code inside map_elementwise; what depends on it keeps it in its place.
@gluon.jit
def _exceeds(x, limit):
    """1 in all threads of a warp if x > limit in one of them, else 0."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.f32 p, $1, $2; vote.sync.any.pred p, p, -1; selp.b32 $0, 1, 0, p; }",
        "=r,f,f", [x, gl.to_tensor(limit)], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _quad_max(x):
    """The maximum over the four threads that share two rows. All threads of a warp must come here together."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; shfl.sync.bfly.b32 t, $1, 1, 31, -1; max.f32 t, t, $1; "
        "shfl.sync.bfly.b32 $0, t, 2, 31, -1; max.f32 $0, $0, t; }",
        "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip
