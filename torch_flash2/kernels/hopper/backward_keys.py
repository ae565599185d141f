"""dK and dV on Hopper, in Gluon for sm90a: a tile of keys stays, the query heads of its group stream past it.

B segments, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
All tiles of scores are transposed, [64 keys, BLOCK_M rows]: P^T and dS^T are then left operands in registers of dV +=
P^T dO and dK += dS^T Q. Up to head dim 128 each warpgroup has 64 keys and both of their accumulators; beyond, two
warpgroups share 64 keys (backward_shared.py). Each element of dK and dV is summed in one order: they are bit-equal from
run to run.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..device import tiles
from . import compat, dropping
from .backward_feeding import clean_rows, masked_rows, meet, next_turn, produce, vector
from .backward_order import additions_to, await_turn, end_turn, keep_order
from .backward_pipeline import (
    MOST_KEYS,
    BackwardInputs,
    BackwardRule,
    Fixed,
    Gradient,
    KeyTasks,
    Streams,
    accumulate,
    advance,
    filled,
    free_key_task,
    freed,
    get_key_task,
    integers,
    left_operands,
    read_key_task,
    resident_tiles,
    scored,
    scores_of,
    seen_by_keys,
    store_gradient,
    tile_ring,
    vector_ring,
    view,
)
from .backward_shared import consume_scores, consume_values
from .backward_sums import add_tile, carry_sums, in_register_order, leaving_to, sums_tile
from .pipeline import Ring, landed, landed_beside, matrix, operand, ring_barriers, steps_of, zeros


@gluon.jit
def _query_gradient(ds, j, k, home, exchange, WG: gl.constexpr, SHAPE: gl.constexpr):
    """Issue this warpgroup's columns of dQ [BLOCK_M, WIDTH_D / GROUPS] of all keys of the program, from dS^T of all
    warpgroups, which meet in shared memory; GROUPS products in flight."""
    BLOCK_M: gl.constexpr = SHAPE.BLOCK
    GROUPS: gl.constexpr = SHAPE.GROUPS
    WIDTH_D: gl.constexpr = SHAPE.WIDTH_D
    COLS: gl.constexpr = WIDTH_D // GROUPS
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    first = j % 2 * GROUPS
    exchange.index(first + WG).store(ds)
    if SHAPE.CARRIED:
        # Behind the barrier, where no store is left for the fence to wait for.
        meet(128 * GROUPS)
        fence_async_shared()
    else:
        fence_async_shared()
        meet(128 * GROUPS)
    dq = gl.zeros([BLOCK_M, COLS], gl.float32, ACC)
    for g in gl.static_range(GROUPS):
        keys = view(k.data, home + g, 64, WIDTH_D).slice(WG * COLS, COLS, dim=1)
        dq = warpgroup_mma(exchange.index(first + g).permute((1, 0)), keys, dq, use_acc=g > 0, is_async=True)
    return dq


@gluon.jit
def _sum_queries(streams, fixed, rule, SHAPE: gl.constexpr):
    """The warpgroup of dQ, where it has one of its own: dS^T of the others times the keys, added to the sums."""
    if SHAPE.TASKS == 1:
        _sum_next(0, 0, streams, fixed, rule, SHAPE)
    else:
        turn = gl.to_tensor(0)
        at = gl.to_tensor(0)
        going = gl.to_tensor(1)
        while going > 0:
            _sum_next(turn, at, streams, fixed, rule, SHAPE)
            going, at = free_key_task(fixed.tasks, turn, at, rule.sizes.group, SHAPE.TASKS, 4)
            turn += 1


@gluon.jit
def _sum_next(turn, at, streams, fixed, rule, SHAPE: gl.constexpr):
    """The turn-th task, if there is one."""
    task = get_key_task(fixed.tasks, turn, SHAPE.TASKS, 4)
    if task.count >= 0:
        filled(fixed.k, turn, SHAPE.TASKS)
        _sum_task(at, turn % SHAPE.TASKS, streams[4], fixed.k, task, rule, SHAPE)


@gluon.jit
def _sum_task(first, slot, exchange, k, task, rule, SHAPE: gl.constexpr):
    """dQ's part of one task, from the first-th fill of the exchange on."""
    BLOCK_M: gl.constexpr = SHAPE.BLOCK
    GROUPS: gl.constexpr = SHAPE.GROUPS
    WIDTH_D: gl.constexpr = SHAPE.WIDTH_D
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH_D, 16])
    h = task.h * rule.sizes.group
    i = task.count * 0
    for j in range(first, first + task.count * rule.sizes.group):
        tile = task.start // BLOCK_M + i
        home = slot * GROUPS + gl.minimum(i, 0)
        filled(exchange, j, 2)
        dq = gl.zeros([BLOCK_M, WIDTH_D], gl.float32, ACC)
        for g in gl.static_range(GROUPS):
            rows = exchange.data.index(j % 2 * GROUPS + g).permute((1, 0))
            dq = warpgroup_mma(rows, view(k.data, home + g, 64, WIDTH_D), dq, use_acc=g > 0, is_async=True)
        dq = warpgroup_mma_wait(0, (dq,))
        mbarrier.arrive(exchange.free.index(j % 2))
        if rule.additions is not None:
            await_turn(rule.additions, j)
        add_tile(sums_tile(h, tile, task, rule, SHAPE), dq, BLOCK_M, WIDTH_D)
        if rule.additions is not None:
            end_turn(rule.additions, j)
        h, i = advance(h, i, task, SHAPE)


