"""The Hopper forward: FlashAttention-3's pipeline (Shah et al. 2024, arXiv 2407.08608) in Gluon, sm90a.

B segments, H query heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
A persistent program has a scheduler warp, which claims tiles of query rows, a producer warp, which loads queries, keys
and values by TMA, and two or three warpgroups of 64 query rows each. A warpgroup issues Q K^T of the next tile of keys
before the softmax of this one, keeps P in registers, and moves its maximum only when it grew by more than 2**8 (as
FlashAttention-4 does).
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

from ..bundles import Rows
from ..device import bands, scores, tiles
from . import compat, lanes
from .careful import attend_carefully, note_nan
from .feeding import produce, schedule
from .pipeline import (
    COUNTERS,
    TASKS,
    Buffers,
    Inputs,
    Ring,
    Rule,
    free_task,
    get_task,
    landed,
    matrix,
    operand,
    pass_turn,
    query_task,
    ring_barriers,
    take_turn,
    task_ring,
    tasks_of,
    zeros,
)

FLAGS = gl.constexpr(COUNTERS)


class Scored(NamedTuple):
    """What the scores of one task need: the factor from scores to log2 units, and the steps' operands."""

    scale2: Any
    steps: Any


@gluon.jit
def _scored(task, rule, STEPS: gl.constexpr):
    """What the scores of a task need."""
    segment = gl.minimum(task.b, rule.sizes.B - 1)
    steps = scores.prepare(rule.operands.steps, segment, task.h, task.start_q, task.start_k, STEPS)
    return Scored(rule.scoring.scale2, steps)


@gluon.jit
def _rescale(x, factor, LAYOUT: gl.constexpr, WIDTH: gl.constexpr):
    """x [64, WIDTH] times the rows' factors, skipped by threads whose factors are 1."""
    a = gl.convert_layout(factor, gl.SliceLayout(1, LAYOUT))[:, None]
    if WIDTH == 128:
        result = gl.map_elementwise(lanes.rescale64, x, a, pack=64)
    elif WIDTH == 64:
        result = gl.map_elementwise(lanes.rescale32, x, a, pack=32)
    else:
        result = gl.map_elementwise(lanes.rescale16, x, a, pack=16)
    return result[0]


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
def _query_key(buffers, q_slot, stage, WG: gl.constexpr, SHAPE: gl.constexpr):
    """Issue S = Q K^T [64, BLOCK_N]; CHUNKS_D products in flight."""
    CHUNKS_D: gl.constexpr = SHAPE.CHUNKS_D
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    WIDTH_D: gl.constexpr = SHAPE.WIDTH_D
    DTYPE: gl.constexpr = buffers.k.data.dtype
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    s = gl.zeros([64, BLOCK_N], gl.float32, L)
    for c in gl.static_range(CHUNKS_D):
        q = buffers.q.data.index((q_slot * SHAPE.GROUPS + WG) * CHUNKS_D + c)
        k = buffers.k.data.index(stage * CHUNKS_D + c)
        q = q._reinterpret(DTYPE, [64, WIDTH_D], matrix(WIDTH_D, 2))
        k = k._reinterpret(DTYPE, [BLOCK_N, WIDTH_D], matrix(WIDTH_D, 2))
        s = warpgroup_mma(q, k.permute((1, 0)), s, use_acc=c > 0, is_async=True)
    return s


@gluon.jit
def _weight_value(p, buffers, stage, acc, SHAPE: gl.constexpr):
    """Issue O += P V; CHUNKS_V products in flight."""
    DTYPE: gl.constexpr = buffers.v.data.dtype
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    WIDTH_V: gl.constexpr = SHAPE.WIDTH_V
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    result = ()
    for c in gl.static_range(CHUNKS_V):
        v = buffers.v.data.index(stage * CHUNKS_V + c)._reinterpret(DTYPE, [BLOCK_N, WIDTH_V], matrix(WIDTH_V, 2))
        result = result + (warpgroup_mma(p, v, acc[c], is_async=True),)
    return result


@gluon.jit
def _extent(task):
    """Which tiles of keys a task visits, and which of them need no mask: count, top, full_start, full_stop."""
    return task.count, task.top, task.full_start, task.full_stop


