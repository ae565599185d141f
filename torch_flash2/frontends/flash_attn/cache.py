"""flash-attn's KV caches: append in place, with rotary embedding, and attend.

B sequences, H query heads, G key/value heads, M query rows, L new keys, N positions of the cache, D head dim of query
and key, Dv head dim of value, S positions of the rotary tables, R rotated dims.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ... import caches, problem
from ...problem import Lengths, Pages
from .rotary import turned
from .translate import Options, attend, packed_places


class Rows(NamedTuple):
    """A tensor [B, M, heads, dim], or a packed [total, heads, dim] with cumulative lengths int32 [B + 1]."""

    tensor: torch.Tensor
    cu: torch.Tensor | None = None
    longest: int | None = None

    @property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequence and position in it of every row: [B, 1] and [M], or both [total]."""
        if self.cu is None:
            device = self.tensor.device
            sequences = torch.arange(self.tensor.shape[0], device=device)
            return sequences[:, None], torch.arange(self.tensor.shape[1], device=device)
        return packed_places(self.cu, self.tensor.shape[0])


class Cache(NamedTuple):
    """Keys [B, N, G, D] and values [B, N, G, Dv]; with a block table [B, pages] both are [pages, page size, ...].

    `seqlens` int32 [B]: positions that are taken. `batch_idx` int32 [B]: each sequence's row of the cache. `leftpad`
    int32 [B]: each sequence's first position that counts.
    """

    key: torch.Tensor
    value: torch.Tensor
    seqlens: torch.Tensor | None = None
    batch_idx: torch.Tensor | None = None
    leftpad: torch.Tensor | None = None
    block_table: torch.Tensor | None = None

    @property
    def capacity(self) -> int:
        """Positions that one sequence has."""
        return self.key.shape[1] * (1 if self.block_table is None else self.block_table.shape[1])

    @property
    def pages(self) -> Pages | None:
        """Where keys lie; a row that batch_idx picks is one page."""
        if self.block_table is not None:
            return Pages(self.block_table, self.key.shape[1])
        if self.batch_idx is not None:
            return Pages(self.batch_idx[:, None], self.key.shape[1])
        return None


