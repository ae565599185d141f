"""What flows through a Hopper kernel: tasks from the scheduler to the warpgroups, buffers, and turns between them.

B segments, H query heads, M query rows, N keys. A task is one tile of query rows of one head; the scheduler warp claims
tasks from a counter in global memory and hands them on through shared memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from ..device import bands, scores, tiles
from . import compat, reach

# Places at the start of the workspace: the next task, programs that are done; flags follow.
COUNTERS = 4
TASKS = gl.constexpr(4)
FIELDS = gl.constexpr(15)
PART = gl.constexpr(reach.PART)
DEEP = gl.constexpr(reach.DEEP)
# More keys than there are.
FAR = gl.constexpr(2.0**30)


class Shape(NamedTuple):
    """Compile-time numbers: consumer warpgroups of 64 rows, keys of a tile, buffers of keys and of values, buffers of
    queries; the columns of a tile and how many tiles side by side make D and Dv; the columns that a warpgroup stores at
    once; whether the bands bound keys on the left; whether the last step is ALiBi and no key after a row's own position
    is seen; alignment; whether warpgroups take turns, whether P waits in fp32 until the next product is issued,
    whether tiles without a mask have a loop of their own, and whether queries are held in registers; whether the first
    warpgroup leaves out tiles of keys that none of its rows sees; beyond which sum bases go up to the sums, None where
    they go up to maxima (weights.py); and how many query heads of a group share a tile: the rows of a warpgroup are
    then as many of each, one head's after the other's."""

    GROUPS: int
    BLOCK_N: int
    STAGES: int
    Q_STAGES: int
    WIDTH_D: int
    CHUNKS_D: int
    WIDTH_V: int
    CHUNKS_V: int
    WIDTH_OUT: int
    LEFT: bool
    TILTED: bool
    BOTTOM_RIGHT: bool
    TURNS: bool
    LATE: bool
    APART: bool
    HELD: bool
    SPARES: bool
    LIMIT: float | None
    PACKED: int = 1


class Inputs(NamedTuple):
    """TMA descriptors of query, key, value and out, and the tensors behind them."""

    q: Any
    k: Any
    v: Any
    out: Any
    plain: Any


class Plain(NamedTuple):
    """Query, key, value and out as Strided: for what cannot go by TMA."""

    q: Any
    k: Any
    v: Any
    out: Any


class Aside(NamedTuple):
    """Memory beside inputs and results: the workspace, whose start is counters; the same again where its flags are
    needed; norms for reach.py where they are; where keys are split, Parted."""

    counter: Any
    flags: Any
    norms: Any
    splits: Any


class Buffers(NamedTuple):
    """Shared memory: rings of tasks, queries, keys and values, where output tiles leave from, and the barriers at
    which the producer asks for the next task."""

    tasks: Any
    q: Any
    k: Any
    v: Any
    out: Any
    ask: Any


class Parted(NamedTuple):
    """Where the keys of a tile of query rows are split among S tasks: S, coded as sizes are, and what these leave for
    splitting.combine_rows, fp32: out [B * H * M, S, Dv] and lse in log2 units [B * H * M, S]."""

    count: Any
    out: Any
    lse2: Any


class Rule(NamedTuple):
    """What all tiles share: lengths, sizes, bands' numbers, scoring, operands, lse; where keys may be hidden zeros
    [programs + GROUPS * tasks], for careful.note_nan; where ALiBi's reach is worth to know norms, see reach.py; and
    where keys are split Parted."""

    spans: Any
    sizes: Any
    rules: Any
    scoring: Any
    operands: Any
    lse: Any
    flags: Any
    norms: Any
    splits: Any


class Far(NamedTuple):
    """What decides how far keys matter: norms, operands of the score steps and the softmax scale."""

    norms: Any
    steps: Any
    scale: Any


class Task(NamedTuple):
    """One tile of query rows: its number, its first row, head, segment; where the segment lies; which key tiles it
    visits.

    It visits `count` tiles downwards from `top`, those in [full_start, full_stop) without a mask. count 0: no more
    tasks. Of the first `spared` tiles the first 64 rows see nothing.
    """

    index: Any
    row: Any
    h: Any
    b: Any
    batch_q: Any
    start_q: Any
    stored: Any
    used_q: Any
    batch_k: Any
    start_k: Any
    used_k: Any
    top: Any
    count: Any
    full_start: Any
    full_stop: Any
    spared: Any


COUNT_AT = gl.constexpr(Task._fields.index("count"))


class Ring(NamedTuple):
    """Buffers in shared memory, with a barrier for "filled" and one for "free" each. `data` has `chunks` tiles a
    buffer, each of all rows and a part of the columns."""

    data: Any
    filled: Any
    free: Any


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each of which waits for ARRIVALS partitions.

    Every one must be used. Triton gives the memory of one that is not to a tile, and where the GPU goes over to another
    process in the middle of the kernel and comes back, the barrier's 8 bytes are in that tile (H200, driver 580,
    2026-11-21: NaN in gradients, and illegal accesses).
    """
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), ARRIVALS)
    return made


