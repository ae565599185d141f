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

# Where what heads share decides how many go side by side, that much of it: with all else that passes through L2, 50 MB
# on the H100 and the H200. Twice as much was up to 3 % slower, four times up to 6 % (forward, H200, 2026-11-21).
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


def descriptor(tensor: torch.Tensor, rows: int, cols: int, heads: int = 1) -> TensorDescriptor:
    """How TMA sees a tensor [B, H, M, D] in tiles of rows x cols, of so many heads."""
    layout = gl.NVMMASharedLayout(min(cols * 2, 128), 16, 4)
    return TensorDescriptor(tensor, list(tensor.shape), launching.tma_strides(tensor), [1, heads, rows, cols], layout)


def order(problem: Problem, call: Call, rows: int) -> tuple[int, int]:
    """The order of tiles of so many query rows: how many heads go side by side, their longest tiles first, and how many
    of each head's shortest tiles are kept for the end (none).

    As `_two_each`; of 1024 rows and fewer as many heads as keep their keys and values in L2, where those are more, and
    of fewer than 8 tiles always so. In H200 runs of 2026-11-22, causal, 1k to 16k rows, this was from 2 % slower to 5 %
    faster than those that stay in L2 with short tiles kept for the end.
    """
    if not problem.mask.bands and not problem.lengths:
        # All tiles are of one length: one head after the other.
        return 1, 0
    # Heads of keys, each with its group.
    wanted: float = _in_l2(problem, call.key.shape[2])
    if not problem.packed_q:
        tiles = triton.cdiv(call.query.shape[2], rows)
        if tiles >= 8:
            wanted = max(_two_each(problem, tiles) / problem.group, wanted if tiles < 16 else 0)
    all_heads = problem.heads_kv * (1 if problem.packed_q else problem.batch)
    return _equal_blocks(all_heads, wanted) * problem.group, 0


def key_order(problem: Problem, call: Call, keys: int, ordered: bool = False) -> tuple[int, int]:
    """The order of tiles of so many keys, as of rows: by `_two_each`, which in H200 runs of 2026-11-22 (causal, 512 to
    16k keys) was up to 11 % faster than the heads whose queries and output gradients stay in L2, with tiles kept.

    Where dQ's sums are `ordered`, all tiles of a head come one after the other. Of packed documents the tiles of an
    average one count: eight of 2k keys took 9 % longer with the heads that stay in L2, one. Where a window ends on the
    left most tiles are of one length: heads as stay in L2, and short tiles kept for the end.
    """
    heads = _in_l2(problem, call.query.shape[2] * problem.group)
    all_heads = max(1, problem.heads_kv * (1 if problem.packed_k else problem.batch))
    if ordered:
        return min(max(heads, TOGETHER), all_heads), 0
    if not problem.mask.bands and not problem.lengths:
        return 1, 0
    if not problem.mask.bounds_left:
        tiles = triton.cdiv(call.key.shape[2], keys * (problem.batch if problem.packed_k else 1))
        return _equal_blocks(all_heads, _two_each(problem, tiles)), 0
    # When the tiles before those kept are shared out, multiprocessors are on average half of the longest, of `tiles`
    # tiles to visit, apart; k tiles kept of each head have k^2 / 2. Without them 13 % of the time went at head dim 256
    # and 4096 rows (H200, 2026-11-21).
    tiles = 0 if problem.packed_k else triton.cdiv(call.key.shape[2], keys)
    kept = math.ceil(math.sqrt(problem.hardware.multiprocessors * tiles / all_heads))
    return min(heads, all_heads), min(kept, tiles // 2)


def _in_l2(problem: Problem, rows: int) -> int:
    """How many heads stay in L2 that share so many rows: of keys and values, or of queries and output gradients."""
    return max(1, L2_BYTES // max(rows * (problem.head_dim + problem.head_dim_v) * 2, 1))


def _two_each(problem: Problem, tiles: int) -> int:
    """How many heads of so many tiles to take side by side that each multiprocessor has two of them: who had a long one
    has a short one then, and all begin the next heads together, with what those share."""
    return max(1, 2 * problem.hardware.multiprocessors // max(tiles, 1))


def _equal_blocks(count: int, wanted: float) -> int:
    """About how many of `count` to take at a time so that the last are hardly fewer: the tiles of a small last block
    would not be shared evenly (up to 36 % of the time in a simulation; so 5 %)."""
    blocks = max(1.0, count / wanted)
    sizes = {triton.cdiv(count, n) for n in range(max(1, math.floor(blocks * 0.6)), math.floor(blocks * 1.1) + 1)}
    return min(sizes, key=lambda size: (round(-count % size / size, 1), abs(size - wanted)))


def hides(problem: Problem) -> bool:
    return bool(problem.mask.bands) or problem.packed_k or "used_k" in problem.lengths


@functools.cache
def table(name: str) -> list[dict[str, Any]]:
    """The rows of a table of configurations beside this file."""
    rows: list[dict[str, Any]] = json.loads((Path(__file__).parent / name).read_text())
    return rows
