"""The tensors of a measured call, and what is counted on them.

B batch, H query heads, M query rows, N keys, Dv head dim of value
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from torch_flash2 import Lengths, masks
from torch_flash2.oracle import Inputs

from .suites import Shape


class Segment(NamedTuple):
    """Where one segment's rows lie in query, and its keys in key and value."""

    batch_q: int
    row: int
    rows: int
    batch_k: int
    key: int
    keys: int


def segments(inputs: Inputs) -> list[Segment]:
    """The segments of a call, from its lengths."""
    lengths = inputs.lengths or Lengths()
    sides = []
    for tensor, cu, used in (
        (inputs.query, lengths.cu_q, lengths.used_q),
        (inputs.key, lengths.cu_k, lengths.used_k),
    ):
        if cu is None:
            places = [(b, 0, tensor.shape[2]) for b in range(tensor.shape[0])]
        else:
            edges = cu.tolist()
            places = [(0, edges[i], edges[i + 1] - edges[i]) for i in range(len(edges) - 1)]
        counts = [count for _, _, count in places] if used is None else used.tolist()
        sides.append([(b, start, n) for (b, start, _), n in zip(places, counts, strict=True)])
    return [Segment(*q, *k) for q, k in zip(*sides, strict=True)]


@dataclasses.dataclass
class Sample:
    """Inputs of one call, and the gradient [B, H, M, Dv] that arrives."""

    inputs: Inputs
    grad_out: torch.Tensor

    def flops(self, direction: str) -> float:
        """Operations of the two products on visible pairs; the backward counts 2.5 times these."""
        inputs = self.inputs
        mask = masks.parse(inputs.bands)
        seen: dict[tuple[int, int], int] = {}
        pairs = 0
        for segment in segments(inputs):
            size = segment.rows, segment.keys
            if size not in seen:
                lo, hi = mask.keys(torch.arange(size[0]), *size)
                seen[size] = int((hi - lo).clamp(min=0).sum())
            pairs += seen[size]
        forward = 2.0 * inputs.query.shape[1] * pairs
        forward *= inputs.query.shape[3] + inputs.value.shape[3]
        return {"forward": 1.0, "backward": 2.5, "both": 3.5}[direction] * forward

    def bytes(self, direction: str) -> int:
        """The fewest bytes to move: each input read once, each output written once."""
        inputs = sum(t.numel() * t.element_size() for t in self.inputs.leaves.values())
        out = self.grad_out.numel() * self.grad_out.element_size()
        lse = 4 * self.grad_out.shape[0] * self.grad_out.shape[1] * self.grad_out.shape[2]
        forward, backward = inputs + out + lse, 2 * inputs + 2 * out + lse
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def make(shape: Shape, device: torch.device, seed: int, requires_grad: bool) -> Sample:
    """Random normal data; padding is 0: not every peer keeps what it masks from leaking."""
    inputs = shape.case.inputs(device, seed)
    for tensor in (inputs.query, inputs.key, inputs.value):
        tensor.nan_to_num_(nan=0.0)
    for leaf in inputs.leaves.values():
        leaf.requires_grad_(requires_grad)
    batch, heads, rows, _ = inputs.query.shape
    generator = torch.Generator(device).manual_seed(seed + 1)
    sizes = (batch, rows, heads, inputs.value.shape[3])
    grad_out = torch.randn(sizes, generator=generator, device=device).to(inputs.query.dtype)
    return Sample(inputs, grad_out.transpose(1, 2))


def segment_ids(edges: torch.Tensor, length: int) -> torch.Tensor:
    """The document [length] that each row of a packed tensor belongs to."""
    rows = torch.arange(length, device=edges.device)
    return torch.searchsorted(edges[1:].long(), rows, right=True)


def visible(inputs: Inputs) -> torch.Tensor:
    """Mask, documents and padding of a call as one bool mask [1 or B, 1, M, N]; True is attend.

    Raises:
        ValueError: the rows are packed and the keys are not, or the other way round.
    """
    batch, rows, keys = inputs.query.shape[0], inputs.query.shape[2], inputs.key.shape[2]
    if inputs.lengths is None:
        batch = 1
    elif (inputs.lengths.cu_q is None) != (inputs.lengths.cu_k is None):
        raise ValueError("no dense mask can say that only one side is packed")
    device, mask = inputs.query.device, masks.parse(inputs.bands)
    keep = torch.zeros(batch, 1, rows, keys, dtype=torch.bool, device=device)
    for segment in segments(inputs)[: batch if inputs.lengths is None else None]:
        m = torch.arange(segment.rows, device=device)[:, None]
        n = torch.arange(segment.keys, device=device)[None, :]
        block = keep[segment.batch_q, 0, segment.row :, segment.key :]
        block[: segment.rows, : segment.keys] = mask.visible(m, n, segment.rows, segment.keys)
    return keep if inputs.dense is None else keep & inputs.dense
