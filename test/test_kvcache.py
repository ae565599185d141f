"""flash-attn's KV caches: append, rotary and attention, against a loop over sequences in plain PyTorch.

B sequences, H query heads, G key/value heads, M query rows, L new keys, N keys, D head dim, R rotated dims.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from test_flash_attn import DEVICES, message, randn

from torch_flash2 import UnsupportedError, flash_attn, flash_attn_interface
from torch_flash2.frontends.flash_attn import translate


def rotate(x: torch.Tensor, position: int, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """One row [heads, D] at a position, as complex numbers."""
    R = 2 * cos.shape[1]
    turned = x[..., :R]
    real, imaginary = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    product = torch.complex(real, imaginary) * torch.complex(cos[position], sin[position])
    pair = product.real, product.imag
    return torch.cat([torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1), x[..., R:]], -1)


def attend_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any], slopes: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Math attention of one sequence: q [M, H, D], k and v [N, G, D], every mask bottom-right."""
    M, N, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = torch.einsum("mhd,nhd->hmn", q, k) * options.get("softmax_scale", q.shape[2] ** -0.5)
    if options.get("softcap"):
        score = options["softcap"] * torch.tanh(score / options["softcap"])
    m, n = torch.arange(M)[:, None] + N - M, torch.arange(N)
    if slopes is not None:
        score = score - slopes.to(score.dtype)[:, None, None] * (m - n).abs()
    left, right = options.get("window_size", (-1, -1))
    right = 0 if options.get("causal") else right
    hidden = (n < m - left if left >= 0 else n < 0) | (n > m + right if right >= 0 else n > N)
    score = score.masked_fill(hidden, -torch.inf)
    lse = score.logsumexp(-1)
    return torch.einsum("hmn,nhd->mhd", (score - lse[..., None]).exp().nan_to_num(), v), lse


def have_pages() -> bool:
    """Whether paged keys stand, seen by a tiny call."""
    cache = torch.zeros(2, 16, 1, 16)
    try:
        flash_attn.flash_attn_with_kvcache(
            torch.zeros(1, 1, 1, 16), cache, cache, cache_seqlens=3, block_table=torch.zeros(1, 2, dtype=torch.int32)
        )
    except UnsupportedError:
        return False
    return True


needs_pages = pytest.mark.skipif(not have_pages(), reason="pages= raises UnsupportedError")
# Options of flash_attn_with_kvcache, and what the cache is like: new keys, rotary, rows picked, leftpad, page size.
CACHES = {
    "plain": (dict(), dict(L=0)),
    "append": (dict(causal=True), dict(L=3)),
    "append-one": (dict(softcap=4.0), dict(M=1, L=1, rotary=True)),
    "rotary": (dict(causal=True), dict(L=4, rotary=True)),
    "rotary-halves": (dict(causal=True, rotary_interleaved=False), dict(L=4, rotary=True)),
    "rotary-full": (dict(rotary_interleaved=False), dict(L=4, rotary=True)),
    "window": (dict(window_size=(5, 1)), dict(L=4, rotary=True)),
    "alibi": (dict(causal=True), dict(L=2, alibi=True)),
    "leftpad": (dict(causal=True), dict(L=2, rotary=True, leftpad=True)),
    "leftpad-window": (dict(window_size=(6, 0), causal=True), dict(L=0, leftpad=True)),
    "more-queries": (dict(causal=True), dict(M=9, L=2)),
    "int": (dict(causal=True), dict(L=3, number=True)),
    "picked": (dict(causal=True), dict(L=3, rotary=True, picked=True)),
    "picked-whole": (dict(), dict(L=0, picked=True, whole=True)),
    "whole": (dict(window_size=(3, -1)), dict(L=0, whole=True)),
    "paged": (dict(causal=True), dict(L=0, page=16)),
    "paged-append": (dict(causal=True), dict(L=5, rotary=True, page=16)),
    "paged-window": (dict(window_size=(9, 0), softcap=3.0), dict(L=1, M=1, page=32)),
}


def cache_params() -> list[Any]:
    paged = {name for name, (_, kind) in CACHES.items() if "page" in kind or "picked" in kind}
    return [pytest.param(name, marks=[needs_pages] if name in paged else [], id=name) for name in CACHES]