@gluon.jit
def forget(made, COUNT: gl.constexpr):
    """End barriers, before memory is used for something else."""
    for i in gl.static_range(COUNT):
        mbarrier.invalidate(made.index(i))


@gluon.jit
def forget_ring(ring, COUNT: gl.constexpr):
    """End both barriers of a ring's COUNT buffers."""
    forget(ring.filled, COUNT)
    forget(ring.free, COUNT)


@gluon.jit
def ring_barriers(COUNT: gl.constexpr, READERS: gl.constexpr, WRITERS: gl.constexpr = 1):
    """The two barriers of each of COUNT buffers, which WRITERS partitions fill and READERS partitions read."""
    return barriers(COUNT, WRITERS), barriers(COUNT, READERS)


@gluon.jit
def task_ring(READERS: gl.constexpr):
    """The ring through which the scheduler hands on tasks."""
    data = gl.allocate_shared_memory(gl.int32, [TASKS * 16, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    filled, free = ring_barriers(TASKS, READERS)
    return Ring(data, filled, free)


@gluon.jit
def ring_at(index, COUNT: gl.constexpr):
    """Which of COUNT buffers the index-th use of a ring takes, and the phase of its "filled" barrier; of index -1 some
    buffer."""
    turn = gl.to_tensor(index).to(gl.uint32, bitcast=True)
    return (turn % COUNT).to(gl.int32, bitcast=True), ((turn // COUNT) & 1).to(gl.int32, bitcast=True)


@gluon.jit
def put_field(ring, at, value):
    """Write one number of a task (one warp) that is not handed on yet."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    ring.data.index(at).store(gl.full([1], 0, gl.int32, L) + value)


@gluon.jit
def put_task(ring, index, task):
    """Hand on the index-th task (one warp), once its place in the ring is free."""
    slot = index % TASKS
    mbarrier.wait(ring.free.index(slot), ((index // TASKS) & 1) ^ 1)
    for i in gl.static_range(len(task)):
        put_field(ring, slot * 16 + i, task[i])
    mbarrier.arrive(ring.filled.index(slot))


@gluon.jit
def get_task(ring, index, WARPS: gl.constexpr):
    """The index-th task; `free_task` gives its place back."""
    slot, phase = ring_at(index, TASKS)
    mbarrier.wait(ring.filled.index(slot), phase)
    return read_task(ring, index, WARPS)


@gluon.jit
def read_task(ring, index, WARPS: gl.constexpr):
    """The index-th task once more, before `free_task`."""
    slot, _ = ring_at(index, TASKS)
    base = slot * 16
    return Task(
        field(ring, base, WARPS),
        field(ring, base + 1, WARPS),
        field(ring, base + 2, WARPS),
        field(ring, base + 3, WARPS),
        field(ring, base + 4, WARPS),
        field(ring, base + 5, WARPS),
        field(ring, base + 6, WARPS),
        field(ring, base + 7, WARPS),
        field(ring, base + 8, WARPS),
        field(ring, base + 9, WARPS),
        field(ring, base + 10, WARPS),
        field(ring, base + 11, WARPS),
        field(ring, base + 12, WARPS),
        field(ring, base + 13, WARPS),
        field(ring, base + 14, WARPS),
        field(ring, base + 15, WARPS),
    )


@gluon.jit
def count_of(ring, index):
    """`count` of the index-th task, once it is handed on (a warpgroup)."""
    slot, phase = ring_at(index, TASKS)
    mbarrier.wait(ring.filled.index(slot), phase)
    return field(ring, slot * 16 + COUNT_AT, 4)


@gluon.jit
def field(ring, at, WARPS: gl.constexpr):
    return gl.max(ring.data.index(at).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def free_task(ring, index):
    mbarrier.arrive(ring.free.index(index % TASKS))


@gluon.jit
def steps_of(h, task, rule, STEPS: gl.constexpr):
    """What the score steps need of query head h of a task."""
    segment = gl.minimum(task.b, rule.sizes.B - 1)
    return scores.prepare(rule.operands.steps, segment, h, task.start_q, task.start_k, STEPS)


@gluon.constexpr_function
def own_rows(SHAPE):
    """The query rows of a warpgroup, of each head that shares its tiles."""
    return 64 // SHAPE.PACKED


@gluon.constexpr_function
def rows_of(SHAPE):
    """The query rows of a tile, of each head that shares it."""
    return 64 * SHAPE.GROUPS // SHAPE.PACKED


@gluon.jit
def row_in_tile(r, WG: gl.constexpr, SHAPE: gl.constexpr):
    """Which query row of its tile a warpgroup's row r in 0 .. 63 is."""
    if SHAPE.PACKED == 1:
        return WG * 64 + r
    else:
        return WG * own_rows(SHAPE) + r % own_rows(SHAPE)


@gluon.jit
def head_in_tile(r, SHAPE: gl.constexpr):
    """Which of the heads that share a tile a warpgroup's row r is of."""
    return r // own_rows(SHAPE)


@gluon.jit
def tasks_of(spans, sizes, BLOCK_M: gl.constexpr, PACKED: gl.constexpr = 1):
    """How many tiles each head has, and how many heads there are over all batch entries; those that share tiles are
    one."""
    heads = sizes.H // PACKED
    if spans.cu_q is None:
        heads = heads * sizes.B
    return tiles.tile_count(spans.cu_q, sizes.B, sizes.M, BLOCK_M), heads


@gluon.jit
def split_of(index, spans, sizes, splits, BLOCK_M: gl.constexpr, PACKED: gl.constexpr = 1):
    """Which split the index-th task is of, the index of its tile, and how many splits there are; all tiles of one split
    come first. `splits` is Parted or None."""
    split = 0
    count = 1
    if splits is not None:
        per_head, heads = tasks_of(spans, sizes, BLOCK_M, PACKED)
        count = tiles.decoded(splits.count)
        split = index // (per_head * heads)
        index = index % (per_head * heads)
    return split, index, count


@gluon.jit
def all_tasks(rule, SHAPE: gl.constexpr):
    """How many tasks all programs share, those without rows or keys too."""
    per_head, heads = tasks_of(rule.spans, rule.sizes, rows_of(SHAPE), SHAPE.PACKED)
    total = per_head * heads
    if rule.splits is not None:
        total *= tiles.decoded(rule.splits.count)
    return total


@gluon.jit
def placed(index, per_head, heads, order):
    """Which head's turn the index-th is in the order of calls.order, and which turn of that head."""
    together, kept = order
    front = (per_head - kept) * heads
    last = index >= front
    place = gl.where(last, index - front, index)
    turns = gl.where(last, kept, per_head - kept)
    together = gl.where(last, heads, together)
    block = place // (turns * together)
    rest = place % (turns * together)
    width = gl.minimum(together, heads - block * together)
    turn = gl.where(last, per_head - kept, 0) + rest // width
    return block * together + rest % width, turn


@gluon.jit
def _reach(far, head_q, head_k, heads, h, b, row, sizes, BLOCK_M: gl.constexpr, STEPS: gl.constexpr,
           WARPS: gl.constexpr):  # fmt: skip
    """How many keys before its last one the rows of a task may give a weight to, as reach.py says."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    lane = gl.arange(0, 32, layout=L)
    parts = gl.cdiv(sizes.M, PART)
    # A tile lies in one or two parts.
    part = gl.minimum((row + gl.minimum(lane, 1) * (BLOCK_M - 1)) // PART, parts - 1)
    norm_q = gl.max(gl.load(far.norms + head_q * parts + part), 0)
    parts_k = gl.cdiv(sizes.N, PART)
    keys = far.norms + heads * parts + head_k * parts_k
    most = gl.full([32], 0.0, gl.float32, L)
    for first in range(0, parts_k, 32):
        most = gl.maximum(most, gl.load(keys + gl.minimum(first + lane, parts_k - 1)))
    norm_k = gl.max(most, 0)
    slope = scores.prepare(far.steps, gl.minimum(b, sizes.B - 1), h, 0, 0, STEPS)[0]
    keys_away = (2 * norm_q * norm_k * far.scale + DEEP) / slope + 1
    return gl.where((slope > 0) & (keys_away < FAR), keys_away, FAR).to(gl.int32)


@gluon.jit
def query_task(index, order, spans, sizes, rules, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
               BOTTOM_RIGHT: gl.constexpr, STEPS: gl.constexpr, WARPS: gl.constexpr,
               SPARES: gl.constexpr = False, far=None, splits=None, PACKED: gl.constexpr = 1):  # fmt: skip
    """The index-th task: heads begin with their last tile, the longest under a causal mask. A task without stored rows
    has count 0, a split without keys 0 or less. `far` is a Far where tiles that do not matter are to be left out,
    `splits` as for `split_of`; PACKED heads share a tile, and a task has the first of
    them."""
    per_head, heads = tasks_of(spans, sizes, BLOCK_M, PACKED)
    split, place, parts = split_of(index, spans, sizes, splits, BLOCK_M, PACKED)
    head, turn = placed(place, per_head, heads, order)
    tile = per_head - 1 - turn
    of_entry = sizes.H // PACKED
    h = head % of_entry * PACKED
    if spans.cu_q is None:
        b = head // of_entry
    else:
        b = tiles.find_segment(spans.cu_q, sizes.B, tile, BLOCK_M)
        tile -= gl.load(spans.cu_q + b) // BLOCK_M + b
    batch_q, start_q, stored, used_q = tiles.extent(b, spans.cu_q, spans.used_q, sizes.B, sizes.M)
    batch_k, start_k, _, used_k = tiles.extent(b, spans.cu_k, spans.used_k, sizes.B, sizes.N)
    row = tile * BLOCK_M
    # An arange is a power of two long: rows past the tile repeat its last one.
    LENGTH: gl.constexpr = 128 if BLOCK_M <= 128 else 256
    KEYS: gl.constexpr = STEPS.KEYS
    m = row + gl.minimum(gl.arange(0, LENGTH, layout=gl.BlockedLayout([1], [32], [WARPS], [0])), BLOCK_M - 1)
    shift = used_k - used_q if BOTTOM_RIGHT else used_k * 0
    lo, hi = bands.intersect(gl.minimum(m, used_q - 1), used_k, used_q, used_k, shift, rules.numbers, KEYS)
    hi = gl.where(row < used_q, hi, lo)
    span = bands.tile_span(lo, hi, used_k, BLOCK_N, False)
    # A task visits at least one tile, masked altogether where its rows see no key.
    top = gl.maximum(gl.cdiv(span.stop, BLOCK_N) - 1, 0)
    start = span.start
    if far is not None:
        far_start = _reach(
            far, batch_q * sizes.H + h, batch_k * (sizes.H // sizes.group) + h // sizes.group, heads, h, b,
            start_q + row, sizes, BLOCK_M, STEPS, WARPS,
        )  # fmt: skip
        start = gl.maximum(start, gl.min(gl.where(lo < hi, hi, used_k), 0) - far_start)
    count = gl.maximum(top - start // BLOCK_N, 0) + 1
    if splits is not None:
        share = gl.cdiv(count, parts)
        top -= split * share
        count = gl.minimum(share, count - split * share)
    spared = count * 0
    if SPARES:
        stop = gl.max(gl.where((m < row + 64 // PACKED) & (lo < hi), hi, 0), 0)
        spared = gl.minimum(top - gl.maximum(gl.cdiv(stop, BLOCK_N) - 1, 0), count - 1)
        if splits is not None:
            spared = gl.maximum(spared, 0)
    count = gl.where(row < stored, count, 0)
    return Task(
        index, row, h, b, batch_q, start_q, stored, used_q, batch_k, start_k, used_k,
        top * BLOCK_N, count, span.full_start, span.full_stop, spared,
    )  # fmt: skip


@gluon.constexpr_function
def barrier_asm(instruction, index, threads):
    return f"{instruction} {index}, {threads}; mov.u32 $0, $1;"


@gluon.jit
def take_turn(WG: gl.constexpr):
    """Wait until the warpgroup before this one has issued its products (named barriers, which Gluon lacks; Triton
    itself uses those from 0 on, one for each partition)."""
    ASM: gl.constexpr = barrier_asm("bar.sync", 8 + WG, 256)
    gl.inline_asm_elementwise(ASM, "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pass_turn(WG: gl.constexpr):
    """Let warpgroup WG issue its products."""
    ASM: gl.constexpr = barrier_asm("bar.arrive", 8 + WG, 256)
    gl.inline_asm_elementwise(ASM, "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def matrix(width, rank):
    """The shared layout of a tile [..., rows, width] of 16-bit elements."""
    return gl.NVMMASharedLayout(min(width * 2, 128), 16, rank)


@gluon.jit
def landed(acc, PENDING: gl.constexpr):
    """The accumulators once at most PENDING products are in flight."""
    if len(acc) == 1:
        return (warpgroup_mma_wait(PENDING, acc),)
    else:
        return warpgroup_mma_wait(PENDING, acc)


@gluon.jit
def landed_beside(x, acc, PENDING: gl.constexpr):
    """An accumulator and a tuple of others once at most PENDING products are in flight."""
    done = landed((x,) + acc, PENDING)
    rest = ()
    for c in gl.static_range(len(acc)):
        rest = rest + (done[c + 1],)
    return done[0], rest


@gluon.jit
def operand(x, WIDTH: gl.constexpr, DTYPE: gl.constexpr):
    """A tile [64, rows] as the register operand of a product into WIDTH columns; this moves no data between threads."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    return gl.convert_layout(x.to(DTYPE), gl.DotOperandLayout(0, ACC, 2))


@gluon.jit
def zeros(WIDTH: gl.constexpr, CHUNKS: gl.constexpr):
    """An accumulator [64, CHUNKS * WIDTH] of zeros."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    acc = ()
    for _ in gl.static_range(CHUNKS):
        acc = acc + (gl.zeros([64, WIDTH], gl.float32, ACC),)
    return acc


@gluon.jit
def parts(x, WIDTH: gl.constexpr):
    """A tile [64, columns] of an accumulator as tiles of WIDTH columns; this moves no data between threads."""
    if x.shape[1] == WIDTH:
        return (x,)
    else:
        HALF: gl.constexpr = x.shape[1] // 2
        ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
        left, right = gl.split(gl.permute(gl.reshape(x, [64, 2, HALF]), (0, 2, 1)))
        left = gl.convert_layout(left, ACC, assert_trivial=True)
        right = gl.convert_layout(right, ACC, assert_trivial=True)
        return parts(left, WIDTH) + parts(right, WIDTH)


@gluon.jit
def load_tiles(source, at, batch, head, row, barrier, data, first, WIDTH: gl.constexpr, CHUNKS: gl.constexpr):
    """Load the CHUNKS tiles of rows from `row` on into data[first ..]; `at` is where the segment starts."""
    for c in gl.static_range(CHUNKS):
        compat.load(source, [batch, head, at + row, c * WIDTH], barrier, data.index(first + c))