@gluon.jit
def _scores_of(s, n0, done, scored, rule, buffers, WG: gl.constexpr, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """Scores [64, BLOCK_N] of the tile of keys at n0 from its products, the steps applied."""
    if len(STEPS.VALUE) > 0:
        L: gl.constexpr = s.type.layout
        task, m, n, shift = _positions(n0, done, buffers, L, WG, SHAPE)
        inside = (m < task.used_q)[:, None] & (n < task.used_k)[None, :]
        distance = (m + shift)[:, None] - n[None, :]
        s = s * rule.scoring.first
        s = scores.apply(s, scored.steps, m[:, None], n[None, :], distance, inside, STEPS)
    return s


@gluon.jit
def _masked(s, n0, done, rule, buffers, WG: gl.constexpr, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """Scores, -inf where a row does not see the key.

    Most tiles need no mask: callers branch around this, and the task is read here, so that its fields take no registers
    from those tiles.
    """
    KEYS: gl.constexpr = STEPS.KEYS
    L: gl.constexpr = s.type.layout
    task, m, n, shift = _positions(0, done, buffers, L, WG, SHAPE)
    lo, hi = bands.intersect(
        gl.minimum(m, task.used_q - 1), task.used_k, task.used_q, task.used_k, shift, rule.rules.numbers, KEYS
    )
    visible = n[None, :] < (hi - n0)[:, None]
    if SHAPE.LEFT:
        visible = visible & (n[None, :] >= (lo - n0)[:, None])
    return gl.where(visible, s, -float("inf"))


@gluon.jit
def _positions(n0, done, buffers, L: gl.constexpr, WG: gl.constexpr, SHAPE: gl.constexpr):
    """The task; a warpgroup's rows [64] and keys n0 .. n0 + BLOCK_N in a tile of layout L; where row 0 stands."""
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    task = get_task(buffers.tasks, done, 4)
    m = task.row + WG * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, L))
    n = n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, L))
    shift = task.used_k - task.used_q if SHAPE.BOTTOM_RIGHT else task.used_k * 0
    return task, m, n, shift


@gluon.jit
def _finite_base(row_max):
    """What is subtracted from a row: its maximum, 0 where it has seen no key yet."""
    return gl.where(row_max == -float("inf"), 0.0, row_max)


@gluon.jit
def _first_softmax(s, scored):
    """P, row maximum (log2 units) and partial sums of a task's first tile."""
    row_max = gl.max(s, 1) * scored.scale2
    p = gl.exp2(s * scored.scale2 - _finite_base(row_max)[:, None])
    return p, row_max, _partial_sums(p)


@gluon.jit
def _finish(
    acc, row_max, sums, task, rule, inputs, buffers, WG: gl.constexpr, SHAPE: gl.constexpr
):  # fmt: skip
    """Store out [64, Dv] and lse [64] of a task's rows."""
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    WIDTH: gl.constexpr = SHAPE.WIDTH_V
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, ACC)
    at = task.row + WG * 64 + gl.arange(0, 64, layout=ROWS)
    row_sum = gl.convert_layout(gl.sum(gl.sum(sums, 2), 1), ROWS)
    row_max = gl.convert_layout(row_max, ROWS)
    # Sinks join the denominator of rows that see a key; rows that see none are 0, their lse -inf.
    none = (row_sum == 0.0) | (at >= task.used_q)
    decay = gl.full([64], 1.0, gl.float32, ROWS)
    if rule.operands.sinks is not None:
        sink = gl.load(rule.operands.sinks + task.h).to(gl.float32) * scores.LOG2E
        new_max = gl.maximum(row_max, sink)
        decay = gl.exp2(row_max - new_max)
        row_sum = row_sum * decay + gl.exp2(sink - new_max)
        row_max = new_max
    total = gl.where(none, 1.0, row_sum)
    lse = gl.where(none, -float("inf"), (row_max + gl.log2(total)) * scores.LN2)
    lse_at = gl.cast(task.batch_q * rule.sizes.H + task.h, gl.int64) * rule.sizes.M + task.start_q
    gl.store(rule.lse + lse_at + at, lse, mask=at < task.stored)
    weight = gl.where(none, 0.0, decay * rule.scoring.inverse_keep / total)

    if rule.flags is not None:
        # NaN here may come from a value that no row of the tile sees: `_repair` looks again.
        per_head, heads = tasks_of(rule.spans, rule.sizes, 64 * SHAPE.GROUPS)
        for c in gl.static_range(CHUNKS_V):
            note_nan(acc[c], rule.flags, WG * per_head * heads + task.index)
    _store(acc, weight, none, task, rule, inputs, buffers, WG, SHAPE)


