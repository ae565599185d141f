"""What a thread does with its scores of a tile of keys: weights over the bases of its two rows.

Called from lanes.py with all N scores [N] that a thread holds, in MMA order: those i with i & 2 are of its second row.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Sums beyond this may be of weights that fp32 cannot hold.
_FAR = gl.constexpr(2.0**120)


@gluon.jit
def soften(s, first, second, limit, scale2, slope, offsets):
    """Weights exp2(s * scale2 - base) [N], their sums [2] of each row, and the rows' bases [2]: `first` and `second`
    until a warp has a sum over `limit`. Bases then go up to the sums, which need no maxima, and weights are divided; or
    where that is far, bases go up to the rows' maxima, and scores are weighed again.

    Where there is a slope, scores have less offsets[i & 1] and slope more for each column past the first eight: a
    thread's columns are two of every eight.
    """
    COUNT: gl.constexpr = len(s)
    p, sums = _weigh(s, first, second, scale2, slope, offsets)
    largest = gl.maximum(sums[0], sums[1])
    if _exceeds(largest, limit) != 0:
        old = (first, second)
        if _exceeds(largest, _FAR) != 0:
            if slope is None:
                most = _maxima(s)
                most = (_quad_max(most[0]) * scale2, _quad_max(most[1]) * scale2)
            else:
                scaled = ()
                for i in gl.static_range(COUNT):
                    scaled = scaled + (gl.fma(s[i], scale2, gl.fma(slope, i // 4 * 8.0, -offsets[i % 2])),)
                most = _maxima(scaled)
                most = (_quad_max(most[0]), _quad_max(most[1]))
            first = gl.maximum(first, most[0])
            second = gl.maximum(second, most[1])
            p, sums = _weigh(s, first, second, scale2, slope, offsets)
        else:
            first += gl.maximum(gl.log2(_quad_max(sums[0])), 0.0)
            second += gl.maximum(gl.log2(_quad_max(sums[1])), 0.0)
            down = (gl.exp2(old[0] - first), gl.exp2(old[1] - second))
            p = _divide(p, down)
            sums = (sums[0] * down[0], sums[1] * down[1])
    return p, sums, (first, second)


@gluon.jit
def soften_by_maxima(s, first, second, scale2):
    """The same without a slope, where bases go up to the rows' maxima at once: less code. With head dim 64 and a causal
    mask a forward was 4 % faster so beside FlashAttention-3, with 128 hardly; there data whose maxima grow with every
    tile took 1.3 times as long (H200, 2026-11-21)."""
    p, sums = _weigh(s, first, second, scale2, None, None)
    if _exceeds(gl.maximum(sums[0], sums[1]), 4096.0) != 0:
        most = _maxima(s)
        first = gl.maximum(first, _quad_max(most[0]) * scale2)
        second = gl.maximum(second, _quad_max(most[1]) * scale2)
        p, sums = _weigh(s, first, second, scale2, None, None)
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


@gluon.jit
def _divide(p, down):
    """Weights times the factors [2] of their rows. With `*` LLVM makes one vector of all, and a loop with head dim 64
    takes it apart again for every tile (32 instructions of 390)."""
    COUNT: gl.constexpr = len(p)
    ASM: gl.constexpr = "mul.f32 $0, $1, $2;"
    divided = ()
    for i in gl.static_range(COUNT):
        x = gl.inline_asm_elementwise(ASM, "=f,f,f", [p[i], down[i // 2 % 2]], dtype=gl.float32, is_pure=True, pack=1)
        divided = divided + (x,)
    return divided


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
