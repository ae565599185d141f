"""What the backward knows of query rows before it begins, and the gradient that follows from it alone.

B batch, H query heads, M query rows, Dv head dim of value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...problem import Call
from ..bundles import Rows, RowStats, Sizes, Strided, coded
from ..device import scores, tiles
from . import launching, tables

# How many fp32 numbers of a workspace a program sets to 0.
CLEARED = tl.constexpr(8192)


@triton.jit
def backward_stats(
    out, grad_out, lse_ptr, grad_lse_ptr, stats, sums, coded_sums, coded_sizes,
    BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr
):  # fmt: skip
    """RowStats of one tile of rows; a row that sees no key has delta 0. And zeros in `sums`, CLEARED for each program,
    of which there may be more than tiles."""
    sizes = tiles.sizes_of(coded_sizes)
    pid = tl.program_id(0)
    if sums is not None:
        if pid < tiles.decoded(coded_sums) // CLEARED:
            at = tl.cast(pid, tl.int64) * CLEARED + tl.arange(0, CLEARED)
            tl.store(sums + at, tl.zeros([CLEARED], tl.float32))
    count = stats.pitch // BLOCK_M
    row = pid % count * BLOCK_M
    # Programs past the last tile write what another writes.
    bh = tl.minimum(pid // count, sizes.B * sizes.H - 1)
    m = row + tl.arange(0, BLOCK_M)
    o = tiles.load_rows(Rows(out, bh // sizes.H, bh % sizes.H, bh * 0), row, sizes.M, True, BLOCK_M, BLOCK_DV, True)
    do = tiles.load_rows(
        Rows(grad_out, bh // sizes.H, bh % sizes.H, bh * 0), row, sizes.M, True, BLOCK_M, BLOCK_DV, True
    )
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at = tl.cast(bh, tl.int64) * sizes.M + m
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + at, mask=m < sizes.M, other=0.0)
    lse = tl.load(lse_ptr + at, mask=m < sizes.M, other=-float("inf"))
    seen = lse != -float("inf")
    to = tl.cast(bh, tl.int64) * stats.pitch + m
    tl.store(stats.lse2 + to, tl.where(seen, lse * scores.LOG2E, float("inf")))
    tl.store(stats.delta + to, tl.where(seen, delta, 0.0))


def launch_stats(
    call: Call,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    sums: torch.Tensor | None = None,
) -> RowStats:
    """The statistics of all query rows, and zeros in `sums`, fp32, of a multiple of CLEARED elements."""
    B, H, M, Dv = out.shape
    block_dv = tables.block_dim(Dv)
    block_m = min(64, 8192 // block_dv)
    pitch = (triton.cdiv(M, 128) + 1) * 128
    lse2, delta = lse.new_empty(2, B * H * pitch)
    stats = RowStats(lse2, delta, pitch)
    grad_lse = grad_lse.contiguous() if grad_lse is not None else None
    arguments = (
        Strided.of(out),
        Strided.of(grad_out),
        lse,
        grad_lse,
        stats,
        sums,
        coded(0 if sums is None else sums.numel()),
        Sizes.coded(B, H, 1, M, 0),
        block_m,
        block_dv,
    )
    programs = B * H * pitch // block_m
    if sums is not None:
        programs = max(programs, sums.numel() // CLEARED.value)
    launching.launch(backward_stats, programs, call.query.device, arguments, num_warps=4)
    return stats


def sink_gradient(call: Call, lse: torch.Tensor, stats: RowStats, gradient: torch.Tensor | None) -> None:
    """The gradient of sinks [H] from the rows' statistics; nothing where None is wanted."""
    if gradient is None:
        return
    assert call.sinks is not None
    B, H, M = lse.shape
    delta = stats.delta.view(B, H, stats.pitch)[:, :, :M]
    sink = torch.exp(call.sinks.to(torch.float32)[None, :, None] - lse)
    gradient.copy_(-torch.where(lse == -torch.inf, 0.0, sink * delta).sum((0, 2)))
