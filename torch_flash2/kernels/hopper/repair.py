"""What follows the Hopper kernels that compute dQ: sums brought to their place, and, where NaN or infinite keys lie
behind a mask, marked tiles computed again on the portable kernel's careful path.

M query rows, D head dim.
"""

import triton
import triton.language as tl

from ..bundles import Rows
from ..device import tiles
from ..triton.query_gradient import query_gradient

# How many flags a program looks at together: one after the other they would take as many trips to memory.
TOGETHER = tl.constexpr(16)


@triton.jit
def repair_queries(
    flags, coded_total, q, k, v, grad_out, stats, grad_q, spans, coded_sizes, rules, scoring, operands,
    MODE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """dQ of the marked tiles, and their marks cleared; tiles are numbered as `tiles.locate` numbers programs."""
    total = tiles.decoded(coded_total)
    stride = tl.num_programs(0)
    for first in range(tl.program_id(0), total, stride * TOGETHER):
        mine = first + tl.arange(0, TOGETHER) * stride
        if tl.max(tl.load(flags + mine, mask=mine < total, other=0), 0) != 0:
            for pid in range(first, tl.minimum(first + stride * TOGETHER, total), stride):
                if tl.load(flags + pid) != 0:
                    query_gradient(
                        pid, q, k, v, grad_out, stats, grad_q, None, spans, coded_sizes, rules, scoring, operands,
                        MODE, STEPS, True,
                    )  # fmt: skip
                    tl.debug_barrier()
                    tl.store(flags + pid, 0)


@triton.jit
def finish_queries(
    sums, grad_q, flags, spans, coded_sizes, scoring, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """dQ of one tile of rows from its sums, which lie as `backward_sums.in_register_order` says; with `flags` a tile
    with NaN is marked, at the number of the program."""
    pid = tl.program_id(0)
    sizes = tiles.sizes_of(coded_sizes)
    tile, h, b = tiles.locate(pid, spans.cu_q, sizes.B, sizes.H, sizes.M, BLOCK_M, True)
    batch, start, stored, used = tiles.extent(b, spans.cu_q, spans.used_q, sizes.B, sizes.M)
    count = tiles.tile_count(spans.cu_q, sizes.B, sizes.M, BLOCK_M)
    if spans.cu_q is None:
        number = (b * sizes.H + h) * count + tile
    else:
        number = h * count + tile + tl.load(spans.cu_q + b) // BLOCK_M + b
    first = tl.cast(number, tl.int64) * (BLOCK_M * WIDTH * CHUNKS)
    element = tl.arange(0, BLOCK_M * WIDTH)
    row = tile * BLOCK_M
    counted = (row + tl.arange(0, BLOCK_M) < used)[:, None]
    found = False
    for i in tl.static_range(CHUNKS):
        # Number (w, c, g, t, r, e) is element (16 w + 8 r + g, 8 c + 2 t + e).
        dq = tl.reshape(tl.load(sums + first + i * BLOCK_M * WIDTH + element), (BLOCK_M // 16, WIDTH // 8, 8, 4, 2, 2))
        dq = tl.reshape(tl.permute(dq, (0, 4, 2, 1, 3, 5)), (BLOCK_M, WIDTH)) * scoring.scale
        dq = tl.where(counted, dq, 0.0)
        tiles.store_columns(Rows(grad_q, batch, h, start), row, stored, i * WIDTH, dq, BLOCK_M, WIDTH)
        if flags is not None:
            found = found | tiles.any_nan((dq,))
    if flags is not None:
        tl.store(flags + pid, 1, mask=found)
