"""CPU tensors: ATen's own flash kernel where it is right, else eager attention tile by tile, both in linear memory.

B batch entries, H query heads, M query rows, N keys, D head dim of query and key, Dv head dim of
value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .. import masks
from ..problem import Call, Gradients, Problem, Saved
from . import eager

# Scores that the tiled path computes together where it can choose, 4 MiB in fp32, and at most.
SCORES = 1 << 20
MOST_SCORES = 1 << 22
ROWS = (64, 32, 16, 8, 4, 2, 1)


class Config(NamedTuple):
    """`path` is "aten" or "tiled"; `rows` how many query rows the tiled path takes at a time.

    The aten path leaves calls with NaN or infinities, and gradients of the lse, to the tiled one.
    """

    path: str
    rows: int


def why_not(problem: Problem) -> Iterator[str]:
    """Why this kernel cannot run the problem."""
    if problem.hardware.type != "cpu":
        yield f"it runs on CPU tensors, these are on {problem.hardware.type}"
    if problem.page_size is not None and problem.direction == "backward":
        yield "it has no backward through pages"


def aten_why_not(problem: Problem) -> Iterator[str]:
    """Why ATen's kernel cannot run the problem, or would not be right."""
    causal = masks.causal().bands
    if problem.mask.bands not in ((), causal) or problem.dense:
        yield "it has no mask but causal"
    elif problem.mask.bands == causal and problem.mask.align == "bottom-right":
        yield "its causal mask is top-left"
    if not problem.positive_scale:
        yield "it masks before it scales"
    if problem.steps or problem.sinks or problem.dropout:
        yield "it has no softcap, ALiBi, bias, sinks or dropout"
    if problem.head_dim != problem.head_dim_v:
        yield "it has one head dim for key and value"
    if 0 in (problem.batch, problem.heads, problem.seqlen_q, problem.seqlen_k):
        yield "it fails on empty tensors"
    if problem.direction == "backward" and problem.dtype == torch.float64:
        yield "it needs the lse in fp64"
    if problem.dtype.itemsize == 2:
        yield "it rounds the lse to 16 bits, and sums 16-bit gradients in 16 bits"


def config(problem: Problem) -> Config:
    """ATen's kernel where it can."""
    path = "tiled" if any(aten_why_not(problem)) else "aten"
    fitting = (rows for rows in ROWS if rows * problem.group * problem.seqlen_k <= MOST_SCORES)
    return Config(path, next(fitting, 1))


def candidates(problem: Problem) -> Iterator[Config]:
    """Both paths, and the tiled one with more and with fewer rows."""
    best = config(problem)
    if best.path == "aten":
        yield best
    for rows in dict.fromkeys((best.rows, 2 * best.rows, max(best.rows // 2, 1))):
        yield Config("tiled", rows)


def copies(problem: Problem) -> Iterator[str]:
    """The copies of inputs that the kernel makes."""
    if problem.layout == "strided" and not any(aten_why_not(problem)):
        yield "of query, key and value, those with strides in the head dim"


def launch(
    problem: Problem, config: Config, call: Call, saved: Saved | None = None
) -> tuple[torch.Tensor, torch.Tensor] | Gradients:
    """Run it: out [B, H, M, Dv] in the query's dtype and lse fp32 [B, H, M], or Gradients.

    Raises:
        ValueError: a forced config asks for a path that cannot run the problem, or for no rows.
    """
    if config.path not in ("aten", "tiled") or config.rows < 1:
        raise ValueError(f"cpu's config needs path 'aten' or 'tiled' and rows >= 1, got {config}")
    call = eager.unpaged(call)
    if config.path == "aten":
        reasons = "; ".join(aten_why_not(problem))
        if reasons:
            raise ValueError(f"cpu's path 'aten' cannot run this call: {reasons}")
        causal = bool(problem.mask.bands)
        found: tuple[torch.Tensor, torch.Tensor] | Gradients | None
        if saved is None:
            found = _aten_forward(call, causal)
        else:
            found = _aten_backward(call, saved, causal)
        if found is not None:
            return found
    step = _step(problem, config.rows)
    return eager.forward(call, step) if saved is None else eager.backward(call, saved, step)


def _step(problem: Problem, rows: int) -> eager.Step:
    """As many heads, and then batch entries, as the scores' bound lets in, at least one."""
    scores = max(min(rows, problem.seqlen_q) * problem.seqlen_k * problem.group, 1)
    heads = min(max(SCORES // scores, 1), problem.heads_kv)
    return eager.Step(max(SCORES // (scores * heads), 1), heads, rows)


def _aten_forward(call: Call, causal: bool) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The forward by ATen's kernel; None where an input has NaN or infinities.

    ATen multiplies hidden values by 0, and short rows of scores lose a NaN.
    """
    out, lse = eager.outputs(call)
    for segment in eager.split(call, call.query.shape[0], call.key.shape[1]):
        if segment.M == 0 or segment.N == 0:
            continue
        part = segment.call(call)
        inputs = [_unit(tensor) for tensor in (part.query, part.key, part.value)]
        if not all(map(_finite, inputs)):
            return None
        part_out, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *inputs, 0.0, causal, scale=call.scale
        )
        segment.queries(out).copy_(part_out)
        segment.queries(lse).copy_(part_lse)
    return out, lse


def _aten_backward(call: Call, saved: Saved, causal: bool) -> Gradients | None:
    """The backward by ATen's kernel; None as for the forward, or where the lse has a gradient."""
    if saved.grad_out is None or saved.grad_lse is not None:
        return None
    query, key, value = (
        torch.zeros_like(tensor) if want else None for tensor, want in zip(call[:3], saved.wanted[:3], strict=True)
    )
    sums = Gradients(query, key, value, None, None)
    for segment in eager.split(call, call.query.shape[0], call.key.shape[1]):
        if segment.M == 0 or segment.N == 0:
            continue
        part, state = segment.call(call), segment.saved(saved)
        assert state.grad_out is not None
        tensors = (state.grad_out, part.query, part.key, part.value, state.out)
        inputs = [_unit(tensor) for tensor in tensors]
        if not all(map(_finite, inputs)):
            return None
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *inputs, state.lse, 0.0, causal, scale=call.scale
        )
        for total, gradient in zip(segment.gradients(sums)[:3], gradients, strict=True):
            if total is not None:
                total.add_(gradient)
    return sums


def _unit(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with unit stride on its last dimension, which ATen takes for granted."""
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all of it is; a sum that overflows says no as well, which is safe here."""
    return bool(torch.isfinite(tensor.sum(dtype=eager.working_dtype(tensor.dtype))))
