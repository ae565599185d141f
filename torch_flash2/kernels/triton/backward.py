"""The portable backward in Triton, sm80 and up: one kernel for dK and dV, one for dQ, deterministic; atomics, see
fused.py, on request.

B segments, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
With P the probabilities and delta = rowsum(dO * O) - dLSE: dV = P^T dO, dS = P * (dO V^T - delta), dQ = scale dS K, dK
= scale dS^T Q
(Dao et al. 2022, arXiv 2205.14135, appendix B.4). Scores are recomputed in both kernels; nothing of size M * N is
stored.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ...problem import Call, Gradients, Problem, Saved
from ..bundles import Dropout, Grads, Head, Queries, Rows, RowStats, Strided, Tile
from ..device import bands, philox, scores, tiles
from . import bias_gradient, fused, launching, recording, tables
from .common import load_stats, score_gradient
from .query_gradient import query_gradient
from .statistics import launch_stats, sink_gradient
from .tables import BackwardConfig


@triton.jit
def _accumulate_keys(
    dk, dv, keys, values, inputs, hk, b, tile, span, sizes, rules, scoring, operands,
    MODE: tl.constexpr, STEPS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dK (before the scale) and dV of a tile of keys, over the query tiles of a span that need a mask (MASKED) or need
    none.

    One loop runs over the tiles of all query heads of the group, so that loads are pipelined across heads.
    """
    if MASKED:
        count = bands.masked_tiles(span, MODE.BLOCK_M)
    else:
        count = (span.full_stop - span.full_start) // MODE.BLOCK_M
    n = tile.at
    k = tiles.load_pieces(keys, tile.first, tile.N, True, MODE.BLOCK_N, MODE.BLOCK_D, MODE)
    v = k
    if inputs.grads.k is not None:
        v = tiles.load_pieces(values, tile.first, tile.N, True, MODE.BLOCK_N, MODE.BLOCK_DV, MODE)
    segment = tl.minimum(b, sizes.B - 1)
    for i in tl.range(0, count * sizes.group if MODE.GROUPED else count):
        h = hk
        j = i
        if MODE.GROUPED:
            h = hk * sizes.group + i // count
            j = i % count
        if MASKED:
            m0 = bands.masked_tile(span, j, MODE.BLOCK_M)
        else:
            m0 = span.full_start + j * MODE.BLOCK_M
        dropout = None
        if operands.seed is not None:
            dropout = Dropout(philox.load_key(operands.seed), b, h, philox.threshold_of(scoring))
        dense = None
        if rules.dense is not None:
            dense = tiles.dense_at(rules.dense, segment, h, inputs.start_q, inputs.start_k)
        steps = scores.prepare(operands.steps, segment, h, inputs.start_q, inputs.start_k, STEPS)
        head = Head(scoring.first, scoring.scale2, steps, dropout, dense)
        m = m0 + tl.arange(0, MODE.BLOCK_M)
        q_rows = Rows(inputs.q, inputs.batch_q, h, inputs.start_q)
        do_rows = Rows(inputs.grad_out, inputs.batch_q, h, inputs.start_q)
        q = tiles.load_pieces(q_rows, m0, tile.M, MASKED, MODE.BLOCK_M, MODE.BLOCK_D, MODE)
        do = tiles.load_pieces(do_rows, m0, tile.M, MASKED, MODE.BLOCK_M, MODE.BLOCK_DV, MODE)
        lse2, delta = load_stats(inputs.stats, inputs.batch_q * sizes.H + h, inputs.start_q + m)
        # Transposed tiles [BLOCK_N, BLOCK_M]: P and dS are the left operands of both products.
        # again is never anything but 0, which the compiler does not know: loads there stay loads of their own.
        again = tl.minimum(m0, 0)
        if MODE.AGAIN:
            s = tiles.dot_rows(
                keys, tile.first + again, tile.N, MODE.BLOCK_N, q_rows, m0, tile.M, MODE.BLOCK_M, MODE.BLOCK_D, MODE
            )
        else:
            s = tiles.dot_pieces(k, q, MODE)
        inside = (m < tile.M)[None, :] & (n < tile.N)[:, None]
        s, slope = score_gradient(s, m[None, :], n[:, None], tile.shift, inside, head, STEPS)
        p = tl.exp2(s * head.scale2 - lse2[None, :])
        if MASKED:
            visible = (m[None, :] < tile.hi[:, None]) & (m[None, :] >= tile.lo[:, None])
            if head.dense is not None:
                visible = visible & (tiles.load_at(head.dense, m[None, :], n[:, None], visible & inside) != 0)
            p = tl.where(visible, p, 0.0)
        dropped = p
        if head.dropout is not None:
            kept = philox.keep_tile(head.dropout, m, tile.first, MODE.BLOCK_M, MODE.BLOCK_N).T
            dropped = tl.where(kept, p, 0.0)
        if inputs.grads.v is not None:
            if MODE.AGAIN:
                dv = tiles.add_dot_rows(dv, dropped, do_rows, m0, tile.M, MODE.BLOCK_M, MODE)
            else:
                dv = tiles.add_dot(dv, dropped.to(do[0].dtype), do, MODE)
        if inputs.grads.k is not None:
            if MODE.AGAIN:
                dp = tiles.dot_rows(
                    values, tile.first + again, tile.N, MODE.BLOCK_N, do_rows, m0 + again, tile.M, MODE.BLOCK_M,
                    MODE.BLOCK_DV, MODE,
                )  # fmt: skip
            else:
                dp = tiles.dot_pieces(v, do, MODE)
            if head.dropout is not None:
                dp = tl.where(kept, dp * scoring.inverse_keep, 0.0)
            ds = p * (dp - delta[None, :]) * slope
            if MASKED:
                # A masked value may be NaN, and 0 * NaN is NaN.
                ds = tl.where(visible, ds, 0.0)
            ds = ds.to(q[0].dtype)
            if MODE.AGAIN:
                dk = tiles.add_dot_rows(dk, ds, q_rows, m0 + again, tile.M, MODE.BLOCK_M, MODE)
            else:
                dk = tiles.add_dot(dk, ds, q, MODE)
    return dk, dv


