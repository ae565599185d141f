"""Dropout on Hopper: the bits of scores.keep, for the scores that threads hold of a tile.

M query rows, N keys. Philox gives the words of four neighbouring keys of one row at once. In a tile [64 rows, N] two
threads share those: of each pair the even one draws for its first row, the odd one for its second. In a tile [64 keys,
M] four threads do, which draw for one row each of two fours of keys. Threads keep a bit of each word and exchange bits.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..device import philox

_A = gl.constexpr(0xD2511F53)
_B = gl.constexpr(0xCD9E8D57)
_STEP_0 = gl.constexpr(0x9E3779B9)
_STEP_1 = gl.constexpr(0xBB67AE85)
# One element for each thread of a warpgroup.
_THREADS = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


class Key(NamedTuple):
    """The words of Philox's key, and the threshold."""

    k0: Any
    k1: Any
    threshold: Any


class Draw(NamedTuple):
    """What Philox makes of one row, one for each thread [128], before the key's number enters: the word that this is
    added to in the first round, one word of the second, three of the third; and the Key."""

    quad: Any
    second: Any
    third_0: Any
    third_1: Any
    third_2: Any
    key: Any


class KeyDraw(NamedTuple):
    """What Philox makes of four keys [128] before the row's number enters: two words of the second round, and one of
    the segment; and the Key."""

    high: Any
    low: Any
    segment: Any
    key: Any


@gluon.jit
def _key_of(rule):
    key = philox.load_key(rule.operands.seed)
    return Key(key.to(gl.uint32), (key >> 32).to(gl.uint32), philox.threshold_of(rule.scoring))


