"""Masks: text, algebra, and the three views of a band (predicate, keys, queries).

M query rows, N keys of a segment.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_flash2 import masks
from torch_flash2.masks import Mask

COUNTS = st.integers(0, 40)
SIDES = st.none() | COUNTS
ALIGNS = st.sampled_from([None, *masks.ALIGNMENTS])
BANDS = st.one_of(
    st.just(masks.causal()),
    st.builds(masks.window, SIDES, SIDES),
    st.builds(masks.chunk, st.integers(1, 40)),
    st.builds(masks.prefix, COUNTS),
)
LENGTHS = st.integers(0, 45)


@st.composite
def some_masks(draw: st.DrawFn) -> Mask:
    mask = Mask((), draw(ALIGNS))
    for band in draw(st.lists(BANDS, max_size=3)):
        mask &= band
    return mask


def sees(mask: Mask, M: int, N: int) -> torch.Tensor:
    """The mask as a table [M, N], from the definition of each band and nothing else."""
    shift = N - M if mask.align == "bottom-right" else 0
    table = torch.ones(M, N, dtype=torch.bool)
    for band in mask.bands:
        given = dataclasses.asdict(band)
        for m in range(M):
            at = m + shift
            for n in range(N):
                table[m, n] &= {
                    "causal": lambda at=at, n=n, **_: n <= at,
                    "window": lambda left, right, at=at, n=n: (
                        (left is None or n >= at - left) and (right is None or n <= at + right)
                    ),
                    "chunk": lambda size, at=at, n=n: n // size == at // size,
                    "prefix": lambda length, at=at, n=n: n < length or n <= at,
                }[band.name](**given)
    return table


@given(some_masks())
def test_text_round_trip(mask: Mask) -> None:
    assert masks.parse(str(mask)) == mask
    assert masks.parse(mask.template, mask.numbers) == mask
    assert not any(character.isdigit() for character in mask.template)


def test_text_as_people_write_it() -> None:
    assert masks.parse("causal&window( 128 ,0 )") == masks.causal() & masks.window(128, 0)
    assert masks.parse(" full @ bottom-right") == Mask((), "bottom-right")
    assert str(masks.window(right=3)) == "window(-, 3)"
    assert str(masks.causal(align="bottom-right") & masks.chunk(8)) == "causal & chunk(8) @ bottom-right"


@given(some_masks(), LENGTHS, LENGTHS)
def test_three_views(mask: Mask, M: int, N: int) -> None:
    table = sees(mask, M, N)
    m, n = torch.arange(M), torch.arange(N)
    assert torch.equal(mask.visible(m[:, None], n[None, :], M, N).expand(M, N), table)
    lo, hi = mask.keys(m, M, N)
    assert torch.equal((n >= lo[:, None]) & (n < hi[:, None]), table)
    lo, hi = mask.queries(n, M, N)
    assert torch.equal(((m >= lo[:, None]) & (m < hi[:, None])).T, table)
    for row in range(M):
        start, stop = mask.keys(row, M, N)
        assert list(range(start, stop)) == table[row].nonzero()[:, 0].tolist()


@given(some_masks(), some_masks(), LENGTHS, LENGTHS)
def test_algebra(a: Mask, b: Mask, M: int, N: int) -> None:
    if a.align and b.align and a.align != b.align:
        with pytest.raises(ValueError, match="one mask has one alignment"):
            _ = a & b
        return
    both = a & b
    assert both & a == both and a & a == a and Mask() & a == a
    align = both.align
    parts = [dataclasses.replace(mask, align=align) for mask in (a, b)]
    assert torch.equal(sees(both, M, N), sees(parts[0], M, N) & sees(parts[1], M, N))
    assert torch.equal(sees(both, M, N), sees(b & a, M, N))


def test_dense() -> None:
    table = torch.rand(5, 7) > 0.5
    mask = masks.dense(table) & masks.causal() & (torch.rand(1, 5, 1) > 0.5)
    assert isinstance(mask, masks.DenseMask) and mask.mask == masks.causal()
    assert mask.dense.shape == (1, 5, 7) and not (mask.dense & ~table).any()
    assert torch.equal((table & masks.causal()).dense, table)
    with pytest.raises(TypeError, match=r"must be bool.*pass a float tensor as bias="):
        masks.dense(table.float())
    with pytest.raises(TypeError):
        _ = masks.causal() & 3


@pytest.mark.parametrize(
    "text, message",
    [
        ("causal & wndow(3, 4)", r"'wndow\(3, 4\)' is no band; known are causal, window"),
        ("window(3; 4)", "'3; 4' is no number"),
        ("window(-3, 4)", "window's left must be at least 0 .None is unlimited., got -3"),
        ("chunk(0)", "chunk's size must be at least 1, got 0"),
        ("prefix(99999999999)", "prefix's length must be at most 2"),
        ("causal @ top-right", "align must be one of"),
        ("causal(3) @ top-left", r"in mask 'causal\(3\)"),
        ("window(#, #)", r"in mask 'window\(#, #\)'"),
        ("window(1, 2, 3)", r"in mask 'window\(1, 2, 3\)'"),
        ("chunk(4, -)", r"in mask 'chunk\(4, -\)'"),
        ("chunk(-)", r"in mask 'chunk\(-\)'"),
        ("chunk", "in mask 'chunk'"),
        ("", "is no band"),
    ],
)
def test_rejected_text(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masks.parse(text)


def test_rejected_numbers() -> None:
    with pytest.raises(ValueError, match="window's right must be at least 0"):
        masks.window(right=-1)
    with pytest.raises(TypeError, match=r"chunk's size must be an int, got 2\.0"):
        masks.chunk(2.0)
    with pytest.raises(TypeError, match="window's left must be an int or None, got True"):
        masks.window(True)
