"""What the Hopper backward's kernels share: their compile-time numbers, where a program works, products of tiles.

B segments, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
)

from ..bundles import Rows
from ..device import bands, scores, tiles
from . import compat
from .pipeline import FIELDS, Ring, barriers, field, matrix, placed, put_field, ring_barriers

# The most keys that a tile of them has.
MOST_KEYS = gl.constexpr(128)


class BackwardShape(NamedTuple):
    """Compile-time numbers: consumer warpgroups, positions of a streamed tile, buffers of what streams (`STAGES` of
    queries or keys, `STAGES_V` of output gradients or values); the columns of a tile and how many tiles side by side
    make D and Dv; whether bands bound keys on the left, alignment; whether query heads share a key head; whether two
    warpgroups share 64 keys; whether S of the next tile is issued before dS of this one; whether dQ's products have a
    warpgroup of their own; how many times 64 columns of keys and of values (for dQ of output gradients) stay in
    registers too, as left operands; of how many tasks keys and values are on the chip; whether a warp of its own has
    TMA add to dQ's sums, from shared memory."""

    GROUPS: int
    BLOCK: int
    STAGES: int
    STAGES_V: int
    WIDTH_D: int
    CHUNKS_D: int
    WIDTH_V: int
    CHUNKS_V: int
    LEFT: bool
    BOTTOM_RIGHT: bool
    GROUPED: bool
    SHARED: bool
    AHEAD: bool
    APART: bool
    KEPT: int
    KEPT_V: int
    TASKS: int
    CARRIED: bool


class BackwardInputs(NamedTuple):
    """TMA descriptors: query, key, value, output gradient; one-dimensional, RowStats' lse2 and behind it delta."""

    q: Any
    k: Any
    v: Any
    do: Any
    stats: Any


class KeyOutputs(NamedTuple):
    """dK and dV as Strided, RowStats, and where dQ is summed, or None: fp32 tiles of 64 rows of each head, as
    backward_sums.py says; a 0 from which on tasks are claimed, or None where each program has one; and where tiles
    of keys are added to a tile of sums in one order a 0 for each tile of sums, or None. `order` is that of
    calls.key_order, and how many tiles there are, all coded."""

    k: Any
    v: Any
    stats: Any
    sums: Any
    counter: Any
    added: Any
    order: Any


class QueryOutputs(NamedTuple):
    """dQ as Strided, RowStats, and where tiles are marked that `repair_queries` computes again, or None."""

    q: Any
    stats: Any
    flags: Any


class Fixed(NamedTuple):
    """Tiles of keys in shared memory: keys and values as Landing, and the tasks as KeyTasks."""

    k: Any
    v: Any
    tasks: Any


class KeyTasks(NamedTuple):
    """A ring of tasks that the producer hands on: their numbers, where the rows that see each key start and stop, or
    None for stops if that is the last row, and barriers. A task is given back when its gradients have left, and with it
    the buffers of its keys and values."""

    data: Any
    starts: Any
    stops: Any
    filled: Any
    free: Any


class Landing(NamedTuple):
    """Buffers with a barrier for "filled" each, and none for "free": they are filled once, or freed with the tiles of a
    ring."""

    data: Any
    filled: Any


class Streams(NamedTuple):
    """What passes a tile of keys: rings of queries and output gradients, and lse2 and delta beside them as Landing;
    tiles in which warpgroups hand each other dS^T, as a ring where a warpgroup of its own takes them, or None; and
    where dQ's products leave through shared memory, as backward_sums.Leaving, or None.

    lse2 and delta come by TMA with the tiles. Of packed rows they do not: a vector starts anywhere there, and TMA wants
    its start at 16 bytes (an illegal instruction otherwise, H200, 2026-11-21). Then the producer copies them, and they
    have barriers of their own.
    """

    q: Any
    do: Any
    lse2: Any
    delta: Any
    exchange: Any
    leaving: Any


class QueryTiles(NamedTuple):
    """The dQ kernel's tiles: queries and output gradients, which stay, as Landing; rings of keys and values, which
    pass."""

    q: Any
    do: Any
    k: Any
    v: Any


