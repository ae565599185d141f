"""The two warps that feed the warpgroups: a scheduler, which claims tasks, and a producer, which loads their tiles.

B segments, H query heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .pipeline import (
    TASKS,
    Far,
    Task,
    all_tasks,
    free_task,
    get_task,
    load_tiles,
    own_rows,
    put_task,
    query_task,
    ring_at,
    rows_of,
)
from .storing import leave_nothing


@gluon.jit
def schedule(buffers, rule, order, counter, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """The scheduler warp: claim tasks when the producer asks, and hand them on. It is not the producer itself, because
    what a task is takes about as long to work out as a tile of keys."""
    total = all_tasks(rule, SHAPE)
    index = gl.program_id(0)
    done = 0
    far = None
    if rule.norms is not None:
        far = Far(rule.norms, rule.operands.steps, rule.scoring.scale)
    while index < total:
        task = query_task(
            index, order, rule.spans, rule.sizes, rule.rules, rows_of(SHAPE), SHAPE.BLOCK_N, SHAPE.BOTTOM_RIGHT, STEPS,
            1, SHAPE.SPARES, far, rule.splits, SHAPE.PACKED,
        )  # fmt: skip
        if task.count > 0:
            put_task(buffers.tasks, done, task)
            # After a long task the next one waits until this one nears its end; short ones follow one another faster
            # than tasks are worked out, so they are claimed one or two ahead. Of the last ones only the shortest are:
            # who claims others early has several while some have none (32 heads of 1024 rows, causal: 23 us instead of
            # 30, H200, 2026-11-22).
            ahead = gl.where(task.count > 4, 0, gl.where(task.count > 2, 1, 2))
            ahead = gl.where((task.count > 2) & (index + gl.num_programs(0) >= total), 0, ahead)
            asked = gl.maximum(done - ahead, 0)
            mbarrier.wait(buffers.ask.index(asked % TASKS), (asked // TASKS) & 1, pred=done >= ahead)
            done += 1
        elif rule.splits is not None:
            leave_nothing(task, rule, SHAPE)
        index = gl.num_programs(0) + gl.atomic_add(counter, 1)
    zero = done * 0
    # No more tasks; its one key needs no mask, which a warpgroup's last turn would work out.
    put_task(
        buffers.tasks, done,
        Task(zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero + 1, zero),
    )  # fmt: skip
    # The last program to end leaves the counters as it found them, for the next launch on this stream.
    if gl.atomic_add(counter + 1, 1) == gl.num_programs(0) - 1:
        gl.store(counter, 0)
        gl.store(counter + 1, 0)


@gluon.jit
def _load(source, ring, index, batch, head, row, WIDTH: gl.constexpr, CHUNKS: gl.constexpr, SHAPE: gl.constexpr):
    """Load the index-th tile of keys or of values, which starts at row `row`, once its buffer is free."""
    stage, phase = ring_at(index, SHAPE.STAGES)
    mbarrier.wait(ring.free.index(stage), phase ^ 1)
    mbarrier.expect(ring.filled.index(stage), SHAPE.BLOCK_N * WIDTH * CHUNKS * 2)
    load_tiles(source, 0, batch, head, row, ring.filled.index(stage), ring.data, stage * CHUNKS, WIDTH, CHUNKS)


@gluon.jit
def produce(inputs, buffers, rule, SHAPE: gl.constexpr):
    """The producer warp: load the tiles of each task.

    Values follow the keys of the tile after theirs, as they are used: a buffer of values is free a turn later than one
    of keys. Where queries have one buffer, a task's first keys come before them: theirs is free earlier.
    """
    GROUPS: gl.constexpr = SHAPE.GROUPS
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    CHUNKS_D: gl.constexpr = SHAPE.CHUNKS_D
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    BYTES_Q: gl.constexpr = 64 * SHAPE.WIDTH_D * CHUNKS_D * 2
    KEYS_FIRST: gl.constexpr = SHAPE.Q_STAGES == 1
    # One more of shorter tiles: at head dim 256 and 512 rows, causal, the time is 1 % less (H200, 2026-11-22).
    AHEAD: gl.constexpr = 4 if BLOCK_N == 64 else 3
    loaded = 0
    done = 0
    # The tile whose values are not loaded.
    late = 0
    batch = 0
    group_head = 0
    late_row = 0
    task = get_task(buffers.tasks, 0, 1)
    while task.count > 0:
        free_task(buffers.tasks, done)
        head = task.h // rule.sizes.group
        if KEYS_FIRST:
            row = task.start_k + task.top
            _load(inputs.k, buffers.k, loaded, task.batch_k, head, row, SHAPE.WIDTH_D, CHUNKS_D, SHAPE)
        slot, phase = ring_at(done, SHAPE.Q_STAGES)
        for w in gl.static_range(GROUPS):
            place = slot * GROUPS + w
            mbarrier.wait(buffers.q.free.index(place), phase ^ 1)
            if SHAPE.HELD:
                # Ordinary reads and TMA's writes are of two proxies. In the warpgroups, behind the reads, this took 2 %
                # of the time at head dim 64, 512 rows (H200, 2026-11-22).
                fence_async_shared()
            mbarrier.expect(buffers.q.filled.index(place), BYTES_Q)
            load_tiles(
                inputs.q, task.start_q, task.batch_q, task.h, task.row + w * own_rows(SHAPE),
                buffers.q.filled.index(place), buffers.q.data, place * CHUNKS_D, SHAPE.WIDTH_D, CHUNKS_D,
            )  # fmt: skip
        # Asking earlier would share out the work less evenly.
        asking = gl.maximum(task.count - AHEAD, 0)
        for j in range(task.count):
            row = task.start_k + task.top - j * BLOCK_N
            if (j > 0) | (KEYS_FIRST == 0):
                _load(inputs.k, buffers.k, loaded, task.batch_k, head, row, SHAPE.WIDTH_D, CHUNKS_D, SHAPE)
            if late > 0:
                _load(inputs.v, buffers.v, loaded - 1, batch, group_head, late_row, SHAPE.WIDTH_V, CHUNKS_V, SHAPE)
            late = 1
            batch = task.batch_k
            group_head = head
            late_row = row
            loaded += 1
            if j == asking:
                mbarrier.arrive(buffers.ask.index(done % TASKS))
        if KEYS_FIRST:
            # The next queries wait for the end of this task.
            _load(inputs.v, buffers.v, loaded - 1, batch, group_head, late_row, SHAPE.WIDTH_V, CHUNKS_V, SHAPE)
            late = 0
        done += 1
        task = get_task(buffers.tasks, done, 1)
    if late > 0:
        _load(inputs.v, buffers.v, loaded - 1, batch, group_head, late_row, SHAPE.WIDTH_V, CHUNKS_V, SHAPE)