@triton.jit
def backward_keys(
    q, k, v, grad_out, stats, grads, spans, coded_sizes, rules, scoring, operands,
    MODE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """dK and dV (one of them where the other's tensor is None) of one tile of keys of one key/value head, summed over
    the query heads of its group."""
    BLOCK_N: tl.constexpr = MODE.BLOCK_N
    BLOCK_D: tl.constexpr = MODE.BLOCK_D
    BLOCK_DV: tl.constexpr = MODE.BLOCK_DV
    QUERIES: tl.constexpr = STEPS.QUERIES
    sizes = tiles.sizes_of(coded_sizes)
    # Where this program works: tiles from the first on, since under a causal mask those have most rows.
    index, hk, b = tiles.locate(tl.program_id(0), spans.cu_k, sizes.B, sizes.H // sizes.group, sizes.N, BLOCK_N, False)
    batch_q, start_q, _, used_q = tiles.extent(b, spans.cu_q, spans.used_q, sizes.B, sizes.M)
    batch_k, start_k, stored, used_k = tiles.extent(b, spans.cu_k, spans.used_k, sizes.B, sizes.N)
    n0 = index * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    shift = used_k - used_q if MODE.BOTTOM_RIGHT else used_k * 0
    # Which rows see its keys; keys past the end count as the last one, so that they widen nothing.
    lo, hi = bands.intersect(tl.minimum(n, used_k - 1), used_q, used_q, used_k, shift, rules.numbers, QUERIES)
    hi = tl.where(n0 < used_k, hi, lo)
    if rules.dense is not None:
        hi = tl.where(n < used_k, hi, lo)
    span = bands.tile_span(lo, hi, used_q, MODE.BLOCK_M, rules.dense is not None)
    tile = Tile(n, n0, lo, hi, shift, used_q, used_k)

    # The key and value tiles stay; the loops stream queries and output gradients, head after head of the group.
    keys = Rows(k, batch_k, hk, start_k)
    values = Rows(v, batch_k, hk, start_k)
    dk = tiles.zero_pieces(BLOCK_N, BLOCK_D, MODE)
    dv = tiles.zero_pieces(BLOCK_N, BLOCK_DV, MODE)
    inputs = Queries(q, grad_out, grads, stats, batch_q, start_q, start_k)
    dk, dv = _accumulate_keys(
        dk, dv, keys, values, inputs, hk, b, tile, span, sizes, rules, scoring, operands, MODE, STEPS, True
    )
    if rules.dense is None:
        dk, dv = _accumulate_keys(
            dk, dv, keys, values, inputs, hk, b, tile, span, sizes, rules, scoring, operands, MODE, STEPS, False
        )
    used = (n < used_k)[:, None]
    if grads.k is not None:
        dk = tiles.keep_pieces(used, tiles.scale_pieces(dk, scoring.scale))
        tiles.store_pieces(Rows(grads.k, batch_k, hk, start_k), n0, stored, dk, BLOCK_N)
    if grads.v is not None:
        dv = tiles.keep_pieces(used, tiles.scale_pieces(dv, scoring.inverse_keep))
        tiles.store_pieces(Rows(grads.v, batch_k, hk, start_k), n0, stored, dv, BLOCK_N)


@triton.jit
def backward_queries(
    q, k, k_plain, v, grad_out, stats, grad_q, sum_q, spans, coded_sizes, rules, scoring, operands,
    MODE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of query rows of one head."""
    pid = tl.program_id(0)
    found = query_gradient(
        pid, q, k, v, grad_out, stats, grad_q, sum_q, spans, coded_sizes, rules, scoring, operands, MODE, STEPS, False
    )
    if len(STEPS.KEYS) > 0 or rules.dense is not None:
        # NaN here may come from a key that no row of the tile sees. All is computed anew from the launch's arguments:
        # what this path shared with the loops above would take registers from them.
        if found:
            # Other threads stored these elements first: without a barrier theirs may land last.
            tl.debug_barrier()
            query_gradient(
                pid + tl.minimum(pid, 0), q, k_plain, v, grad_out, stats, grad_q, sum_q, spans, coded_sizes, rules,
                scoring, operands, MODE, STEPS, True,
            )  # fmt: skip


def why_not(problem: Problem) -> Iterator[str]:
    """Why this kernel cannot run the problem."""
    yield from launching.why_not(problem)
    if problem.page_size is not None:
        yield "it has no backward through pages"


def config(problem: Problem) -> BackwardConfig:
    """The measured or nearest configuration."""
    found = tables.backward(problem)
    return found._replace(fused=None) if any(fused.why_not(problem)) else found


def forbids(problem: Problem, config: BackwardConfig) -> Iterator[str]:
    """What the problem does not allow in a forced configuration."""
    if config.atomics and problem.deterministic:
        yield "atomics add in an order that varies, and PyTorch's deterministic algorithms are on"


def candidates(problem: Problem) -> Iterator[BackwardConfig]:
    """Configurations worth measuring: each kernel's, beside the other's default."""
    default = config(problem)
    for candidate in tables.sweep(problem):
        yield default._replace(kv=candidate)
        yield default._replace(q=candidate)
    if default.fused is not None and not problem.deterministic:
        for candidate in tables.sweep_fused():
            yield default._replace(fused=candidate, atomics=True)


def launch(problem: Problem, config: BackwardConfig, call: Call, saved: Saved) -> Gradients:
    """Run it; each gradient has the shape, dtype and dimension order of its tensor."""
    out, lse, grad_out, grad_lse, wanted = saved
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    elif grad_out.stride(3) != 1:
        # That of out.sum() is expanded: configurations are chosen for rows that load at full width.
        grad_out = grad_out.contiguous()
    tensors = (call.query, call.key, call.value, call.bias, call.sinks)
    found = Gradients(
        *(torch.empty_like(t) if want and t is not None else None for t, want in zip(tensors, wanted, strict=True))
    )
    if problem.batch == 0 or 0 in call.query.shape or 0 in call.key.shape:
        for gradient in found:
            if gradient is not None:
                gradient.zero_()
        return found
    stats = launch_stats(call, out, lse, grad_out, grad_lse)
    sums = None
    if config.fused is not None and (config.atomics or config.v is not None):
        sums = fused.zero_sums(problem, call) if config.atomics and found.query is not None else None
        fused.launch(problem, config.fused, call, grad_out, stats, found.key, found.value, sums)
    elif config.v is not None:
        _launch_keys(problem, config.kv, call, grad_out, stats, Grads(found.key, None, None))
        _launch_keys(problem, config.v, call, grad_out, stats, Grads(None, found.value, None))
    else:
        _launch_keys(problem, config.kv, call, grad_out, stats, Grads(found.key, found.value, None))
    if found.query is not None:
        _launch_queries(problem, config.q, call, grad_out, stats, found.query, sums)
    if wanted[3]:
        bias_gradient.launch(problem, config.bias, call, grad_out, stats, found.bias)
    sink_gradient(call, lse, stats, found.sinks)
    return found


def record(
    problem: Problem, config: BackwardConfig, call: Call, saved: Saved
) -> tuple[Gradients, recording.Recording | None]:
    """Run it, and record it for calls alike."""
    return recording.record(launch, problem, config, call, saved)


def _launch_keys(
    problem: Problem, config: tables.Config, call: Call, grad_out: torch.Tensor, stats: RowStats, grads: Grads
) -> None:  # fmt: skip
    if grads.k is None and grads.v is None:
        return
    mode = launching.mode(problem, config, config.BLOCK_N)
    arguments = (
        launching.load(config, call.query, config.BLOCK_M, mode.BLOCK_D),
        Strided.of(call.key),
        Strided.of(call.value),
        launching.load(config, grad_out, config.BLOCK_M, mode.BLOCK_DV),
        stats,
        Grads(*(None if tensor is None else Strided.of(tensor) for tensor in grads)),
        *launching.bundle(problem, call),
        mode,
        launching.steps(problem),
    )
    programs = launching.programs(call.cu_k, problem.batch, problem.heads_kv, call.key.shape[2], config.BLOCK_N)
    launching.launch(backward_keys, programs, call.query.device, arguments, **config.options)


def _launch_queries(
    problem: Problem, config: tables.Config, call: Call, grad_out: torch.Tensor, stats: RowStats,
    grad_q: torch.Tensor, sum_q: torch.Tensor | None,
) -> None:  # fmt: skip
    mode = launching.mode(problem, config, config.BLOCK_M)
    arguments = (
        Strided.of(call.query),
        launching.load(config, call.key, config.BLOCK_N, mode.BLOCK_D),
        Strided.of(call.key),
        launching.load(config, call.value, config.BLOCK_N, mode.BLOCK_DV),
        Strided.of(grad_out),
        stats,
        Strided.of(grad_q),
        None if sum_q is None else Strided.of(sum_q),
        *launching.bundle(problem, call),
        mode,
        launching.steps(problem),
    )
    programs = launching.programs(call.cu_q, problem.batch, problem.heads, call.query.shape[2], config.BLOCK_M)
    launching.launch(backward_queries, programs, call.query.device, arguments, **config.options)