class Gradient(NamedTuple):
    """Where a gradient goes: by TMA, and the tensor behind it as Strided."""

    tma: Any
    plain: Any


class BackwardRule(NamedTuple):
    """What all tiles share: lengths, sizes, bands' numbers, scoring, operands; RowStats' pitch; where the dQ kernel
    marks tiles that `repair_queries` computes again, or where the dK kernel sums dQ; None in either where it does
    not; and what keeps additions in order, as backward_order.Additions, or None."""

    spans: Any
    sizes: Any
    rules: Any
    scoring: Any
    operands: Any
    pitch: Any
    aside: Any
    additions: Any


class KeyPlace(NamedTuple):
    """A tile of keys: its first key, key head, segment; and where the segment lies."""

    n0: Any
    h: Any
    b: Any
    batch: Any
    start: Any
    stored: Any
    used: Any


class KeyTask(NamedTuple):
    """A tile of keys: its first key, key head, segment; where the segment lies; where row 0 stands; and the tiles of
    query rows that it visits, `count` from `start` on for each query head, those in [full_start, full_stop) without a
    mask."""

    n0: Any
    h: Any
    b: Any
    batch_q: Any
    start_q: Any
    used_q: Any
    batch_k: Any
    start_k: Any
    stored: Any
    used_k: Any
    shift: Any
    start: Any
    count: Any
    full_start: Any
    full_stop: Any


@gluon.jit
def key_place(index, order, spans, sizes, BLOCK_N: gl.constexpr, BACKWARDS: gl.constexpr):
    """Of the index-th tile of BLOCK_N keys: its first key, key head, segment; and where the segment lies. Heads begin
    with their first tile, the longest under a causal mask, or if BACKWARDS with their last one."""
    heads = sizes.H // sizes.group
    per_head = tiles.tile_count(spans.cu_k, sizes.B, sizes.N, BLOCK_N)
    all_heads = heads
    if spans.cu_k is None:
        all_heads = heads * sizes.B
    head, tile = placed(index, per_head, all_heads, order)
    if BACKWARDS:
        tile = per_head - 1 - tile
    h = head % heads
    if spans.cu_k is None:
        b = head // heads
    else:
        b = tiles.find_segment(spans.cu_k, sizes.B, tile, BLOCK_N)
        tile -= gl.load(spans.cu_k + b) // BLOCK_N + b
    batch, start, stored, used = tiles.extent(b, spans.cu_k, spans.used_k, sizes.B, sizes.N)
    return KeyPlace(tile * BLOCK_N, h, b, batch, start, stored, used)


@gluon.jit
def key_task(place, spans, sizes, rules, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, BOTTOM_RIGHT: gl.constexpr,
             SUMS: gl.constexpr, STEPS: gl.constexpr):  # fmt: skip
    """What the tile of keys at a place visits (one warp), and where the rows that see each key start and stop,
    MOST_KEYS numbers each; a key that no row sees starts past all of them. SUMS: dQ is summed over these keys."""
    QUERIES: gl.constexpr = STEPS.QUERIES
    n0, h, b, batch_k, start_k, stored, used_k = place
    batch_q, start_q, _, used_q = tiles.extent(b, spans.cu_q, spans.used_q, sizes.B, sizes.M)
    # Keys past the tile repeat its last one.
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    n = n0 + gl.minimum(gl.arange(0, MOST_KEYS, layout=L), BLOCK_N - 1)
    shift = used_k - used_q if BOTTOM_RIGHT else used_k * 0
    lo, hi = bands.intersect(gl.minimum(n, used_k - 1), used_q, used_q, used_k, shift, rules.numbers, QUERIES)
    hi = gl.where(n0 < used_k, hi, lo)
    span = bands.tile_span(lo, hi, used_q, BLOCK_M, False)
    count = gl.cdiv(gl.maximum(span.stop - span.start, 0), BLOCK_M)
    full_start = span.full_start
    if SUMS:
        # Sums over keys: those past the end must not count.
        full_start = gl.where(n0 + BLOCK_N > used_k, 0x7FFFFFFF, full_start)
    task = KeyTask(
        n0, h, b, batch_q, start_q, used_q, batch_k, start_k, stored, used_k, shift, span.start, count,
        full_start, span.full_stop,
    )  # fmt: skip
    return task, gl.where((n < used_k) & (lo < hi), lo, 0x7FFFFFFF), hi


