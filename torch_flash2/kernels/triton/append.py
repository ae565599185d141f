"""Writing new keys and values into a cache, keys turned by rotary embeddings on the way; Triton.

B segments, G key/value heads, S new rows, N rows of room, D head dim, R angles of a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...problem import Append, Rotary
from ..bundles import Paging, Sizes, Strided, coded
from ..device import tiles
from . import launching, tables

ROWS = 4


class Turn(NamedTuple):
    """Rotary embeddings: cos and sin [positions, R], and the coded number of positions."""

    cos: Any
    sin: Any
    count: Any


@triton.jit
def _row_pointers(x, b, head, r):
    return x.ptr + (tl.cast(b, tl.int64) * x.batch + tl.cast(head, tl.int64) * x.head + r.to(tl.int64) * x.row)


@triton.jit
def _load_turned(
    x, b, head, r, inside, place, turn, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Rows r [ROWS] of a head, turned by the angles of positions `place` in fp32; as they are where HALF is 0."""
    c = tl.arange(0, COLS)[None, :]
    at = _row_pointers(x, b, head, r)[:, None]
    here = inside[:, None] & (c < x.cols)
    tile = tl.load(at + c.to(tl.int64) * x.col, mask=here, other=0.0)
    if HALF > 0:
        # Each column's partner, its angle, and the sign with which the partner enters.
        if INTERLEAVED:
            partner = c ^ 1
            angle = c // 2
            first = c % 2 == 0
        else:
            partner = tl.where(c < HALF, c + HALF, c - HALF)
            angle = tl.where(c < HALF, c, c - HALF)
            first = c < HALF
        turned = here & (c < 2 * HALF)
        other = tl.load(at + partner.to(tl.int64) * x.col, mask=turned, other=0.0).to(tl.float32)
        p = tl.minimum(tl.maximum(place, 0), tiles.decoded(turn.count) - 1).to(tl.int64)[:, None]
        cos = tl.load(turn.cos.ptr + p * turn.cos.row + angle * turn.cos.col, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(turn.sin.ptr + p * turn.sin.row + angle * turn.sin.col, mask=turned, other=0.0).to(tl.float32)
        tile = tl.where(turned, tile.to(tl.float32) * cos + tl.where(first, -other, other) * sin, tile.to(tl.float32))
    return tile


@triton.jit
def append_rows(
    key, value, key_cache, value_cache, used_k, batch_index, paging, turn, coded_sizes,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """New rows of one segment and head into the cache. Sizes: B, heads, batch entries of the cache, new rows, room."""
    sizes = tiles.sizes_of(coded_sizes)
    count = tl.cdiv(sizes.M, BLOCK)
    r = tl.program_id(0) % count * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(0) // count % sizes.H
    b = tl.program_id(0) // count // sizes.H
    place = tl.load(used_k + b) + r
    inside = (r < sizes.M) & (place >= 0) & (place < sizes.N)
    entries = sizes.group
    if PAGE > 0:
        table = paging.table + tl.cast(b, tl.int64) * tiles.decoded(paging.row)
        entry = tl.load(table + place // PAGE, mask=inside, other=-1)
        row = place % PAGE
        entries = tiles.decoded(paging.pages)
    else:
        entry = b + r * 0
        if batch_index is not None:
            entry = tl.load(batch_index + b) + r * 0
        row = place
    inside = inside & (entry >= 0) & (entry < entries)
    tile = _load_turned(key, b, head, r, inside, place, turn, HALF, INTERLEAVED, BLOCK_D)
    c = tl.arange(0, BLOCK_D)[None, :]
    at = _row_pointers(key_cache, entry, head, row)[:, None] + c.to(tl.int64) * key_cache.col
    tl.store(at, tile.to(key_cache.ptr.dtype.element_ty), mask=inside[:, None] & (c < key_cache.cols))
    if value is not None:
        tile = _load_turned(value, b, head, r, inside, place, turn, 0, False, BLOCK_DV)
        c = tl.arange(0, BLOCK_DV)[None, :]
        at = _row_pointers(value_cache, entry, head, row)[:, None] + c.to(tl.int64) * value_cache.col
        tl.store(at, tile.to(value_cache.ptr.dtype.element_ty), mask=inside[:, None] & (c < value_cache.cols))


@triton.jit
def rotate_rows(
    query, out, used_k, turn, coded_sizes, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, ADVANCE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of one segment and head, turned."""
    sizes = tiles.sizes_of(coded_sizes)
    count = tl.cdiv(sizes.M, BLOCK)
    r = tl.program_id(0) % count * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(0) // count % sizes.H
    b = tl.program_id(0) // count // sizes.H
    place = tl.load(used_k + b) + (r if ADVANCE else r * 0)
    tile = _load_turned(query, b, head, r, r < sizes.M, place, turn, HALF, INTERLEAVED, BLOCK_D)
    c = tl.arange(0, BLOCK_D)[None, :]
    at = _row_pointers(out, b, head, r)[:, None] + c.to(tl.int64) * out.col
    tl.store(at, tile.to(out.ptr.dtype.element_ty), mask=(r < sizes.M)[:, None] & (c < out.cols))


def _turn(rotary: Rotary | None) -> tuple[Turn | None, int, bool]:
    """The angles for a launch, how many a row has, and whether pairs are interleaved."""
    if rotary is None:
        return None, 0, False
    turn = Turn(Strided.of(rotary.cos), Strided.of(rotary.sin), coded(rotary.cos.shape[0]))
    return turn, rotary.cos.shape[1], rotary.interleaved


def launch(call: Append) -> None:
    """Write the rows; those that find no room or no page are dropped."""
    key_cache, value_cache, table = call.key_cache, call.value_cache, call.block_table
    paging, page, room = None, 0, key_cache.shape[2]
    if table is not None:
        paging, page = Paging(table, coded(table.stride(0)), coded(key_cache.shape[0])), key_cache.shape[1]
        room = table.shape[1] * page
        key_cache = key_cache.transpose(1, 2)
        value_cache = None if value_cache is None else value_cache.transpose(1, 2)
    B, G, S, D = call.key.shape
    turn, half, interleaved = _turn(call.rotary)
    arguments = (
        Strided.of(call.key),
        None if call.value is None else Strided.of(call.value),
        Strided.of(key_cache),
        None if value_cache is None else Strided.of(value_cache),
        call.used_k,
        call.batch_index,
        paging,
        turn,
        Sizes.coded(B, G, key_cache.shape[0], S, room),
        half,
        interleaved,
        page,
        ROWS,
        tables.block_dim(D),
        tables.block_dim(D if call.value is None else call.value.shape[3]),
    )
    launching.launch(append_rows, B * G * triton.cdiv(S, ROWS), call.key.device, arguments, num_warps=2)


def rotate(query: torch.Tensor, used_k: torch.Tensor, rotary: Rotary, advance: bool) -> torch.Tensor:
    """Query rows [B, H, S, D] turned: row i as at used_k + i, or all as at used_k."""
    B, H, S, D = query.shape
    out = query.new_empty(B, S, H, D).transpose(1, 2)
    turn, half, interleaved = _turn(rotary)
    arguments = (
        Strided.of(query), Strided.of(out), used_k, turn, Sizes.coded(B, H, 1, S, 0), half, interleaved, advance, ROWS,
        tables.block_dim(D),
    )  # fmt: skip
    launching.launch(rotate_rows, B * H * triton.cdiv(S, ROWS), query.device, arguments, num_warps=2)
    return out
