"""What the backward knows of query rows before it begins, and the gradient that follows from it alone.

B batch, H query heads, M query rows, Dv head dim of value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...problem import Call
from ..bundles import Rows, RowStats, Sizes, Strided
from ..device import scores, tiles
from . import launching, tables


@triton.jit
def backward_stats(
    out, grad_out, lse_ptr, grad_lse_ptr, stats, coded_sizes, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """RowStats of one tile of rows; a row that sees no key has delta 0."""
    sizes = tiles.sizes_of(coded_sizes)
    count = stats.pitch // BLOCK_M
    row = tl.program_id(0) % count * BLOCK_M
    bh = tl.program_id(0) // count
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
    call: Call, out: torch.Tensor, lse: torch.Tensor, grad_out: torch.Tensor, grad_lse: torch.Tensor | None
) -> RowStats:
    """The statistics of all query rows."""
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
        Sizes.coded(B, H, 1, M, 0),
        block_m,
        block_dv,
    )
    launching.launch(backward_stats, B * H * pitch // block_m, call.query.device, arguments, num_warps=4)
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
