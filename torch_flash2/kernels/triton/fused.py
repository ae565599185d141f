"""The backward where atomics are allowed, on GPUs whose warps multiply alone: all three gradients from one kernel, in
Gluon.

B segments, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
A program owns a tile of keys and adds dS K to sums of dQ: five products, where the deterministic pair of kernels needs
seven. Warps share tiles in both dimensions, which halves what they read from shared memory, as FlashAttention-2 does
(Dao 2023, arXiv 2307.08691).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ...problem import Call, Problem, tma_ready
from ..bundles import Grads, Head, Rows, RowStats, Strided
from ..device import bands, scores, tiles
from . import launching, tables
from .common import load_stats, score_gradient, sums_of

# Renamed in Triton 3.8; 3.9 has the new name only.
copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
# Columns of a tile in shared memory: rows of 128 bytes, swizzled as a whole, can be read along either side.
CHUNK = gl.constexpr(64)


class Shape(NamedTuple):
    """Compile-time numbers: tile sizes, chunks of columns of D and of Dv, warps, how many tiles of queries there is
    room for, and how many warps share the keys of a tile of scores, of dK and dV, and the rows of dQ."""

    BLOCK_M: int
    BLOCK_N: int
    CHUNKS_D: int
    CHUNKS_V: int
    WARPS: int
    STAGES: int
    WARPS_S: int
    WARPS_K: int
    WARPS_Q: int
    LEFT: bool
    BOTTOM_RIGHT: bool
    GROUPED: bool


class Place(NamedTuple):
    """Where a program works: the tile's first key, its key head and segment; batch entry, start and length of the
    segment in queries and in keys, and the rows of keys that are stored."""

    n0: Any
    hk: Any
    b: Any
    batch_q: Any
    start_q: Any
    M: Any
    batch_k: Any
    start_k: Any
    stored: Any
    N: Any


@gluon.constexpr_function
def _matrix(columns):
    """The shared layout of a tile [rows, columns]."""
    return gl.SwizzledSharedLayout(8, max(64 // columns, 1), min(columns // 8, 8), [1, 0])


@gluon.constexpr_function
def _accumulator(rows, WARPS):
    """The layout of a product that `rows` groups of warps share along its first dimension."""
    return gl.NVMMADistributedLayout([2, 0], [rows, WARPS // rows], [16, 8])


@gluon.jit
def _buffers(DTYPE: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr):
    """Room for tiles [ROWS, CHUNK], STAGES of each chunk. Chunks are allocations of their own: between two copies into
    one of them Triton puts a barrier."""
    found = ()
    for _ in gl.static_range(CHUNKS):
        found = found + (gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, CHUNK], _matrix(CHUNK)),)
    return found


@gluon.jit
def _copy_rows(buffers, slot, rows, row, limit, BLOCK: gl.constexpr, WARPS: gl.constexpr):
    """Begin to copy rows row .. row + BLOCK of a segment into a slot of its buffers; 0 past limit and past the tensor's
    columns. All strides and columns are multiples of 8 elements."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    x = rows.x
    r = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, L))
    c = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, L))
    stride = x.row // 8 * 8
    base = gl.cast(rows.start + row, gl.int64) * stride
    base += gl.cast(rows.batch, gl.int64) * (x.batch // 8 * 8) + gl.cast(rows.head, gl.int64) * (x.head // 8 * 8)
    pointers = (x.ptr + base) + (r[:, None] * stride + c[None, :])
    inside = (row + r < limit)[:, None]
    for i in gl.static_range(len(buffers)):
        columns = (c + i * CHUNK < x.cols // 8 * 8)[None, :]
        copy(buffers[i].index(slot), pointers + i * CHUNK, mask=inside & columns)


@gluon.jit
def _dot_chunks(x, y, slot, ROWS: gl.constexpr, COLS: gl.constexpr, L: gl.constexpr):
    """X Y^T [ROWS, COLS] of two tiles in shared memory, the second in a slot."""
    product = gl.zeros([ROWS, COLS], gl.float32, L)
    for i in gl.static_range(len(x)):
        left = x[i].index(0).load(gl.DotOperandLayout(0, L, 2))
        right = y[i].index(slot).permute((1, 0)).load(gl.DotOperandLayout(1, L, 2))
        product = mma_v2(left, right, product)
    return product


@gluon.jit
def _add_dot(totals, x, y, slot, L: gl.constexpr):
    """totals + X Y, where totals are accumulators of CHUNK columns, and Y is in a slot of shared memory."""
    sums = ()
    for i in gl.static_range(len(totals)):
        right = y[i].index(slot).load(gl.DotOperandLayout(1, L, 2))
        sums = sums + (mma_v2(x, right, totals[i]),)
    return sums


@gluon.jit
def _zeros(ROWS: gl.constexpr, CHUNKS: gl.constexpr, L: gl.constexpr):
    pieces = ()
    for _ in gl.static_range(CHUNKS):
        pieces = pieces + (gl.zeros([ROWS, CHUNK], gl.float32, L),)
    return pieces


@gluon.jit
def _add_queries(sums, ds, keys, row, SHAPE: gl.constexpr):
    """Add dS K [BLOCK_M, D] to the sums of rows row .. row + BLOCK_M, atomically.

    The sums lie as the accumulator does, so that a warp adds to 128 bytes in a row: blocks of 16 rows, in them blocks
    of 8 columns, in them (row half, column parity, row, column pair).
    """
    BLOCK_M: gl.constexpr = SHAPE.BLOCK_M
    CHUNKS: gl.constexpr = SHAPE.CHUNKS_D
    L: gl.constexpr = _accumulator(SHAPE.WARPS_Q, SHAPE.WARPS)
    r = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, L))
    c = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, L))
    at_row = (r >> 4) * (16 * CHUNK * CHUNKS) + ((r >> 3) & 1) * 64 + (r & 7) * 4
    at_column = (c >> 3) * 128 + (c & 1) * 32 + ((c & 7) >> 1)
    pointers = sums + gl.cast(row, gl.int64) * (CHUNK * CHUNKS)
    # In 64 bits: a sum of 32 bits might overflow, for all that the compiler knows, and each element took an address.
    pointers += at_row.to(gl.int64)[:, None] + at_column.to(gl.int64)[None, :]
    products = _zeros(BLOCK_M, CHUNKS, L)
    for j in gl.static_range(SHAPE.BLOCK_N // CHUNK):
        left = ds.slice(j * CHUNK, CHUNK, 0).permute((1, 0)).load(gl.DotOperandLayout(0, L, 2))
        added = ()
        for i in gl.static_range(CHUNKS):
            right = keys[i].index(0).slice(j * CHUNK, CHUNK, 0).load(gl.DotOperandLayout(1, L, 2))
            added = added + (mma_v2(left, right, products[i]),)
        products = added
    for i in gl.static_range(CHUNKS):
        gl.atomic_add(pointers + i * (16 * CHUNK), products[i], sem="relaxed")


@gluon.jit
def _place(spans, sizes, BLOCK_N: gl.constexpr):
    """Where this program works: tiles from the first on, since under a causal mask those have most rows."""
    pid = gl.program_id(0)
    per_head = tiles.tile_count(spans.cu_k, sizes.B, sizes.N, BLOCK_N)
    heads = sizes.H // sizes.group
    if spans.cu_k is None:
        tile = pid % per_head
        hk = pid // per_head % heads
        b = pid // per_head // heads
    else:
        tile = pid // heads
        hk = pid % heads
        b = tiles.find_segment(spans.cu_k, sizes.B, tile, BLOCK_N)
        tile -= gl.load(spans.cu_k + b) // BLOCK_N + b
    batch_q, start_q, _, used_q = tiles.extent(b, spans.cu_q, spans.used_q, sizes.B, sizes.M)
    batch_k, start_k, stored, used_k = tiles.extent(b, spans.cu_k, spans.used_k, sizes.B, sizes.N)
    return Place(tile * BLOCK_N, hk, b, batch_q, start_q, used_q, batch_k, start_k, stored, used_k)


@gluon.jit
def _step(i, total, count, masked, span, group, hk, SHAPE: gl.constexpr):
    """Head, first row and whether there is a mask, of the i-th of `total` tiles of rows: all those of a head, then the
    next head's; first those with a mask."""
    j = i
    h = hk
    if SHAPE.GROUPED:
        j = i % gl.maximum(count, 1)
        h = hk * group + i // gl.maximum(count, 1)
    free = span.full_start + (j - masked) * SHAPE.BLOCK_M
    m0 = gl.where(j < masked, bands.masked_tile(span, j, SHAPE.BLOCK_M), free)
    return h, m0, j < masked


@gluon.jit
def _store(rows, row, used, stored, pieces, factor, ROWS: gl.constexpr, CHUNKS: gl.constexpr, WARPS: gl.constexpr):
    """Store accumulators times a factor as rows row .. row + ROWS of a segment, those below stored; 0 from used on."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    x = rows.x
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    c = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, L))
    base = tiles.base_of(rows, row)
    for i in gl.static_range(CHUNKS):
        tile = gl.convert_layout((pieces[i] * factor).to(x.ptr.dtype.element_ty), L)
        tile = gl.where((row + r < used)[:, None], tile, 0.0)
        inside = (row + r < stored)[:, None] & (c + i * CHUNK < x.cols)[None, :]
        gl.store(base + (r[:, None] * x.row + (c + i * CHUNK)[None, :]), tile, mask=inside)


@gluon.jit
def backward_fused(
    q, k, v, grad_out, stats, grads, spans, coded_sizes, rules, scoring, operands,
    SHAPE: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one key/value head, and what it adds to the sums of dQ."""
    BLOCK_M: gl.constexpr = SHAPE.BLOCK_M
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    CHUNKS_D: gl.constexpr = SHAPE.CHUNKS_D
    CHUNKS_V: gl.constexpr = SHAPE.CHUNKS_V
    WARPS: gl.constexpr = SHAPE.WARPS
    STAGES: gl.constexpr = SHAPE.STAGES
    DTYPE: gl.constexpr = k.ptr.dtype.element_ty
    QUERIES: gl.constexpr = STEPS.QUERIES
    S: gl.constexpr = _accumulator(SHAPE.WARPS_S, WARPS)
    G: gl.constexpr = _accumulator(SHAPE.WARPS_K, WARPS)
    sizes = tiles.sizes_of(coded_sizes)
    place = _place(spans, sizes, BLOCK_N)
    shift = place.N - place.M if SHAPE.BOTTOM_RIGHT else place.N * 0
    n = place.n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, S))
    # Keys past the end count as the last one, so that they widen nothing.
    lo, hi = bands.intersect(
        gl.minimum(n, place.N - 1), place.M, place.M, place.N, shift, rules.numbers, QUERIES
    )  # fmt: skip
    hi = gl.where(place.n0 < place.N, hi, lo)
    span = bands.tile_span(lo, hi, place.M, BLOCK_M, False)
    masked = bands.masked_tiles(span, BLOCK_M)
    count = masked + (span.full_stop - span.full_start) // BLOCK_M
    total = count * sizes.group
    # No weight of keys past the end, whose score is 0, may reach dQ: where a row's lse is far below 0 it overflows,
    # and 0 times an infinity is NaN.
    ragged = place.n0 + BLOCK_N > place.N
    hi = gl.where(n < place.N, hi, lo)

    # The key and value tiles stay; queries and output gradients stream past, head after head of the group.
    keys = _buffers(DTYPE, CHUNKS_D, 1, BLOCK_N)
    values = _buffers(DTYPE, CHUNKS_V, 1, BLOCK_N)
    queries = _buffers(DTYPE, CHUNKS_D, STAGES, BLOCK_M)
    upstream = _buffers(DTYPE, CHUNKS_V, STAGES, BLOCK_M)
    p_buffer = gl.allocate_shared_memory(DTYPE, [BLOCK_N, BLOCK_M], _matrix(BLOCK_M))
    ds_buffer = gl.allocate_shared_memory(DTYPE, [BLOCK_N, BLOCK_M], _matrix(BLOCK_M))
    k_rows = Rows(k, place.batch_k, place.hk, place.start_k)
    v_rows = Rows(v, place.batch_k, place.hk, place.start_k)
    h, m0, _ = _step(0, total, count, masked, span, sizes.group, place.hk, SHAPE)
    limit = gl.where(total > 0, place.M, 0)
    _copy_rows(keys, 0, k_rows, place.n0, place.N, BLOCK_N, WARPS)
    _copy_rows(values, 0, v_rows, place.n0, place.N, BLOCK_N, WARPS)
    _copy_rows(queries, 0, Rows(q, place.batch_q, h, place.start_q), m0, limit, BLOCK_M, WARPS)
    _copy_rows(upstream, 0, Rows(grad_out, place.batch_q, h, place.start_q), m0, limit, BLOCK_M, WARPS)
    async_copy.commit_group()
    dk = _zeros(BLOCK_N, CHUNKS_D, G)
    dv = _zeros(BLOCK_N, CHUNKS_V, G)
    segment = gl.minimum(place.b, sizes.B - 1)
    for i in range(total):
        h, m0, has_mask = _step(i, total, count, masked, span, sizes.group, place.hk, SHAPE)
        next_h, next_m0, _ = _step(i + 1, total, count, masked, span, sizes.group, place.hk, SHAPE)
        next_limit = gl.where(i + 1 < total, place.M, 0)
        next_q = Rows(q, place.batch_q, next_h, place.start_q)
        next_do = Rows(grad_out, place.batch_q, next_h, place.start_q)
        slot = i % STAGES
        async_copy.wait_group(0)
        if STAGES > 1:
            ahead = (i + 1) % STAGES
            _copy_rows(queries, ahead, next_q, next_m0, next_limit, BLOCK_M, WARPS)
            _copy_rows(upstream, ahead, next_do, next_m0, next_limit, BLOCK_M, WARPS)
            async_copy.commit_group()
        m = m0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, S))
        lse2, delta = load_stats(stats, place.batch_q * sizes.H + h, place.start_q + m)
        # Transposed tiles [BLOCK_N, BLOCK_M]: P and dS are the left operands of dV and dK.
        s = _dot_chunks(keys, queries, slot, BLOCK_N, BLOCK_M, S)
        steps = scores.prepare(operands.steps, segment, h, place.start_q, place.start_k, STEPS)
        head = Head(scoring.first, scoring.scale2, steps, None, None)
        inside = (m < place.M)[None, :] & (n < place.N)[:, None]
        s, slope = score_gradient(s, m[None, :], n[:, None], shift, inside, head, STEPS)
        p = gl.exp2(s * scoring.scale2 - lse2[None, :])
        if has_mask | ragged:
            p = gl.where((m[None, :] < hi[:, None]) & (m[None, :] >= lo[:, None]), p, 0.0)
        dp = _dot_chunks(values, upstream, slot, BLOCK_N, BLOCK_M, S)
        ds = p * (dp - delta[None, :]) * slope
        if has_mask | ragged:
            # A masked value may be NaN, and 0 * NaN is NaN.
            ds = gl.where(p == 0.0, 0.0, ds)
        p_buffer.store(p.to(DTYPE))
        ds_buffer.store(ds.to(DTYPE))
        left = p_buffer.load(gl.DotOperandLayout(0, G, 2))
        dv = _add_dot(dv, left, upstream, slot, G)
        left = ds_buffer.load(gl.DotOperandLayout(0, G, 2))
        dk = _add_dot(dk, left, queries, slot, G)
        if STAGES == 1:
            _copy_rows(queries, 0, next_q, next_m0, next_limit, BLOCK_M, WARPS)
            _copy_rows(upstream, 0, next_do, next_m0, next_limit, BLOCK_M, WARPS)
            async_copy.commit_group()
        if grads.sum_q is not None:
            sums = sums_of(grads.sum_q, place.batch_q * sizes.H + h, place.start_q, place.b, spans.cu_q)
            _add_queries(sums, ds_buffer, keys, m0, SHAPE)
    async_copy.wait_group(0)
    if grads.k is not None:
        to = Rows(grads.k, place.batch_k, place.hk, place.start_k)
        _store(to, place.n0, place.N, place.stored, dk, scoring.scale, BLOCK_N, CHUNKS_D, WARPS)
    if grads.v is not None:
        to = Rows(grads.v, place.batch_k, place.hk, place.start_k)
        _store(to, place.n0, place.N, place.stored, dv, 1.0, BLOCK_N, CHUNKS_V, WARPS)


