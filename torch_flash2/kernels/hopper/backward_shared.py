"""dK and dV on Hopper for head dims above 128, in Gluon for sm90a: two warpgroups share 64 keys.

B segments, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
One warpgroup makes P and dV, the other dS and dK, and P goes from one to the other through shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from . import compat, dropping
from .backward_feeding import clean_rows, meet, vector
from .backward_pipeline import (
    accumulate,
    advance,
    filled,
    freed,
    get_key_task,
    left_operands,
    scored,
    scores_of,
    seen_by_keys,
    store_gradient,
)
from .pipeline import landed, operand, steps_of, zeros


@gluon.jit
def consume_values(dv_to, streams, fixed, handed, rule, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """The warpgroup of P and dV, 64 keys. It hands on P, times the slope of the score steps, below 0 where dropped."""
    task = get_key_task(fixed.tasks, 0, 1, 4)
    BLOCK_M: gl.constexpr = SHAPE.BLOCK
    CHUNKS_D: gl.constexpr = SHAPE.CHUNKS_D
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    WIDTH_D: gl.constexpr = SHAPE.WIDTH_D
    WIDTH_V: gl.constexpr = SHAPE.WIDTH_V
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    ROWS: gl.constexpr = gl.SliceLayout(0, S)
    q, do, lse2s = streams.q, streams.do, streams.lse2
    k, v, tasks = fixed
    DTYPE: gl.constexpr = q.data.dtype
    LENGTHS: gl.constexpr = rule.spans.cu_q is not None or rule.spans.used_q is not None
    n = task.n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    dv = zeros(WIDTH_V, CHUNKS_V)
    h = task.h * rule.sizes.group
    steps = steps_of(h, task, rule, STEPS)
    draw = dropping.begin_keys(task, rule, 0)
    i = task.count * 0
    mbarrier.wait(k.filled.index(0), 0)
    kept = left_operands(k.data, i, BLOCK_M, WIDTH_D, SHAPE.KEPT)
    for j in range(task.count * rule.sizes.group):
        slot = j % SHAPE.STAGES
        slot_v = j % SHAPE.STAGES_V
        m0 = task.start + i * BLOCK_M
        m = m0 + gl.arange(0, BLOCK_M, layout=ROWS)
        now = steps
        if SHAPE.GROUPED:
            now = steps_of(h, task, rule, STEPS)
        filled(q, j, SHAPE.STAGES)
        if LENGTHS:
            clean_rows(j, m0, streams, task, rule, 0, SHAPE)
        s = scores_of(kept, k, gl.minimum(m0, 0), q, slot, BLOCK_M, WIDTH_D, CHUNKS_D)
        lse2 = vector(lse2s, j, rule, SHAPE.STAGES, ROWS)
        freed(handed, j, 2)
        s = warpgroup_mma_wait(0, (s,))
        mbarrier.arrive(q.free.index(slot))
        s, slope = scored(s, m[None, :], n[:, None], task.shift, now, rule.scoring, STEPS)
        p = gl.exp2(s * rule.scoring.scale2 - lse2[None, :])
        if (m0 < task.full_start) | (m0 >= task.full_stop):
            p = gl.where(seen_by_keys(tasks, 0, m, 0, S), p, 0.0)
        weight = p * slope
        if len(draw) > 0:
            bits = dropping.kept_keys(draw, h, m0, BLOCK_M)
            p = dropping.drop_keys(p, bits)
            weight = dropping.drop_keys(weight, bits) * 2.0 - weight
        handed.data.index(j % 2).store(weight.to(DTYPE))
        mbarrier.arrive(handed.filled.index(j % 2))
        filled(do, j, SHAPE.STAGES_V)
        dv = accumulate(operand(p, WIDTH_V, DTYPE), do.data, slot_v * CHUNKS_V, dv, BLOCK_M, WIDTH_V, CHUNKS_V)
        dv = landed(dv, 0)
        mbarrier.arrive(do.free.index(slot_v))
        h, i = advance(h, i, task, SHAPE)
    # The gradient leaves through the tiles of V, which the other warpgroup reads.
    meet(256)
    store_gradient(dv_to, dv, rule.scoring.inverse_keep, v.data, 0, task.n0, task.stored, task.used_k, task.batch_k,
                   task.h, task.start_k, rule.spans.cu_k, WIDTH_V)  # fmt: skip
    compat.store_wait(0)


@gluon.jit
def consume_scores(dk_to, streams, fixed, handed, rule, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """The warpgroup of dS and dK, 64 keys, which is handed P."""
    task = get_key_task(fixed.tasks, 0, 1, 4)
    BLOCK_M: gl.constexpr = SHAPE.BLOCK
    CHUNKS_D: gl.constexpr = SHAPE.CHUNKS_D
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    WIDTH_D: gl.constexpr = SHAPE.WIDTH_D
    WIDTH_V: gl.constexpr = SHAPE.WIDTH_V
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    ROWS: gl.constexpr = gl.SliceLayout(0, S)
    q, do, deltas = streams.q, streams.do, streams.delta
    k, v, tasks = fixed
    DTYPE: gl.constexpr = q.data.dtype
    LENGTHS: gl.constexpr = rule.spans.cu_q is not None or rule.spans.used_q is not None
    dk = zeros(WIDTH_D, CHUNKS_D)
    i = task.count * 0
    mbarrier.wait(v.filled.index(0), 0)
    kept = left_operands(v.data, i, BLOCK_M, WIDTH_V, SHAPE.KEPT_V)
    for j in range(task.count * rule.sizes.group):
        slot = j % SHAPE.STAGES
        slot_v = j % SHAPE.STAGES_V
        m0 = task.start + i * BLOCK_M
        m = m0 + gl.arange(0, BLOCK_M, layout=ROWS)
        filled(do, j, SHAPE.STAGES_V)
        if LENGTHS:
            filled(q, j, SHAPE.STAGES)
            clean_rows(j, m0, streams, task, rule, 1, SHAPE)
        dp = scores_of(kept, v, gl.minimum(m0, 0), do, slot_v, BLOCK_M, WIDTH_V, CHUNKS_V)
        delta = vector(deltas, j, rule, SHAPE.STAGES_V, ROWS)
        filled(handed, j, 2)
        dp = warpgroup_mma_wait(0, (dp,))
        mbarrier.arrive(do.free.index(slot_v))
        p = handed.data.index(j % 2).load(S).to(gl.float32)
        mbarrier.arrive(handed.free.index(j % 2))
        if rule.operands.seed is not None:
            dp = gl.where(p < 0.0, 0.0, dp * rule.scoring.inverse_keep)
            p = gl.abs(p)
        ds = p * (dp - delta[None, :])
        if (m0 < task.full_start) | (m0 >= task.full_stop):
            # A masked value may be NaN, and 0 * NaN is NaN.
            ds = gl.where(seen_by_keys(tasks, 0, m, 0, S), ds, 0.0)
        filled(q, j, SHAPE.STAGES)
        dk = accumulate(operand(ds, WIDTH_D, DTYPE), q.data, slot * CHUNKS_D, dk, BLOCK_M, WIDTH_D, CHUNKS_D)
        dk = landed(dk, 0)
        mbarrier.arrive(q.free.index(slot))
        _, i = advance(i, i, task, SHAPE)
    meet(256)
    store_gradient(dk_to, dk, rule.scoring.scale, k.data, 0, task.n0, task.stored, task.used_k, task.batch_k, task.h,
                   task.start_k, rule.spans.cu_k, WIDTH_D)  # fmt: skip
    compat.store_wait(0)