@gluon.jit
def _await_next(j, then, streams, task, rule, WG: gl.constexpr, SHAPE: gl.constexpr):
    """Wait for the queries after the j-th tile of rows, if there are any: their buffer."""
    ahead = (j + 1) % SHAPE.STAGES
    mbarrier.wait(streams[0].filled.index(ahead), ((j + 1) // SHAPE.STAGES) & 1, pred=then.more)
    if rule.spans.cu_q is not None or rule.spans.used_q is not None:
        if then.more:
            clean_rows(j + 1, then.m0, streams, task, rule, WG, SHAPE)
    return ahead


@gluon.jit
def _step(at, now, dk, dv, following, kept, draw, streams, fixed, task, rule, WG: gl.constexpr, MASKED: gl.constexpr,
          SHAPE: gl.constexpr, STEPS: gl.constexpr):  # fmt: skip
    """dK and dV with the j-th tile of rows, the one from row m0 of head h, and dQ's part where it is summed here; the
    keys are in the home-th buffer, the task's first tile was the first-th: `at` is (j, h, m0, first, home). Also what
    comes next, as Turn. With `AHEAD` `following` are the tile's products with the keys, and those of the next tile come
    back; `kept` are keys and values in registers."""
    j, h, m0, first, home = at
    BLOCK_M: gl.constexpr = SHAPE.BLOCK
    CHUNKS_D: gl.constexpr = SHAPE.CHUNKS_D
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    WIDTH_D: gl.constexpr = SHAPE.WIDTH_D
    WIDTH_V: gl.constexpr = SHAPE.WIDTH_V
    SHARED_SUMS: gl.constexpr = rule.aside is not None and not SHAPE.APART
    # How many products dV may leave in flight: those of S and of dK.
    BEHIND: gl.constexpr = 2 * CHUNKS_D if SHAPE.AHEAD else CHUNKS_D
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    ROWS: gl.constexpr = gl.SliceLayout(0, S)
    LENGTHS: gl.constexpr = rule.spans.cu_q is not None or rule.spans.used_q is not None
    q, do, lse2s, deltas, exchange, _ = streams
    k, v, tasks = fixed
    DTYPE: gl.constexpr = q.data.dtype
    slot = j % SHAPE.STAGES
    slot_v = j % SHAPE.STAGES_V
    m = m0 + gl.arange(0, BLOCK_M, layout=ROWS)
    n = task.n0 + WG * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    # Never anything but 0, which the compiler does not know: addresses of tiles that stay would take registers.
    again = gl.minimum(m0, 0)
    if SHAPE.AHEAD and not MASKED and not SHARED_SUMS:
        # Another 0 for this body: where both compute equal addresses, ptxas 12.8 leaves out some of the second's, here
        # with Triton 3.7 (test/machine_code.py). Elsewhere it would cost registers.
        again = gl.minimum(j, 0)
        slot += again
        slot_v += again
    mine = home * SHAPE.GROUPS + WG + again
    if SHAPE.AHEAD:
        s = following
    else:
        filled(q, j, SHAPE.STAGES)
        if LENGTHS:
            clean_rows(j, m0, streams, task, rule, WG, SHAPE)
        s = scores_of(kept[0], k, mine * CHUNKS_D, q, slot, BLOCK_M, WIDTH_D, CHUNKS_D)
    AFTER: gl.constexpr = SHAPE.AHEAD and SHARED_SUMS
    if not AFTER:
        lse2 = vector(lse2s, j, rule, SHAPE.STAGES, ROWS)
    filled(do, j, SHAPE.STAGES_V)
    then = next_turn(j, h, m0, first, home, tasks, rule, SHAPE)
    dp = scores_of(kept[1], v, mine * CHUNKS_V, do, slot_v, BLOCK_M, WIDTH_V, CHUNKS_V)
    if not SHAPE.AHEAD:
        s = warpgroup_mma_wait(CHUNKS_V, (s,))
    if AFTER:
        # A branch, before which no exponential is taken: all of dP is issued first.
        filled(do, j, SHAPE.STAGES_V)
        lse2 = vector(lse2s, j, rule, SHAPE.STAGES, ROWS)
    x, slope = scored(s, m[None, :], n[:, None], task.shift, now, rule.scoring, STEPS)
    p = gl.exp2(x * rule.scoring.scale2 - lse2[None, :])
    if MASKED:
        p = gl.where(seen_by_keys(tasks, home, m, WG * 64, S), p, 0.0)
    # Before the next branch: P and the slope both, in fp32, would be spilled there.
    weight = p * slope
    bits = dropping.kept_keys(draw, h, m0, BLOCK_M)
    p = dropping.drop_keys(p, bits)
    dv = accumulate(operand(p, WIDTH_V, DTYPE), do.data, slot_v * CHUNKS_V, dv, BLOCK_M, WIDTH_V, CHUNKS_V)
    # This wait's branch ends the basic block: without it ptxas moves the next line's wait above the exponentials.
    filled(do, j, SHAPE.STAGES_V)
    dp = warpgroup_mma_wait(CHUNKS_V, (dp,))
    if len(bits) > 0:
        dp = dropping.drop_keys(dp, bits) * rule.scoring.inverse_keep
    if SHAPE.AHEAD and not SHARED_SUMS:
        # S of the next tile, beside dV and the arithmetic of dS.
        ahead = _await_next(j, then, streams, task, rule, WG, SHAPE)
        following = scores_of(kept[0], k, mine * CHUNKS_D, q, ahead, BLOCK_M, WIDTH_D, CHUNKS_D)
    ds = weight * (dp - vector(deltas, j, rule, SHAPE.STAGES_V, ROWS)[None, :])
    if MASKED:
        # A masked value may be NaN, and 0 * NaN is NaN.
        ds = gl.where(seen_by_keys(tasks, home, m, WG * 64, S), ds, 0.0)
    ds = ds.to(DTYPE)
    COLS: gl.constexpr = WIDTH_D // SHAPE.GROUPS
    if SHARED_SUMS:
        dq = _query_gradient(ds, j, k, home * SHAPE.GROUPS + again, exchange, WG, SHAPE)
    elif rule.aside is not None:
        freed(exchange, j, 2)
        exchange.data.index(j % 2 * SHAPE.GROUPS + WG).store(ds)
        fence_async_shared()
        mbarrier.arrive(exchange.filled.index(j % 2))
    dk = accumulate(operand(ds, WIDTH_D, DTYPE), q.data, slot * CHUNKS_D, dk, BLOCK_M, WIDTH_D, CHUNKS_D)
    if SHARED_SUMS:
        dq, dv = landed_beside(dq, dv, CHUNKS_D)
        add_tile(sums_tile(h, m0 // BLOCK_M, task, rule, SHAPE) + WG * (BLOCK_M * COLS), dq, BLOCK_M, COLS)
        if SHAPE.AHEAD:
            # S of the next tile behind dK: where dQ was there are registers for it now.
            ahead = _await_next(j, then, streams, task, rule, WG, SHAPE)
            following = scores_of(kept[0], k, mine * CHUNKS_D, q, ahead, BLOCK_M, WIDTH_D, CHUNKS_D)
    else:
        dv = landed(dv, BEHIND)
    mbarrier.arrive(do.free.index(slot_v))
    if SHAPE.AHEAD:
        following, dk = landed_beside(following, dk, 0)
    else:
        dk = landed(dk, 0)
    mbarrier.arrive(q.free.index(slot))
    return dk, dv, following, then


@gluon.jit
def _step_carried(at, dk, dv, s, streams, fixed, task, rule, WG: gl.constexpr, MASKED: gl.constexpr,
                  SHAPE: gl.constexpr):  # fmt: skip
    """`_step` where another warp has TMA add dQ's products to the sums. The tile's S comes in, that of the next one
    comes back.

    Additions from registers (`add_tile`) keep these until memory has taken them, 64 bytes a clock, and all that reads
    or writes shared memory waits behind them. With them a turn takes 3820 cycles, of which tensor cores work 2560, so
    3600 (ncu, H200, 2026-11-21).
    """
    j, h, m0, first, home = at
    BLOCK_M: gl.constexpr = SHAPE.BLOCK
    WIDTH_D: gl.constexpr = SHAPE.WIDTH_D
    WIDTH_V: gl.constexpr = SHAPE.WIDTH_V
    GROUPS: gl.constexpr = SHAPE.GROUPS
    COLS: gl.constexpr = WIDTH_D // GROUPS
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    ROWS: gl.constexpr = gl.SliceLayout(0, S)
    q, do, lse2s, deltas, exchange, leaving = streams
    k, v, tasks = fixed
    DTYPE: gl.constexpr = q.data.dtype
    slot = j % SHAPE.STAGES
    slot_v = j % SHAPE.STAGES_V
    m = m0 + gl.arange(0, BLOCK_M, layout=ROWS)
    # Never anything but 0, which the compiler does not know: addresses of tiles that stay would take registers.
    again = gl.minimum(m0, 0)
    mine = home * GROUPS + WG + again
    # Before dP, which takes all that shared memory can give; the exponentials wait for it, and so dP begins first.
    lse2 = vector(lse2s, j, rule, SHAPE.STAGES, ROWS)
    filled(do, j, SHAPE.STAGES_V)
    then = next_turn(j, h, m0, first, home, tasks, rule, SHAPE)
    dp = scores_of((), v, mine, do, slot_v, BLOCK_M, WIDTH_V, 1)
    p = gl.exp2(s * rule.scoring.scale2 - lse2[None, :])
    if MASKED:
        p = gl.where(seen_by_keys(tasks, home, m, WG * 64, S), p, 0.0)
    dv = accumulate(operand(p, WIDTH_V, DTYPE), do.data, slot_v, dv, BLOCK_M, WIDTH_V, 1)
    dp = warpgroup_mma_wait(1, (dp,))
    ds = p * (dp - vector(deltas, j, rule, SHAPE.STAGES_V, ROWS)[None, :])
    if MASKED:
        # A masked value may be NaN, and 0 * NaN is NaN.
        ds = gl.where(seen_by_keys(tasks, home, m, WG * 64, S), ds, 0.0)
    ds = ds.to(DTYPE)
    dq = _query_gradient(ds, j, k, home * GROUPS + again, exchange, WG, SHAPE)
    dk = accumulate(operand(ds, WIDTH_D, DTYPE), q.data, slot, dk, BLOCK_M, WIDTH_D, 1)
    ahead = _await_next(j, then, streams, task, rule, WG, SHAPE)
    dq, dv = landed_beside(dq, dv, 1)
    mbarrier.wait(leaving.free.index(WG), (j & 1) ^ 1)
    leaving.data.index(WG).store(in_register_order(dq, BLOCK_M, COLS))
    mbarrier.arrive(leaving.filled.index(WG))
    s = scores_of((), k, mine, q, ahead, BLOCK_M, WIDTH_D, 1)
    s, dk = landed_beside(s, dk, 0)
    return dk, dv, s, then


@gluon.jit
def _consume(WG: gl.constexpr, dk_to, dv_to, streams, fixed, rule, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """A warpgroup: of each task dK and dV of 64 keys, and dQ's part where it is summed here."""
    if SHAPE.TASKS == 1:
        _consume_next(WG, 0, 0, dk_to, dv_to, streams, fixed, rule, SHAPE, STEPS)
    else:
        turn = gl.to_tensor(0)
        at = gl.to_tensor(0)
        going = gl.to_tensor(1)
        while going > 0:
            _consume_next(WG, turn, at, dk_to, dv_to, streams, fixed, rule, SHAPE, STEPS)
            going, at = free_key_task(fixed.tasks, turn, at, rule.sizes.group, SHAPE.TASKS, 4)
            turn += 1


@gluon.jit
def _consume_next(WG: gl.constexpr, turn, at, dk_to, dv_to, streams, fixed, rule, SHAPE: gl.constexpr,
                  STEPS: gl.constexpr):  # fmt: skip
    """The turn-th task, if there is one."""
    task = get_key_task(fixed.tasks, turn, SHAPE.TASKS, 4)
    if task.count >= 0:
        filled(fixed.k, turn, SHAPE.TASKS)
        filled(fixed.v, turn, SHAPE.TASKS)
        _task_gradients(WG, at, turn % SHAPE.TASKS, dk_to, dv_to, streams, fixed, task, rule, SHAPE, STEPS)


@gluon.jit
def _task_gradients(WG: gl.constexpr, first, home, dk_to, dv_to, streams, fixed, task, rule, SHAPE: gl.constexpr,
                    STEPS: gl.constexpr):  # fmt: skip
    """A warpgroup's part of a task, whose keys are in the home-th buffer, from the first-th fill of the rings on."""
    BLOCK_M: gl.constexpr = SHAPE.BLOCK
    CHUNKS_D: gl.constexpr = SHAPE.CHUNKS_D
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    WIDTH_D: gl.constexpr = SHAPE.WIDTH_D
    WIDTH_V: gl.constexpr = SHAPE.WIDTH_V
    q, _, _, _, exchange, _ = streams
    k, v, _ = fixed
    dk = zeros(WIDTH_D, CHUNKS_D)
    dv = zeros(WIDTH_V, CHUNKS_V)
    h = task.h * rule.sizes.group
    steps = steps_of(h, task, rule, STEPS)
    draw = dropping.begin_keys(task, rule, WG)
    some = task.count > 0
    stop = first + task.count * rule.sizes.group
    mine = home * SHAPE.GROUPS + WG
    kept_k = left_operands(k.data, mine * CHUNKS_D, BLOCK_M, WIDTH_D, SHAPE.KEPT)
    kept_v = left_operands(v.data, mine * CHUNKS_V, BLOCK_M, WIDTH_V, SHAPE.KEPT_V)
    kept = (kept_k, kept_v)
    s = task.start * 0
    if SHAPE.AHEAD:
        slot = first % SHAPE.STAGES
        mbarrier.wait(q.filled.index(slot), (first // SHAPE.STAGES) & 1, pred=some)
        if rule.spans.cu_q is not None or rule.spans.used_q is not None:
            if some:
                clean_rows(first, task.start, streams, task, rule, WG, SHAPE)
        s = warpgroup_mma_wait(0, (scores_of(kept[0], k, mine * CHUNKS_D, q, slot, BLOCK_M, WIDTH_D, CHUNKS_D),))
    j = gl.to_tensor(first)
    m0 = task.start
    masks = masked_rows(m0, home, fixed.tasks)
    more = some
    while more:
        now = steps
        if SHAPE.GROUPED:
            now = steps_of(h, task, rule, STEPS)
        # Two bodies, so that a tile without a mask is worked on without a branch.
        if SHAPE.CARRIED:
            tile = (j, h, m0, first, home)
            if masks:
                dk, dv, s, then = _step_carried(tile, dk, dv, s, streams, fixed, task, rule, WG, True, SHAPE)
            else:
                dk, dv, s, then = _step_carried(tile, dk, dv, s, streams, fixed, task, rule, WG, False, SHAPE)
        elif masks:
            dk, dv, s, then = _step((j, h, m0, first, home), now, dk, dv, s, kept, draw, streams, fixed, task, rule, WG,
                                    True, SHAPE, STEPS)  # fmt: skip
        else:
            dk, dv, s, then = _step((j, h, m0, first, home), now, dk, dv, s, kept, draw, streams, fixed, task, rule, WG,
                                    False, SHAPE, STEPS)  # fmt: skip
        h, m0, masks, more = then
        j += 1
    task = read_key_task(fixed.tasks, home, 4)
    row = task.n0 + WG * 64
    store_gradient(dv_to, dv, rule.scoring.inverse_keep, v.data, mine * CHUNKS_V, row, task.stored, task.used_k,
                   task.batch_k, task.h, task.start_k, rule.spans.cu_k, WIDTH_V)  # fmt: skip
    # dK leaves through the tiles of keys, which dQ's products read.
    if rule.aside is not None:
        if SHAPE.APART:
            freed(exchange, stop + 1, 2)
        else:
            meet(128 * SHAPE.GROUPS)
    store_gradient(dk_to, dk, rule.scoring.scale, k.data, mine * CHUNKS_D, row, task.stored, task.used_k, task.batch_k,
                   task.h, task.start_k, rule.spans.cu_k, WIDTH_D)  # fmt: skip
    compat.store_wait(0)


@gluon.jit
def backward_keys(
    q, k, v, do, stats, dk, dv, sums, outputs, spans, coded_sizes, rules, scoring, operands,
    SHAPE: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one key head, summed over the query heads of its group: 64 keys a warpgroup, or
    (SHAPE.SHARED) 64 keys that two warpgroups share. `sums` are dQ's as TMA sees them, where it adds to them, or
    None."""
    GROUPS: gl.constexpr = SHAPE.GROUPS
    BLOCK_M: gl.constexpr = SHAPE.BLOCK
    SHARED: gl.constexpr = SHAPE.SHARED
    DTYPE: gl.constexpr = q.dtype
    KEYS: gl.constexpr = 1 if SHARED else GROUPS
    inputs = BackwardInputs(q, k, v, do, stats)
    dk_to = Gradient(dk, outputs.k)
    dv_to = Gradient(dv, outputs.v)
    key_tiles = resident_tiles(SHAPE.TASKS, KEYS * SHAPE.CHUNKS_D, 64, SHAPE.WIDTH_D, DTYPE)
    value_tiles = resident_tiles(SHAPE.TASKS, KEYS * SHAPE.CHUNKS_V, 64, SHAPE.WIDTH_V, DTYPE)
    # The warp that carries sums frees tiles of rows for all.
    READERS_M: gl.constexpr = 1 if SHAPE.CARRIED else GROUPS
    query_tiles = tile_ring(SHAPE.STAGES, READERS_M, BLOCK_M, SHAPE.WIDTH_D, SHAPE.CHUNKS_D, DTYPE)
    do_tiles = tile_ring(SHAPE.STAGES_V, READERS_M, BLOCK_M, SHAPE.WIDTH_V, SHAPE.CHUNKS_V, DTYPE)
    exchange = None
    if outputs.sums is not None:
        exchange = gl.allocate_shared_memory(DTYPE, [2 * GROUPS, 64, BLOCK_M], matrix(BLOCK_M, 2))
        if SHAPE.APART:
            exchange_filled, exchange_free = ring_barriers(2, 1, GROUPS)
            exchange = Ring(exchange, exchange_filled, exchange_free)
    lse2s = vector_ring(SHAPE.STAGES, BLOCK_M, query_tiles, spans.cu_q)
    deltas = vector_ring(SHAPE.STAGES_V, BLOCK_M, do_tiles, spans.cu_q)
    leaving = None
    if SHAPE.CARRIED:
        leaving = leaving_to(sums, SHAPE)
    streams = Streams(query_tiles, do_tiles, lse2s, deltas, exchange, leaving)
    additions = None
    if outputs.added is not None:
        additions = additions_to(outputs.added)
    rule = BackwardRule(
        spans, tiles.sizes_of(coded_sizes), rules, scoring, operands, outputs.stats.pitch, outputs.sums, additions
    )
    stops = None
    if SHAPE.LEFT or spans.cu_q is not None or spans.used_q is not None:
        stops = integers(SHAPE.TASKS, MOST_KEYS)
    # Who reads a task: all warpgroups, and the warps that keep additions in order.
    READERS: gl.constexpr = GROUPS + (1 if SHAPE.APART or SHAPE.CARRIED else 0) + (0 if outputs.added is None else 2)
    tasks_filled, tasks_free = ring_barriers(SHAPE.TASKS, READERS)
    tasks = KeyTasks(integers(SHAPE.TASKS * 16, 1), integers(SHAPE.TASKS, MOST_KEYS), stops, tasks_filled, tasks_free)
    fixed = Fixed(key_tiles, value_tiles, tasks)
    order = (tiles.decoded(outputs.order[0]), tiles.decoded(outputs.order[1]))
    total = tiles.decoded(outputs.order[2])
    if SHARED:
        handed_filled, handed_free = ring_barriers(2, 1)
        handed_data = gl.allocate_shared_memory(DTYPE, [2, 64, BLOCK_M], matrix(BLOCK_M, 2))
        handed = Ring(handed_data, handed_filled, handed_free)
        fence_async_shared()
        gl.warp_specialize(
            [
                (consume_values, (dv_to, streams, fixed, handed, rule, SHAPE, STEPS)),
                (consume_scores, (dk_to, streams, fixed, handed, rule, SHAPE, STEPS)),
                (produce, (inputs, outputs, order, streams, fixed, total, rule, KEYS, SHAPE, STEPS)),
            ],
            [4, 1],
            [240, 24],
        )
    elif additions is not None:
        fence_async_shared()
        gl.warp_specialize(
            [
                (_consume, (0, dk_to, dv_to, streams, fixed, rule, SHAPE, STEPS)),
                (_consume, (1, dk_to, dv_to, streams, fixed, rule, SHAPE, STEPS)),
                (_sum_queries, (streams, fixed, rule, SHAPE)),
                (produce, (inputs, outputs, order, streams, fixed, total, rule, KEYS, SHAPE, STEPS)),
                (keep_order, (False, tasks, rule, SHAPE)),
                (keep_order, (True, tasks, rule, SHAPE)),
            ],
            [4, 4, 1, 1, 1],
            [208, 64, 24, 24, 24],
        )
    elif SHAPE.APART:
        fence_async_shared()
        gl.warp_specialize(
            [
                (_consume, (0, dk_to, dv_to, streams, fixed, rule, SHAPE, STEPS)),
                (_consume, (1, dk_to, dv_to, streams, fixed, rule, SHAPE, STEPS)),
                (_sum_queries, (streams, fixed, rule, SHAPE)),
                (produce, (inputs, outputs, order, streams, fixed, total, rule, KEYS, SHAPE, STEPS)),
            ],
            [4, 4, 1],
            [208, 64, 24],
        )
    elif SHAPE.CARRIED:
        fence_async_shared()
        gl.warp_specialize(
            [
                (_consume, (0, dk_to, dv_to, streams, fixed, rule, SHAPE, STEPS)),
                (_consume, (1, dk_to, dv_to, streams, fixed, rule, SHAPE, STEPS)),
                (produce, (inputs, outputs, order, streams, fixed, total, rule, KEYS, SHAPE, STEPS)),
                (carry_sums, (streams, tasks, rule, SHAPE)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
    else:
        fence_async_shared()
        gl.warp_specialize(
            [
                (_consume, (0, dk_to, dv_to, streams, fixed, rule, SHAPE, STEPS)),
                (_consume, (1, dk_to, dv_to, streams, fixed, rule, SHAPE, STEPS)),
                (produce, (inputs, outputs, order, streams, fixed, total, rule, KEYS, SHAPE, STEPS)),
            ],
            [4, 1],
            [240, 24],
        )
