"""Caches of keys and values: writing new rows into them, with rotary embeddings.

B segments, H query heads, G key/value heads, S new rows, N rows of room, D head dim of query and key, Dv of value, R
angles of a row.
"""

from __future__ import annotations

import torch

from . import ops as ops
from .problem import Append, Pages, Rotary


def append(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor | None,
    used_k: torch.Tensor,
    *,
    pages: Pages | None = None,
    batch_index: torch.Tensor | None = None,
    rotary: Rotary | None = None,
) -> None:
    """Write new keys and values behind those that a cache holds, in place.

    New row i of segment b goes to position used_k[b] + i; `used_k` itself stays as it is. Rows for which the cache has
    no room, or the block table no valid page, are dropped. Nothing is read by the host: it works inside CUDA graphs.

    Args:
        key_cache: [B, G, N, D], or [pages, page_size, G, D] where `pages` are given; any strides.
        value_cache: as key_cache, of Dv columns; None together with `value` where the value is in the key.
        key: [B, G, S, D], in the cache's dtype.
        value: [B, G, S, Dv].
        used_k: int32 [B], how many rows each segment holds already.
        pages: the block table and page size.
        batch_index: int32 [B], the cache's batch entry of each segment; by default its own number. Not with pages.
        rotary: turn the keys by these angles on the way.

    Raises:
        TypeError, ValueError: an argument breaks the rule that the message names.
    """
    table = None if pages is None else pages.block_table
    call = Append(key_cache, value_cache, key, value, used_k, table, batch_index, rotary)
    _validate(call, None if pages is None else pages.page_size)
    cos, sin, interleaved = rotary if rotary is not None else (None, None, False)
    torch.ops.torch_flash2.append(*call[:-1], cos, sin, interleaved)


def rotate(query: torch.Tensor, used_k: torch.Tensor, rotary: Rotary, *, advance: bool = True) -> torch.Tensor:
    """Query rows turned by rotary embeddings, as a new tensor; there is no backward.

    Args:
        query: [B, H, S, D].
        used_k: int32 [B], the position of each segment's first row.
        rotary: the angles.
        advance: row i stands at used_k + i; otherwise all rows stand at used_k.

    Raises:
        TypeError, ValueError: an argument breaks the rule that the message names.
    """
    _check_rows("query", query, used_k)
    _check_rotary(rotary, query)
    out: torch.Tensor = torch.ops.torch_flash2.rotate(query, used_k, *rotary, advance)
    return out


def _validate(call: Append, page_size: int | None) -> None:
    _check_rows("key", call.key, call.used_k)
    if (call.value_cache is None) != (call.value is None):
        raise ValueError("value_cache and value are given together or not at all")
    B, G, S, _ = call.key.shape
    for name, cache, new in (("key", call.key_cache, call.key), ("value", call.value_cache, call.value)):
        if cache is None or new is None:
            continue
        if cache.dim() != 4 or new.dim() != 4:
            raise ValueError(f"{name} and {name}_cache must have 4 dimensions, got {new.dim()} and {cache.dim()}")
        if cache.dtype != new.dtype or cache.device != new.device:
            raise TypeError(
                f"{name} must be as {name}_cache, {cache.dtype} on {cache.device}, got {new.dtype} on {new.device}"
            )
        heads = cache.shape[1 if page_size is None else 2]
        if (G, new.shape[3]) != (heads, cache.shape[3]) or new.shape[:3] != call.key.shape[:3]:
            raise ValueError(
                f"{name} of shape {tuple(new.shape)} does not fit {S} new rows of {B} segments into {name}_cache of "
                f"shape {tuple(cache.shape)}"
            )
        if page_size is not None and cache.shape[1] != page_size:
            raise ValueError(f"{name}_cache must be [pages, {page_size}, heads, dim], got {tuple(cache.shape)}")
        if cache.shape[0] != call.key_cache.shape[0]:
            raise ValueError("key_cache and value_cache must agree in their first dimension")
    table, index = call.block_table, call.batch_index
    if table is not None and (table.dtype != torch.int32 or table.dim() != 2 or table.shape[0] != B):
        raise ValueError(f"block_table must be int32 [{B}, pages], got {table.dtype} {tuple(table.shape)}")
    if index is not None and table is not None:
        raise ValueError("batch_index is for caches without pages: reorder the block table")
    if index is not None and (index.dtype != torch.int32 or tuple(index.shape) != (B,)):
        raise ValueError(f"batch_index must be int32 [{B}], got {index.dtype} {tuple(index.shape)}")
    if index is None and table is None and call.key_cache.shape[0] != B:
        raise ValueError(f"key_cache must have batch {B}, got {call.key_cache.shape[0]}; batch_index can choose")
    for name, tensor in (("used_k", call.used_k), ("block_table", table), ("batch_index", index)):
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} must have unit stride in its last dimension, got {tensor.stride(-1)}")
    if call.rotary is not None:
        _check_rotary(call.rotary, call.key)


def _check_rows(name: str, rows: torch.Tensor, used_k: torch.Tensor) -> None:
    if rows.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions [batch, heads, seqlen, head_dim], got {tuple(rows.shape)}")
    if used_k.dtype != torch.int32 or tuple(used_k.shape) != (rows.shape[0],):
        raise ValueError(f"used_k must be int32 [{rows.shape[0]}], got {used_k.dtype} {tuple(used_k.shape)}")


def _check_rotary(rotary: Rotary, rows: torch.Tensor) -> None:
    cos, sin, _ = rotary
    if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[0] == 0 or not 0 < 2 * cos.shape[1] <= rows.shape[3]:
        raise ValueError(
            f"cos and sin must be [positions, angles] with at most {rows.shape[3] // 2} angles, got {tuple(cos.shape)} "
            f"and {tuple(sin.shape)}"
        )
