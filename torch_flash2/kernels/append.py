"""Writing new keys and values into a cache, in eager PyTorch: what tensors on the CPU take, and the oracle.

B segments, G key/value heads, S new rows, N rows of room, D head dim.
"""

from __future__ import annotations

import torch

from ..problem import Append, Rotary


def rotated(tensor: torch.Tensor, positions: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rows [B, heads, S, D] turned by the angles of positions [B, S]; computed in fp32, columns past the angles as they
    are. Positions past the last angle count as it."""
    half = rotary.cos.shape[1]
    at = positions.clamp(0, rotary.cos.shape[0] - 1).long()
    cos, sin = (table[at][:, None].float() for table in (rotary.cos, rotary.sin))
    turned, rest = tensor[..., : 2 * half].float(), tensor[..., 2 * half :]
    first, second = (turned[..., ::2], turned[..., 1::2]) if rotary.interleaved else turned.split(half, dim=3)
    parts = first * cos - second * sin, first * sin + second * cos
    turned = torch.stack(parts, dim=4).flatten(3) if rotary.interleaved else torch.cat(parts, dim=3)
    return torch.cat([turned.to(tensor.dtype), rest], dim=3)


def positions(call: Append) -> torch.Tensor:
    """Where each new row stands, [B, S]."""
    return call.used_k[:, None] + torch.arange(call.key.shape[2], device=call.key.device)


def launch(call: Append) -> None:
    """Write the rows; those that find no room or no page are dropped."""
    place = positions(call)
    key = call.key if call.rotary is None else rotated(call.key, place, call.rotary)
    if call.block_table is not None:
        size = call.key_cache.shape[1]
        column = place.div(size, rounding_mode="floor")
        inside = (column >= 0) & (column < call.block_table.shape[1])
        entry = call.block_table.gather(1, column.clamp(0, call.block_table.shape[1] - 1).long()).long()
        row = place % size
    else:
        entry = torch.arange(len(place), device=place.device) if call.batch_index is None else call.batch_index
        entry, row = entry.long()[:, None].expand_as(place), place
        inside = (place >= 0) & (place < call.key_cache.shape[2])
    inside = inside & (entry >= 0) & (entry < call.key_cache.shape[0])
    for cache, new in ((call.key_cache, key), (call.value_cache, call.value)):
        if cache is not None and new is not None:
            rows = cache if call.block_table is not None else cache.transpose(1, 2)
            rows[entry[inside], row[inside].long()] = new.transpose(1, 2)[inside]


def rotate(query: torch.Tensor, used_k: torch.Tensor, rotary: Rotary, advance: bool) -> torch.Tensor:
    """Query rows [B, H, S, D] turned: row i as at used_k + i, or all as at used_k."""
    steps = torch.arange(query.shape[2], device=query.device) * int(advance)
    out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
    return out.copy_(rotated(query, used_k[:, None] + steps, rotary))
