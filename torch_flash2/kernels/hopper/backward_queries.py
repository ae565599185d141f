"""dQ on Hopper, in Gluon for sm90a: a tile of query rows stays, keys and values stream past it.

B segments, H query heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
dP = dO V^T, dS = P * (dP - delta), dQ = scale dS K, with P recomputed from the lse (Dao et al. 2022, arXiv 2205.14135,
appendix B.4). A program has a producer warp, which loads by TMA, and warpgroups of 64 query rows each; no warpgroup
waits for another, and each element is summed in one order: results are bit-equal from run to run.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)

from ..device import bands, scores, tiles
from . import compat, dropping
from .backward_pipeline import (
    BackwardInputs,
    BackwardRule,
    Gradient,
    QueryTiles,
    accumulate,
    filled,
    freed,
    outer,
    resident_tiles,
    scored,
    store_gradient,
    tile_ring,
)
from .pipeline import landed, load_tiles, operand, query_task, tasks_of, zeros


@gluon.jit
def _produce(inputs, rings, task, rule, SHAPE: gl.constexpr):
    """The producer warp: the rows' tiles once, then keys and values downwards from the task's top."""
    GROUPS: gl.constexpr = SHAPE.GROUPS
    BLOCK_N: gl.constexpr = SHAPE.BLOCK
    CHUNKS_D: gl.constexpr = SHAPE.CHUNKS_D
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    WIDTH_D: gl.constexpr = SHAPE.WIDTH_D
    WIDTH_V: gl.constexpr = SHAPE.WIDTH_V
    q, do, k, v = rings
    head = task.h // rule.sizes.group
    mbarrier.expect(q.filled.index(0), 64 * GROUPS * WIDTH_D * CHUNKS_D * 2)
    for w in gl.static_range(GROUPS):
        load_tiles(inputs.q, task.start_q, task.batch_q, task.h, task.row + w * 64, q.filled.index(0), q.data,
                   w * CHUNKS_D, WIDTH_D, CHUNKS_D)  # fmt: skip
    for j in range(task.count):
        row = task.top - j * BLOCK_N
        freed(k, j, SHAPE.STAGES)
        slot = j % SHAPE.STAGES
        mbarrier.expect(k.filled.index(slot), BLOCK_N * WIDTH_D * CHUNKS_D * 2)
        load_tiles(inputs.k, task.start_k, task.batch_k, head, row, k.filled.index(slot), k.data, slot * CHUNKS_D,
                   WIDTH_D, CHUNKS_D)  # fmt: skip
        if j == 0:
            mbarrier.expect(do.filled.index(0), 64 * GROUPS * WIDTH_V * CHUNKS_V * 2)
            for w in gl.static_range(GROUPS):
                load_tiles(inputs.do, task.start_q, task.batch_q, task.h, task.row + w * 64, do.filled.index(0),
                           do.data, w * CHUNKS_V, WIDTH_V, CHUNKS_V)  # fmt: skip
        freed(v, j, SHAPE.STAGES_V)
        slot_v = j % SHAPE.STAGES_V
        mbarrier.expect(v.filled.index(slot_v), BLOCK_N * WIDTH_V * CHUNKS_V * 2)
        load_tiles(inputs.v, task.start_k, task.batch_k, head, row, v.filled.index(slot_v), v.data, slot_v * CHUNKS_V,
                   WIDTH_V, CHUNKS_V)  # fmt: skip


@gluon.jit
def _visible(m, n, task, rule, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """Which keys n [BLOCK_N] the rows m [64] see: [64, BLOCK_N]."""
    KEYS: gl.constexpr = STEPS.KEYS
    shift = task.used_k - task.used_q if SHAPE.BOTTOM_RIGHT else task.used_k * 0
    lo, hi = bands.intersect(
        gl.minimum(m, task.used_q - 1), task.used_k, task.used_q, task.used_k, shift, rule.rules.numbers, KEYS
    )
    visible = n[None, :] < hi[:, None]
    if SHAPE.LEFT:
        visible = visible & (n[None, :] >= lo[:, None])
    return visible


@gluon.jit
def _note_nan(acc, place, flags, WIDTH: gl.constexpr):
    """Set the flag at `place` where a thread holds NaN (or infinities of both signs in one row)."""
    for c in gl.static_range(len(acc)):
        sums = gl.sum(gl.reshape(acc[c], [64, WIDTH // 8, 4, 2]), 1)  # [64, 4, 2]: what each thread holds
        nan = sums != sums
        gl.store(flags + place + nan.to(gl.int32) * 0, nan.to(gl.int32), mask=nan)


@gluon.jit
def _place(task, rule, BLOCK_M: gl.constexpr):
    """The number that `tiles.locate` gives the program which owns this tile in the portable kernels."""
    per_head, _ = tasks_of(rule.spans, rule.sizes, BLOCK_M)
    tile = task.row // BLOCK_M
    if rule.spans.cu_q is None:
        place = (task.b * rule.sizes.H + task.h) * per_head + (per_head - 1 - tile)
    else:
        tile += gl.load(rule.spans.cu_q + task.b) // BLOCK_M + task.b
        place = (per_head - 1 - tile) * rule.sizes.H + task.h
    return place


@gluon.jit
def _consume(WG: gl.constexpr, stats, gradient, rings, task, rule, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """A warpgroup: dQ of 64 query rows."""
    BLOCK_N: gl.constexpr = SHAPE.BLOCK
    CHUNKS_D: gl.constexpr = SHAPE.CHUNKS_D
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    WIDTH_D: gl.constexpr = SHAPE.WIDTH_D
    WIDTH_V: gl.constexpr = SHAPE.WIDTH_V
    q, do, k, v = rings
    DTYPE: gl.constexpr = q.data.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    m = task.row + WG * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    at = gl.cast(task.batch_q * rule.sizes.H + task.h, gl.int64) * rule.pitch + task.start_q
    # Rows past the last one of a tensor have statistics up to the pitch.
    inside = task.start_q + m < rule.pitch
    lse2 = gl.load(stats.lse2 + at + m, mask=inside, other=float("inf"))
    delta = gl.load(stats.delta + at + m, mask=inside, other=0.0)
    segment = gl.minimum(task.b, rule.sizes.B - 1)
    steps = scores.prepare(rule.operands.steps, segment, task.h, task.start_q, task.start_k, STEPS)
    draw = dropping.begin(task, rule, WG)
    dq = zeros(WIDTH_D, CHUNKS_D)
    some = task.count > 0
    mbarrier.wait(q.filled.index(0), 0)
    mbarrier.wait(do.filled.index(0), 0, pred=some)
    mbarrier.wait(k.filled.index(0), 0, pred=some)
    for j in range(task.count):
        slot = j % SHAPE.STAGES
        slot_v = j % SHAPE.STAGES_V
        n0 = task.top - j * BLOCK_N
        # Never anything but 0, which the compiler does not know: addresses of tiles that stay would take registers.
        again = gl.minimum(n0, 0)
        s = outer(q.data, WG * CHUNKS_D + again, k.data, slot * CHUNKS_D, BLOCK_N, WIDTH_D, CHUNKS_D)
        filled(v, j, SHAPE.STAGES_V)
        dp = outer(do.data, WG * CHUNKS_V + again, v.data, slot_v * CHUNKS_V, BLOCK_N, WIDTH_V, CHUNKS_V)
        s = warpgroup_mma_wait(CHUNKS_V, (s,))
        n = n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S))
        shift = task.used_k - task.used_q if SHAPE.BOTTOM_RIGHT else task.used_k * 0
        s, slope = scored(s, m[:, None], n[None, :], shift, steps, rule.scoring, STEPS)
        p = gl.exp2(s * rule.scoring.scale2 - lse2[:, None]) * slope
        # This wait's branch ends the basic block: without it ptxas moves the next line's wait above the exponentials.
        filled(v, j, SHAPE.STAGES_V)
        dp = warpgroup_mma_wait(0, (dp,))
        mbarrier.arrive(v.free.index(slot_v))
        if rule.operands.seed is not None:
            dp = dropping.drop(dp, dropping.kept(draw, n0, BLOCK_N)) * rule.scoring.inverse_keep
        ds = p * (dp - delta[:, None])
        if (n0 < task.full_start) | (n0 >= task.full_stop):
            # A masked key or value may be NaN, and 0 * NaN is NaN.
            ds = gl.where(_visible(m, n, task, rule, SHAPE, STEPS), ds, 0.0)
        dq = accumulate(operand(ds, WIDTH_D, DTYPE), k.data, slot * CHUNKS_D, dq, BLOCK_N, WIDTH_D, CHUNKS_D)
        following = j + 1
        mbarrier.wait(
            k.filled.index(following % SHAPE.STAGES), (following // SHAPE.STAGES) & 1, pred=following < task.count
        )
        dq = landed(dq, 0)
        mbarrier.arrive(k.free.index(slot))
    if rule.aside is not None:
        _note_nan(dq, _place(task, rule, 64 * SHAPE.GROUPS), rule.aside, WIDTH_D)
    store_gradient(
        gradient, dq, rule.scoring.scale, q.data, WG * CHUNKS_D, task.row + WG * 64, task.stored, task.used_q,
        task.batch_q, task.h, task.start_q, rule.spans.cu_q, WIDTH_D,
    )  # fmt: skip
    compat.store_wait(0)


@gluon.jit
def backward_queries(
    q, k, v, do, dq, outputs, coded_order, spans, coded_sizes, rules, scoring, operands,
    SHAPE: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    """dQ of one tile of 64 * GROUPS query rows of one head."""
    GROUPS: gl.constexpr = SHAPE.GROUPS
    DTYPE: gl.constexpr = q.dtype
    BLOCK_M: gl.constexpr = 64 * GROUPS
    inputs = BackwardInputs(q, k, v, do, None)
    gradient = Gradient(dq, outputs.q)
    stats = outputs.stats
    query_tiles = resident_tiles(1, GROUPS * SHAPE.CHUNKS_D, 64, SHAPE.WIDTH_D, DTYPE)
    do_tiles = resident_tiles(1, GROUPS * SHAPE.CHUNKS_V, 64, SHAPE.WIDTH_V, DTYPE)
    key_tiles = tile_ring(SHAPE.STAGES, GROUPS, SHAPE.BLOCK, SHAPE.WIDTH_D, SHAPE.CHUNKS_D, DTYPE)
    value_tiles = tile_ring(SHAPE.STAGES_V, GROUPS, SHAPE.BLOCK, SHAPE.WIDTH_V, SHAPE.CHUNKS_V, DTYPE)
    rings = QueryTiles(query_tiles, do_tiles, key_tiles, value_tiles)
    fence_async_shared()
    rule = BackwardRule(spans, tiles.sizes_of(coded_sizes), rules, scoring, operands, stats.pitch, outputs.flags, None)
    order = (tiles.decoded(coded_order[0]), tiles.decoded(coded_order[1]))
    task = query_task(
        gl.program_id(0), order, spans, rule.sizes, rules, BLOCK_M, SHAPE.BLOCK, SHAPE.BOTTOM_RIGHT,
        STEPS, 4,
    )  # fmt: skip
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, stats, gradient, rings, task, rule, SHAPE, STEPS)),
                (_consume, (1, stats, gradient, rings, task, rule, SHAPE, STEPS)),
                (_produce, (inputs, rings, task, rule, SHAPE)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, stats, gradient, rings, task, rule, SHAPE, STEPS)),
                (_consume, (1, stats, gradient, rings, task, rule, SHAPE, STEPS)),
                (_consume, (2, stats, gradient, rings, task, rule, SHAPE, STEPS)),
                (_produce, (inputs, rings, task, rule, SHAPE)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
