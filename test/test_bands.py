"""The bands on the device equal those of masks.py, and visit the right tiles; in the interpreter.

M query rows, N keys of a segment.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_masks import sees, some_masks

from torch_flash2.kernels.bundles import coded
from torch_flash2.masks import Mask

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
bands = pytest.importorskip("torch_flash2.kernels.device.bands")

pytestmark = pytest.mark.interpreter


@triton.jit
def intervals(out, M, N, shift, numbers, KEYS: tl.constexpr, QUERIES: tl.constexpr, SIZE: tl.constexpr):
    x = tl.arange(0, SIZE)
    lo, hi = bands.intersect(x, N, M, N, shift, numbers, KEYS)
    tl.store(out + x, lo)
    tl.store(out + SIZE + x, hi)
    lo, hi = bands.intersect(x, M, M, N, shift, numbers, QUERIES)
    tl.store(out + 2 * SIZE + x, lo)
    tl.store(out + 3 * SIZE + x, hi)


@triton.jit
def spans(out, lo, hi, limit, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    x = tl.arange(0, SIZE)
    span = bands.tile_span(tl.load(lo + x), tl.load(hi + x), limit, BLOCK, False)
    tl.store(out, span.start)
    tl.store(out + 1, span.full_start)
    tl.store(out + 2, span.full_stop)
    tl.store(out + 3, span.stop)
    count = bands.masked_tiles(span, BLOCK)
    tl.store(out + 4, count)
    for i in range(0, count):
        tl.store(out + 5 + i, bands.masked_tile(span, i, BLOCK))


@given(some_masks(), st.integers(1, 45), st.integers(1, 45))
def test_bands(mask: Mask, M: int, N: int) -> None:
    SIZE = 64
    out = torch.empty(4, SIZE, dtype=torch.int32)
    keys, queries = (
        tuple(getattr(bands, f"{band.name}_{side}") for band in mask.bands) for side in ("keys", "queries")
    )
    numbers = tuple(tuple(map(coded, band.numbers)) for band in mask.bands)
    intervals[(1,)](out, M, N, mask.shift(M, N), numbers, keys, queries, SIZE)
    m, n = torch.arange(M)[:, None], torch.arange(N)[None, :]
    table = sees(mask, M, N)
    assert torch.equal((n >= out[0, :M, None]) & (n < out[1, :M, None]), table)
    assert torch.equal((m >= out[2, None, :N]) & (m < out[3, None, :N]), table)


@given(some_masks(), st.integers(1, 150), st.integers(1, 150), st.data())
def test_tiles(mask: Mask, M: int, N: int, data: Any) -> None:
    BLOCK, SIZE = data.draw(st.sampled_from([(16, 16), (32, 16), (16, 64)]))
    row = data.draw(st.integers(0, M - 1))
    rows = torch.arange(row, row + SIZE).clamp(max=M - 1)
    lo, hi = (bound.to(torch.int32) for bound in mask.keys(rows, M, N))
    out = torch.full((64,), -1, dtype=torch.int32)
    spans[(1,)](out, lo, hi, N, BLOCK, SIZE)
    start, full_start, full_stop, stop, count, *masked = out.tolist()

    # Every key that is seen lies in one visited tile; the free tiles lie inside all rows.
    n = torch.arange(N)
    seen = ((n >= lo[:, None]) & (n < hi[:, None])).nonzero()[:, 1].tolist()
    full = list(range(full_start, full_stop, BLOCK))
    visited = [*masked[:count], *full]
    assert len(visited) == len(set(visited)) and all(tile % BLOCK == 0 for tile in visited)
    assert {key // BLOCK * BLOCK for key in seen} <= set(visited)
    assert all((lo <= tile).all() and (hi >= tile + BLOCK).all() for tile in full)
    # Nothing is visited beyond the keys that are seen.
    if seen:
        assert min(visited) <= min(seen) and max(visited) <= max(seen)
        assert start == min(visited) and stop == max(seen) + 1
    else:
        assert not visited
