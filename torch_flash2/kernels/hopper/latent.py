"""Decoding with latent keys (absorbed MLA) on Hopper from the host's side: what it can run, its launch.

B segments, H query heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...problem import Call, Problem, key_value, stored_keys
from ..bundles import Strided
from ..triton import launching, recording, splitting
from .latent_kernel import KEYS, ROWS, WIDTH, Shape, attention_latent

VALUE_DIM = 512
# The most columns beside the value's: queries, two tiles of keys and P just fit into shared memory.
REST = 64


def why_not(problem: Problem) -> Iterator[str]:
    """Why this kernel cannot run the problem."""
    hardware = problem.hardware
    if hardware.type != "cuda" or hardware.capability != (9, 0):
        yield "it is for Hopper GPUs (compute capability 9.0)"
        return
    if not problem.value_in_key:
        yield "it is for values that are the first columns of the key, the same memory"
        return
    if launching.INTERPRETED and not hardware.name.startswith("simulated"):
        yield "Triton's interpreter cannot run Gluon"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        yield f"it has float16 and bfloat16, got {problem.dtype}"
    if problem.layout != "aligned" or problem.wide:
        yield "TMA needs unit stride on D and multiples of 16 bytes everywhere else"
    if problem.head_dim_v != VALUE_DIM or problem.head_dim > VALUE_DIM + REST:
        yield (
            f"it has values of {VALUE_DIM} columns in keys of up to {VALUE_DIM + REST}, "
            f"got {problem.head_dim_v} in {problem.head_dim}"
        )
    if problem.page_size is not None and problem.page_size % 16:
        yield f"it has pages of multiples of 16 keys, got {problem.page_size}"
    if problem.steps or problem.dense or not problem.positive_scale:
        yield "softcap, ALiBi, biases, dense masks and scales that are not positive stay on the portable kernel"
    if problem.packed_q or problem.packed_k:
        yield "it has no packed documents"
    if problem.dropout:
        yield "it has no dropout"


def config(problem: Problem) -> None:
    """It has one way to run: what it keeps in shared memory leaves no choice."""


def candidates(problem: Problem) -> Iterator[None]:
    """Configurations worth measuring: there is nothing to choose."""
    yield None


def shape(problem: Problem) -> Shape:
    """The compile-time numbers of a launch."""
    page = problem.page_size or 0
    return Shape(
        triton.cdiv(problem.head_dim, WIDTH.value),
        page,
        math.gcd(page, KEYS.value),
        problem.mask.bounds_left,
        problem.mask.align == "bottom-right",
    )


def descriptor(key: torch.Tensor, rows: int) -> TensorDescriptor:
    """How TMA sees keys [B or pages, G, keys, D] in boxes of `rows` keys and one chunk of columns."""
    layout = gl.NVMMASharedLayout(128, 16, 4)
    return TensorDescriptor(key, list(key.shape), launching.tma_strides(key), [1, 1, rows, WIDTH.value], layout)


def launch(problem: Problem, config: None, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Run it: out [B, H, M, Dv] in the query's dtype, laid out in memory as the query; lse fp32 [B, H, M]."""
    out, lse = launching.outputs(call)
    if problem.batch == 0 or 0 in call.query.shape or stored_keys(call) == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    tile_bytes = KEYS.value * problem.head_dim * problem.dtype.itemsize
    splits, count = splitting.prepare(problem, splitting.Work(ROWS.value, KEYS.value, tile_bytes, 1), call, lse)
    spans, sizes, rules, scoring, operands = launching.bundle(problem, call)
    numbers = shape(problem)
    arguments = (
        Strided.of(call.query), descriptor(key_value(call)[0], numbers.BOX), Strided.of(out), lse, splits, spans,
        sizes, rules, scoring, operands.sinks, numbers, launching.steps(problem),
    )  # fmt: skip
    programs = splitting.programs(problem, ROWS.value) * count
    launching.launch(attention_latent, programs, call.query.device, arguments, num_warps=4)
    if count > 1:
        splitting.combine(splits, out, lse, call, sizes)
    return out, lse


def record(
    problem: Problem, config: None, call: Call
) -> tuple[tuple[torch.Tensor, torch.Tensor], recording.Recording | None]:
    """Run it, and record it for calls alike."""
    return recording.record(launch, problem, config, call)
