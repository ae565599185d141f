"""flash-attn's arguments in this library's words; both of its interfaces share this.

B batch entries or packed documents, H query heads, G key/value heads, M query rows, N keys, D head dim of query and
key, Dv head dim of value.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ... import masks
from ...attention import _call
from ...masks import DenseMask, Mask
from ...problem import Call, Lengths, Pages


class Options(NamedTuple):
    """What the functions of flash-attn take besides tensors."""

    causal: bool
    window_size: tuple[int, int]
    softmax_scale: float | None = None
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    dropout_p: float = 0.0
    deterministic: bool = False
    attention_chunk: int = 0
    num_splits: int = 0

    @property
    def mask(self) -> Mask:
        """Always bottom-right; a window's side below 0 is unlimited."""
        given: Any = self.window_size
        sides = given.tolist() if isinstance(given, torch.Tensor) else given
        left, right = (side if 0 <= side < masks.FAR else None for side in sides)
        if self.causal:
            right = 0
        mask = Mask(align="bottom-right")
        if self.causal and left is None:
            mask = mask & masks.causal()
        elif left is not None or right is not None:
            mask = mask & masks.window(left, right)
        return mask & masks.chunk(self.attention_chunk) if self.attention_chunk else mask


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: Options,
    lengths: Lengths | None = None,
    pages: Pages | None = None,
    counted: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Call]:
    """Attention of query [B, M, H, D] on key [B, N, G, D] and value [B, N, G, Dv], packed ones having B = 1.

    Args:
        counted: bool [B, 1, 1, N], the keys that count.

    Returns:
        out [B, M, H, Dv], lse [B, H, M] and the call, for `signed_probabilities`.
    """
    query = query.transpose(1, 2)
    if pages is None:
        key, value = key.transpose(1, 2), value.transpose(1, 2)
    # Not `options.mask & counted`, which torch.compile takes for an operator of tensors.
    mask = options.mask if counted is None else DenseMask(options.mask, counted)
    softcap = options.softcap if options.softcap > 0 else None
    scores = (None, softcap, options.alibi_slopes, None, options.dropout_p, options.softmax_scale)
    call = _call(query, key, value, mask, *scores, lengths, pages, options.num_splits or None)
    if options.deterministic:
        call = call._replace(deterministic=True)
    out, lse = torch.ops.torch_flash2.forward(*call)
    return out.transpose(1, 2), lse, call


def hint(longest: Any) -> Any:
    """A longest length, where reading it costs nothing."""
    return longest if isinstance(longest, (int, torch.SymInt)) else None


def packed_places(cu: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Document and position in it, both [total], of packed rows with cumulative lengths int32 [B + 1]."""
    rows = torch.arange(total, device=cu.device)
    document = torch.bucketize(rows, cu[1:], right=True).clamp(max=cu.shape[0] - 2)
    return document, rows - cu.long()[document]


@torch.no_grad()
def signed_probabilities(call: Call) -> torch.Tensor:
    """Probabilities [B, H, M, N] of a call over the largest of their row, those that dropout drops negative; of packed
    ones, padded to the longest.

    Probabilities are the output on the rows of the identity as values, 512 columns at a time.
    """
    key = call.key
    position, columns = torch.arange(key.shape[2], device=key.device), key.shape[2]
    if call.cu_k is not None:
        _, position = packed_places(call.cu_k, key.shape[2])
        columns = call.max_k if call.max_k is not None else int(call.cu_k.diff().max())
    found = []
    for first in range(0, columns, 512):
        some = torch.arange(first, min(first + 512, columns), device=key.device)
        value = (position[:, None] == some).to(key.dtype).expand(*key.shape[:2], -1, -1)
        given = call._replace(value=value)
        kept, _ = torch.ops.torch_flash2.forward(*given)
        whole, _ = torch.ops.torch_flash2.forward(*given._replace(dropout_p=0.0, seed=None))
        found.append(torch.where((kept == 0) & (whole > 0), -whole, whole))
    signed = torch.cat(found, dim=3).float()
    largest = signed.abs().amax(3, keepdim=True)
    signed = (signed / torch.where(largest > 0, largest, 1)).to(key.dtype)
    if call.cu_q is None:
        return signed
    edges = call.cu_q.tolist()
    rows = call.max_q if call.max_q is not None else int(call.cu_q.diff().max())
    padded = signed.new_zeros(len(edges) - 1, signed.shape[1], rows, columns)
    for entry, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
        padded[entry, :, : stop - start] = signed[0, :, start:stop]
    return padded
