"""What a thread does with its scores of a tile of keys: weights over the bases of its two rows.

Called from lanes.py with all N scores [N] that a thread holds, in MMA order: those i with i & 2 are of its second row.
The special function unit makes 16 exponentials a clock: where that is what a tile waits for, EIGHTHS of every eight
weights come from a polynomial instead, as in FlashAttention-4.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..device import scores

@gluon.jit
def soften(s, first, second, scale2, EIGHTHS: gl.constexpr):
    """Weights exp2(s * scale2 - base) [N], their sums [2] of each row, and the rows' bases [2]: `first` and `second`,
    or the rows' maxima where a warp has a sum that is large."""
    COUNT: gl.constexpr = len(s)
    p, sums = _weigh(s, first, second, scale2, EIGHTHS)
    if _exceeds(gl.maximum(sums[0], sums[1])) != 0:
        a = gl.maximum(s[0], s[1])
        b = gl.maximum(s[2], s[3])
        for i in gl.static_range(1, COUNT // 4):
            a = gl.maximum(a, gl.maximum(s[4 * i], s[4 * i + 1]))
            b = gl.maximum(b, gl.maximum(s[4 * i + 2], s[4 * i + 3]))
        first = gl.maximum(first, _quad_max(a) * scale2)
        second = gl.maximum(second, _quad_max(b) * scale2)
        p, sums = _weigh(s, first, second, scale2, 0)
    return p, sums, (first, second)


@gluon.jit
def _weigh(s, first, second, scale2, EIGHTHS: gl.constexpr):
    """Weights [N] and their sums [2]."""
    COUNT: gl.constexpr = len(s)
    p = ()
    sums = (0.0, 0.0, 0.0, 0.0)
    last = sums
    for g in gl.static_range(COUNT // 8):
        # A polynomial waits for sums of the eights before the last: else ptxas puts all of them before the exponentials.
        awaited = last
        last = sums
        for i in gl.static_range(8 * g, 8 * g + 8):
            x = s[i] * scale2 - (first if i & 2 == 0 else second)
            if i % 8 * EIGHTHS % 8 + EIGHTHS >= 8:
                p = p + (scores.exp2_by_fma(x, gl.to_tensor(awaited[i % 8 // 4 * 2])),)
            else:
                p = p + (gl.exp2(x),)
        for i in gl.static_range(8 * g, 8 * g + 8, 4):
            if i == 0:
                sums = (p[0], p[1], p[2], p[3])
            else:
                sums = (sums[0] + p[i], sums[1] + p[i + 1], sums[2] + p[i + 2], sums[3] + p[i + 3])
    return p, (sums[0] + sums[1], sums[2] + sums[3])


# Triton takes only "pure" code inside map_elementwise; what depends on it keeps it in its place.
@gluon.jit
def _exceeds(x):
    """1 in all threads of a warp if x > 4096 in one of them, else 0."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.f32 p, $1, 0f45800000; vote.sync.any.pred p, p, -1; selp.b32 $0, 1, 0, p; }",
        "=r,f", [x], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _quad_max(x):
    """The maximum over the four threads that share two rows. All threads of a warp must come here together."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; shfl.sync.bfly.b32 t, $1, 1, 31, -1; max.f32 t, t, $1; "
        "shfl.sync.bfly.b32 $0, t, 2, 31, -1; max.f32 $0, $0, t; }",
        "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip
