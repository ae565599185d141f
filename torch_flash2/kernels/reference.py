"""The oracle: attention written out in eager PyTorch, any mask, any device; memory as M * N.

It computes in fp64 where the inputs are fp64, else in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..problem import Call, Gradients, Problem, Saved
from . import eager


def why_not(problem: Problem) -> Iterator[str]:
    """Why this kernel cannot run the problem."""
    if problem.hardware.name.startswith("simulated"):
        yield "it runs on real tensors only"
    if problem.page_size is not None and problem.direction == "backward":
        yield "it has no backward through pages"


def config(problem: Problem) -> None:
    """There is nothing to configure."""


def candidates(problem: Problem) -> Iterator[None]:
    """There is nothing to measure."""
    yield None


def launch(
    problem: Problem, config: None, call: Call, saved: Saved | None = None
) -> tuple[torch.Tensor, torch.Tensor] | Gradients:
    """Run it: out [B, H, M, Dv] in the query's dtype and lse fp32 [B, H, M], or Gradients."""
    call = eager.unpaged(call)
    step = eager.Step(max(problem.batch, 1), problem.heads_kv, max(problem.seqlen_q, 1))
    return eager.forward(call, step) if saved is None else eager.backward(call, saved, step)
