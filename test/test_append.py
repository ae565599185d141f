"""Writing into caches: rotary embeddings, pages, rows without room; Triton's interpreter, eager, and a GPU.

B segments, G key/value heads, S new rows, N rows of room, D head dim, R angles of a row.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import torch_flash2
from torch_flash2 import Pages, Rotary
from torch_flash2.kernels import append as eager
from torch_flash2.problem import Append

interpreted = pytest.mark.interpreter


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One call in numbers; half 0 is no rotary embedding, page 0 no pages."""

    B: int = 3
    G: int = 2
    S: int = 3
    N: int = 32
    D: int = 24
    Dv: int = 16
    page: int = 0
    half: int = 0
    interleaved: bool = False
    reorder: bool = False
    dtype: torch.dtype = torch.float32


def make(sizes: Sizes, device: str = "cpu") -> Append:
    """Random tensors; of the positions some have no room, and of the pages some are wild."""
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = dict(generator=generator, device=device, dtype=sizes.dtype)
    B, G, S = sizes.B, sizes.G, sizes.S

    def cache(dim: int) -> torch.Tensor:
        shape = (9, sizes.page, G, dim) if sizes.page else (B + 2, sizes.N, G, dim)
        made = torch.randn(shape, **options)
        return made if sizes.page else made.transpose(1, 2)

    used = torch.randint(-1, sizes.N + 1, (B,), generator=generator, device=device, dtype=torch.int32)
    table = index = rotary = None
    if sizes.page:
        columns = -(-sizes.N // sizes.page)
        table = torch.randperm(9, generator=generator, device=device).int().repeat(B)[: B * columns].reshape(B, columns)
        table = (table + torch.arange(B, device=device, dtype=torch.int32)[:, None]) % 9 if columns == 1 else table
        table[0, -1] = 2**30
        table[-1, 0] = -1
    else:
        index = torch.randperm(B + 2, generator=generator, device=device).int()[:B]
    if sizes.half:
        angles = torch.randn(sizes.N + 1, sizes.half, **options)
        rotary = Rotary(angles.cos(), angles.sin(), sizes.interleaved)
    key, value = (torch.randn(B, S, G, dim, **options).transpose(1, 2) for dim in (sizes.D, sizes.Dv))
    return Append(cache(sizes.D), cache(sizes.Dv), key, value, used, table, index, rotary)


def by_hand(call: Append) -> tuple[torch.Tensor, torch.Tensor]:
    """The caches after the call, row by row."""
    caches = call.key_cache.clone(), call.value_cache.clone()
    B, _, S, _ = call.key.shape
    for b in range(B):
        for i in range(S):
            place = int(call.used_k[b]) + i
            for cache, new in zip(caches, (call.key, call.value), strict=True):
                row = new[b, :, i]
                if new is call.key and call.rotary is not None:
                    row = turned(row, place, call.rotary)
                if call.block_table is None:
                    if 0 <= place < cache.shape[2]:
                        cache[call.batch_index[b], :, place] = row
                elif 0 <= place < call.block_table.shape[1] * cache.shape[1]:
                    page = int(call.block_table[b, place // cache.shape[1]])
                    if 0 <= page < cache.shape[0]:
                        cache[page, place % cache.shape[1]] = row
    return caches


def turned(row: torch.Tensor, place: int, rotary: Rotary) -> torch.Tensor:
    """[heads, D] times complex numbers."""
    R = rotary.cos.shape[1]
    place = min(max(place, 0), len(rotary.cos) - 1)
    factor = torch.complex(rotary.cos[place].double(), rotary.sin[place].double())
    x = row[:, : 2 * R].double()
    pairs = x.unflatten(1, (R, 2)) if rotary.interleaved else x.unflatten(1, (2, R)).transpose(1, 2)
    product = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * factor)
    x = product.flatten(1) if rotary.interleaved else product.transpose(1, 2).flatten(1)
    return torch.cat([x.to(row.dtype), row[:, 2 * R :]], dim=1)


def check(sizes: Sizes, launch: Callable[[Append], None], device: str = "cpu") -> None:
    call = make(sizes, device)
    wanted = by_hand(call)
    launch(call)
    tolerance = dict(rtol=1e-2, atol=1e-2) if sizes.dtype.itemsize == 2 else dict(rtol=1e-5, atol=1e-5)
    for cache, expected in zip((call.key_cache, call.value_cache), wanted, strict=True):
        torch.testing.assert_close(cache, expected, **tolerance)


ALL_SIZES = st.builds(
    Sizes,
    B=st.integers(1, 3),
    G=st.integers(1, 3),
    S=st.integers(1, 9),
    N=st.integers(1, 33),
    D=st.integers(8, 24),
    Dv=st.integers(1, 20),
    page=st.sampled_from([0, 16, 33]),
    half=st.integers(0, 4),
    interleaved=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)


def distinct(sizes: Sizes) -> Sizes:
    """Segments write to pages of their own: of 9 pages each gets up to 3."""
    return dataclasses.replace(sizes, N=min(sizes.N, 3 * sizes.page)) if sizes.page else sizes


@given(sizes=ALL_SIZES)
def test_eager(sizes: Sizes) -> None:
    check(distinct(sizes), eager.launch)


@interpreted
@given(sizes=ALL_SIZES)
def test_triton(sizes: Sizes) -> None:
    check(distinct(sizes), importlib.import_module("torch_flash2.kernels.triton.append").launch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_gpu(dtype: torch.dtype, page: int, interleaved: bool) -> None:
    sizes = Sizes(S=5, N=40, D=128, Dv=128, page=page, half=64, interleaved=interleaved, dtype=dtype)

    def run(call: Append) -> None:
        pages = None if call.block_table is None else Pages(call.block_table, page)
        torch_flash2.append(*call[:5], pages=pages, batch_index=call.batch_index, rotary=call.rotary)

    check(sizes, run, "cuda")


@pytest.mark.parametrize("advance", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("module", ["kernels.append", pytest.param("kernels.triton.append", marks=interpreted)])
def test_rotate(module: str, interleaved: bool, advance: bool) -> None:
    call = make(Sizes(half=5, interleaved=interleaved))
    used = torch.tensor([0, 7, 29], dtype=torch.int32)
    assert call.rotary is not None
    found = importlib.import_module(f"torch_flash2.{module}").rotate(call.key, used, call.rotary, advance)
    for b in range(3):
        for i in range(3):
            expected = turned(call.key[b, :, i], int(used[b]) + (i if advance else 0), call.rotary)
            torch.testing.assert_close(found[b, :, i], expected)


def test_ops() -> None:
    call = make(Sizes(half=5))
    used = call.used_k.clamp(0, 20)
    assert call.rotary is not None
    arguments = (*call[:4], used, None, call.batch_index, *call.rotary)
    torch.library.opcheck(torch.ops.torch_flash2.append.default, arguments)
    torch.library.opcheck(torch.ops.torch_flash2.rotate.default, (call.key, used, *call.rotary, True))


def test_key_alone() -> None:
    call = make(Sizes(half=5))
    wanted = by_hand(call)
    torch_flash2.append(call.key_cache, None, call.key, None, call.used_k, batch_index=call.batch_index,
                        rotary=call.rotary)  # fmt: skip
    torch.testing.assert_close(call.key_cache, wanted[0])


def test_append_then_attend() -> None:
    """A cache written in two steps is the cache written in one."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 3, 40, 16, generator=generator)
    table = torch.randperm(8, generator=generator).int().reshape(2, 4)
    pages = Pages(table, 16)
    pools = [torch.zeros(8, 16, 3, 16) for _ in range(4)]
    lengths = torch.tensor([17, 30], dtype=torch.int32)
    for b, n in enumerate(lengths.tolist()):
        torch_flash2.append(pools[0], pools[1], key[b : b + 1, :, :n], key[b : b + 1, :, :n], lengths[:1] * 0,
                            pages=Pages(table[b : b + 1], 16))  # fmt: skip
    torch_flash2.append(pools[0], pools[1], key[:, :, 38:], key[:, :, 38:], lengths, pages=pages)
    query = torch.randn(2, 3, 2, 16, generator=generator)
    used = torch_flash2.Lengths(used_k=lengths + 2)
    found = torch_flash2.attention(query, pools[0], pools[1], "causal @ bottom-right", lengths=used, pages=pages)
    for b, n in enumerate(lengths.tolist()):
        own = torch.cat([key[b, :, :n], key[b, :, 38:]], dim=1)[None]
        wanted = torch_flash2.attention(query[b : b + 1], own, own, "causal @ bottom-right")
        torch.testing.assert_close(found[b : b + 1], wanted)


def test_rejections() -> None:
    call = make(Sizes(half=5))
    caches, new, used, rotary = call[:2], call[2:4], call.used_k, call.rotary
    assert rotary is not None
    pages = Pages(torch.zeros(3, 2, dtype=torch.int32), 16)
    short = Rotary(rotary.cos[:, :3], rotary.sin)
    wide = Rotary(torch.zeros(4, 13), torch.zeros(4, 13))
    calls: list[Callable[[], Any]] = [
        lambda: torch_flash2.append(*caches, *new, used),
        lambda: torch_flash2.append(*caches, *new, used.long(), batch_index=call.batch_index),
        lambda: torch_flash2.append(*caches, *new, used, batch_index=used[:2]),
        lambda: torch_flash2.append(*caches, *new, used, batch_index=call.batch_index, pages=pages),
        lambda: torch_flash2.append(*caches, *new, used, pages=pages),
        lambda: torch_flash2.append(caches[0], None, *new, used, batch_index=call.batch_index),
        lambda: torch_flash2.append(*caches, new[0].half(), new[1], used, batch_index=call.batch_index),
        lambda: torch_flash2.append(*caches, new[0][..., :8], new[1], used, batch_index=call.batch_index),
        lambda: torch_flash2.rotate(new[0], used, short),
        lambda: torch_flash2.rotate(new[0], used, wide),
        lambda: torch_flash2.rotate(new[0][0], used, rotary),
    ]
    texts = []
    for run in calls:
        with pytest.raises((TypeError, ValueError)) as caught:
            run()
        texts.append(f"{type(caught.value).__name__}: {caught.value}")
    pytest.importorskip("expecttest").assert_expected_inline(
        "\n".join(texts),
        """\
ValueError: key_cache must have batch 3, got 5; batch_index can choose
ValueError: used_k must be int32 [3], got torch.int64 (3,)
ValueError: batch_index must be int32 [3], got torch.int32 (2,)
ValueError: key of shape (3, 2, 3, 24) does not fit 3 new rows of 3 segments into key_cache of shape (5, 2, 32, 24)
ValueError: key of shape (3, 2, 3, 24) does not fit 3 new rows of 3 segments into key_cache of shape (5, 2, 32, 24)
ValueError: value_cache and value are given together or not at all
TypeError: key must be as key_cache, torch.float32 on cpu, got torch.float16 on cpu
ValueError: key of shape (3, 2, 3, 8) does not fit 3 new rows of 3 segments into key_cache of shape (5, 2, 32, 24)
ValueError: cos and sin must be [positions, angles] with at most 12 angles, got (33, 3) and (33, 5)
ValueError: cos and sin must be [positions, angles] with at most 12 angles, got (4, 13) and (4, 13)
ValueError: query must have 4 dimensions [batch, heads, seqlen, head_dim], got (2, 3, 24)""",
    )
