"""The Hopper forward: FlashAttention-3's pipeline (Shah et al. 2024, arXiv 2407.08608) in Gluon, sm90a.

B segments, H query heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
A persistent program has a scheduler warp, which claims tiles of query rows, a producer warp, which loads queries, keys
and values by TMA, and two or three warpgroups of 64 query rows each. A warpgroup issues Q K^T of the next tile of keys
before the softmax of this one, and keeps P in registers. From a row's scores it subtracts a base: the maximum of the
row's first tile, until weights over it become large (weights.py).
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

from ..device import tiles
from . import compat, dropping, lanes
from .careful import attend_carefully, note_nan
from .feeding import produce, schedule
from .pipeline import (
    COUNTERS,
    TASKS,
    Buffers,
    Inputs,
    Ring,
    Rule,
    all_tasks,
    barriers,
    count_of,
    forget,
    forget_ring,
    free_task,
    get_task,
    landed,
    matrix,
    operand,
    own_rows,
    pass_turn,
    query_task,
    read_task,
    ring_at,
    ring_barriers,
    rows_of,
    steps_of,
    take_turn,
    task_ring,
    zeros,
)
from .scoring import masked, row_maxima, scores_of, shift, softmax, spread
from .storing import store, totals

FLAGS = gl.constexpr(COUNTERS)


class State(NamedTuple):
    """A warpgroup's rows between two turns: P of the tile of keys whose P V comes next, accumulators; the rows' bases
    (log2 units), sums, and what the accumulators are to be multiplied by, each [64, 4]."""

    p: Any
    acc: Any
    base: Any
    sums: Any
    decay: Any


@gluon.jit
def _queries(buffers, q_slot, chunk, WG: gl.constexpr, SHAPE: gl.constexpr):
    """The queries [64, WIDTH_D] of a warpgroup in shared memory."""
    WIDTH_D: gl.constexpr = SHAPE.WIDTH_D
    q = buffers.q.data.index((q_slot * SHAPE.GROUPS + WG) * SHAPE.CHUNKS_D + chunk)
    return compat.view(q, [64, WIDTH_D], matrix(WIDTH_D, 2))


@gluon.jit
def _hold(buffers, q_slot, WG: gl.constexpr, SHAPE: gl.constexpr):
    """Where they are held, a warpgroup's queries as register operands: products then read half as many rows from shared
    memory, whose bandwidth is near its limit."""
    L: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SHAPE.BLOCK_N, 16]), 2)
    CHUNKS: gl.constexpr = SHAPE.CHUNKS_D if SHAPE.HELD else 0
    held = ()
    for c in gl.static_range(CHUNKS):
        held = held + (_queries(buffers, q_slot, c, WG, SHAPE).load(L),)
    return held


@gluon.jit
def _query_key(buffers, q_slot, stage, held, WG: gl.constexpr, SHAPE: gl.constexpr):
    """Issue S = Q K^T [64, BLOCK_N]; `held` is what `_hold` gave."""
    CHUNKS_D: gl.constexpr = SHAPE.CHUNKS_D
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    WIDTH_D: gl.constexpr = SHAPE.WIDTH_D
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    s = gl.zeros([64, BLOCK_N], gl.float32, L)
    for c in gl.static_range(CHUNKS_D):
        k = buffers.k.data.index(stage * CHUNKS_D + c)
        k = compat.view(k, [BLOCK_N, WIDTH_D], matrix(WIDTH_D, 2))
        if SHAPE.HELD:
            s = warpgroup_mma(held[c], k.permute((1, 0)), s, use_acc=c > 0, is_async=True)
        else:
            q = _queries(buffers, q_slot, c, WG, SHAPE)
            s = warpgroup_mma(q, k.permute((1, 0)), s, use_acc=c > 0, is_async=True)
    return s


@gluon.jit
def _weight_value(p, buffers, stage, acc, use_acc, SHAPE: gl.constexpr):
    """Issue O += P V, or O = P V; CHUNKS_V products in flight."""
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    WIDTH_V: gl.constexpr = SHAPE.WIDTH_V
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    result = ()
    for c in gl.static_range(CHUNKS_V):
        v = compat.view(buffers.v.data.index(stage * CHUNKS_V + c), [BLOCK_N, WIDTH_V], matrix(WIDTH_V, 2))
        result = result + (warpgroup_mma(p, v, acc[c], use_acc=use_acc, is_async=True),)
    return result


@gluon.jit
def _finish(acc, weight, index, rule, inputs, buffers, WG: gl.constexpr, SHAPE: gl.constexpr):
    """Store out [64, Dv] of the rows of the index-th task."""
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    task = read_task(buffers.tasks, index, 4)
    if rule.flags is not None:
        # NaN here may come from a value that no row of the tile sees: `_repair` looks again.
        place = WG * all_tasks(rule, SHAPE) + task.index
        for c in gl.static_range(CHUNKS_V):
            note_nan(acc[c], rule.flags, place)
    store(acc, weight, task, rule, inputs, buffers, WG, SHAPE)
    free_task(buffers.tasks, index)


@gluon.jit
def _scale_all(acc, factor, SHAPE: gl.constexpr):
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    scaled = ()
    for c in gl.static_range(CHUNKS_V):
        scaled = scaled + (lanes.rescale(acc[c], spread(factor, acc[c]))[0],)
    return scaled


@gluon.jit
def _turns(
    count, state, n0, left, used, slot, held, place, steps, draw, masks, rule, buffers,
    WG: gl.constexpr, SHAPE: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    """`count` turns on tiles that are not the first of their task, whose accumulators have begun. `masks` is None where
    no tile needs a mask; else full_start and full_stop of the task, and its number. Shorter than turns that may be
    anything; but short tasks run faster where all code fits the instruction cache."""
    STAGES: gl.constexpr = SHAPE.STAGES
    NEXT: gl.constexpr = (WG + 1) % SHAPE.GROUPS
    DTYPE: gl.constexpr = buffers.v.data.dtype
    p, acc, base, sums, decay = state
    for _ in range(count):
        stage, _ = ring_at(used, STAGES)
        stage_v, phase_v = ring_at(used - 1, STAGES)
        if SHAPE.TURNS:
            take_turn(WG)
        s = _query_key(buffers, slot, stage, held, WG, SHAPE)
        p16 = operand(p, SHAPE.WIDTH_V, DTYPE) if SHAPE.LATE else p
        acc = _scale_all(acc, decay, SHAPE)
        mbarrier.wait(buffers.v.filled.index(stage_v), phase_v)
        acc = _weight_value(p16, buffers, stage_v, acc, True, SHAPE)
        if SHAPE.TURNS:
            pass_turn(NEXT)
        s = warpgroup_mma_wait(SHAPE.CHUNKS_V, (s,))
        mbarrier.arrive(buffers.k.free.index(stage))
        left -= 1
        if left == 0:
            mbarrier.arrive(buffers.q.free.index(slot * SHAPE.GROUPS + WG))
        used += 1
        n0 -= SHAPE.BLOCK_N
        s = scores_of(s, n0, place, steps, rule, WG, SHAPE, STEPS)
        if masks is not None:
            if (n0 < masks[0]) | (n0 >= masks[1]):
                s = masked(s, n0, masks[2], rule, buffers, WG, SHAPE, STEPS)
        p, base, sums, decay = softmax(s, n0, place, steps, draw, base, sums, rule, SHAPE, STEPS)
        # As in `_consume`: this wait ends the basic block.
        stage, phase = ring_at(used, STAGES)
        mbarrier.wait(buffers.k.filled.index(stage), phase, pred=left > 0)
        acc = landed(acc, 0)
        mbarrier.arrive(buffers.v.free.index(stage_v))
        p = p if SHAPE.LATE else operand(p, SHAPE.WIDTH_V, DTYPE)
    return State(p, acc, base, sums, decay), n0, left, used


@gluon.jit
def _consume(WG: gl.constexpr, inputs, buffers, rule, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """A warpgroup: 64 query rows of each task.

    Each turn issues Q K^T of a tile of keys and P V of the tile before it, also where one is the first of a task and
    the other the last of the task before. A task's rows are stored in the turn that issues its successor's first P V,
    while Q K^T of that turn runs.
    """
    GROUPS: gl.constexpr = SHAPE.GROUPS
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    STAGES: gl.constexpr = SHAPE.STAGES
    Q_STAGES: gl.constexpr = SHAPE.Q_STAGES
    NEXT: gl.constexpr = (WG + 1) % GROUPS
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SHAPE.WIDTH_V, 16])
    DTYPE: gl.constexpr = inputs.v.dtype
    if SHAPE.TURNS:
        if WG == GROUPS - 1:
            pass_turn(0)
    task = get_task(buffers.tasks, 0, 4)
    steps = steps_of(task.h, task, rule, STEPS)
    draw = dropping.begin(task, rule, WG)
    some = task.count > 0
    mbarrier.wait(buffers.q.filled.index(WG), 0, pred=some)
    mbarrier.wait(buffers.k.filled.index(0), 0, pred=some)
    held = _hold(buffers, 0, WG, SHAPE)
    s = warpgroup_mma_wait(0, (_query_key(buffers, 0, 0, held, WG, SHAPE),))
    mbarrier.arrive(buffers.k.free.index(0), pred=some)
    n0 = task.top
    place = task.row + shift(task, SHAPE)
    full_start, full_stop = task.full_start, task.full_stop
    s = scores_of(s, n0, place, steps, rule, WG, SHAPE, STEPS)
    if (n0 < full_start) | (n0 >= full_stop):
        s = masked(s, n0, 0, rule, buffers, WG, SHAPE, STEPS)
    base = row_maxima(s, n0, place, steps, rule, SHAPE, STEPS)
    L: gl.constexpr = base.type.layout
    sums = gl.full([64, 4], 0.0, gl.float32, L)
    p, base, sums, decay = softmax(s, n0, place, steps, draw, base, sums, rule, SHAPE, STEPS)
    p = p if SHAPE.LATE else operand(p, SHAPE.WIDTH_V, DTYPE)
    acc = zeros(SHAPE.WIDTH_V, SHAPE.CHUNKS_V)
    weight = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, ACC))
    going = task.count  # 0 after the last task
    left = task.count - 1  # tiles of the task whose Q K^T is not issued
    if left == 0:
        mbarrier.arrive(buffers.q.free.index(WG))
    fresh = task.count > 0  # whether P is of a task's first tile
    begun = left * 0 + 1  # tasks whose first Q K^T is issued
    used = left * 0 + 1  # tiles of keys whose Q K^T is issued
    mbarrier.wait(buffers.k.filled.index(1 % STAGES), (1 // STAGES) & 1, pred=left > 0)
    while going > 0:
        stage, phase = ring_at(used, STAGES)
        stage_v, phase_v = ring_at(used - 1, STAGES)
        begins = left == 0
        if begins:
            following = get_task(buffers.tasks, begun, 4)
            steps = steps_of(following.h, following, rule, STEPS)
            draw = dropping.begin(following, rule, WG)
            going = following.count
            left = following.count
            n0, place = following.top + BLOCK_N, following.row + shift(following, SHAPE)
            full_start, full_stop = following.full_start, following.full_stop
            slot, phase_q = ring_at(begun, Q_STAGES)
            mbarrier.wait(buffers.q.filled.index(slot * GROUPS + WG), phase_q, pred=going > 0)
            held = _hold(buffers, slot, WG, SHAPE)
            mbarrier.wait(buffers.k.filled.index(stage), phase, pred=going > 0)
        left -= 1
        n0 -= BLOCK_N
        current = begun - 1 + begins.to(gl.int32)
        slot, _ = ring_at(current, Q_STAGES)
        if SHAPE.TURNS:
            take_turn(WG)
        s = _query_key(buffers, slot, stage, held, WG, SHAPE)
        p16 = operand(p, SHAPE.WIDTH_V, DTYPE) if SHAPE.LATE else p
        if fresh & (begun >= 2):
            _finish(acc, weight, begun - 2, rule, inputs, buffers, WG, SHAPE)
        else:
            acc = _scale_all(acc, decay, SHAPE)
        mbarrier.wait(buffers.v.filled.index(stage_v), phase_v)
        acc = _weight_value(p16, buffers, stage_v, acc, fresh == 0, SHAPE)
        if SHAPE.TURNS:
            pass_turn(NEXT)
        if begins:
            # Read here: fields that only this needs would take registers from the loop.
            task = read_task(buffers.tasks, begun - 1, 4)
            weight = totals(base, sums, task, rule, WG, SHAPE, STEPS)
            sums = gl.full([64, 4], 0.0, gl.float32, L)
        s = warpgroup_mma_wait(SHAPE.CHUNKS_V, (s,))
        s = scores_of(s, n0, place, steps, rule, WG, SHAPE, STEPS)
        masks = (n0 < full_start) | (n0 >= full_stop)
        if begins | masks:
            if masks:
                s = masked(s, n0, current, rule, buffers, WG, SHAPE, STEPS)
            if begins:
                base = row_maxima(s, n0, place, steps, rule, SHAPE, STEPS)
        mbarrier.arrive(buffers.k.free.index(stage), pred=going > 0)
        if left == 0:
            mbarrier.arrive(buffers.q.free.index(slot * GROUPS + WG))
        used += 1
        p, base, sums, decay = softmax(s, n0, place, steps, draw, base, sums, rule, SHAPE, STEPS)
        # This wait's branch ends the basic block: without it ptxas moves the next line's above the softmax.
        stage, phase = ring_at(used, STAGES)
        mbarrier.wait(buffers.k.filled.index(stage), phase, pred=left > 0)
        acc = landed(acc, 0)
        mbarrier.arrive(buffers.v.free.index(stage_v))
        p = p if SHAPE.LATE else operand(p, SHAPE.WIDTH_V, DTYPE)
        fresh = begins
        begun = current + 1
        if SHAPE.APART:
            # Tiles up to the next that needs a mask.
            apart = gl.minimum((n0 - full_start) // BLOCK_N, left)
            apart = gl.where(begins | (n0 - BLOCK_N >= full_stop), 0, apart)
            state = State(p, acc, base, sums, decay)
            state, n0, left, used = _turns(
                apart, state, n0, left, used, slot, held, place, steps, draw, None, rule, buffers, WG, SHAPE, STEPS
            )
            p, acc, base, sums, decay = state
    if begun > 1:
        _finish(acc, weight, begun - 2, rule, inputs, buffers, WG, SHAPE)
    if SHAPE.TURNS:
        if WG == 0:
            take_turn(0)
    compat.stores_landed()


@gluon.jit
def _pass_over(ring, first, count, SHAPE: gl.constexpr):
    """Give `count` buffers of a ring back, from its first-th use on, without reading them."""
    for i in range(count):
        # Before it is filled, its barrier may still wait for the use before.
        stage, phase = ring_at(first + i, SHAPE.STAGES)
        mbarrier.wait(ring.filled.index(stage), phase)
        mbarrier.arrive(ring.free.index(stage))


@gluon.jit
def _consume_one(WG: gl.constexpr, inputs, buffers, rule, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """As `_consume`, where queries have one buffer and warpgroups take no turns. A task's queries come only when the
    last Q K^T of the task before is done: here that task's rows are stored before they are waited for. Under its first
    Q K^T that took 3 % longer at head dim 256, causal, 512 rows, and as long from 4k on (H200, 2026-11-22).
    """
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    STAGES: gl.constexpr = SHAPE.STAGES
    DTYPE: gl.constexpr = inputs.v.dtype
    SPARES: gl.constexpr = SHAPE.SPARES and WG == 0
    begun = gl.to_tensor(0)  # tasks whose first Q K^T is issued
    used = gl.to_tensor(0)  # tiles of keys whose Q K^T is issued, or that are left out
    while count_of(buffers.tasks, begun) > 0:
        task = read_task(buffers.tasks, begun, 4)
        steps = steps_of(task.h, task, rule, STEPS)
        draw = dropping.begin(task, rule, WG)
        left = task.count - 1  # tiles of the task whose Q K^T is not issued
        n0 = task.top
        place = task.row + shift(task, SHAPE)
        full_start, full_stop = task.full_start, task.full_stop
        spared = task.spared
        if SPARES:
            _pass_over(buffers.k, used, spared, SHAPE)
            used += spared
            left -= spared
            n0 -= spared * BLOCK_N
        mbarrier.wait(buffers.q.filled.index(WG), begun & 1)
        held = _hold(buffers, 0, WG, SHAPE)
        stage, phase = ring_at(used, STAGES)
        mbarrier.wait(buffers.k.filled.index(stage), phase)
        s = warpgroup_mma_wait(0, (_query_key(buffers, 0, stage, held, WG, SHAPE),))
        mbarrier.arrive(buffers.k.free.index(stage))
        if left == 0:
            mbarrier.arrive(buffers.q.free.index(WG))
        s = scores_of(s, n0, place, steps, rule, WG, SHAPE, STEPS)
        if (n0 < full_start) | (n0 >= full_stop):
            s = masked(s, n0, begun, rule, buffers, WG, SHAPE, STEPS)
        base = row_maxima(s, n0, place, steps, rule, SHAPE, STEPS)
        sums = gl.full([64, 4], 0.0, gl.float32, base.type.layout)
        p, base, sums, decay = softmax(s, n0, place, steps, draw, base, sums, rule, SHAPE, STEPS)
        p = p if SHAPE.LATE else operand(p, SHAPE.WIDTH_V, DTYPE)
        acc = zeros(SHAPE.WIDTH_V, SHAPE.CHUNKS_V)
        if SPARES:
            _pass_over(buffers.v, used - spared, spared, SHAPE)
        used += 1
        stage, phase = ring_at(used, STAGES)
        mbarrier.wait(buffers.k.filled.index(stage), phase, pred=left > 0)
        state = State(p, acc, base, sums, decay)
        masks = (full_start, full_stop, begun)
        if SHAPE.APART:
            while left > 0:
                state, n0, left, used = _turns(
                    1, state, n0, left, used, 0, held, place, steps, draw, masks, rule, buffers, WG, SHAPE, STEPS
                )
                apart = gl.minimum((n0 - full_start) // BLOCK_N, left)
                apart = gl.where(n0 - BLOCK_N >= full_stop, 0, apart)
                state, n0, left, used = _turns(
                    apart, state, n0, left, used, 0, held, place, steps, draw, None, rule, buffers, WG, SHAPE, STEPS
                )
        else:
            state, n0, left, used = _turns(
                left, state, n0, left, used, 0, held, place, steps, draw, masks, rule, buffers, WG, SHAPE, STEPS
            )
        p, acc, base, sums, decay = state
        stage_v, phase_v = ring_at(used - 1, STAGES)
        p16 = operand(p, SHAPE.WIDTH_V, DTYPE) if SHAPE.LATE else p
        acc = _scale_all(acc, decay, SHAPE)
        mbarrier.wait(buffers.v.filled.index(stage_v), phase_v)
        acc = landed(_weight_value(p16, buffers, stage_v, acc, True, SHAPE), 0)
        mbarrier.arrive(buffers.v.free.index(stage_v))
        last = read_task(buffers.tasks, begun, 4)
        weight = totals(base, sums, last, rule, WG, SHAPE, STEPS)
        _finish(acc, weight, begun, rule, inputs, buffers, WG, SHAPE)
        begun += 1
    compat.stores_landed()


@gluon.jit
def _work(WG: gl.constexpr, inputs, buffers, rule, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """A warpgroup."""
    if SHAPE.Q_STAGES == 1 and not SHAPE.TURNS:
        _consume_one(WG, inputs, buffers, rule, SHAPE, STEPS)
    else:
        _consume(WG, inputs, buffers, rule, SHAPE, STEPS)


@gluon.jit
def attention_forward(
    q, k, v, out, plain, lse, aside, coded_order, spans, coded_sizes, rules, scoring, operands,
    SHAPE: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    """Persistent: out [B, H, M, Dv] and lse [B, H, M] of all tiles that the counter hands out."""
    GROUPS: gl.constexpr = SHAPE.GROUPS
    DTYPE: gl.constexpr = q.dtype
    Q_TILES: gl.constexpr = SHAPE.Q_STAGES * GROUPS * SHAPE.CHUNKS_D
    q_data = gl.allocate_shared_memory(
        DTYPE, [Q_TILES, 1, SHAPE.PACKED, own_rows(SHAPE), SHAPE.WIDTH_D], matrix(SHAPE.WIDTH_D, 4)
    )
    k_data = gl.allocate_shared_memory(
        DTYPE, [SHAPE.STAGES * SHAPE.CHUNKS_D, 1, 1, SHAPE.BLOCK_N, SHAPE.WIDTH_D], matrix(SHAPE.WIDTH_D, 4)
    )
    v_data = gl.allocate_shared_memory(
        DTYPE, [SHAPE.STAGES * SHAPE.CHUNKS_V, 1, 1, SHAPE.BLOCK_N, SHAPE.WIDTH_V], matrix(SHAPE.WIDTH_V, 4)
    )
    out_data = gl.allocate_shared_memory(DTYPE, [GROUPS, 64, SHAPE.WIDTH_OUT], matrix(SHAPE.WIDTH_OUT, 2))
    # Each warpgroup has its own: where there is one buffer, the first's next rows come while the second still works.
    q_filled, q_free = ring_barriers(SHAPE.Q_STAGES * GROUPS, 1)
    k_filled, k_free = ring_barriers(SHAPE.STAGES, GROUPS)
    v_filled, v_free = ring_barriers(SHAPE.STAGES, GROUPS)
    ask = barriers(TASKS, 1)
    buffers = Buffers(
        task_ring(GROUPS + 1), Ring(q_data, q_filled, q_free), Ring(k_data, k_filled, k_free),
        Ring(v_data, v_filled, v_free), out_data, ask,
    )  # fmt: skip
    fence_async_shared()
    inputs = Inputs(q, k, v, out, plain)
    places = None
    if aside.flags is not None:
        places = aside.flags + FLAGS
    rule = Rule(spans, tiles.sizes_of(coded_sizes), rules, scoring, operands, lse, places, aside.norms, aside.splits)
    order = (tiles.decoded(coded_order[0]), tiles.decoded(coded_order[1]))
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_work, (0, inputs, buffers, rule, SHAPE, STEPS)),
                (_work, (1, inputs, buffers, rule, SHAPE, STEPS)),
                (produce, (inputs, buffers, rule, SHAPE)),
                (schedule, (buffers, rule, order, aside.counter, SHAPE, STEPS)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_work, (0, inputs, buffers, rule, SHAPE, STEPS)),
                (_work, (1, inputs, buffers, rule, SHAPE, STEPS)),
                (_work, (2, inputs, buffers, rule, SHAPE, STEPS)),
                (produce, (inputs, buffers, rule, SHAPE)),
                (schedule, (buffers, rule, order, aside.counter, SHAPE, STEPS)),
            ],
            [4, 4, 1, 1],
            [160, 160, 24, 24],
        )

    if aside.flags is not None:
        # Repairing uses shared memory of its own.
        forget_ring(buffers.tasks, TASKS)
        forget_ring(buffers.q, SHAPE.Q_STAGES * GROUPS)
        forget_ring(buffers.k, SHAPE.STAGES)
        forget_ring(buffers.v, SHAPE.STAGES)
        forget(ask, TASKS)
        _repair(inputs, rule, order, SHAPE, STEPS)


@gluon.jit
def _repair(inputs, rule, order, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """Attend again where a warpgroup of this program found NaN. It comes last, because registers that it needs would be
    spilled in the main loops."""
    program = gl.program_id(0)
    if gl.load(rule.flags + program) != 0:
        total = all_tasks(rule, SHAPE)
        places = rule.flags + gl.num_programs(0)
        for place in range(0, total * SHAPE.GROUPS):
            if gl.load(places + place) == program + 1:
                task = query_task(
                    place % total, order, rule.spans, rule.sizes, rule.rules, rows_of(SHAPE), SHAPE.BLOCK_N,
                    SHAPE.BOTTOM_RIGHT, STEPS, 4, splits=rule.splits, PACKED=SHAPE.PACKED,
                )  # fmt: skip
                steps = steps_of(task.h, task, rule, STEPS)
                first = task.row + place // total * own_rows(SHAPE)
                for head in range(task.h, task.h + SHAPE.PACKED):
                    attend_carefully(first, head, task, steps, rule, inputs.plain, SHAPE, STEPS)
                gl.store(places + place, 0)
        gl.store(rule.flags + program, 0)
