"""How far keys matter under ALiBi: beyond that their weights are 0 in fp32, and their tiles need no visit.

B segments, H query heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
A product of a query and a key is at most that of their norms, |q| |k|. Of a row's keys under a causal mask the last is
the nearest: a key n before it scores less by slope * n, but for at most 2 |q| |k| scale. Where that is more than DEEP,
its weight over the row's maximum is less than half of fp32's smallest number. A kernel before the forward notes the
largest norms of PART rows each. What is not finite in a query, key or value makes the reach infinite.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...problem import Call, Problem
from ..bundles import Strided, coded
from ..device import tiles
from ..triton import launching

PART = 256
# exp(-104) is less than 2^-150.
DEEP = 104.0


@triton.jit
def _most(x, head, heads, first, length, PART: tl.constexpr, COLUMNS: tl.constexpr):
    """The largest squared norm among rows first .. first + PART of a head [B * heads], inf where one is not finite."""
    r = first + tl.arange(0, PART)
    c = tl.arange(0, COLUMNS)
    start = x.ptr + (tl.cast(head // heads, tl.int64) * x.batch + tl.cast(head % heads, tl.int64) * x.head)
    inside = (r < length)[:, None] & (c < x.cols)[None, :]
    tile = tl.load(start + (r.to(tl.int64)[:, None] * x.row + c[None, :]), mask=inside, other=0.0).to(tl.float32)
    squares = tl.sum(tile * tile, 1)
    return tl.max(tl.where(squares == squares, squares, float("inf")), 0)


@triton.jit
def note_norms(
    q, k, v, norms, coded_sizes, coded_programs, PART: tl.constexpr, COLUMNS: tl.constexpr, COLUMNS_V: tl.constexpr
):
    """Norms of queries [B, H, parts of M], then of keys [B, heads of them, parts of N], fp32; B is 1 where documents
    are packed."""
    sizes = tiles.sizes_of(coded_sizes)
    program = tl.program_id(0)
    of_queries = tiles.decoded(coded_programs)
    if program < of_queries:
        parts = tl.cdiv(sizes.M, PART)
        most = _most(q, program // parts, sizes.H, program % parts * PART, sizes.M, PART, COLUMNS)
    else:
        parts = tl.cdiv(sizes.N, PART)
        place = program - of_queries
        heads = sizes.H // sizes.group
        first = place % parts * PART
        most = _most(k, place // parts, heads, first, sizes.N, PART, COLUMNS)
        bad = _most(v, place // parts, heads, first, sizes.N, PART, COLUMNS_V) == float("inf")
        most = tl.where(bad, float("inf"), most)
    tl.store(norms + program, tl.sqrt(most))


def pays(problem: Problem, tilted: bool) -> bool:
    """Whether a call notes norms: ALiBi is its only score step, under a causal mask, and keys are many."""
    return tilted and len(problem.steps) == 1 and problem.seqlen_k >= 4096


def norms(problem: Problem, call: Call) -> torch.Tensor:
    """Launch `note_norms`."""
    heads, heads_k = (x.shape[0] * x.shape[1] for x in (call.query, call.key))
    of_queries, of_keys = (n * triton.cdiv(x.shape[2], PART) for n, x in ((heads, call.query), (heads_k, call.key)))
    found = torch.empty(of_queries + of_keys, dtype=torch.float32, device=call.query.device)
    _, sizes, _, _, _ = launching.bundle(problem, call)
    columns = (triton.next_power_of_2(d) for d in (problem.head_dim, problem.head_dim_v))
    arguments: tuple[Any, ...] = (
        *map(Strided.of, (call.query, call.key, call.value)), found, sizes, coded(of_queries), PART, *columns
    )  # fmt: skip
    launching.launch(note_norms, of_queries + of_keys, call.query.device, arguments, num_warps=8)
    return found