@gluon.jit
def integers(COUNT: gl.constexpr, LENGTH: gl.constexpr):
    """COUNT vectors of LENGTH int32 in shared memory."""
    return gl.allocate_shared_memory(gl.int32, [COUNT, LENGTH], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def put_key_task(ring, slot, task, starts, stops):
    """Hand on a task (one warp), whose place in the ring is free."""
    for i in gl.static_range(FIELDS):
        put_field(ring, slot * 16 + i, task[i])
    ring.starts.index(slot).store(starts)
    if ring.stops is not None:
        ring.stops.index(slot).store(stops)
    mbarrier.arrive(ring.filled.index(slot))


@gluon.jit
def end_key_tasks(ring, slot):
    """Say that no task is left: one of count -1."""
    put_field(ring, slot * 16 + 12, -1)
    mbarrier.arrive(ring.filled.index(slot))


@gluon.jit
def free_key_task(ring, turn, at, group, COUNT: gl.constexpr, WARPS: gl.constexpr):
    """Give back the task of the turn-th fill: whether to wait for another one, > 0, and the number of
    fills of the rings of rows so far, which was `at` before the task."""
    count = field(ring, turn % COUNT * 16 + 12, WARPS)
    mbarrier.arrive(ring.free.index(turn % COUNT))
    return count + 1, at + count * group


@gluon.jit
def get_key_task(ring, turn, COUNT: gl.constexpr, WARPS: gl.constexpr):
    """The task of the turn-th fill."""
    filled(ring, turn, COUNT)
    return read_key_task(ring, turn % COUNT, WARPS)


@gluon.jit
def read_key_task(ring, slot, WARPS: gl.constexpr):
    """The task in a slot once more: its numbers need not stay in registers."""
    at = slot * 16
    return KeyTask(
        field(ring, at, WARPS),
        field(ring, at + 1, WARPS),
        field(ring, at + 2, WARPS),
        field(ring, at + 3, WARPS),
        field(ring, at + 4, WARPS),
        field(ring, at + 5, WARPS),
        field(ring, at + 6, WARPS),
        field(ring, at + 7, WARPS),
        field(ring, at + 8, WARPS),
        field(ring, at + 9, WARPS),
        field(ring, at + 10, WARPS),
        field(ring, at + 11, WARPS),
        field(ring, at + 12, WARPS),
        field(ring, at + 13, WARPS),
        field(ring, at + 14, WARPS),
    )


@gluon.jit
def advance(h, i, task, SHAPE: gl.constexpr):
    """The head and the tile of rows that come next."""
    i += 1
    if SHAPE.GROUPED:
        last = i == task.count
        h = gl.where(last, h + 1, h)
        i = gl.where(last, 0, i)
    return h, i


@gluon.jit
def tile_ring(COUNT: gl.constexpr, READERS: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr,
              CHUNKS: gl.constexpr, DTYPE: gl.constexpr):  # fmt: skip
    """A ring of COUNT buffers, each CHUNKS tiles [ROWS, WIDTH] side by side."""
    TILES: gl.constexpr = COUNT * CHUNKS
    data = gl.allocate_shared_memory(DTYPE, [TILES, 1, 1, ROWS, WIDTH], matrix(WIDTH, 4))
    filled, free = ring_barriers(COUNT, READERS)
    return Ring(data, filled, free)


@gluon.jit
def resident_tiles(COUNT: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr,
                   DTYPE: gl.constexpr):  # fmt: skip
    """COUNT buffers of TILES tiles [ROWS, WIDTH], each filled at once."""
    ALL: gl.constexpr = COUNT * TILES
    data = gl.allocate_shared_memory(DTYPE, [ALL, 1, 1, ROWS, WIDTH], matrix(WIDTH, 4))
    return Landing(data, barriers(COUNT, 1))


@gluon.jit
def vector_ring(COUNT: gl.constexpr, LENGTH: gl.constexpr, tiles_beside, cu):
    """COUNT buffers of LENGTH fp32 numbers, which land with the tiles of a ring; of packed rows by themselves."""
    data = gl.allocate_shared_memory(gl.float32, [COUNT, LENGTH], gl.NVMMASharedLayout(0, 32, 1))
    if cu is None:
        return Landing(data, tiles_beside.filled)
    else:
        return Landing(data, barriers(COUNT, 1))


@gluon.jit
def copy_vector(ring, slot, source, LENGTH: gl.constexpr):
    """Copy LENGTH numbers from a pointer into a buffer (one warp), and say that they are there."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    ring.data.index(slot).store(gl.load(source + gl.arange(0, LENGTH, layout=L)))
    mbarrier.arrive(ring.filled.index(slot))


@gluon.jit
def view(data, index, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """One tile [ROWS, WIDTH] of a ring."""
    return compat.view(data.index(index), [ROWS, WIDTH], matrix(WIDTH, 2))


@gluon.jit
def part(data, index, first, COLS: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """COLS columns from number `first` on of a tile [ROWS, WIDTH] of a ring."""
    tile = view(data, index, ROWS, WIDTH)
    if COLS < WIDTH:
        tile = tile.slice(first, COLS, dim=1)
    return tile


@gluon.jit
def left_operands(data, first, COLS: gl.constexpr, WIDTH: gl.constexpr, COUNT: gl.constexpr):
    """The first COUNT times 64 columns of tiles [64, WIDTH] as register operands of products into COLS columns."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    kept = ()
    for c in gl.static_range(COUNT):
        x = part(data, first + c * 64 // WIDTH, c * 64 % WIDTH, 64, 64, WIDTH)
        kept = kept + (x.load(gl.DotOperandLayout(0, L, 2)),)
    return kept


@gluon.jit
def scores_of(kept, fixed, first, moving, slot, COLS: gl.constexpr, WIDTH: gl.constexpr, CHUNKS: gl.constexpr):
    """Issue the products [64, COLS] of what stays, tiles `first` on, of which `kept` has the first columns in
    registers, with a buffer of what passes; CHUNKS products in flight, or more where only part of a tile is kept.

    A product [64, 64] of two tiles in shared memory reads it at 128 bytes a clock, all that it has: with left operands
    in registers 192/128 was 7 % faster (H200, 2026-11-21).
    """
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    KEPT: gl.constexpr = 64 * len(kept)
    product = gl.zeros([64, COLS], gl.float32, L)
    for c in gl.static_range(len(kept)):
        y = part(moving.data, slot * CHUNKS + c * 64 // WIDTH, c * 64 % WIDTH, 64, COLS, WIDTH)
        product = warpgroup_mma(kept[c], y.permute((1, 0)), product, use_acc=c > 0, is_async=True)
    if KEPT % WIDTH > 0:
        x = part(fixed.data, first + KEPT // WIDTH, KEPT % WIDTH, WIDTH - KEPT % WIDTH, 64, WIDTH)
        y = part(moving.data, slot * CHUNKS + KEPT // WIDTH, KEPT % WIDTH, WIDTH - KEPT % WIDTH, COLS, WIDTH)
        product = warpgroup_mma(x, y.permute((1, 0)), product, is_async=True)
    for c in gl.static_range((KEPT + WIDTH - 1) // WIDTH, CHUNKS):
        x = view(fixed.data, first + c, 64, WIDTH)
        y = view(moving.data, slot * CHUNKS + c, COLS, WIDTH)
        product = warpgroup_mma(x, y.permute((1, 0)), product, use_acc=c > 0, is_async=True)
    return product


@gluon.jit
def accumulate(x, data, first, acc, ROWS: gl.constexpr, WIDTH: gl.constexpr, CHUNKS: gl.constexpr):
    """Issue acc += x data, x [64, ROWS] in registers; CHUNKS products in flight."""
    result = ()
    for c in gl.static_range(CHUNKS):
        result = result + (warpgroup_mma(x, view(data, first + c, ROWS, WIDTH), acc[c], is_async=True),)
    return result


@gluon.jit
def scored(s, m, n, shift, steps, scoring, STEPS: gl.constexpr):
    """Scores from raw products, in units of scoring.scale2, and the derivative of a score in its own units with respect
    to scale * product; m and n broadcast to the tile."""
    slope = 1.0
    if len(STEPS.VALUE) > 0:
        s, slope = scores.apply_with_slope(s * scoring.first, steps, m, n, m + shift - n, m == m, STEPS)
    return s, slope


@gluon.jit
def seen_by_keys(tasks, slot, m, first, S: gl.constexpr):
    """Which rows m [BLOCK_M] see the 64 keys from number `first` on of the task in a slot: [64, BLOCK_M]. Without stops
    that are all rows to the last one, past which lse2 is infinite and P 0."""
    KEYS: gl.constexpr = gl.SliceLayout(1, S)
    seen = m[None, :] >= tasks.starts.index(slot).slice(first, 64).load(KEYS)[:, None]
    if tasks.stops is not None:
        seen = seen & (m[None, :] < tasks.stops.index(slot).slice(first, 64).load(KEYS)[:, None])
    return seen


@gluon.jit
def clean(ring, first, limit, ROWS: gl.constexpr, WIDTH: gl.constexpr, CHUNKS: gl.constexpr):
    """Set rows from `limit` on of a buffer's tiles to 0: they are another document's, or padding."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    for c in gl.static_range(CHUNKS):
        tile = view(ring.data, first + c, ROWS, WIDTH)
        kept = tile.load(L)
        tile.store(gl.where((r < limit)[:, None], kept, gl.zeros([ROWS, WIDTH], kept.dtype, L)))


@gluon.jit
def store_gradient(gradient, acc, weight, staging, first, row, stored, used, batch, head, start, cu,
                   WIDTH: gl.constexpr):  # fmt: skip
    """Store acc * weight as rows row .. row + 64 of a segment, those below `stored`; rows from `used` on are 0. The
    tiles of `staging` from `first` on are free for it."""
    DTYPE: gl.constexpr = staging.dtype
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    r = row + gl.arange(0, 64, layout=gl.SliceLayout(1, L))
    for c in gl.static_range(len(acc)):
        tile = gl.where((r < used)[:, None], acc[c] * weight, 0.0).to(DTYPE)
        if cu is None:
            _store_by_tma(gradient.tma, tile, staging.index(first + c), batch, head, start + row, c * WIDTH, WIDTH)
        else:
            if row + 64 <= stored:
                _store_by_tma(gradient.tma, tile, staging.index(first + c), batch, head, start + row, c * WIDTH, WIDTH)
            else:
                # TMA would write over the next document's rows.
                rows = Rows(gradient.plain, batch, head, start)
                col = c * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, L))
                at = tiles.base_of(rows, 0) + (r.to(gl.int64)[:, None] * rows.x.row + col[None, :] * rows.x.col)
                gl.store(at, tile, mask=(r < stored)[:, None] & (col < rows.x.cols)[None, :])


@gluon.jit
def _store_by_tma(to, tile, staging, batch, head, row, column, WIDTH: gl.constexpr):
    compat.view(staging, [64, WIDTH], matrix(WIDTH, 2)).store(tile)
    fence_async_shared()
    compat.store(to, [batch, head, row, column], staging)


@gluon.jit
def filled(ring, index, COUNT: gl.constexpr):
    """Wait until the index-th fill of a ring of COUNT buffers is there."""
    mbarrier.wait(ring.filled.index(index % COUNT), (index // COUNT) & 1)


@gluon.jit
def freed(ring, index, COUNT: gl.constexpr):
    """Wait until the buffer of the index-th fill is free."""
    mbarrier.wait(ring.free.index(index % COUNT), ((index // COUNT) & 1) ^ 1)
