"""dK and dV on Hopper, in Gluon for sm90a: a tile of keys stays, the query heads of its group stream past it.

B segments, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
All tiles of scores are transposed, [64 keys, BLOCK_M rows]: P^T and dS^T are then left operands in registers of dV +=
P^T dO and dK += dS^T Q. Up to head dim 128 each warpgroup has 64 keys and both of their accumulators; beyond, two
warpgroups share 64 keys: one makes P and dV, the other dS and dK, and P goes from one to the other through shared
memory. Each element is summed in one order: results are bit-equal from run to run.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..device import scores, tiles
from . import compat
from .backward_pipeline import (
    BackwardInputs,
    BackwardRule,
    Fixed,
    Gradient,
    KeyTasks,
    Streams,
    accumulate,
    add_tile,
    clean,
    copy_vector,
    end_key_tasks,
    filled,
    free_key_task,
    freed,
    get_key_task,
    integers,
    key_place,
    key_task,
    left_operand,
    outer,
    put_key_task,
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
from .pipeline import Ring, barrier_asm, landed, load_tiles, matrix, operand, ring_barriers, tasks_of, zeros


@gluon.jit
def _sync(THREADS: gl.constexpr):
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
def _produce(inputs, outputs, swizzle, streams, fixed, total, rule, KEYS: gl.constexpr, LENGTH: gl.constexpr,
             SHAPE: gl.constexpr, STEPS: gl.constexpr):  # fmt: skip
    """The producer warp: it claims tasks, and loads of each the keys and values and then what passes them."""
    turn = total * 0
    at = total * 0
    index = gl.program_id(0)
    while index < total:
        place = key_place(index, swizzle, rule.spans, rule.sizes, 64 * KEYS)
        slot = turn % SHAPE.TASKS
        freed(fixed.tasks, turn, SHAPE.TASKS)
        _load_keys(inputs, place, slot, fixed.k, fixed.v, KEYS, SHAPE)
        task, starts, stops = key_task(
            place, rule.spans, rule.sizes, rule.rules, 64 * KEYS, SHAPE.BLOCK, LENGTH, SHAPE.BOTTOM_RIGHT, STEPS
        )
        put_key_task(fixed.tasks, slot, task, starts, stops)
        _load_rows(inputs, outputs.stats, streams, at, task, rule, SHAPE)
        at += task.count * rule.sizes.group
        turn += 1
        index = total
        if SHAPE.TASKS > 1:
            # Now that the task's last rows are on their way: who claims early may be left with a long task at the end.
            index = gl.num_programs(0) + gl.atomic_add(outputs.counter, 1)
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
    q, do, lse2, delta, _ = streams
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
        h, i = _advance(h, i, task, SHAPE)


@gluon.jit
def _vector(ring, index, rule, COUNT: gl.constexpr, L: gl.constexpr):
    """The index-th lse2 or delta, once the tile beside it is there."""
    if rule.spans.cu_q is not None:
        filled(ring, index, COUNT)
    return ring.data.index(index % COUNT).load(L)


@gluon.jit
def _advance(h, i, task, SHAPE: gl.constexpr):
    """The head and the tile of rows that come next."""
    i += 1
    if SHAPE.GROUPED:
        last = i == task.count
        h = gl.where(last, h + 1, h)
        i = gl.where(last, 0, i)
    return h, i


@gluon.jit
def _steps_of(h, task, rule, STEPS: gl.constexpr):
    """What the score steps need of one query head."""
    segment = gl.minimum(task.b, rule.sizes.B - 1)
    return scores.prepare(rule.operands.steps, segment, h, task.start_q, task.start_k, STEPS)


@gluon.jit
def _clean_rows(j, m0, streams, task, rule, WG: gl.constexpr, SHAPE: gl.constexpr):
    """Where a tile of rows reaches past its document or into padding: 0 there, whatever is stored, for 0 * NaN is
    NaN. The first warpgroup cleans the queries, the second the output gradients."""
    BLOCK_M: gl.constexpr = SHAPE.BLOCK
    q, do, lse2, delta, _ = streams
    if m0 + BLOCK_M > task.used_q:
        filled(do, j, SHAPE.STAGES_V)
        if WG == 0:
            clean(q, j % SHAPE.STAGES * SHAPE.CHUNKS_D, task.used_q - m0, BLOCK_M, SHAPE.WIDTH_D, SHAPE.CHUNKS_D)
        if WG == 1:
            clean(do, j % SHAPE.STAGES_V * SHAPE.CHUNKS_V, task.used_q - m0, BLOCK_M, SHAPE.WIDTH_V, SHAPE.CHUNKS_V)
        fence_async_shared()
        _sync(128 * SHAPE.GROUPS)


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
    fence_async_shared()
    _sync(128 * GROUPS)
    dq = gl.zeros([BLOCK_M, COLS], gl.float32, ACC)
    for g in gl.static_range(GROUPS):
        keys = view(k.data, home + g, 64, WIDTH_D).slice(WG * COLS, COLS, dim=1)
        dq = warpgroup_mma(exchange.index(first + g).permute((1, 0)), keys, dq, use_acc=g > 0, is_async=True)
    return dq


@gluon.jit
def _sums_tile(h, tile, task, rule, SHAPE: gl.constexpr):
    """Where the sums of dQ of a tile of rows of head h begin."""
    BLOCK_M: gl.constexpr = SHAPE.BLOCK
    per_head, _ = tasks_of(rule.spans, rule.sizes, BLOCK_M)
    if rule.spans.cu_q is None:
        number = (task.b * rule.sizes.H + h) * per_head + tile
    else:
        number = h * per_head + tile + task.start_q // BLOCK_M + task.b
    return rule.aside + gl.cast(number, gl.int64) * (BLOCK_M * SHAPE.WIDTH_D)


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
            going, at = free_key_task(fixed.tasks, turn, at, rule.sizes.group, SHAPE.TASKS)
            turn += 1


@gluon.jit
def _sum_next(turn, at, streams, fixed, rule, SHAPE: gl.constexpr):
    """The turn-th task, if there is one."""
    task = get_key_task(fixed.tasks, turn, SHAPE.TASKS)
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
        add_tile(_sums_tile(h, tile, task, rule, SHAPE), dq, BLOCK_M, WIDTH_D)
        h, i = _advance(h, i, task, SHAPE)


@gluon.jit
def _landed_beside(x, acc, PENDING: gl.constexpr):
    """An accumulator and a tuple of others once at most PENDING products are in flight."""
    done = landed((x,) + acc, PENDING)
    rest = ()
    for c in gl.static_range(len(acc)):
        rest = rest + (done[c + 1],)
    return done[0], rest


@gluon.jit
def _step(j, h, i, now, dk, dv, following, kept, stop, home, streams, fixed, task, rule, WG: gl.constexpr,
          MASKED: gl.constexpr, SHAPE: gl.constexpr, STEPS: gl.constexpr):  # fmt: skip
    """dK and dV with the j-th tile of rows, of which the task's last is before the stop-th, the i-th of head h, and
    dQ's part where it is summed here; the keys are in the home-th buffer. With `AHEAD` `following` are the tile's
    products with the keys, and those of the next tile come back; `kept` are keys and values in registers, or None."""
    BLOCK_M: gl.constexpr = SHAPE.BLOCK
    CHUNKS_D: gl.constexpr = SHAPE.CHUNKS_D
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    WIDTH_D: gl.constexpr = SHAPE.WIDTH_D
    WIDTH_V: gl.constexpr = SHAPE.WIDTH_V
    # How many products dV may leave in flight: those of S and of dK.
    BEHIND: gl.constexpr = 2 * CHUNKS_D if SHAPE.AHEAD else CHUNKS_D
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    ROWS: gl.constexpr = gl.SliceLayout(0, S)
    LENGTHS: gl.constexpr = rule.spans.cu_q is not None or rule.spans.used_q is not None
    q, do, lse2s, deltas, exchange = streams
    k, v, tasks = fixed
    DTYPE: gl.constexpr = q.data.dtype
    slot = j % SHAPE.STAGES
    slot_v = j % SHAPE.STAGES_V
    m0 = task.start + i * BLOCK_M
    m = m0 + gl.arange(0, BLOCK_M, layout=ROWS)
    n = task.n0 + WG * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    # Never anything but 0, which the compiler does not know: addresses of tiles that stay would take registers.
    again = gl.minimum(m0, 0)
    if SHAPE.AHEAD and not MASKED:
        # Another 0 for this body: where both compute equal addresses, ptxas 12.8 leaves out some of the second's, here
        # with Triton 3.7 (test/machine_code.py). Elsewhere it would cost registers.
        again = gl.minimum(i, 0)
        slot += again
        slot_v += again
    mine = home * SHAPE.GROUPS + WG + again
    if SHAPE.AHEAD:
        s = following
    else:
        filled(q, j, SHAPE.STAGES)
        if LENGTHS:
            _clean_rows(j, m0, streams, task, rule, WG, SHAPE)
        s = scores_of(kept[0], k, mine * CHUNKS_D, q, slot, BLOCK_M, WIDTH_D, CHUNKS_D)
    lse2 = _vector(lse2s, j, rule, SHAPE.STAGES, ROWS)
    filled(do, j, SHAPE.STAGES_V)
    dp = scores_of(kept[1], v, mine * CHUNKS_V, do, slot_v, BLOCK_M, WIDTH_V, CHUNKS_V)
    if not SHAPE.AHEAD:
        s = warpgroup_mma_wait(CHUNKS_V, (s,))
    x, slope = scored(s, m[None, :], n[:, None], task.shift, now, rule.scoring, STEPS)
    p = gl.exp2(x * rule.scoring.scale2 - lse2[None, :])
    if MASKED:
        p = gl.where(seen_by_keys(tasks, home, m, WG * 64, S), p, 0.0)
    # Before the next branch: P and the slope both, in fp32, would be spilled there.
    weight = p * slope
    dv = accumulate(operand(p, WIDTH_V, DTYPE), do.data, slot_v * CHUNKS_V, dv, BLOCK_M, WIDTH_V, CHUNKS_V)
    # This wait's branch ends the basic block: without it ptxas moves the next line's wait above the exponentials.
    filled(do, j, SHAPE.STAGES_V)
    dp = warpgroup_mma_wait(CHUNKS_V, (dp,))
    if SHAPE.AHEAD:
        # S of the next tile, beside dV and the arithmetic of dS.
        _, next_i = _advance(h, i, task, SHAPE)
        more = j + 1 < stop
        ahead = (j + 1) % SHAPE.STAGES
        mbarrier.wait(q.filled.index(ahead), ((j + 1) // SHAPE.STAGES) & 1, pred=more)
        if LENGTHS:
            if more:
                _clean_rows(j + 1, task.start + next_i * BLOCK_M, streams, task, rule, WG, SHAPE)
        following = scores_of(kept[0], k, mine * CHUNKS_D, q, ahead, BLOCK_M, WIDTH_D, CHUNKS_D)
    ds = weight * (dp - _vector(deltas, j, rule, SHAPE.STAGES_V, ROWS)[None, :])
    if MASKED:
        # A masked value may be NaN, and 0 * NaN is NaN.
        ds = gl.where(seen_by_keys(tasks, home, m, WG * 64, S), ds, 0.0)
    ds = ds.to(DTYPE)
    SHARED_SUMS: gl.constexpr = rule.aside is not None and not SHAPE.APART
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
        dq, dv = _landed_beside(dq, dv, CHUNKS_D)
        add_tile(_sums_tile(h, m0 // BLOCK_M, task, rule, SHAPE) + WG * (BLOCK_M * COLS), dq, BLOCK_M, COLS)
    else:
        dv = landed(dv, BEHIND)
    mbarrier.arrive(do.free.index(slot_v))
    if SHAPE.AHEAD:
        following, dk = _landed_beside(following, dk, 0)
    else:
        dk = landed(dk, 0)
    mbarrier.arrive(q.free.index(slot))
    return dk, dv, following


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
            going, at = free_key_task(fixed.tasks, turn, at, rule.sizes.group, SHAPE.TASKS)
            turn += 1


@gluon.jit
def _consume_next(WG: gl.constexpr, turn, at, dk_to, dv_to, streams, fixed, rule, SHAPE: gl.constexpr,
                  STEPS: gl.constexpr):  # fmt: skip
    """The turn-th task, if there is one."""
    task = get_key_task(fixed.tasks, turn, SHAPE.TASKS)
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
    q, _, _, _, exchange = streams
    k, v, _ = fixed
    dk = zeros(WIDTH_D, CHUNKS_D)
    dv = zeros(WIDTH_V, CHUNKS_V)
    h = task.h * rule.sizes.group
    steps = _steps_of(h, task, rule, STEPS)
    i = task.count * 0
    some = task.count > 0
    stop = first + task.count * rule.sizes.group
    mine = home * SHAPE.GROUPS + WG
    kept = (None, None)
    if SHAPE.KEPT:
        kept = (left_operand(k, mine, BLOCK_M, WIDTH_D), left_operand(v, mine, BLOCK_M, WIDTH_V))
    s = task.start * 0
    if SHAPE.AHEAD:
        slot = first % SHAPE.STAGES
        mbarrier.wait(q.filled.index(slot), (first // SHAPE.STAGES) & 1, pred=some)
        if rule.spans.cu_q is not None or rule.spans.used_q is not None:
            if some:
                _clean_rows(first, task.start, streams, task, rule, WG, SHAPE)
        s = warpgroup_mma_wait(0, (scores_of(kept[0], k, mine * CHUNKS_D, q, slot, BLOCK_M, WIDTH_D, CHUNKS_D),))
    full_stop = task.full_stop
    if rule.aside is not None:
        # dQ sums over keys: those past the end must not count.
        full_stop = gl.where(task.n0 + 64 * SHAPE.GROUPS > task.used_k, 0, full_stop)
    for j in range(first, stop):
        m0 = task.start + i * BLOCK_M
        now = steps
        if SHAPE.GROUPED:
            now = _steps_of(h, task, rule, STEPS)
        # Two bodies, so that a tile without a mask is worked on without a branch.
        if (m0 < task.full_start) | (m0 >= full_stop):
            dk, dv, s = _step(j, h, i, now, dk, dv, s, kept, stop, home, streams, fixed, task, rule, WG, True,
                              SHAPE, STEPS)  # fmt: skip
        else:
            dk, dv, s = _step(j, h, i, now, dk, dv, s, kept, stop, home, streams, fixed, task, rule, WG, False,
                              SHAPE, STEPS)  # fmt: skip
        h, i = _advance(h, i, task, SHAPE)
    task = read_key_task(fixed.tasks, home)
    row = task.n0 + WG * 64
    store_gradient(dv_to, dv, rule.scoring.inverse_keep, v.data, mine * CHUNKS_V, row, task.stored, task.used_k,
                   task.batch_k, task.h, task.start_k, rule.spans.cu_k, WIDTH_V)  # fmt: skip
    # dK leaves through the tiles of keys, which dQ's products read.
    if rule.aside is not None:
        if SHAPE.APART:
            freed(exchange, stop + 1, 2)
        else:
            _sync(128 * SHAPE.GROUPS)
    store_gradient(dk_to, dk, rule.scoring.scale, k.data, mine * CHUNKS_D, row, task.stored, task.used_k, task.batch_k,
                   task.h, task.start_k, rule.spans.cu_k, WIDTH_D)  # fmt: skip
    compat.store_wait(0)


@gluon.jit
def _consume_values(dv_to, streams, fixed, handed, rule, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """The warpgroup of P and dV, 64 keys. It hands on P, times the slope of the score steps."""
    task = get_key_task(fixed.tasks, 0, 1)
    BLOCK_M: gl.constexpr = SHAPE.BLOCK
    CHUNKS_D: gl.constexpr = SHAPE.CHUNKS_D
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    WIDTH_D: gl.constexpr = SHAPE.WIDTH_D
    WIDTH_V: gl.constexpr = SHAPE.WIDTH_V
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    ROWS: gl.constexpr = gl.SliceLayout(0, S)
    q, do, lse2s, deltas, exchange = streams
    k, v, tasks = fixed
    DTYPE: gl.constexpr = q.data.dtype
    LENGTHS: gl.constexpr = rule.spans.cu_q is not None or rule.spans.used_q is not None
    n = task.n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    dv = zeros(WIDTH_V, CHUNKS_V)
    h = task.h * rule.sizes.group
    steps = _steps_of(h, task, rule, STEPS)
    i = task.count * 0
    mbarrier.wait(k.filled.index(0), 0)
    for j in range(task.count * rule.sizes.group):
        slot = j % SHAPE.STAGES
        slot_v = j % SHAPE.STAGES_V
        m0 = task.start + i * BLOCK_M
        m = m0 + gl.arange(0, BLOCK_M, layout=ROWS)
        now = steps
        if SHAPE.GROUPED:
            now = _steps_of(h, task, rule, STEPS)
        filled(q, j, SHAPE.STAGES)
        if LENGTHS:
            _clean_rows(j, m0, streams, task, rule, 0, SHAPE)
        s = outer(k.data, gl.minimum(m0, 0), q.data, slot * CHUNKS_D, BLOCK_M, WIDTH_D, CHUNKS_D)
        lse2 = _vector(lse2s, j, rule, SHAPE.STAGES, ROWS)
        freed(handed, j, 2)
        # dV of the tile before is still in flight beside these products.
        s = warpgroup_mma_wait(0, (s,))
        mbarrier.arrive(q.free.index(slot))
        s, slope = scored(s, m[None, :], n[:, None], task.shift, now, rule.scoring, STEPS)
        p = gl.exp2(s * rule.scoring.scale2 - lse2[None, :])
        if (m0 < task.full_start) | (m0 >= task.full_stop):
            p = gl.where(seen_by_keys(tasks, 0, m, 0, S), p, 0.0)
        handed.data.index(j % 2).store((p * slope).to(DTYPE))
        mbarrier.arrive(handed.filled.index(j % 2))
        filled(do, j, SHAPE.STAGES_V)
        dv = accumulate(operand(p, WIDTH_V, DTYPE), do.data, slot_v * CHUNKS_V, dv, BLOCK_M, WIDTH_V, CHUNKS_V)
        dv = landed(dv, 0)
        mbarrier.arrive(do.free.index(slot_v))
        h, i = _advance(h, i, task, SHAPE)
    # The gradient leaves through the tiles of V, which the other warpgroup reads.
    _sync(256)
    store_gradient(dv_to, dv, rule.scoring.inverse_keep, v.data, 0, task.n0, task.stored, task.used_k, task.batch_k,
                   task.h, task.start_k, rule.spans.cu_k, WIDTH_V)  # fmt: skip
    compat.store_wait(0)


@gluon.jit
def _consume_scores(dk_to, streams, fixed, handed, rule, SHAPE: gl.constexpr, STEPS: gl.constexpr):
    """The warpgroup of dS and dK, 64 keys, which is handed P."""
    task = get_key_task(fixed.tasks, 0, 1)
    BLOCK_M: gl.constexpr = SHAPE.BLOCK
    CHUNKS_D: gl.constexpr = SHAPE.CHUNKS_D
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    WIDTH_D: gl.constexpr = SHAPE.WIDTH_D
    WIDTH_V: gl.constexpr = SHAPE.WIDTH_V
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    ROWS: gl.constexpr = gl.SliceLayout(0, S)
    q, do, lse2s, deltas, exchange = streams
    k, v, tasks = fixed
    DTYPE: gl.constexpr = q.data.dtype
    LENGTHS: gl.constexpr = rule.spans.cu_q is not None or rule.spans.used_q is not None
    dk = zeros(WIDTH_D, CHUNKS_D)
    i = task.count * 0
    mbarrier.wait(v.filled.index(0), 0)
    for j in range(task.count * rule.sizes.group):
        slot = j % SHAPE.STAGES
        slot_v = j % SHAPE.STAGES_V
        m0 = task.start + i * BLOCK_M
        m = m0 + gl.arange(0, BLOCK_M, layout=ROWS)
        filled(do, j, SHAPE.STAGES_V)
        if LENGTHS:
            filled(q, j, SHAPE.STAGES)
            _clean_rows(j, m0, streams, task, rule, 1, SHAPE)
        dp = outer(v.data, gl.minimum(m0, 0), do.data, slot_v * CHUNKS_V, BLOCK_M, WIDTH_V, CHUNKS_V)
        delta = _vector(deltas, j, rule, SHAPE.STAGES_V, ROWS)
        filled(handed, j, 2)
        dp = warpgroup_mma_wait(0, (dp,))
        mbarrier.arrive(do.free.index(slot_v))
        p = handed.data.index(j % 2).load(S).to(gl.float32)
        mbarrier.arrive(handed.free.index(j % 2))
        ds = p * (dp - delta[None, :])
        if (m0 < task.full_start) | (m0 >= task.full_stop):
            # A masked value may be NaN, and 0 * NaN is NaN.
            ds = gl.where(seen_by_keys(tasks, 0, m, 0, S), ds, 0.0)
        filled(q, j, SHAPE.STAGES)
        dk = accumulate(operand(ds, WIDTH_D, DTYPE), q.data, slot * CHUNKS_D, dk, BLOCK_M, WIDTH_D, CHUNKS_D)
        dk = landed(dk, 0)
        mbarrier.arrive(q.free.index(slot))
        _, i = _advance(i, i, task, SHAPE)
    _sync(256)
    store_gradient(dk_to, dk, rule.scoring.scale, k.data, 0, task.n0, task.stored, task.used_k, task.batch_k, task.h,
                   task.start_k, rule.spans.cu_k, WIDTH_D)  # fmt: skip
    compat.store_wait(0)


@gluon.jit
def backward_keys(
    q, k, v, do, stats, dk, dv, outputs, swizzle, coded_total, spans, coded_sizes, rules, scoring, operands,
    SHAPE: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one key head, summed over the query heads of its group: 64 keys a warpgroup, or
    (SHAPE.SHARED) 64 keys that two warpgroups share."""
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
    query_tiles = tile_ring(SHAPE.STAGES, GROUPS, BLOCK_M, SHAPE.WIDTH_D, SHAPE.CHUNKS_D, DTYPE)
    do_tiles = tile_ring(SHAPE.STAGES_V, GROUPS, BLOCK_M, SHAPE.WIDTH_V, SHAPE.CHUNKS_V, DTYPE)
    exchange = None
    if outputs.sums is not None:
        exchange = gl.allocate_shared_memory(DTYPE, [2 * GROUPS, 64, BLOCK_M], matrix(BLOCK_M, 2))
        if SHAPE.APART:
            exchange_filled, exchange_free = ring_barriers(2, 1, GROUPS)
            exchange = Ring(exchange, exchange_filled, exchange_free)
    lse2s = vector_ring(SHAPE.STAGES, BLOCK_M, query_tiles, spans.cu_q)
    deltas = vector_ring(SHAPE.STAGES_V, BLOCK_M, do_tiles, spans.cu_q)
    streams = Streams(query_tiles, do_tiles, lse2s, deltas, exchange)
    rule = BackwardRule(spans, tiles.sizes_of(coded_sizes), rules, scoring, operands, outputs.stats.pitch, outputs.sums)
    LENGTH: gl.constexpr = 256 if KEYS > 2 else 128
    stops = None
    if SHAPE.LEFT or spans.cu_q is not None or spans.used_q is not None:
        stops = integers(SHAPE.TASKS, LENGTH)
    tasks_filled, tasks_free = ring_barriers(SHAPE.TASKS, GROUPS + 1 if SHAPE.APART else GROUPS)
    tasks = KeyTasks(integers(SHAPE.TASKS * 16, 1), integers(SHAPE.TASKS, LENGTH), stops, tasks_filled, tasks_free)
    fixed = Fixed(key_tiles, value_tiles, tasks)
    total = tiles.decoded(coded_total)
    number = tiles.decoded(swizzle)
    if SHARED:
        handed_filled, handed_free = ring_barriers(2, 1)
        handed_data = gl.allocate_shared_memory(DTYPE, [2, 64, BLOCK_M], matrix(BLOCK_M, 2))
        handed = Ring(handed_data, handed_filled, handed_free)
        fence_async_shared()
        gl.warp_specialize(
            [
                (_consume_values, (dv_to, streams, fixed, handed, rule, SHAPE, STEPS)),
                (_consume_scores, (dk_to, streams, fixed, handed, rule, SHAPE, STEPS)),
                (_produce, (inputs, outputs, number, streams, fixed, total, rule, KEYS, LENGTH, SHAPE, STEPS)),
            ],
            [4, 1],
            [240, 24],
        )
    elif SHAPE.APART:
        fence_async_shared()
        gl.warp_specialize(
            [
                (_consume, (0, dk_to, dv_to, streams, fixed, rule, SHAPE, STEPS)),
                (_consume, (1, dk_to, dv_to, streams, fixed, rule, SHAPE, STEPS)),
                (_sum_queries, (streams, fixed, rule, SHAPE)),
                (_produce, (inputs, outputs, number, streams, fixed, total, rule, KEYS, LENGTH, SHAPE, STEPS)),
            ],
            [4, 4, 1],
            [208, 64, 24],
        )
    elif GROUPS == 2:
        fence_async_shared()
        gl.warp_specialize(
            [
                (_consume, (0, dk_to, dv_to, streams, fixed, rule, SHAPE, STEPS)),
                (_consume, (1, dk_to, dv_to, streams, fixed, rule, SHAPE, STEPS)),
                (_produce, (inputs, outputs, number, streams, fixed, total, rule, KEYS, LENGTH, SHAPE, STEPS)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        fence_async_shared()
        gl.warp_specialize(
            [
                (_consume, (0, dk_to, dv_to, streams, fixed, rule, SHAPE, STEPS)),
                (_consume, (1, dk_to, dv_to, streams, fixed, rule, SHAPE, STEPS)),
                (_consume, (2, dk_to, dv_to, streams, fixed, rule, SHAPE, STEPS)),
                (_produce, (inputs, outputs, number, streams, fixed, total, rule, KEYS, LENGTH, SHAPE, STEPS)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
