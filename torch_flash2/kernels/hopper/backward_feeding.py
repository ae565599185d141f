"""Around the products of dK and dV on Hopper: the producer's loads, and what consumers ask at each tile of rows.

B segments, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from . import compat
from .backward_order import BEFORE, added_before
from .backward_pipeline import (
    advance,
    clean,
    copy_vector,
    end_key_tasks,
    filled,
    freed,
    key_place,
    key_task,
    put_key_task,
)
from .pipeline import barrier_asm, field, load_tiles, put_field


@gluon.jit
def meet(THREADS: gl.constexpr):
    """Wait for all consumer warpgroups (a named barrier, which Gluon lacks; Triton itself uses those from 0 on)."""
    ASM: gl.constexpr = barrier_asm("bar.sync", 8, THREADS)
    gl.inline_asm_elementwise(ASM, "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _load_keys(inputs, place, slot, k, v, KEYS: gl.constexpr, SHAPE: gl.constexpr):
    """Load the tiles of keys and values of a task."""
    CHUNKS_D: gl.constexpr = SHAPE.CHUNKS_D
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    WIDTH_D: gl.constexpr = SHAPE.WIDTH_D
    WIDTH_V: gl.constexpr = SHAPE.WIDTH_V
    mbarrier.expect(k.filled.index(slot), 64 * KEYS * WIDTH_D * CHUNKS_D * 2)
    for w in gl.static_range(KEYS):
        load_tiles(inputs.k, place.start, place.batch, place.h, place.n0 + w * 64, k.filled.index(slot), k.data,
                   (slot * KEYS + w) * CHUNKS_D, WIDTH_D, CHUNKS_D)  # fmt: skip
    mbarrier.expect(v.filled.index(slot), 64 * KEYS * WIDTH_V * CHUNKS_V * 2)
    for w in gl.static_range(KEYS):
        load_tiles(inputs.v, place.start, place.batch, place.h, place.n0 + w * 64, v.filled.index(slot), v.data,
                   (slot * KEYS + w) * CHUNKS_V, WIDTH_V, CHUNKS_V)  # fmt: skip


@gluon.jit
def produce(inputs, outputs, order, streams, fixed, total, rule, KEYS: gl.constexpr, SHAPE: gl.constexpr,
            STEPS: gl.constexpr):  # fmt: skip
    """The producer warp: it claims tasks, and loads of each the keys and values and then what passes them."""
    turn = total * 0
    at = total * 0
    index = gl.program_id(0)
    if outputs.added is not None:
        # A task waits for tasks claimed before it, which must be running: programs claim their first one as well.
        index = gl.atomic_add(outputs.counter, 1)
    while index < total:
        place = key_place(index, order, rule.spans, rule.sizes, 64 * KEYS, outputs.added is not None)
        slot = turn % SHAPE.TASKS
        freed(fixed.tasks, turn, SHAPE.TASKS)
        _load_keys(inputs, place, slot, fixed.k, fixed.v, KEYS, SHAPE)
        task, starts, stops = key_task(
            place, rule.spans, rule.sizes, rule.rules, 64 * KEYS, SHAPE.BLOCK, SHAPE.BOTTOM_RIGHT,
            rule.aside is not None, STEPS,
        )  # fmt: skip
        if outputs.added is not None:
            beyond = added_before(
                place, rule.spans, rule.sizes, rule.rules, 64 * KEYS, SHAPE.BLOCK, SHAPE.BOTTOM_RIGHT, STEPS
            )
            put_field(fixed.tasks, slot * 16 + BEFORE, beyond)
        put_key_task(fixed.tasks, slot, task, starts, stops)
        _load_rows(inputs, outputs.stats, streams, at, task, rule, SHAPE)
        at += task.count * rule.sizes.group
        turn += 1
        index = total
        if SHAPE.TASKS > 1:
            # Now that the task's last rows are on their way: who claims early may be left with a long task at the end.
            index = gl.atomic_add(outputs.counter, 1)
            if outputs.added is None:
                index += gl.num_programs(0)
    if SHAPE.TASKS > 1:
        freed(fixed.tasks, turn, SHAPE.TASKS)
        end_key_tasks(fixed.tasks, turn % SHAPE.TASKS)


@gluon.jit
def _load_rows(inputs, stats, streams, first, task, rule, SHAPE: gl.constexpr):
    """Load queries and output gradients of every head of the group, from the first-th fill of their rings on."""
    BLOCK_M: gl.constexpr = SHAPE.BLOCK
    CHUNKS_D: gl.constexpr = SHAPE.CHUNKS_D
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    WIDTH_D: gl.constexpr = SHAPE.WIDTH_D
    WIDTH_V: gl.constexpr = SHAPE.WIDTH_V
    # Bytes of each of lse2 and delta that come by TMA.
    VECTOR: gl.constexpr = 4 if rule.spans.cu_q is None else 0
    q, do, lse2, delta, _, _ = streams
    h = task.h * rule.sizes.group
    i = task.count * 0
    for j in range(first, first + task.count * rule.sizes.group):
        row = task.start + i * BLOCK_M
        at = (task.batch_q * rule.sizes.H + h) * rule.pitch + task.start_q + row
        freed(q, j, SHAPE.STAGES)
        slot = j % SHAPE.STAGES
        mbarrier.expect(q.filled.index(slot), BLOCK_M * (WIDTH_D * CHUNKS_D * 2 + VECTOR))
        load_tiles(inputs.q, task.start_q, task.batch_q, h, row, q.filled.index(slot), q.data, slot * CHUNKS_D,
                   WIDTH_D, CHUNKS_D)  # fmt: skip
        if VECTOR > 0:
            compat.load(inputs.stats, [at], q.filled.index(slot), lse2.data.index(slot))
        else:
            copy_vector(lse2, slot, stats.lse2 + at, BLOCK_M)
        freed(do, j, SHAPE.STAGES_V)
        slot_v = j % SHAPE.STAGES_V
        mbarrier.expect(do.filled.index(slot_v), BLOCK_M * (WIDTH_V * CHUNKS_V * 2 + VECTOR))
        load_tiles(inputs.do, task.start_q, task.batch_q, h, row, do.filled.index(slot_v), do.data,
                   slot_v * CHUNKS_V, WIDTH_V, CHUNKS_V)  # fmt: skip
        if VECTOR > 0:
            # delta lies behind lse2.
            at += rule.sizes.B * rule.sizes.H * rule.pitch
            compat.load(inputs.stats, [at], do.filled.index(slot_v), delta.data.index(slot_v))
        else:
            copy_vector(delta, slot_v, stats.delta + at, BLOCK_M)
        h, i = advance(h, i, task, SHAPE)


@gluon.jit
def vector(ring, index, rule, COUNT: gl.constexpr, L: gl.constexpr):
    """The index-th lse2 or delta, once the tile beside it is there."""
    if rule.spans.cu_q is not None:
        filled(ring, index, COUNT)
    return ring.data.index(index % COUNT).load(L)


class Turn(NamedTuple):
    """A turn of the loop over tiles of rows: the query head, the tile's first row, whether some of its rows do not see
    all keys, and whether there is this turn at all."""

    h: Any
    m0: Any
    masks: Any
    more: Any


@gluon.jit
def next_turn(j, h, m0, first, home, tasks, rule, SHAPE: gl.constexpr):
    """What comes after turn j of a task that began with turn `first`. The task's numbers are read from shared memory
    while products run: registers are short, and numbers that are spilled come late, behind the additions to dQ's sums
    (H200, 2026-11-21: 14 % of the time at head dim 128 with 4 heads a group)."""
    count = field(tasks, home * 16 + 12, 4)
    m0 += SHAPE.BLOCK
    if SHAPE.GROUPED:
        start = field(tasks, home * 16 + 11, 4)
        last = m0 >= start + count * SHAPE.BLOCK
        h = gl.where(last, h + 1, h)
        m0 = gl.where(last, start, m0)
    return Turn(h, m0, masked_rows(m0, home, tasks), j + 1 < first + count * rule.sizes.group)


@gluon.jit
def masked_rows(m0, home, tasks):
    """Whether some rows of the tile from m0 on do not see all keys of a task."""
    masks = m0 < field(tasks, home * 16 + 13, 4)
    if tasks.stops is not None:
        masks = masks | (m0 >= field(tasks, home * 16 + 14, 4))
    return masks


@gluon.jit
def clean_rows(j, m0, streams, task, rule, WG: gl.constexpr, SHAPE: gl.constexpr):
    """Where a tile of rows reaches past its document or into padding: 0 there, whatever is stored, for 0 * NaN is
    NaN. The first warpgroup cleans the queries, the second the output gradients."""
    BLOCK_M: gl.constexpr = SHAPE.BLOCK
    q, do, lse2, delta, _, _ = streams
    if m0 + BLOCK_M > task.used_q:
        filled(do, j, SHAPE.STAGES_V)
        if WG == 0:
            clean(q, j % SHAPE.STAGES * SHAPE.CHUNKS_D, task.used_q - m0, BLOCK_M, SHAPE.WIDTH_D, SHAPE.CHUNKS_D)
        if WG == 1:
            clean(do, j % SHAPE.STAGES_V * SHAPE.CHUNKS_V, task.used_q - m0, BLOCK_M, SHAPE.WIDTH_V, SHAPE.CHUNKS_V)
        fence_async_shared()
        meet(128 * SHAPE.GROUPS)
