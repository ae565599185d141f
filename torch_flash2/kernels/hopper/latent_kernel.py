"""Decoding with latent keys (absorbed MLA) on sm90a, in Gluon: the value is the first 512 columns of the key.

B segments, H query heads, G key heads, M query rows, N keys, D head dim of query and key, Dv = 512 of value.
A program has 64 of the H / G * M packed query rows (as in the portable decode kernel) and a split of a segment's keys.
One warp loads tiles of 64 keys by TMA, once for both products, in chunks of 64 columns. One warpgroup multiplies
queries and keys and does the softmax; it multiplies P, from registers, with the value's columns 0 .. 256, the other one
P from shared memory with columns 256 .. 512 (as FlashMLA and FlashAttention-3 divide them). P V of a tile is issued
before Q K^T of the next one, so that the next tile but one can be loaded meanwhile: with room for two, loads are what
the products wait for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..device import bands, scores, tiles
from ..triton import splitting
from . import compat
from .lanes import rescale
from .pipeline import barriers, landed, matrix, operand, zeros

# Query rows and keys of a tile; columns of a chunk; chunks of the value, and how many of them a warpgroup has.
ROWS = gl.constexpr(64)
KEYS = gl.constexpr(64)
WIDTH = gl.constexpr(64)
VALUE = gl.constexpr(8)
HALF = gl.constexpr(4)
# Tiles of keys that shared memory holds beside the queries.
STAGES = gl.constexpr(2)
# The parts of a tile of keys that are loaded and given back each on its own, in the order in which they come free:
# columns beside the value, the second warpgroup's half of the value, the first one's.
PARTS = gl.constexpr(3)


class Shape(NamedTuple):
    """Compile-time numbers: chunks of D; the page size, 0 where keys are not paged, and how many keys a TMA load has;
    whether the bands bound keys on the left, alignment; how many tiles of columns a warpgroup's part of the value has,
    and their width."""

    CHUNKS: int
    PAGE: int
    BOX: int
    LEFT: bool
    BOTTOM_RIGHT: bool
    CHUNKS_V: int = 2 if compat.WIDENING else 4
    WIDTH_V: int = 128 if compat.WIDENING else 64


class Rule(NamedTuple):
    """What all programs share: the query and out as Strided, lse, splits, sizes, bands' numbers, scoring, sinks."""

    q: Any
    out: Any
    lse: Any
    splits: Any
    sizes: Any
    rules: Any
    scoring: Any
    sinks: Any


class Part(NamedTuple):
    """What one program has: segment, key head, the first of its packed rows and how many the head has; which split,
    from which key on, and how many tiles; the segment's used rows and keys; keys in [full_start, full_stop) are seen by
    all rows."""

    b: Any
    hk: Any
    first: Any
    rows: Any
    split: Any
    start: Any
    count: Any
    used_q: Any
    used_k: Any
    full_start: Any
    full_stop: Any


class Buffers(NamedTuple):
    """Shared memory: queries [chunks, 64, 64], keys [stages * chunks, 64, 64], P [64, 64], what the rows' sums are
    multiplied with [64], and barriers: `filled` and `free` [stages * PARTS] of the keys."""

    q: Any
    k: Any
    p: Any
    factor: Any
    q_filled: Any
    filled: Any
    free: Any
    p_filled: Any
    p_free: Any


@gluon.constexpr_function
def _first(part):
    """The first chunk of a part."""
    return (VALUE.value, HALF.value, 0)[part]


@gluon.constexpr_function
def _chunks(part, chunks):
    """How many chunks a part has."""
    return chunks - VALUE.value if part == 0 else HALF.value


@gluon.jit
def _finite_base(row_max):
    """What is subtracted from a row: its maximum, 0 where it has seen no key yet."""
    return gl.where(row_max == -float("inf"), 0.0, row_max)


