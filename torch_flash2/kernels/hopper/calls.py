"""What the Hopper kernels, forward and backward, have in common on the host's side.

B batch, H query heads, D head dim.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...problem import Call, Problem
from ..triton import launching

# Keys and values of the heads that are worked on side by side should stay in L2, beside all else that passes through
# it: 50 MB on the H100 and the H200. Twice as much was up to 3 % slower, four times up to 6 % (forward, H200,
# 2026-11-21).
L2_BYTES = 16 << 20

# How many heads go side by side at least where a tile of keys waits for the one before it: a simulation has waits of
# two tiles of rows, 19 % of the time at head dim 64 and 8192 rows with one head, none with four.
TOGETHER = 4


def why_not(problem: Problem) -> Iterator[str]:
    """Why this kernel cannot run the problem."""
    hardware = problem.hardware
    if hardware.type != "cuda" or hardware.capability != (9, 0):
        yield "it is for Hopper GPUs (compute capability 9.0)"
        return
    if launching.INTERPRETED and not hardware.name.startswith("simulated"):
        yield "Triton's interpreter cannot run Gluon"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        yield f"it has float16 and bfloat16, got {problem.dtype}"
    if problem.layout != "aligned" or problem.head_dim_v % 8 != 0:
        yield "TMA needs unit stride on D and multiples of 16 bytes everywhere else"
    if max(problem.head_dim, problem.head_dim_v) > 256:
        yield f"it has head dims up to 256, got {problem.head_dim} and {problem.head_dim_v}"
    if problem.dense or "bias" in problem.steps:
        yield "dense masks and biases stay on the portable kernel"
    if not problem.positive_scale:
        yield "a scale that is not positive stays on the portable kernel"
    if problem.page_size is not None:
        yield "it has no paged keys and values"
    if problem.batch * problem.heads * (problem.seqlen_q // 128 + 1) >= 2**30:
        yield "the call has more tiles than its counter can count"


def descriptor(tensor: torch.Tensor, rows: int, cols: int) -> TensorDescriptor:
    """How TMA sees a tensor [B, H, M, D] in tiles of rows x cols."""
    layout = gl.NVMMASharedLayout(min(cols * 2, 128), 16, 4)
    return TensorDescriptor(tensor, list(tensor.shape), launching.tma_strides(tensor), [1, 1, rows, cols], layout)


def order(problem: Problem, call: Call, rows: int) -> tuple[int, int]:
    """The order of tiles of so many query rows, as `side_by_side`: what heads share is their keys and values."""
    key_bytes = call.key.shape[2] * (problem.head_dim + problem.head_dim_v) * 2
    all_heads = problem.heads * (1 if problem.packed_q else problem.batch)
    # Equal blocks: the tiles of a small last one would not be shared evenly.
    blocks = triton.cdiv(all_heads, max(1, L2_BYTES // max(key_bytes, 1)) * problem.group)
    heads = triton.cdiv(all_heads // problem.group, max(blocks, 1)) * problem.group
    tiles = 0 if problem.packed_q else triton.cdiv(call.query.shape[2], rows)
    together, kept = side_by_side(problem, heads, all_heads, tiles)
    # Keys are read again for what is kept. With two tiles more, 512 rows took 8 and 9 % longer with head dims 128 and
    # 256, 1024 rows 2 and 4 %, 2048 rows and more about 1 % (H200, 2026-11-21).
    return together, max(kept - 2, 0)


def key_order(problem: Problem, call: Call, keys: int, ordered: bool = False) -> tuple[int, int]:
    """The order of tiles of so many keys, as `side_by_side`: what passes them is queries and output gradients. Where
    dQ's sums are `ordered`, all tiles of a head one after the other."""
    row_bytes = call.query.shape[2] * problem.group * (problem.head_dim + problem.head_dim_v) * 2
    heads = max(1, L2_BYTES // max(row_bytes, 1))
    all_heads = problem.heads_kv * (1 if problem.packed_k else problem.batch)
    if ordered:
        return min(max(heads, TOGETHER), max(all_heads, 1)), 0
    tiles = 0 if problem.packed_k else triton.cdiv(call.key.shape[2], keys)
    return side_by_side(problem, heads, all_heads, tiles)


def side_by_side(problem: Problem, heads: int, all_heads: int, tiles: int) -> tuple[int, int]:
    """How many heads go side by side, as many as stay in L2, their longest tiles first; and how many of the shortest of
    a head's tiles, 0 where documents are packed, are kept for the end, when those of all heads go side by side.

    A block of heads whose tiles are not shared evenly by the multiprocessors would leave long tiles for the end: 13 %
    of the time with a head dim of 256 and 4096 rows (H200, 2026-11-21). When the tiles before those kept are shared
    out, multiprocessors are on average half of the longest, of `tiles` tiles to visit, apart; k tiles kept of each head
    have k^2 / 2.
    """
    if not problem.mask.bands and not problem.lengths:
        # All tiles are of one length: one head after the other.
        return 1, 0
    all_heads = max(all_heads, 1)
    kept = math.ceil(math.sqrt(problem.hardware.multiprocessors * tiles / all_heads))
    return min(heads, all_heads), min(kept, tiles // 2)


def hides(problem: Problem) -> bool:
    return bool(problem.mask.bands) or problem.packed_k or "used_k" in problem.lengths


@functools.cache
def table(name: str) -> list[dict[str, Any]]:
    """The rows of a table of configurations beside this file."""
    rows: list[dict[str, Any]] = json.loads((Path(__file__).parent / name).read_text())
    return rows