@gluon.jit
def _store(acc, weight, none, task, rule, inputs, buffers, WG: gl.constexpr, SHAPE: gl.constexpr):
    """Store out [64, Dv] of a task's rows: accumulators times the rows' weights, 0 in rows that see nothing."""
    WIDTH: gl.constexpr = SHAPE.WIDTH_V
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    OUT: gl.constexpr = inputs.out.dtype
    row = task.row + WG * 64
    for c in gl.static_range(CHUNKS_V):
        tile = acc[c] * weight[:, None]
        if rule.spans.used_q is not None:
            # Rows of padding may hold anything, and 0 times an infinity is NaN.
            tile = gl.where(none[:, None], 0.0, tile)
        tile = tile.to(OUT)
        if rule.spans.cu_q is None:
            _store_by_tma(tile, row, c, task, inputs, buffers, WG)
        else:
            if row + 64 <= task.stored:
                _store_by_tma(tile, row, c, task, inputs, buffers, WG)
            else:
                # TMA would write over the next document's rows.
                rows = Rows(inputs.plain.out, task.batch_q, task.h, task.start_q)
                _store_by_pointer(tile, row, c * WIDTH, task.stored, rows)


@gluon.jit
def _store_by_tma(tile, row, chunk, task, inputs, buffers, WG: gl.constexpr):
    """Store [64, WIDTH] at row `row` of a task's segment through shared memory."""
    WIDTH: gl.constexpr = tile.shape[1]
    staging = buffers.out.index(WG)
    compat.store_wait(0)
    staging.store(tile)
    fence_async_shared()
    compat.store(
        inputs.out,
        [task.batch_q, task.h, task.start_q + row, chunk * WIDTH],
        staging._reinterpret(tile.dtype, [1, 1, 64, WIDTH], matrix(WIDTH, 4)),
    )


@gluon.jit
def _store_by_pointer(tile, row, column, limit, rows):
    """Store [64, WIDTH] as rows row .. row + 64 of a segment, those below limit."""
    L: gl.constexpr = tile.type.layout
    r = row + gl.arange(0, 64, layout=gl.SliceLayout(1, L))
    c = column + gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, L))
    at = tiles.base_of(rows, 0) + (r.to(gl.int64)[:, None] * rows.x.row + c[None, :] * rows.x.col)
    gl.store(at, tile, mask=(r < limit)[:, None] & (c < rows.x.cols)[None, :])


@gluon.jit
def _scale_all(acc, factor, SHAPE: gl.constexpr):
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SHAPE.WIDTH_V, 16])
    scaled = ()
    for c in gl.static_range(CHUNKS_V):
        scaled = scaled + (_rescale(acc[c], factor, ACC, SHAPE.WIDTH_V),)
    return scaled