class Rotary(NamedTuple):
    """Tables cos and sin [S, R / 2]. Interleaved pairs are (0, 1), (2, 3), ..., others (0, R / 2), (1, R / 2 + 1), ...

    `starts` int32 [B]: the position of each sequence's first row.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool
    starts: torch.Tensor

    @property
    def tables(self) -> problem.Rotary:
        return problem.Rotary(self.cos, self.sin, self.interleaved)

    def turn(self, rows: Rows, steps: bool = True) -> torch.Tensor:
        """Rows rotated by their positions, computed in fp32; without `steps` all of a sequence by its first."""
        if rows.cu is None:
            return caches.rotate(rows.tensor.transpose(1, 2), self.starts, self.tables, advance=steps).transpose(1, 2)
        sequences, offsets = rows.places
        positions = self.starts.long()[sequences] + (offsets if steps else torch.zeros_like(offsets))
        return turned(rows.tensor, positions, self.cos, self.sin, self.interleaved)


def append(cache: Cache, key: Rows, value: torch.Tensor, rotary: Rotary | None) -> None:
    """Write new keys, rotated, and their values into the cache, each sequence's behind the positions taken."""
    assert cache.seqlens is not None
    if key.cu is None and (rotary is None or rotary.starts is cache.seqlens):
        paged = cache.block_table is not None
        caches.append(
            cache.key if paged else cache.key.transpose(1, 2),
            cache.value if paged else cache.value.transpose(1, 2),
            key.tensor.transpose(1, 2),
            value.transpose(1, 2),
            cache.seqlens,
            pages=cache.pages if paged else None,
            batch_index=cache.batch_idx,
            rotary=None if rotary is None else rotary.tables,
        )
        return
    # Packed rows, and rotation by other positions than those in the cache.
    sequences, offsets = key.places
    positions = cache.seqlens.long()[sequences] + offsets
    if cache.block_table is not None:
        size = cache.key.shape[1]
        rows, positions = cache.block_table.long()[sequences, positions // size], positions % size
    elif cache.batch_idx is not None:
        rows = cache.batch_idx.long()[sequences]
    else:
        rows = sequences
    cache.key[rows, positions] = key.tensor if rotary is None else rotary.turn(key)
    cache.value[rows, positions] = value


@torch.no_grad()
def attend_cache(
    query: Rows,
    new: tuple[Rows, torch.Tensor] | None,
    cache: Cache,
    options: Options,
    rotary: Rotary | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append new keys and values, then attend to the cache. Nothing is read on the host; there is no gradient.

    Returns:
        out [B, M, H, Dv] and lse [B, H, M], or [total, H, Dv] and [H, total].
    """
    used = cache.seqlens
    if new is not None:
        assert used is not None
        key, value = new
        append(cache, key, value, rotary)
        used = used + (key.tensor.shape[1] if key.cu is None else key.cu.diff())
    rows = query.tensor
    if rotary is not None:
        # Without a band all rows see the same keys, and stand at one position.
        rows = rotary.turn(query, steps=len(options.mask.bands) > 0)
    if used is None and (query.cu is not None or cache.pages is not None or cache.leftpad is not None):
        count = rows.shape[0] if query.cu is None else query.cu.shape[0] - 1
        used = torch.full((count,), cache.capacity, dtype=torch.int32, device=rows.device)
    counted = None
    if cache.leftpad is not None:
        assert used is not None
        counted = _counted(query, used, cache.leftpad, cache.capacity, options.attention_chunk)
        # Chunks too are counted from there.
        options = options._replace(attention_chunk=0)
    lengths = Lengths(cu_q=query.cu, used_k=used, max_q=query.longest)
    packed = rows if query.cu is None else rows[None]
    out, lse, _ = attend(packed, cache.key, cache.value, options, lengths, cache.pages, counted)
    return (out, lse) if query.cu is None else (out[0], lse[0])


def _counted(
    query: Rows, used: torch.Tensor, leftpad: torch.Tensor, capacity: int, attention_chunk: int
) -> torch.Tensor:
    """The keys that count, bool: [B, 1, 1, N], or where there are chunks [B, 1, M, N] or [1, 1, total, N]."""
    position = torch.arange(capacity, device=used.device)
    counted = (position >= leftpad[:, None])[:, None, None, :]
    if not attention_chunk:
        return counted
    sequences, offsets = query.places
    rows: int | torch.Tensor = query.tensor.shape[1] if query.cu is None else query.cu.diff()[sequences]
    first = leftpad[sequences]
    place = offsets + used[sequences] - rows - first
    start = (place - place % attention_chunk)[..., None]
    position = position - first[..., None]
    inside = (position >= start) & (position < start + attention_chunk)
    return counted & inside[:, None] if query.cu is None else ((position >= 0) & inside)[None, None]


def checked(cache: Cache, query: Rows, new: tuple[Rows, torch.Tensor] | None, tables: bool) -> None:
    """The rules of a cache that attention itself does not hold.

    Raises:
        ValueError, TypeError: a rule is broken.
    """
    count = query.tensor.shape[0] if query.cu is None else query.cu.shape[0] - 1
    for name, tensor in (("k_cache", cache.key), ("v_cache", cache.value)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} must have contiguous last dimension, got stride {tensor.stride(-1)}")
    for name in ("seqlens", "batch_idx", "leftpad"):
        tensor = getattr(cache, name)
        if tensor is not None and (tensor.dtype != torch.int32 or tuple(tensor.shape) != (count,)):
            raise ValueError(f"cache_{name} must be int32 [{count}], got {tensor.dtype} {list(tensor.shape)}")
    if cache.block_table is not None and cache.batch_idx is not None:
        raise ValueError("cache_batch_idx picks rows of a cache without pages: pick rows of block_table instead")
    if new is None:
        if tables:
            raise ValueError("rotary_cos and rotary_sin rotate new keys: k and v must be given with them")
        return
    if cache.seqlens is None:
        raise ValueError("new keys are written behind cache_seqlens, which must be given with k and v")
    for name, tensor, cached in (("k", new[0].tensor, cache.key), ("v", new[1], cache.value)):
        if tensor.shape[-2:] != cached.shape[-2:] or tensor.dtype != cached.dtype:
            raise ValueError(
                f"{name} must have the cache's heads, head dim and dtype {list(cached.shape[-2:])} {cached.dtype}, "
                f"got {list(tensor.shape[-2:])} {tensor.dtype}"
            )
    if new[0].tensor.shape[:-2] != new[1].shape[:-2]:
        raise ValueError(f"k and v must agree in length, got {list(new[0].tensor.shape)} and {list(new[1].shape)}")
    if new[0].cu is None and new[0].tensor.shape[0] != count:
        raise ValueError(f"k must have a row for each of {count} sequences, got {new[0].tensor.shape[0]}")


def rotary_of(
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    starts: torch.Tensor | None,
    cache: Cache,
) -> Rotary | None:
    """The rotary tables, or None where there are none.

    Raises:
        ValueError: one of the tables is missing, or their shapes do not fit the cache.
    """
    if cos is None and sin is None:
        return None
    starts = cache.seqlens if starts is None else starts
    if cos is None or sin is None or starts is None:
        raise ValueError("rotary_cos, rotary_sin and cache_seqlens must be given together")
    if cos.shape != sin.shape or cos.dim() != 2 or 2 * cos.shape[1] > cache.key.shape[-1]:
        raise ValueError(
            f"rotary_cos and rotary_sin must be [positions, R / 2] with R <= {cache.key.shape[-1]}, "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    if cos.shape[0] < cache.capacity:
        raise ValueError(f"rotary tables must cover the cache's {cache.capacity} positions, got {cos.shape[0]}")
    return Rotary(cos, sin, interleaved, starts)
