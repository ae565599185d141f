"""dQ's sums in the kernel of dK and dV: where they lie, and how a tile of products is added to them.

M query rows, D head dim. Sums are fp32, a tile [BLOCK_M, D] after the other, in the order in which threads hold
products (`in_register_order`), in as many parts side by side as warpgroups make. Additions are atomic: from registers,
or by TMA from shared memory, where a warp of its own has it done.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from . import compat
from .backward_pipeline import advance, get_key_task
from .pipeline import ring_barriers, tasks_of


class Leaving(NamedTuple):
    """Products of dQ on their way to the sums: a tile of each warpgroup, with barriers as a ring has them, and the sums
    as TMA sees them."""

    data: Any
    filled: Any
    free: Any
    to: Any


@gluon.jit
def leaving_to(sums, SHAPE: gl.constexpr):
    """Of a kernel."""
    GROUPS: gl.constexpr = SHAPE.GROUPS
    PART: gl.constexpr = SHAPE.BLOCK * SHAPE.WIDTH_D // GROUPS
    data = gl.allocate_shared_memory(gl.float32, [GROUPS, PART], gl.NVMMASharedLayout(0, 32, 1))
    filled, free = ring_barriers(GROUPS, 1)
    return Leaving(data, filled, free, sums)


@gluon.jit
def sums_number(h, tile, task, rule, BLOCK_M: gl.constexpr):
    """The number of a tile of rows of head h among all that are summed."""
    per_head, _ = tasks_of(rule.spans, rule.sizes, BLOCK_M)
    if rule.spans.cu_q is None:
        return (task.b * rule.sizes.H + h) * per_head + tile
    else:
        return h * per_head + tile + task.start_q // BLOCK_M + task.b


@gluon.jit
def sums_tile(h, tile, task, rule, SHAPE: gl.constexpr):
    """Where the sums of dQ of a tile of rows of head h begin."""
    number = sums_number(h, tile, task, rule, SHAPE.BLOCK)
    return rule.aside + gl.cast(number, gl.int64) * (SHAPE.BLOCK * SHAPE.WIDTH_D)


@gluon.jit
def in_register_order(tile, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """A tile [ROWS, WIDTH] of a product as a vector in which four registers of a thread lie side by side. Element
    (16 w + 8 r + g, 8 c + 2 t + e) is number (w, c, g, t, r, e)."""
    x = gl.reshape(tile, [ROWS // 16, 2, 8, WIDTH // 8, 4, 2])
    return gl.reshape(gl.permute(x, (0, 3, 2, 4, 1, 5)), [ROWS * WIDTH])


@gluon.jit
def add_tile(to, tile, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """Add a tile [ROWS, WIDTH] of a product to fp32 sums at `to`, atomically: four registers of a thread at once."""
    x = in_register_order(tile, ROWS, WIDTH)
    L: gl.constexpr = x.type.layout
    # The address of a thread's first four, and how far on the next are: constants, which need no registers.
    number = gl.arange(0, ROWS * WIDTH, layout=L)
    further = number // 128 % (WIDTH // 8) * 512
    at = to.to(gl.int64, bitcast=True) + (number // 4 * 16 - further).to(gl.int64)
    ASM: gl.constexpr = (
        "{ .reg .b64 a; cvt.u64.u32 a, $8; add.s64 a, a, $4;"
        " red.relaxed.gpu.global.add.v4.f32 [a], {$12, $13, $14, $15};"
        " mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0; }"
    )
    gl.inline_asm_elementwise(
        ASM, "=r,=r,=r,=r,l,l,l,l,r,r,r,r,f,f,f,f", [at, further, x], dtype=gl.int32, is_pure=False, pack=4
    )  # fmt: skip


@gluon.jit
def carry_sums(streams, tasks, rule, SHAPE: gl.constexpr):
    """A warp: it has TMA add the products that consumers leave to the sums, in a program of one task."""
    GROUPS: gl.constexpr = SHAPE.GROUPS
    PART: gl.constexpr = SHAPE.BLOCK * SHAPE.WIDTH_D // GROUPS
    leaving = streams.leaving
    task = get_key_task(tasks, 0, 1, 1)
    h = task.h * rule.sizes.group
    i = task.count * 0
    for j in range(task.count * rule.sizes.group):
        number = sums_number(h, task.start // SHAPE.BLOCK + i, task, rule, SHAPE.BLOCK)
        for w in gl.static_range(GROUPS):
            mbarrier.wait(leaving.filled.index(w), j & 1)
            # Here, not where the tile was stored: there it took 340 cycles of a turn (H200, 2026-11-21).
            fence_async_shared()
            compat.add(leaving.to, [(number * GROUPS + w) * PART], leaving.data.index(w))
        # Who leaves dQ's products has done with the output gradients, and with the queries before.
        mbarrier.arrive(streams.do.free.index(j % SHAPE.STAGES_V))
        mbarrier.arrive(streams.q.free.index((j + SHAPE.STAGES - 1) % SHAPE.STAGES), pred=j > 0)
        for w in gl.static_range(GROUPS):
            compat.store_wait(GROUPS - 1 - w)
            mbarrier.arrive(leaving.free.index(w))
        h, i = advance(h, i, task, SHAPE)
