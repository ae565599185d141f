"""The tests' oracle: dense attention written out in plain PyTorch, independent of every kernel.

Small and obvious: segment by segment, in chunks that bound the memory, differentiated by autograd.

B batch entries or packed documents, H query heads, G key/value heads, M query rows, N keys,
D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from . import masks, scores
from .problem import Lengths


class Inputs(NamedTuple):
    """The tensors and keywords of one call of `attention`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bands: str
    dense: torch.Tensor | None
    bias: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    softcap: float | None
    dropout_p: float
    scale: float | None
    lengths: Lengths | None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """query, key, value and mask."""
        mask: Any = self.bands if self.dense is None else masks.parse(self.bands) & self.dense
        return self.query, self.key, self.value, mask

    @property
    def keywords(self) -> dict[str, Any]:
        """The keywords of `attention`."""
        return {name: getattr(self, name) for name in self._fields[5:]}

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        """The tensors that have a gradient."""
        named = {name: getattr(self, name) for name in ("query", "key", "value", "bias", "sinks")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


class Results(NamedTuple):
    """out [B, H, M, Dv], lse [B, H, M], and a gradient for each of Inputs.leaves."""

    out: torch.Tensor
    lse: torch.Tensor
    gradients: dict[str, torch.Tensor]


class _Place(NamedTuple):
    """Where a segment lies in one side's tensors."""

    batch: int
    start: int
    length: int


class _Chunk(NamedTuple):
    """Some key heads with the query heads of their groups, some rows and some keys of a segment."""

    segment: int
    at: _Place
    to: _Place
    kv_heads: slice
    heads: slice
    rows: slice
    keys: slice

    def where(self, name: str, tensor: torch.Tensor) -> tuple[Any, ...]:
        """The index of the chunk's part of a tensor of Inputs."""
        rows = slice(self.at.start + self.rows.start, self.at.start + self.rows.stop)
        keys = slice(self.to.start + self.keys.start, self.to.start + self.keys.stop)
        if name == "query":
            return self.at.batch, self.heads, rows
        if name in ("key", "value"):
            return self.to.batch, self.kv_heads, keys
        if name == "sinks":
            return (self.heads,)
        # A bias or dense mask: the part of each dimension in which it varies.
        parts = (slice(self.segment, self.segment + 1), self.heads, rows, keys)
        return tuple(slice(0, 1) if n == 1 else part for n, part in zip(tensor.shape, parts, strict=True))


# Scores that one chunk may have: bounds the memory.
_CHUNK = 1 << 26


def math_attention(
    inputs: Inputs,
    seed: torch.Tensor | None,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    dtype: torch.dtype,
) -> Results:
    """What plain PyTorch gives where all is computed in `dtype`; in float64, the exact result.

    Args:
        inputs: the call.
        seed: int64 [2], the words that dropout draws, or None.
        grad_out, grad_lse: the gradients that arrive.
        dtype: of every intermediate; sums over chunks and the results are float32 or float64.
    """
    B, H, M, _ = inputs.query.shape
    device = inputs.query.device
    # Large cases are 16-bit; float32 holds their results exactly enough.
    wide = torch.float64 if inputs.query.dtype == torch.float32 else torch.float32
    results = Results(
        torch.zeros(B, H, M, inputs.value.shape[3], dtype=wide, device=device),
        torch.full((B, H, M), -torch.inf, dtype=torch.float64, device=device),
        {n: torch.zeros(t.shape, dtype=wide, device=device) for n, t in inputs.leaves.items()},
    )
    for chunk in _chunks(inputs):
        leaves = {
            name: leaf.detach()[chunk.where(name, leaf)].to(dtype).requires_grad_()
            for name, leaf in inputs.leaves.items()
        }
        out, lse = _attend(chunk, inputs, leaves, seed)
        place = chunk.where("query", inputs.query)
        results.out[place], results.lse[place] = out.detach().to(wide), lse.detach().double()
        upstream = [grad_out[place].to(out.dtype), grad_lse[place].to(lse.dtype)]
        found = torch.autograd.grad([out, lse], list(leaves.values()), upstream)
        for name, gradient in zip(leaves, found, strict=True):
            results.gradients[name][chunk.where(name, inputs.leaves[name])] += gradient
    return results


def _chunks(inputs: Inputs) -> Iterator[_Chunk]:
    """The work, cut into chunks of at most _CHUNK scores, without keys that no row of it sees."""
    H, G = inputs.query.shape[1], inputs.key.shape[1]
    group, device = H // G, inputs.query.device
    mask = masks.parse(inputs.bands)
    for index, (at, to) in enumerate(zip(_places(inputs, "q"), _places(inputs, "k"), strict=True)):
        M, N = at.length, to.length
        n = torch.arange(N, device=device)
        rows = min(max(_CHUNK // (group * max(N, 1)), 1), max(M, 1))
        for m in range(0, M, rows):
            part = slice(m, min(m + rows, M))
            band = mask.visible(torch.arange(part.start, part.stop, device=device)[:, None], n, M, N)
            seen = band.any(dim=0).nonzero()
            if len(seen) == 0:
                continue
            keys = slice(int(seen[0]), int(seen[-1]) + 1)
            heads = max(_CHUNK // (group * rows * (keys.stop - keys.start)), 1)
            for g in range(0, G, heads):
                end = min(g + heads, G)
                yield _Chunk(index, at, to, slice(g, end), slice(g * group, end * group), part, keys)


def _places(inputs: Inputs, side: str) -> list[_Place]:
    tensor = inputs.query if side == "q" else inputs.key
    lengths = inputs.lengths or Lengths()
    cu, used = (getattr(lengths, f"{kind}_{side}") for kind in ("cu", "used"))
    if cu is None:
        places = [_Place(b, 0, tensor.shape[2]) for b in range(tensor.shape[0])]
    else:
        edges = cu.tolist()
        places = [_Place(0, start, end - start) for start, end in zip(edges, edges[1:], strict=False)]
    if used is not None:
        places = [place._replace(length=n) for place, n in zip(places, used.tolist(), strict=True)]
    return places


def _attend(
    chunk: _Chunk, inputs: Inputs, leaves: dict[str, torch.Tensor], seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a chunk's query [H, M, D] on key [G, N, D] and value [G, N, Dv], written out."""
    query, device = leaves["query"], leaves["query"].device
    group = query.shape[0] // leaves["key"].shape[0]
    key, value = (leaves[name].repeat_interleave(group, dim=0) for name in ("key", "value"))
    m = torch.arange(chunk.rows.start, chunk.rows.stop, device=device)[:, None]
    n = torch.arange(chunk.keys.start, chunk.keys.stop, device=device)[None, :]
    M, N = chunk.at.length, chunk.to.length
    mask = masks.parse(inputs.bands)

    # Scores.
    scale = query.shape[2] ** -0.5 if inputs.scale is None else inputs.scale
    score = (query @ key.transpose(1, 2)) * scale
    if inputs.softcap is not None:
        score = inputs.softcap * torch.tanh(score / inputs.softcap)
    if inputs.alibi_slopes is not None:
        slopes = torch.atleast_2d(inputs.alibi_slopes)
        slopes = slopes[chunk.segment % len(slopes), chunk.heads, None, None].to(score.dtype)
        score = score - slopes * (m + mask.shift(M, N) - n).abs()
    if "bias" in leaves:
        score = score + leaves["bias"][0]

    # Softmax; a row that sees no key is computed on zeros, so that it takes no part in gradients.
    visible = mask.visible(m, n, M, N) & (score != -torch.inf)
    if inputs.dense is not None:
        visible = visible & inputs.dense[chunk.where("dense", inputs.dense)][0]
    some = visible.any(dim=2, keepdim=True)
    score = torch.where(visible, score, -torch.inf)
    if "sinks" in leaves:
        sinks = leaves["sinks"].reshape(-1, 1, 1).expand(-1, score.shape[1], 1)
        score = torch.cat([score, sinks], dim=2)
    score = torch.where(some, score, 0.0)
    lse = torch.logsumexp(score if score.dtype == torch.float64 else score.float(), dim=2)
    p = torch.softmax(score, dim=2)[:, :, : visible.shape[2]]
    p = torch.where(visible, p, 0.0)
    if seed is not None:
        b = torch.tensor(chunk.segment, device=device)
        h = torch.arange(chunk.heads.start, chunk.heads.stop, device=device)[:, None, None]
        kept = scores.keep(seed, b, h, m, n, inputs.dropout_p)
        p = torch.where(kept, p / (1 - inputs.dropout_p), 0.0)
    return p @ value, torch.where(some[..., 0], lse, -torch.inf)