class Decoding:
    """A cache and what is asked of it; `capacity` positions a sequence, laid out as `kind` of CACHES says."""

    B, H, G, D, capacity = 3, 4, 2, 32, 64

    def __init__(self, device: str, dtype: torch.dtype, kind: dict[str, Any]) -> None:
        B, H, G, D, N = self.B, self.H, self.G, self.D, self.capacity
        L, page = kind["L"], kind.get("page")
        options = dict(device=device, dtype=dtype)
        self.q = randn(B, kind.get("M", 4), H, D, **options)
        self.new = [randn(B, L, G, D, **options, seed=seed) for seed in (1, 2)] if L else []
        self.table = self.picked = None
        rows, size = (B, N) if page is None else (B * N // page + 1, page)
        if page is not None:
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))[: B * N // page]
            self.table = order.reshape(B, -1).to(device=device, dtype=torch.int32)
        elif "picked" in kind:
            rows = 5
            self.picked = torch.tensor([4, 0, 3], dtype=torch.int32, device=device)
        self.keys, self.values = (randn(rows, size, G, D, **options, seed=seed) for seed in (3, 4))
        taken = [7, 7, 7] if "number" in kind else [11, 40, N - 5] if "leftpad" in kind else [0 if L else 1, 40, N - 5]
        self.taken = [N] * B if "whole" in kind else taken
        self.left = [0, 9, 30] if "leftpad" in kind else [0] * B
        angle = torch.outer(torch.arange(N), 1.5 ** -torch.arange(8.0))
        self.tables = [f(angle).to(**options) for f in (torch.cos, torch.sin)] if kind.get("rotary") else []
        self.slopes = torch.tensor([0.5, 0.1, 0.02, 0.3], device=device) if "alibi" in kind else None

    def arguments(self, kind: dict[str, Any]) -> dict[str, Any]:
        """Keywords of flash_attn_with_kvcache."""

        def ints(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.q.device)

        found: dict[str, Any] = dict(cache_batch_idx=self.picked, block_table=self.table, alibi_slopes=self.slopes)
        if "whole" not in kind:
            found["cache_seqlens"] = self.taken[0] if "number" in kind else ints(self.taken)
        if "leftpad" in kind:
            found["cache_leftpad"] = ints(self.left)
        found.update(zip(("k", "v"), self.new, strict=False))
        found.update(zip(("rotary_cos", "rotary_sin"), self.tables, strict=False))
        return found

    def place(self, b: int, position: int) -> tuple[int, int]:
        """Where a position of a sequence lies in the cache."""
        if self.table is not None:
            size = self.keys.shape[1]
            return int(self.table[b, position // size]), position % size
        return (b if self.picked is None else int(self.picked[b])), position

    def wanted(self, options: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """out, lse and the caches afterwards, all computed in a dtype, on the CPU."""
        q, keys, values, *tables = (x.cpu().to(dtype) for x in (self.q, self.keys, self.values, *self.tables))
        keys, values, interleaved = keys.clone(), values.clone(), options.get("rotary_interleaved", True)
        local = options.get("causal") or options.get("window_size", (-1, -1)) != (-1, -1)
        outs, lses = [], []
        for b, taken in enumerate(self.taken):
            length = taken
            for i in range(self.new[0].shape[1] if self.new else 0):
                k, v = (x[b, i].cpu().to(dtype) for x in self.new)
                # What is cached is rounded to the cache's dtype.
                keys[self.place(b, length)] = rotate(k, length, *tables, interleaved) if tables else k
                values[self.place(b, length)] = v
                length += 1
            rows = q[b]
            if tables:
                turned = (rotate(row, taken + (m if local else 0), *tables, interleaved) for m, row in enumerate(rows))
                rows = torch.stack(list(turned))
            at = [self.place(b, position) for position in range(self.left[b], length)]
            k, v = (torch.stack([cache[place] for place in at]) for cache in (keys, values))
            slopes = None if self.slopes is None else self.slopes.cpu()
            out, lse = attend_rows(rows, k, v, options, slopes)
            outs.append(out)
            lses.append(lse)
        return torch.stack(outs), torch.stack(lses), keys, values


def hold(found: tuple[torch.Tensor, ...], case: Decoding, options: dict[str, Any]) -> None:
    """Every error at most twice that of plain PyTorch in the same dtype, plus rounding."""
    dtype = case.q.dtype
    exact, plain = case.wanted(options, torch.float64), case.wanted(options, torch.float32)
    if dtype != torch.float32:
        plain = tuple(tensor.to(dtype) for tensor in plain)
    for name, a, e, p in zip(("out", "lse", "k_cache", "v_cache"), found, exact, plain, strict=True):
        a, p = a.cpu().double(), p.double()
        assert torch.equal(a == -torch.inf, e == -torch.inf), name
        finite = e != -torch.inf
        allowed = 2 * (p - e)[finite].abs().max() + 4 * torch.finfo(dtype).eps * e[finite].abs().max()
        assert (a - e)[finite].abs().max() <= allowed, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", cache_params())
def test_cache(name: str, device: str) -> None:
    options, kind = CACHES[name]
    case = Decoding(device, torch.float32 if device == "cpu" else torch.bfloat16, kind)
    keys, values = case.keys.clone(), case.values.clone()
    arguments = case.arguments(kind)

    def step(keys: torch.Tensor, values: torch.Tensor) -> Any:
        return flash_attn.flash_attn_with_kvcache(case.q, keys, values, **arguments, **options, return_softmax_lse=True)

    # The first call compiles, and may wait.
    step(keys.clone(), values.clone())
    with contextlib.nullcontext() if device == "cpu" else no_sync():
        out, lse = step(keys, values)
    hold((out, lse, keys, values), case, options)


class no_sync:  # noqa: N801
    """In this block a wait for the GPU raises."""

    def __enter__(self) -> None:
        with warnings.catch_warnings():
            # PyTorch warns that the mode is a prototype.
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


def test_cache_of_v3() -> None:
    """Packed queries and packed new keys are the padded ones, sequence by sequence."""
    kind = dict(L=4, rotary=True)
    case = Decoding("cpu", torch.float32, kind)
    arguments = case.arguments(kind)
    arguments.pop("block_table"), arguments.pop("alibi_slopes")
    wanted_caches, caches = ([case.keys.clone(), case.values.clone()] for _ in range(2))
    wanted, wanted_lse, *_ = flash_attn_interface.flash_attn_with_kvcache(
        case.q, *wanted_caches, **arguments, causal=True, return_softmax_lse=True
    )
    cu = torch.tensor([0, 4, 8, 12], dtype=torch.int32)
    arguments.update(k=arguments["k"].flatten(0, 1), v=arguments["v"].flatten(0, 1))
    out, lse, *_ = flash_attn_interface.flash_attn_with_kvcache(
        case.q.flatten(0, 1), *caches, **arguments, causal=True, cu_seqlens_q=cu, cu_seqlens_k_new=cu, max_seqlen_q=4,
        return_softmax_lse=True,
    )  # fmt: skip
    torch.testing.assert_close(out.unflatten(0, (3, 4)), wanted)
    torch.testing.assert_close(lse.unflatten(1, (3, 4)).transpose(0, 1), wanted_lse)
    for found, want in zip(caches, wanted_caches, strict=True):
        assert torch.equal(found, want)
    hold((wanted, wanted_lse, *wanted_caches), case, dict(causal=True))


def seen(M: int, used: int, left: int, chunk: int) -> torch.Tensor:
    """Which of 64 positions the rows of a sequence see, [M, 64]: causal, in chunks that are counted from `left`."""
    place, n = torch.arange(M)[:, None] + used - M - left, torch.arange(64) - left
    first = place.div(chunk, rounding_mode="floor") * chunk
    return (n >= 0) & (n <= place) & (n >= first) & (n < first + chunk)


@needs_pages
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("paged", [False, True])
def test_leftpad_of_v3(packed: bool, paged: bool) -> None:
    """cache_leftpad with chunks, with pages of which cache_batch_idx picks rows, with packed queries."""
    q, keys = randn(3, 4, 4, 32), randn(5, 64, 2, 32, seed=1)
    values = torch.eye(64)[None, :, None].expand(5, -1, 2, -1).contiguous()
    picked, used, left = [4, 0, 3], [11, 40, 64], [3, 9, 30]
    caches, table = [keys, values], None
    if paged:
        order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
        table = order.argsort().reshape(5, 4).int()
        caches = [cache.reshape(20, 16, *cache.shape[2:])[order] for cache in caches]
    rows = [4, 2, 3] if packed else [4, 4, 4]
    options: dict[str, Any] = dict(cache_seqlens=used, cache_batch_idx=picked, cache_leftpad=left)
    options = {name: torch.tensor(value, dtype=torch.int32) for name, value in options.items()}
    if packed:
        cu = torch.tensor([0, 4, 6, 9], dtype=torch.int32)
        options.update(cu_seqlens_q=cu, max_seqlen_q=4)
        q = torch.cat([q[b, :n] for b, n in enumerate(rows)])
    found = flash_attn_interface.flash_attn_with_kvcache(
        q, *caches, page_table=table, causal=True, attention_chunk=6, **options
    )
    parts = found.split(rows) if packed else found.unbind()
    for b, part in enumerate(parts):
        wanted = seen(rows[b], used[b], left[b], 6)
        assert torch.equal(part[:, 0] > 0, wanted), b


@needs_pages
@pytest.mark.parametrize("device", DEVICES)
def test_varlen_pages(device: str) -> None:
    """Packed queries on paged keys are those on packed keys."""
    cu_q, cu_k = (torch.tensor(edges, dtype=torch.int32, device=device) for edges in ([0, 3, 10], [0, 20, 51]))
    q, k, v = (randn(n, 4, 32, device=device, seed=n) for n in (10, 51, 52))
    v = v[1:]
    table = torch.tensor([[3, 1, 0], [4, 2, 5]], dtype=torch.int32, device=device)
    pages = [randn(6, 16, 4, 32, device=device, seed=9) for _ in range(2)]
    for b, (start, stop) in enumerate([(0, 20), (20, 51)]):
        for t in range(start, stop):
            for cache, rows in zip(pages, (k, v), strict=True):
                cache[table[b, (t - start) // 16].item(), (t - start) % 16] = rows[t]
    options = dict(causal=True, return_attn_probs=True)
    found = flash_attn.flash_attn_varlen_func(q, *pages, cu_q, cu_k, 7, 31, block_table=table, **options)
    for a, b in zip(found, flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 31, **options), strict=True):
        torch.testing.assert_close(a, b)


def test_num_splits_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """As given; 0 leaves them to the library. In each interface."""
    made = []
    call = translate._call
    monkeypatch.setattr(translate, "_call", lambda *arguments: made.append(call(*arguments)) or made[-1])
    q, cache = randn(2, 1, 4, 16), randn(2, 8, 2, 16)
    for module in (flash_attn, flash_attn_interface):
        for splits in (0, 3):
            module.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=5, num_splits=splits)
    assert [call.num_splits for call in made] == [None, 3, None, 3]


def test_cache_compiles() -> None:
    """One graph, whose cache is written in place."""
    kind = dict(L=1, M=1, rotary=True, leftpad=True)
    case = Decoding("cpu", torch.float32, kind)

    def step(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        return flash_attn.flash_attn_with_kvcache(q, keys, values, **arguments, causal=True)

    wanted_caches, caches = ([case.keys.clone(), case.values.clone()] for _ in range(2))
    wanted = step(case.q, *wanted_caches, case.arguments(kind))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.q, *caches, case.arguments(kind)), wanted)
    assert torch.equal(caches[0], wanted_caches[0]) and not torch.equal(caches[0], case.keys)


def test_cache_mistakes() -> None:
    expecttest = pytest.importorskip("expecttest")
    q, cache, new, cos = randn(2, 1, 4, 16), randn(2, 8, 2, 16), randn(2, 1, 2, 16), randn(8, 4)
    lengths = torch.tensor([1, 2], dtype=torch.int32)
    call = flash_attn.flash_attn_with_kvcache
    mistakes = [
        message(call, q, cache, cache, new, cache_seqlens=lengths),
        message(call, q, cache, cache, new, new),
        message(call, q, cache, cache, rotary_cos=cos, rotary_sin=cos, cache_seqlens=lengths),
        message(call, q, cache, cache, new, new, rotary_cos=cos, cache_seqlens=lengths),
        message(call, q, cache, cache, new, new, cos[:4], cos[:4], lengths),
        message(call, q, cache, cache, new, new, cos.repeat(1, 4), cos.repeat(1, 4), lengths),
        message(call, q, cache, cache, new[..., :8], new, cache_seqlens=lengths),
        message(call, q, cache, cache, new[:1], new[:1], cache_seqlens=lengths),
        message(call, q, cache, cache, cache_seqlens=lengths.long()),
        message(call, q, cache.transpose(1, 3), cache, cache_seqlens=lengths),
        message(call, q, cache, cache, cache_seqlens=lengths, cache_batch_idx=lengths, block_table=lengths[:, None]),
        message(call, q[:, :, :3], cache, cache, cache_seqlens=lengths),
    ]
    expecttest.assert_expected_inline(
        "\n".join(mistakes),
        """\
ValueError: k and v must be given together
ValueError: new keys are written behind cache_seqlens, which must be given with k and v
ValueError: rotary_cos and rotary_sin rotate new keys: k and v must be given with them
ValueError: rotary_cos, rotary_sin and cache_seqlens must be given together
ValueError: rotary tables must cover the cache's 8 positions, got 4
ValueError: rotary_cos and rotary_sin must be [positions, R / 2] with R <= 16, got [8, 16] and [8, 16]
ValueError: k must have the cache's heads, head dim and dtype [2, 16] torch.float32, got [2, 8] torch.float32
ValueError: k must have a row for each of 2 sequences, got 1
ValueError: cache_seqlens must be int32 [2], got torch.int64 [2]
ValueError: k_cache must have contiguous last dimension, got stride 32
ValueError: cache_batch_idx picks rows of a cache without pages: pick rows of block_table instead
ValueError: query heads must be a multiple of key heads, got 3 and 2""",
    )