@gluon.jit
def _partial_sums(p):
    """Row sums [64, 4, 2] of p, what each thread holds of them: lanes meet once, at the end."""
    M: gl.constexpr = p.shape[0]
    N: gl.constexpr = p.shape[1]
    return gl.sum(gl.reshape(p, [M, N // 8, 4, 2]), 1)


@gluon.jit
def _times_rows(sums, factor):
    """Partial sums [64, 4, 2] times the rows' factors."""
    L: gl.constexpr = sums.type.layout
    rows = gl.convert_layout(factor, gl.SliceLayout(1, gl.SliceLayout(2, L)))
    return sums * gl.expand_dims(gl.expand_dims(rows, 1), 2)


@gluon.jit
def _scale_all(acc, factor, SHAPE: gl.constexpr):
    """Accumulators times the rows' factors [64]."""
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SHAPE.WIDTH_V, 16])
    rows = gl.convert_layout(factor, gl.SliceLayout(1, ACC))[:, None]
    scaled = ()
    for c in gl.static_range(CHUNKS_V):
        scaled = scaled + (rescale(acc[c], rows)[0],)
    return scaled


@gluon.jit
def _packed(part, sizes, L: gl.constexpr):
    """Row, head and whether it exists of each of the program's packed rows [64]; rows past the end repeat the last."""
    r = part.first + gl.arange(0, ROWS, layout=L)
    stored = r < part.rows
    r = gl.minimum(r, part.rows - 1)
    return r // sizes.group, part.hk * sizes.group + r % sizes.group, stored


@gluon.jit
def _bounds(m, used_q, used_k, numbers, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """The keys [lo, hi) that rows m see."""
    BANDS: gl.constexpr = STEPS.KEYS
    shift = used_k - used_q if SHAPE.BOTTOM_RIGHT else used_k * 0
    lo, hi = bands.intersect(gl.minimum(m, used_q - 1), used_k, used_q, used_k, shift, numbers, BANDS)
    return lo, gl.where(m < used_q, hi, lo)


@gluon.jit
def _all_tiles(used, B, limit):
    """As splitting.all_tiles."""
    lanes = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    total = lanes * 0
    for b0 in range(0, B, 128):
        length = gl.load(used + b0 + lanes, mask=b0 + lanes < B, other=0)
        total += gl.cdiv(gl.minimum(gl.maximum(length, 0), limit), KEYS)
    return gl.sum(total, 0)


@gluon.jit
def _find_part(spans, rule, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """This program's Part. Splits come last: those that a short segment leaves empty run when nothing else is left."""
    sizes = rule.sizes
    rows = sizes.M * sizes.group
    per_head = gl.cdiv(rows, ROWS)
    index = gl.program_id(0) % per_head
    rest = gl.program_id(0) // per_head
    hk = rest % (sizes.H // sizes.group)
    rest = rest // (sizes.H // sizes.group)
    b = rest % sizes.B
    split = rest // sizes.B
    _, _, _, used_q = tiles.extent(b, None, spans.used_q, sizes.B, sizes.M)
    _, _, _, used_k = tiles.extent(b, None, spans.used_k, sizes.B, sizes.N)
    zero = b * 0
    part = Part(b, hk, index * ROWS, rows, split, zero, zero, used_q, used_k, zero, zero)
    m, _, _ = _packed(part, sizes, gl.BlockedLayout([1], [32], [4], [0]))
    lo, hi = _bounds(m, used_q, used_k, rule.rules.numbers, SHAPE, STEPS)
    span = bands.tile_span(lo, hi, used_k, KEYS, False)
    total = zero
    if rule.splits.wanted is not None:
        total = _all_tiles(spans.used_k, sizes.B, splitting.most_counted(rule.splits, sizes))
    start, stop = splitting.part_of(span, split, rule.splits, total, KEYS)
    count = gl.cdiv(gl.maximum(stop - start, 0), KEYS)
    return Part(b, hk, index * ROWS, rows, split, start, count, used_q, used_k, span.full_start, span.full_stop)


# The warp that loads keys.


@gluon.jit
def _page(paging, b, n, used_k, SHAPE: gl.constexpr):
    """The page of key n of a segment; a bad number counts as the nearest, as in the portable kernels."""
    at = paging.table + gl.cast(b, gl.int64) * tiles.decoded(paging.row) + n // SHAPE.PAGE
    page = gl.load(at, mask=n < used_k, other=0)
    return gl.minimum(gl.maximum(page, 0), tiles.decoded(paging.pages) - 1)


@gluon.jit
def _pages(paging, part, n0, SHAPE: gl.constexpr):
    """The pages of the tile of keys at n0, one for each of its boxes; the segment where keys are not paged."""
    BOXES: gl.constexpr = KEYS // SHAPE.BOX
    found = ()
    for i in gl.static_range(BOXES):
        if SHAPE.PAGE > 0:
            found = found + (_page(paging, part.b, n0 + i * SHAPE.BOX, part.used_k, SHAPE),)
        else:
            found = found + (part.b,)
    return found


@gluon.jit
def _load_piece(k, pages, n0, j, buffers, part, PIECE: gl.constexpr, SHAPE: gl.constexpr):
    """Load a part of the j-th tile of keys, which starts at n0, once its buffer is free."""
    BOX: gl.constexpr = SHAPE.BOX
    BOXES: gl.constexpr = KEYS // BOX
    COUNT: gl.constexpr = _chunks(PIECE, SHAPE.CHUNKS)
    FIRST: gl.constexpr = _first(PIECE)
    if COUNT > 0:
        stage = j % STAGES
        filled = buffers.filled.index(stage * PARTS + PIECE)
        mbarrier.wait(buffers.free.index(stage * PARTS + PIECE), ((j // STAGES) & 1) ^ 1)
        mbarrier.expect(filled, KEYS * WIDTH * 2 * COUNT)
        for c in gl.static_range(COUNT):
            tile = buffers.k.index(stage * SHAPE.CHUNKS + FIRST + c)
            boxes = compat.view(tile, [BOXES, 1, 1, BOX, WIDTH], matrix(WIDTH, 4))
            for i in gl.static_range(BOXES):
                row = n0 + i * BOX
                if SHAPE.PAGE > 0:
                    row = row % SHAPE.PAGE
                compat.load(k, [pages[i], part.hk, row, (FIRST + c) * WIDTH], filled, boxes.index(i))


@gluon.jit
def _load_keys(k, paging, buffers, part, SHAPE: gl.constexpr):
    """Load the program's tiles of keys, part by part as buffers come free."""
    # Page numbers are loaded a tile ahead, so that the loads of keys need not wait for them.
    pages = _pages(paging, part, part.start, SHAPE)
    for j in range(part.count):
        n0 = part.start + j * KEYS
        following = _pages(paging, part, n0 + KEYS, SHAPE)
        for piece in gl.static_range(PARTS):
            _load_piece(k, pages, n0, j, buffers, part, piece, SHAPE)
        pages = following


# The warpgroups.


@gluon.jit
def _load_queries(rule, buffers, part, SHAPE: gl.constexpr):
    """The program's query rows into shared memory, by pointer: packed rows are not evenly spaced."""
    CHUNKS: gl.constexpr = SHAPE.CHUNKS
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    m, h, stored = _packed(part, rule.sizes, gl.SliceLayout(1, L))
    q = rule.q
    at = gl.cast(part.b, gl.int64) * q.batch + h.to(gl.int64) * q.head + m.to(gl.int64) * q.row
    for c in gl.static_range(CHUNKS):
        column = c * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, L))
        inside = stored[:, None] & (column < q.cols)[None, :]
        tile = gl.load(q.ptr + (at[:, None] + (column * q.col)[None, :]), mask=inside, other=0.0)
        buffers.q.index(c).store(tile)
    fence_async_shared()
    mbarrier.arrive(buffers.q_filled.index(0))


@gluon.jit
def _query_key_piece(s, buffers, j, PIECE: gl.constexpr, SHAPE: gl.constexpr):
    """Issue what a part of the j-th tile of keys adds to S."""
    COUNT: gl.constexpr = _chunks(PIECE, SHAPE.CHUNKS)
    FIRST: gl.constexpr = _first(PIECE)
    START: gl.constexpr = 0 if SHAPE.CHUNKS > VALUE else 1
    stage = j % STAGES
    if COUNT > 0:
        mbarrier.wait(buffers.filled.index(stage * PARTS + PIECE), (j // STAGES) & 1)
    for c in gl.static_range(COUNT):
        k = buffers.k.index(stage * SHAPE.CHUNKS + FIRST + c).permute((1, 0))
        s = warpgroup_mma(buffers.q.index(FIRST + c), k, s, use_acc=PIECE > START or c > 0, is_async=True)
    return s


@gluon.jit
def _query_key(buffers, j, SHAPE: gl.constexpr):
    """Issue S = Q K^T [64, 64] of the j-th tile, chunk by chunk as they land."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    s = gl.zeros([ROWS, KEYS], gl.float32, L)
    for piece in gl.static_range(PARTS):
        s = _query_key_piece(s, buffers, j, piece, SHAPE)
    return s


@gluon.jit
def _weight_value(p, buffers, j, acc, WG: gl.constexpr, SHAPE: gl.constexpr):
    """Issue O += P V of the j-th tile for a warpgroup's columns; CHUNKS_V products in flight."""
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    WIDE: gl.constexpr = SHAPE.WIDTH_V
    STEP: gl.constexpr = WIDE // WIDTH
    first = (j % STAGES) * SHAPE.CHUNKS + WG * HALF
    result = ()
    for c in gl.static_range(CHUNKS_V):
        v = compat.view(buffers.k.index(first + c * STEP), [KEYS, WIDE], matrix(WIDE, 2))
        result = result + (warpgroup_mma(p, v, acc[c], is_async=True),)
    return result


@gluon.jit
def _hide(s, lo, hi, n0, j, buffers, SHAPE: gl.constexpr):
    """Scores of a tile that not all rows see, -inf where a row does not see the key.

    A masked score has weight 0, and 0 * NaN is NaN: values of keys that some row does not see are made finite here. A
    row that does see such a key has NaN already, from its score. (Or, of an infinite element, the score -inf: then its
    weight is 0, and the row does not become NaN here as it would in plain PyTorch.)
    """
    L: gl.constexpr = s.type.layout
    TALL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    n = n0 + gl.arange(0, KEYS, layout=gl.SliceLayout(0, L))
    visible = n[None, :] < hi[:, None]
    if SHAPE.LEFT:
        visible = visible & (n[None, :] >= lo[:, None])
    at = n0 + gl.arange(0, KEYS, layout=gl.SliceLayout(1, TALL))
    hidden = (at < gl.max(lo, 0)) | (at >= gl.min(hi, 0))
    stage = j % STAGES
    for c in range(VALUE):
        tile = buffers.k.index(stage * SHAPE.CHUNKS + c)
        value = tile.load(TALL)
        bad = hidden[:, None] & ~(gl.abs(value.to(gl.float32)) < float("inf"))
        if gl.max(gl.max(bad.to(gl.int32), 1), 0) > 0:
            tile.store(gl.where(bad, 0.0, value.to(gl.float32)).to(value.dtype))
    return gl.where(visible, s, -float("inf"))


@gluon.jit
def _hand_over(p16, factor, buffers, j):
    """Give P and the factor of the j-th tile to the other warpgroup, once it is done with the last ones."""
    mbarrier.wait(buffers.p_free.index(0), (j & 1) ^ 1)
    buffers.p.store(p16)
    buffers.factor.store(factor)
    fence_async_shared()
    mbarrier.arrive(buffers.p_filled.index(0))


@gluon.jit
def _score(rule, buffers, part, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """The first warpgroup: scores, softmax, and the first half of the value's columns."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    DTYPE: gl.constexpr = buffers.k.dtype
    L: gl.constexpr = gl.SliceLayout(1, S)
    scale2 = rule.scoring.scale * scores.LOG2E
    m, _, _ = _packed(part, rule.sizes, L)
    lo, hi = _bounds(m, part.used_q, part.used_k, rule.rules.numbers, SHAPE, STEPS)
    mbarrier.wait(buffers.q_filled.index(0), 0)
    s = warpgroup_mma_wait(0, (_query_key(buffers, 0, SHAPE),))
    if SHAPE.CHUNKS > VALUE:
        mbarrier.arrive(buffers.free.index(0))
    if (part.start < part.full_start) | (part.start >= part.full_stop):
        s = _hide(s, lo, hi, part.start, 0, buffers, SHAPE)
    row_max = gl.max(s, 1) * scale2
    p = gl.exp2(s * scale2 - _finite_base(row_max)[:, None])
    sums = _partial_sums(p)
    p16 = p.to(DTYPE)
    decay = gl.full([ROWS], 1.0, gl.float32, L)
    _hand_over(p16, decay, buffers, 0)
    acc = zeros(SHAPE.WIDTH_V, SHAPE.CHUNKS_V)
    for j in range(1, part.count):
        # P V of the last tile goes first: its buffer is free while Q K^T of this one runs.
        acc = _scale_all(acc, decay, SHAPE)
        acc = _weight_value(operand(p16, SHAPE.WIDTH_V, DTYPE), buffers, j - 1, acc, 0, SHAPE)
        s = _query_key(buffers, j, SHAPE)
        acc = warpgroup_mma_wait(SHAPE.CHUNKS, acc)
        mbarrier.arrive(buffers.free.index(((j - 1) % STAGES) * PARTS + 2))
        s = warpgroup_mma_wait(0, (s,))
        if SHAPE.CHUNKS > VALUE:
            mbarrier.arrive(buffers.free.index((j % STAGES) * PARTS))
        n0 = part.start + j * KEYS
        if (n0 < part.full_start) | (n0 >= part.full_stop):
            s = _hide(s, lo, hi, n0, j, buffers, SHAPE)
        # The maximum moves only when it grew by more than 2**8.
        new_max = gl.maximum(row_max, gl.max(s, 1) * scale2)
        new_max = gl.where(new_max - row_max > 8.0, new_max, row_max)
        base = _finite_base(new_max)
        decay = gl.exp2(row_max - base)
        p = gl.exp2(s * scale2 - base[:, None])
        sums = _times_rows(sums, decay) + _partial_sums(p)
        row_max = new_max
        p16 = p.to(DTYPE)
        _hand_over(p16, decay, buffers, j)
    acc = _scale_all(acc, decay, SHAPE)
    acc = _weight_value(operand(p16, SHAPE.WIDTH_V, DTYPE), buffers, part.count - 1, acc, 0, SHAPE)
    acc = landed(acc, 0)

    row_sum = gl.convert_layout(gl.sum(gl.sum(sums, 2), 1), L)
    weight, lse2 = _weights(row_max, row_sum, rule, part)
    mbarrier.wait(buffers.p_free.index(0), (part.count & 1) ^ 1)
    buffers.factor.store(weight)
    mbarrier.arrive(buffers.p_filled.index(0))
    _store_lse(lse2, rule, part)
    _store(acc, weight, rule, part, 0, SHAPE)


@gluon.jit
def _weigh(rule, buffers, part, SHAPE: gl.constexpr):
    """The second warpgroup: queries into shared memory, then the second half of the value's columns."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SHAPE.WIDTH_V, 16])
    L: gl.constexpr = gl.SliceLayout(1, ACC)
    _load_queries(rule, buffers, part, SHAPE)
    acc = zeros(SHAPE.WIDTH_V, SHAPE.CHUNKS_V)
    for j in range(part.count):
        stage = j % STAGES
        mbarrier.wait(buffers.p_filled.index(0), j & 1)
        acc = _scale_all(acc, buffers.factor.load(L), SHAPE)
        mbarrier.wait(buffers.filled.index(stage * PARTS + 1), (j // STAGES) & 1)
        acc = landed(_weight_value(buffers.p, buffers, j, acc, 1, SHAPE), 0)
        mbarrier.arrive(buffers.p_free.index(0))
        mbarrier.arrive(buffers.free.index(stage * PARTS + 1))
    mbarrier.wait(buffers.p_filled.index(0), part.count & 1)
    _store(acc, buffers.factor.load(L), rule, part, 1, SHAPE)


@gluon.jit
def _weights(row_max, row_sum, rule, part):
    """What the sums are multiplied with in the end, 0 in rows that see no key, and lse in log2 units."""
    L: gl.constexpr = row_max.type.layout
    m, h, stored = _packed(part, rule.sizes, L)
    none = row_sum == 0.0
    decay = gl.full([ROWS], 1.0, gl.float32, L)
    if rule.splits.out is None:
        if rule.sinks is not None:
            sink = gl.load(rule.sinks + h).to(gl.float32) * scores.LOG2E
            new_max = gl.maximum(row_max, sink)
            decay = gl.exp2(row_max - new_max)
            row_sum = row_sum * decay + gl.exp2(sink - new_max)
            row_max = new_max
    total = gl.where(none, 1.0, row_sum)
    lse2 = gl.where(none, -float("inf"), row_max + gl.log2(total))
    return gl.where(none, 0.0, decay / total), lse2


@gluon.jit
def _store_lse(lse2, rule, part):
    """lse of the program's rows, or its split's in log2 units."""
    L: gl.constexpr = lse2.type.layout
    m, h, stored = _packed(part, rule.sizes, L)
    row = (gl.cast(part.b, gl.int64) * rule.sizes.H + h) * rule.sizes.M + m
    if rule.splits.out is None:
        gl.store(rule.lse + row, lse2 * scores.LN2, mask=stored)
    else:
        gl.store(rule.splits.lse2 + (row * tiles.decoded(rule.splits.count) + part.split), lse2, mask=stored)


@gluon.jit
def _store(acc, weight, rule, part, WG: gl.constexpr, SHAPE: gl.constexpr):
    """A warpgroup's columns of the program's rows, to out or to its split's part of it."""
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    WIDE: gl.constexpr = SHAPE.WIDTH_V
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])
    L: gl.constexpr = gl.SliceLayout(1, ACC)
    m, h, stored = _packed(part, rule.sizes, L)
    weight = gl.convert_layout(weight, L)
    if rule.splits.out is None:
        out = rule.out
        at = out.ptr + (gl.cast(part.b, gl.int64) * out.batch + h.to(gl.int64) * out.head + m.to(gl.int64) * out.row)
        col = out.col
        written = stored
    else:
        row = (gl.cast(part.b, gl.int64) * rule.sizes.H + h) * rule.sizes.M + m
        at = rule.splits.out + (row * tiles.decoded(rule.splits.count) + part.split) * rule.out.cols
        col = 1
        written = stored & (weight != 0.0)
    for c in gl.static_range(CHUNKS_V):
        column = WG * HALF * WIDTH + c * WIDE + gl.arange(0, WIDE, layout=gl.SliceLayout(0, ACC))
        tile = gl.where(weight[:, None] == 0.0, 0.0, acc[c] * weight[:, None])
        gl.store(at[:, None] + (column * col)[None, :], tile.to(at.dtype.element_ty), mask=written[:, None])


@gluon.jit
def _store_nothing(rule, part, SHAPE: gl.constexpr):
    """A program without keys: lse -inf, and out 0 where no other split writes it."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SHAPE.WIDTH_V, 16])
    zero = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, ACC))
    _store_lse(zero - float("inf"), rule, part)
    if rule.splits.out is None:
        _store(zeros(SHAPE.WIDTH_V, SHAPE.CHUNKS_V), zero, rule, part, 0, SHAPE)
        _store(zeros(SHAPE.WIDTH_V, SHAPE.CHUNKS_V), zero, rule, part, 1, SHAPE)


@gluon.jit
def attention_latent(
    q, k, out, lse, splits, spans, coded_sizes, rules, scoring, sinks, SHAPE: gl.constexpr, STEPS: gl.constexpr
):
    """One split of a tile of packed rows: out and lse, or the split's part of them where there are several."""
    CHUNKS: gl.constexpr = SHAPE.CHUNKS
    DTYPE: gl.constexpr = k.dtype
    rule = Rule(q, out, lse, splits, tiles.sizes_of(coded_sizes), rules, scoring, sinks)
    part = _find_part(spans, rule, SHAPE, STEPS)
    if part.count > 0:
        buffers = Buffers(
            gl.allocate_shared_memory(DTYPE, [CHUNKS, ROWS, WIDTH], matrix(WIDTH, 2)),
            gl.allocate_shared_memory(DTYPE, [STAGES * CHUNKS, KEYS, WIDTH], matrix(WIDTH, 2)),
            gl.allocate_shared_memory(DTYPE, [ROWS, KEYS], matrix(KEYS, 2)),
            gl.allocate_shared_memory(gl.float32, [ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0])),
            barriers(1, 1),
            barriers(STAGES * PARTS, 1),
            barriers(STAGES * PARTS, 1),
            barriers(1, 1),
            barriers(1, 1),
        )
        fence_async_shared()
        gl.warp_specialize(
            [
                (_score, (rule, buffers, part, SHAPE, STEPS)),
                (_weigh, (rule, buffers, part, SHAPE)),
                (_load_keys, (k, spans.paging, buffers, part, SHAPE)),
            ],
            [4, 1],
            [208, 56],
        )
    else:
        _store_nothing(rule, part, SHAPE)
