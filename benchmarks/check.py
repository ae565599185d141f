"""Correctness before speed: a provider's results against exact ones on a slice of the call.

A slice is one segment and one key head with the query heads that share it, so that long sequences
stay affordable; where a gradient is summed over the batch (bias, sinks), every segment is in it.

B batch, H query heads, G kv heads, M query rows, N keys
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from torch_flash2.oracle import Inputs, math_attention
from torch_flash2.testing import DTYPES

from .data import Sample, Segment, segments
from .providers import Provider
from .suites import Shape

Results = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Slice:
    """Which part of the tensors is compared: some heads, of one segment or, where None, of all."""

    segment: Segment | None
    heads: slice
    heads_kv: slice

    @classmethod
    def of(cls, inputs: Inputs) -> Slice:
        heads, heads_kv = inputs.query.shape[1], inputs.key.shape[1]
        group = heads // heads_kv
        last = (slice(heads - group, heads), slice(heads_kv - 1, heads_kv))
        if inputs.bias is not None and inputs.bias.shape[1] == 1:
            last = (slice(None), slice(None))
        if inputs.bias is not None or inputs.sinks is not None:
            return cls(None, *last)
        full = [segment for segment in segments(inputs) if segment.rows and segment.keys]
        return cls(full[-1], *last)

    def place(self, name: str) -> tuple[slice, ...]:
        """The index of the slice in a leaf or in "out"."""
        if name == "sinks":
            return (self.heads,)
        if name == "bias":
            return slice(None), self.heads
        heads = self.heads_kv if name in ("key", "value") else self.heads
        if self.segment is None:
            return slice(None), heads
        batch, start, length = self.segment[3:] if name in ("key", "value") else self.segment[:3]
        return slice(batch, batch + 1), heads, slice(start, start + length)

    def cut(self, inputs: Inputs) -> Inputs:
        """The slice as a call of its own; without dropout, whose bits are each provider's own."""
        parts: dict[str, Any] = {name: leaf.detach()[self.place(name)] for name, leaf in inputs.leaves.items()}
        slopes = None if inputs.alibi_slopes is None else inputs.alibi_slopes[self.heads]
        lengths = inputs.lengths if self.segment is None else None
        return inputs._replace(**parts, alibi_slopes=slopes, lengths=lengths, dropout_p=0.0)


def results(provider: Provider, shape: Shape, sample: Sample) -> Results:
    """The provider's output and, beyond a forward, the gradient of every leaf; without dropout."""
    inputs = sample.inputs._replace(dropout_p=0.0)
    with provider.context():
        out = provider.call(inputs)
        if shape.direction == "forward":
            return {"out": out.detach()}
        gradients = torch.autograd.grad(out, list(inputs.leaves.values()), sample.grad_out)
    return {"out": out.detach(), **dict(zip(inputs.leaves, gradients, strict=True))}


# A peer is refused where it computes something else, not where it rounds more: its errors stand in the results.
PEER_SLACK = 4.0


class Reference:
    """Exact results of a shape's slice, and how far plain PyTorch in its dtype is from them."""

    def __init__(self, shape: Shape, sample: Sample) -> None:
        self.slice = Slice.of(sample.inputs)
        inputs, dtype = self.slice.cut(sample.inputs), DTYPES[shape.case.dtype]
        grad_out = sample.grad_out[self.slice.place("out")]
        grad_lse = grad_out.new_zeros(grad_out.shape[:3], dtype=torch.float32)
        exact = math_attention(inputs, None, grad_out, grad_lse, torch.float64)
        plain = math_attention(inputs, None, grad_out, grad_lse, dtype)
        self.exact = {"out": exact.out, **exact.gradients}
        rounding = torch.finfo(dtype).eps / 2
        self.bounds = {
            name: 2 * relative_error(value, self.exact[name]) + rounding
            for name, value in {"out": plain.out, **plain.gradients}.items()
        }

    def errors(self, found: Results) -> dict[str, float]:
        """The relative error of each result, ||found - exact|| / ||exact||."""
        return {
            name: relative_error(tensor[self.slice.place(name)], self.exact[name]) for name, tensor in found.items()
        }

    def complaints(self, errors: dict[str, float], slack: float = 1.0) -> list[str]:
        """What is wrong, in words: an error over `slack` times twice plain PyTorch's plus rounding, or NaN."""
        return [
            f"{name} is off by {error:.1e} > {slack * self.bounds[name]:.1e}"
            for name, error in errors.items()
            if not error <= slack * self.bounds[name]
        ]


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    norm = exact.norm().item()
    error = (found.double() - exact).norm().item()
    return error / norm if norm > 0 else (error if math.isfinite(error) else math.inf)