@gluon.jit
def begin(task, rule, WG: gl.constexpr):
    """The Draw of a task's rows in a warpgroup, nothing without dropout."""
    if rule.operands.seed is None:
        return ()
    else:
        key = _key_of(rule)
        thread = gl.arange(0, 128, layout=_THREADS)
        # Of rows g and g + 8 of each 16.
        row = task.row + WG * 64 + thread // 32 * 16 + thread % 2 * 8 + thread // 4 % 8
        high_0, low_0 = _product((thread * 0 + task.b).to(gl.uint32), _A)
        high_2, low_2 = _product(row.to(gl.uint32), _B)
        quad = (thread // 2 % 2).to(gl.uint32) ^ high_0 ^ key.k1
        c0 = high_2 ^ (thread * 0 + task.h).to(gl.uint32) ^ key.k0
        high_0, low = _product(c0, _A)
        high_2, low_2_again = _product(high_0 ^ low_0 ^ _raised(key.k1, _STEP_1, 1), _B)
        return Draw(
            quad, low_2 ^ _raised(key.k0, _STEP_0, 1), high_2 ^ _raised(key.k0, _STEP_0, 2), low_2_again,
            low ^ _raised(key.k1, _STEP_1, 2), key,
        )  # fmt: skip


@gluon.jit
def kept(draw, n0, N: gl.constexpr):
    """Which scores of keys n0 .. n0 + N are kept, as bits of words [64, 4]: a thread's keys of each row, the first the
    lowest; n0 is a multiple of N, a power of two. Nothing without a draw."""
    if len(draw) == 0:
        return ()
    else:
        thread = gl.arange(0, 128, layout=_THREADS)
        first = (thread * 0).to(gl.uint32)
        second = first
        k0 = _same(draw.key.k0)
        k1 = _same(draw.key.k1)
        at = draw.quad ^ (n0 // 4).to(gl.uint32)
        for j in gl.static_range(N // 8):
            c0, c1, c2, c3 = _words(draw, k0, k1, at ^ (2 * j))
            first = _add_bit(first, c0, draw.key.threshold, 2 * j)
            first = _add_bit(first, c1, draw.key.threshold, 2 * j + 1)
            second = _add_bit(second, c2, draw.key.threshold, 2 * j)
            second = _add_bit(second, c3, draw.key.threshold, 2 * j + 1)
        odd = thread % 2 == 1
        mine = gl.where(odd, second, first)
        other = _across(gl.where(odd, first, second), 1)
        words = gl.join(gl.where(odd, other, mine), gl.where(odd, mine, other))
        return (gl.reshape(gl.permute(gl.reshape(words, [4, 8, 4, 2]), (0, 3, 1, 2)), [64, 4]),)


@gluon.jit
def drop(p, bits):
    """The weights, 0 where dropout drops them; `bits` is what `kept` gave."""
    if len(bits) == 0:
        return p
    else:
        M: gl.constexpr = p.shape[0]
        N: gl.constexpr = p.shape[1]
        split = gl.reshape(p, [M, N // 8, 4, 2])
        L: gl.constexpr = split.type.layout
        eights = gl.arange(0, N // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L))))
        ones = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))
        place = (eights * 2)[None, :, None, None] + ones[None, None, None, :]
        words = gl.convert_layout(bits[0], gl.SliceLayout(1, gl.SliceLayout(3, L)), assert_trivial=True)
        words, _ = gl.broadcast(gl.expand_dims(gl.expand_dims(words, 1), 3), split)
        split = _select(words, gl.full([M, N // 8, 4, 2], 1, gl.uint32, L) << place.to(gl.uint32), split)
        return gl.convert_layout(gl.reshape(split, [M, N]), p.type.layout, assert_trivial=True)


@gluon.jit
def begin_keys(task, rule, WG: gl.constexpr):
    """The KeyDraw of 64 keys of a task, nothing without dropout."""
    if rule.operands.seed is None:
        return ()
    else:
        key = _key_of(rule)
        thread = gl.arange(0, 128, layout=_THREADS)
        place = thread // 4 % 8
        quad = task.n0 // 4 + WG * 16 + thread // 32 * 4 + place % 4 // 2 * 2 + place // 4
        high_0, low_0 = _product((thread * 0 + task.b).to(gl.uint32), _A)
        high, low = _product(quad.to(gl.uint32) ^ high_0 ^ key.k1, _B)
        return KeyDraw(high ^ _raised(key.k0, _STEP_0, 1), low, low_0 ^ _raised(key.k1, _STEP_1, 1), key)


@gluon.jit
def kept_keys(draw, h, m0, M: gl.constexpr):
    """Which scores of rows m0 .. m0 + M of head h are kept in a tile [64, M] of keys and rows, as bits of words
    [4, 8, 4], one for each thread. Nothing without a draw."""
    if len(draw) == 0:
        return ()
    else:
        gl.static_assert(M == 64)
        thread = gl.arange(0, 128, layout=_THREADS)
        place = thread // 4 % 4
        row = m0 + thread % 4 * 2 + place % 2
        k0 = _same(draw.key.k0)
        k1 = _same(draw.key.k1)
        head = h.to(gl.uint32) ^ k0
        bits = (thread * 0).to(gl.uint32)
        for j in gl.static_range(M // 8):
            high, low = _product((row + 8 * j).to(gl.uint32), _B)
            high, low_0 = _product(high ^ head, _A)
            words = _rounds(low ^ draw.high, draw.low, high ^ draw.segment, low_0, k0, k1, 2)
            for w in gl.static_range(4):
                bits = _add_bit(bits, words[w], draw.key.threshold, 8 * w + j)
        # A thread has a byte for each of four, and takes one from each.
        bits = _bytes(bits, _across(bits, 4), gl.where(place % 2 == 0, 0x6240, 0x3715))
        bits = _bytes(bits, _across(bits, 8), gl.where(place < 2, 0x5410, 0x3276))
        return (gl.reshape(bits, [4, 8, 4]),)


@gluon.jit
def drop_keys(x, bits):
    """A tile [64, M] of keys and rows, 0 where dropout drops; `bits` is what `kept_keys` gave."""
    if len(bits) == 0:
        return x
    else:
        M: gl.constexpr = x.shape[1]
        split = gl.reshape(x, [4, 2, 8, M // 8, 4, 2])
        L: gl.constexpr = split.type.layout
        half = gl.arange(0, 2, layout=_only(1, L))[None, :, None, None, None, None]
        eight = gl.arange(0, M // 8, layout=_only(3, L))[None, None, None, :, None, None]
        one = gl.arange(0, 2, layout=_only(5, L))[None, None, None, None, None, :]
        place = (half * 16 + one * 8 + eight).to(gl.uint32)
        words = gl.convert_layout(
            bits[0], gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(5, L))), assert_trivial=True
        )
        words, _ = gl.broadcast(gl.expand_dims(gl.expand_dims(gl.expand_dims(words, 1), 3), 5), split)
        split = _select(words, gl.full([4, 2, 8, M // 8, 4, 2], 1, gl.uint32, L) << place, split)
        return gl.convert_layout(gl.reshape(split, [64, M]), x.type.layout, assert_trivial=True)


@gluon.constexpr_function
def _only(dim, layout):
    """The layout of a vector along one dimension of six."""
    for other in (5, 4, 3, 2, 1, 0):
        if other != dim:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def _words(draw, k0, k1, quad):
    """Philox-4x32-10 from its second round on; `quad` is the first round's word that depends on the columns."""
    high, low = _product(quad, _B)
    high, low_0 = _product(high ^ draw.second, _A)
    return _rounds(low ^ draw.third_0, draw.third_1, high ^ draw.third_2, low_0, k0, k1, 3)


@gluon.jit
def _rounds(c0, c1, c2, c3, k0, k1, FIRST: gl.constexpr):
    """Philox's rounds from the FIRST-th on."""
    for i in gl.static_range(FIRST, 10):
        high_0, low_0 = _product(c0, _A)
        high_2, low_2 = _product(c2, _B)
        c0 = high_2 ^ c1 ^ _raised(k0, _STEP_0, i)
        c2 = high_0 ^ c3 ^ _raised(k1, _STEP_1, i)
        c1 = low_2
        c3 = low_0
    return c0, c1, c2, c3


@gluon.jit
def _raised(k, STEP: gl.constexpr, ROUND: gl.constexpr):
    """A word of the key in a round."""
    return k + (STEP * ROUND & 0xFFFFFFFF)


@gluon.jit
def _product(x, FACTOR: gl.constexpr):
    """High and low word of x times FACTOR."""
    wide = x.to(gl.uint64) * FACTOR
    return (wide >> 32).to(gl.uint32), wide.to(gl.uint32)


@gluon.jit
def _add_bit(bits, word, threshold, PLACE: gl.constexpr):
    """The bits, with that at PLACE set if the word is at least the threshold."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ge.u32 p, $2, $3; mov.b32 $0, $1; @p or.b32 $0, $0, $4; }", "=r,r,r,r,r",
        [bits, word, threshold, gl.to_tensor(1 << PLACE).to(gl.uint32)], dtype=gl.uint32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _select(bits, which, x):
    """x where one of the bits is `which`, else 0. The compiler would turn what it can read into 16-bit selections."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; and.b32 t, $1, $2; setp.ne.u32 p, t, 0; selp.f32 $0, $3, 0f00000000, p; }",
        "=f,r,r,f", [bits, which, x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _shuffle_asm(distance):
    return f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;"


@gluon.jit
def _across(x, DISTANCE: gl.constexpr):
    """What the thread holds whose number in the warp differs in one bit."""
    ASM: gl.constexpr = _shuffle_asm(DISTANCE)
    return gl.inline_asm_elementwise(ASM, "=r,r", [x], dtype=gl.uint32, is_pure=False, pack=1)


@gluon.jit
def _bytes(x, y, which):
    """Four bytes of two words."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [x, y, which.to(gl.uint32)], dtype=gl.uint32, is_pure=True, pack=1
    )


@gluon.jit
def _same(x):
    """A number that all threads of a warp hold, in a uniform register: what is computed of it takes no others."""
    return gl.inline_asm_elementwise(
        "redux.sync.or.b32 $0, $1, -1;", "=r,r", [x], dtype=gl.uint32, is_pure=False, pack=1
    )  # fmt: skip