@gluon.jit
def _consume(WG: gl.constexpr, inputs, buffers, rule, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """A warpgroup: 64 query rows of each task.

    The last P V of a task overlaps the first Q K^T of the next one, so that the loop below never drains.
    """
    GROUPS: gl.constexpr = SHAPE.GROUPS
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    STAGES: gl.constexpr = SHAPE.STAGES
    Q_STAGES: gl.constexpr = SHAPE.Q_STAGES
    NEXT: gl.constexpr = (WG + 1) % GROUPS
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    DTYPE: gl.constexpr = inputs.v.dtype
    ROWS: gl.constexpr = gl.SliceLayout(1, S)
    if SHAPE.TURNS:
        if WG == GROUPS - 1:
            pass_turn(0)
    done = 0
    used = 0  # tiles of keys whose Q K^T is issued
    task = get_task(buffers.tasks, 0, 4)
    scored = _scored(task, rule, STEPS)
    some = task.count > 0
    mbarrier.wait(buffers.q.filled.index(0), 0, pred=some)
    mbarrier.wait(buffers.k.filled.index(0), 0, pred=some)
    s = warpgroup_mma_wait(0, (_query_key(buffers, 0, 0, WG, SHAPE),))
    mbarrier.arrive(buffers.k.free.index(0), pred=some)
    count, top, full_start, full_stop = _extent(task)
    s = _scores_of(s, top, 0, scored, rule, buffers, WG, SHAPE, STEPS)
    if (top < full_start) | (top >= full_stop):
        s = _masked(s, top, 0, rule, buffers, WG, SHAPE, STEPS)
    p, row_max, sums = _first_softmax(s, scored)
    p = p if SHAPE.LATE else operand(p, SHAPE.WIDTH_V, DTYPE)
    acc = zeros(SHAPE.WIDTH_V, SHAPE.CHUNKS_V)
    decay = gl.full([64], 1.0, gl.float32, ROWS)
    used += 1
    mbarrier.wait(buffers.k.filled.index(1 % STAGES), (1 // STAGES) & 1, pred=task.count > 1)
    while count > 0:
        slot = done % Q_STAGES
        for j in range(1, count):
            stage = used % STAGES
            stage_v = (used - 1) % STAGES
            phase_v = ((used - 1) // STAGES) & 1
            if SHAPE.TURNS:
                take_turn(WG)
            s = _query_key(buffers, slot, stage, WG, SHAPE)
            acc = _scale_all(acc, decay, SHAPE)
            p16 = operand(p, SHAPE.WIDTH_V, DTYPE) if SHAPE.LATE else p
            mbarrier.wait(buffers.v.filled.index(stage_v), phase_v)
            acc = _weight_value(p16, buffers, stage_v, acc, SHAPE)
            if SHAPE.TURNS:
                pass_turn(NEXT)
            s = warpgroup_mma_wait(SHAPE.CHUNKS_V, (s,))
            mbarrier.arrive(buffers.k.free.index(stage))
            used += 1
            n0 = top - j * BLOCK_N
            s = _scores_of(s, n0, done, scored, rule, buffers, WG, SHAPE, STEPS)
            # Without bands only a task's first tile may need a mask, at the end of its keys.
            if len(STEPS.KEYS) > 0:
                if (n0 < full_start) | (n0 >= full_stop):
                    s = _masked(s, n0, done, rule, buffers, WG, SHAPE, STEPS)
            new_max = gl.maximum(row_max, gl.max(s, 1) * scored.scale2)
            new_max = gl.where(new_max - row_max > 8.0, new_max, row_max)
            base = _finite_base(new_max)
            decay = gl.exp2(row_max - base)
            p = gl.exp2(s * scored.scale2 - base[:, None])
            sums = _times_rows(sums, decay) + _partial_sums(p)
            row_max = new_max
            # This wait's branch ends the basic block: without it ptxas moves the next line's above the softmax.
            mbarrier.wait(buffers.k.filled.index(used % STAGES), (used // STAGES) & 1, pred=j + 1 < count)
            acc = landed(acc, 0)
            mbarrier.arrive(buffers.v.free.index(stage_v))
            p = p if SHAPE.LATE else operand(p, SHAPE.WIDTH_V, DTYPE)

        # Between tasks: the last P V of this one beside the first Q K^T of the next one.
        acc = _scale_all(acc, decay, SHAPE)
        mbarrier.arrive(buffers.q.free.index(slot))
        following = get_task(buffers.tasks, done + 1, 4)
        scored = _scored(following, rule, STEPS)
        some = following.count > 0
        slot = (done + 1) % Q_STAGES
        mbarrier.wait(buffers.q.filled.index(slot), ((done + 1) // Q_STAGES) & 1, pred=some)
        stage = used % STAGES
        stage_v = (used - 1) % STAGES
        phase_v = ((used - 1) // STAGES) & 1
        mbarrier.wait(buffers.k.filled.index(stage), (used // STAGES) & 1, pred=some)
        if SHAPE.TURNS:
            take_turn(WG)
        s = _query_key(buffers, slot, stage, WG, SHAPE)
        p16 = operand(p, SHAPE.WIDTH_V, DTYPE) if SHAPE.LATE else p
        mbarrier.wait(buffers.v.filled.index(stage_v), phase_v)
        acc = _weight_value(p16, buffers, stage_v, acc, SHAPE)
        if SHAPE.TURNS:
            pass_turn(NEXT)
        s = warpgroup_mma_wait(SHAPE.CHUNKS_V, (s,))
        mbarrier.arrive(buffers.k.free.index(stage), pred=some)
        old_max = row_max
        old_sums = sums
        count, top, full_start, full_stop = _extent(following)
        s = _scores_of(s, top, done + 1, scored, rule, buffers, WG, SHAPE, STEPS)
        if (top < full_start) | (top >= full_stop):
            s = _masked(s, top, done + 1, rule, buffers, WG, SHAPE, STEPS)
        p, row_max, sums = _first_softmax(s, scored)
        used += 1
        mbarrier.wait(buffers.k.filled.index(used % STAGES), (used // STAGES) & 1, pred=following.count > 1)
        acc = landed(acc, 0)
        mbarrier.arrive(buffers.v.free.index(stage_v))
        p = p if SHAPE.LATE else operand(p, SHAPE.WIDTH_V, DTYPE)
        # Read once more: the fields that only this needs would take registers from the loops.
        task = get_task(buffers.tasks, done, 4)
        _finish(acc, old_max, old_sums, task, rule, inputs, buffers, WG, SHAPE)
        free_task(buffers.tasks, done)
        acc = zeros(SHAPE.WIDTH_V, SHAPE.CHUNKS_V)
        decay = gl.full([64], 1.0, gl.float32, ROWS)
        done += 1
    if SHAPE.TURNS:
        if WG == 0:
            take_turn(0)
    compat.stores_landed()


@gluon.jit
def attention_forward(
    q, k, v, out, plain, lse, counter, flags, swizzle, spans, coded_sizes, rules, scoring, operands,
    SHAPE: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    """Persistent: out [B, H, M, Dv] and lse [B, H, M] of all tiles that the counter hands out."""
    GROUPS: gl.constexpr = SHAPE.GROUPS
    DTYPE: gl.constexpr = q.dtype
    Q_TILES: gl.constexpr = SHAPE.Q_STAGES * GROUPS * SHAPE.CHUNKS_D
    q_data = gl.allocate_shared_memory(DTYPE, [Q_TILES, 1, 1, 64, SHAPE.WIDTH_D], matrix(SHAPE.WIDTH_D, 4))
    k_data = gl.allocate_shared_memory(
        DTYPE, [SHAPE.STAGES * SHAPE.CHUNKS_D, 1, 1, SHAPE.BLOCK_N, SHAPE.WIDTH_D], matrix(SHAPE.WIDTH_D, 4)
    )
    v_data = gl.allocate_shared_memory(
        DTYPE, [SHAPE.STAGES * SHAPE.CHUNKS_V, 1, 1, SHAPE.BLOCK_N, SHAPE.WIDTH_V], matrix(SHAPE.WIDTH_V, 4)
    )
    out_data = gl.allocate_shared_memory(DTYPE, [GROUPS, 64, SHAPE.WIDTH_V], matrix(SHAPE.WIDTH_V, 2))
    q_filled, q_free = ring_barriers(SHAPE.Q_STAGES, GROUPS)
    k_filled, k_free = ring_barriers(SHAPE.STAGES, GROUPS)
    v_filled, v_free = ring_barriers(SHAPE.STAGES, GROUPS)
    ask = gl.allocate_shared_memory(gl.int64, [TASKS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(TASKS):
        mbarrier.init(ask.index(i), 1)
    buffers = Buffers(
        task_ring(GROUPS + 1), Ring(q_data, q_filled, q_free), Ring(k_data, k_filled, k_free),
        Ring(v_data, v_filled, v_free), out_data, ask,
    )  # fmt: skip
    fence_async_shared()
    inputs = Inputs(q, k, v, out, plain)
    places = None
    if flags is not None:
        places = flags + FLAGS
    rule = Rule(spans, tiles.sizes_of(coded_sizes), rules, scoring, operands, lse, places)
    count = tiles.decoded(swizzle)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, inputs, buffers, rule, SHAPE, STEPS)),
                (_consume, (1, inputs, buffers, rule, SHAPE, STEPS)),
                (produce, (inputs, buffers, rule, SHAPE)),
                (schedule, (buffers, rule, count, counter, SHAPE, STEPS)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, inputs, buffers, rule, SHAPE, STEPS)),
                (_consume, (1, inputs, buffers, rule, SHAPE, STEPS)),
                (_consume, (2, inputs, buffers, rule, SHAPE, STEPS)),
                (produce, (inputs, buffers, rule, SHAPE)),
                (schedule, (buffers, rule, count, counter, SHAPE, STEPS)),
            ],
            [4, 4, 1, 1],
            [160, 160, 24, 24],
        )

    if flags is not None:
        _repair(inputs, rule, count, SHAPE, STEPS)


@gluon.jit
def _repair(inputs, rule, swizzle, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """Attend again where a warpgroup of this program found NaN. It comes last, because registers that it needs would be
    spilled in the main loops."""
    BLOCK_M: gl.constexpr = 64 * SHAPE.GROUPS
    program = gl.program_id(0)
    if gl.load(rule.flags + program) != 0:
        per_head, heads = tasks_of(rule.spans, rule.sizes, BLOCK_M)
        total = per_head * heads
        places = rule.flags + gl.num_programs(0)
        for place in range(0, total * SHAPE.GROUPS):
            if gl.load(places + place) == program + 1:
                task = query_task(
                    place % total, swizzle, rule.spans, rule.sizes, rule.rules, BLOCK_M, SHAPE.BLOCK_N,
                    SHAPE.BOTTOM_RIGHT, STEPS, 4,
                )  # fmt: skip
                steps = _scored(task, rule, STEPS).steps
                first = task.row + place // total * 64
                attend_carefully(first, task, steps, rule, inputs.plain, SHAPE.BOTTOM_RIGHT, SHAPE.BLOCK_N, STEPS)
                gl.store(places + place, 0)
        gl.store(rule.flags + program, 0)