def zero_sums(problem: Problem, call: Call) -> torch.Tensor:
    """Zeros fp32 [B * H, rows, columns] for the sums of dQ, with room for a tile past the last row."""
    rows = (triton.cdiv(call.query.shape[2], 128) + (problem.batch + 1 if problem.packed_q else 0)) * 128
    columns = triton.cdiv(problem.head_dim, CHUNK.value) * CHUNK.value
    heads = call.query.shape[0] * problem.heads
    return call.query.new_zeros(heads, rows, columns, dtype=torch.float32)


def why_not(problem: Problem) -> Iterator[str]:
    """Why this kernel cannot run the problem."""
    if launching.INTERPRETED:
        yield "Triton's interpreter cannot run Gluon"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        yield f"it has float16 and bfloat16, got {problem.dtype}"
    if problem.layout != "aligned" or problem.head_dim_v % 8 or problem.wide:
        yield "it needs unit stride on D and multiples of 16 bytes everywhere else"
    if problem.dense or problem.dropout:
        yield "it has no dense masks and no dropout"


def launch(
    problem: Problem, config: tables.Fused, call: Call, grad_out: torch.Tensor, stats: RowStats,
    grad_k: torch.Tensor | None, grad_v: torch.Tensor | None, sum_q: torch.Tensor | None,
) -> None:  # fmt: skip
    """Fill dK and dV and add to the sums of dQ."""
    if not tma_ready(grad_out):
        grad_out = grad_out.contiguous()
    shape = Shape(
        config.BLOCK_M,
        config.BLOCK_N,
        triton.cdiv(problem.head_dim, CHUNK.value),
        triton.cdiv(problem.head_dim_v, CHUNK.value),
        config.num_warps,
        config.STAGES,
        config.WARPS_S,
        config.WARPS_K,
        config.WARPS_Q,
        problem.mask.bounds_left,
        problem.mask.align == "bottom-right",
        problem.group > 1,
    )
    arguments = (
        *map(Strided.of, (call.query, call.key, call.value, grad_out)),
        stats,
        Grads(*(None if tensor is None else Strided.of(tensor) for tensor in (grad_k, grad_v, sum_q))),
        *launching.bundle(problem, call),
        shape,
        launching.steps(problem),
    )
    programs = launching.programs(call.cu_k, problem.batch, problem.heads_kv, call.key.shape[2], config.BLOCK_N)
    launching.launch(backward_fused, programs, call.query.device, arguments, num_warps=config.num_warps)
