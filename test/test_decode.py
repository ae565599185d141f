"""Decoding: the decode kernel and paged keys, in Triton's interpreter and on a GPU, forward only.

B segments, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_triton import pairwise

import torch_flash2
from torch_flash2 import Lengths, Pages, attention, oracle, problem, testing
from torch_flash2.testing import Case

interpreted = pytest.mark.interpreter
# Masked scores may overflow exp2 before they are dropped.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")

FACTORS: dict[str, tuple[Any, ...]] = {
    "mask": (
        "full",
        "causal @ bottom-right",
        "causal @ top-left",
        "window(7, 0) @ bottom-right",
        "window(-, 3) @ top-left",
        "causal & chunk(13) @ bottom-right",
        "prefix(17) @ bottom-right",
    ),
    "page": (None, 16, 24, 64),
    "splits": (None, 1, 2, 7),
    "rows": (1, 2, 5, 9),
    "keys": (90, 1, 33, 64),
    "heads": ((2, 2), (4, 1), (6, 2), (9, 1)),
    "dims": ((16, 16), (8, 24), (72, 64), (33, 5)),
    "lengths": (None, "padded_k", "padded"),
    "bias": (None, "BHMN", "HMN", "N"),
    "dense": (None, "MN", "BHMN"),
    "layout": ("bhsd", "bshd", "odd"),
    "alibi": (0, 1, 2),
    "softcap": (None, 3.0),
    "sinks": (False, True),
    "dtype": ("fp16", "fp32"),
    "scale": (None, -0.3),
}


def case_of(row: dict[str, Any], name: str) -> tuple[Case, dict[str, Any]]:
    """The case that a row of factors describes, and how it runs."""
    row = dict(row)
    how = {"page": row.pop("page"), "splits": row.pop("splits")}
    (D, Dv), (heads, heads_kv) = row.pop("dims"), row.pop("heads")
    shares: dict[str, Any] = {}
    if row["lengths"] is not None:
        shares = dict(documents=(1.0, 0.4, 0.0), documents_k=(0.7, 1.0, 0.5))
    return Case(name, 3, heads, heads_kv, row.pop("rows"), row.pop("keys"), D, Dv, **row, **shares), how


PAIRS = [case_of(row, f"pair{i}") for i, row in enumerate(pairwise(FACTORS, lambda row: True))]


def paged(inputs: oracle.Inputs, page_size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Pages]:
    """Key and value in pages of any order: rows that nobody uses are NaN, and table entries that nobody uses wild."""
    rng = random.Random(seed)
    B, G, N, _ = inputs.key.shape
    count = -(-N // page_size)
    used = [N] * B
    if inputs.lengths is not None and inputs.lengths.used_k is not None:
        used = inputs.lengths.used_k.tolist()
    spare = 3
    order = rng.sample(range(B * count + spare), B * count)
    table = torch.tensor(order, dtype=torch.int32).reshape(B, count).to(inputs.key.device)
    pools = []
    for tensor in (inputs.key, inputs.value):
        pool = tensor.new_full((B * count + spare, page_size, G, tensor.shape[3]), torch.nan)
        for b, length in enumerate(used):
            for start in range(0, length, page_size):
                stop = min(start + page_size, length)
                pool[table[b, start // page_size], : stop - start] = tensor[b, :, start:stop].transpose(0, 1)
        pools.append(pool)
    wild = torch.tensor([-1, 2**30, -(2**31)], dtype=torch.int32)
    for b, length in enumerate(used):
        for i in range(-(-length // page_size), count):
            table[b, i] = wild[i % 3]
    return pools[0], pools[1], Pages(table, page_size)


def run(
    inputs: oracle.Inputs, page: int | None = None, splits: int | None = None, kernel: str | None = "decode"
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of the inputs, on pages of that size; 16-bit results are NaN where nothing was written."""
    query, key, value, mask = inputs.arguments
    options = {**inputs.keywords, "num_splits": splits, "return_lse": True}
    if page is not None:
        key, value, options["pages"] = paged(inputs, page)
        room = options["pages"].block_table.shape[1] * page - inputs.key.shape[2]
        options["bias"] = padded(options["bias"], room)
        if inputs.dense is not None:
            mask = torch_flash2.masks.parse(inputs.bands) & padded(inputs.dense, room)
        if options["lengths"] is None:
            B, N = query.shape[0], inputs.key.shape[2]
            options["lengths"] = Lengths(used_k=torch.full((B,), N, dtype=torch.int32, device=query.device))
    with testing.poisoned():
        if kernel is None:
            return attention(query, key, value, mask, **options)
        with torch_flash2.force(kernel):
            return attention(query, key, value, mask, **options)


def padded(tensor: torch.Tensor | None, room: int) -> torch.Tensor | None:
    """A tensor that broadcasts to [B, H, M, N], for more keys."""
    if tensor is None or tensor.shape[3] == 1:
        return tensor
    return torch.nn.functional.pad(tensor, (0, room))


def check(case: Case, device: str = "cpu", seed: int = 0, **how: Any) -> None:
    """Hold out and lse to the error bound of testing.check."""
    inputs = case.inputs(device, seed)
    out, lse = run(inputs, **how)
    nothing = torch.zeros_like(out), torch.zeros_like(lse)
    exact, plain, single = (
        oracle.math_attention(inputs, None, *nothing, dtype)
        for dtype in (torch.float64, inputs.query.dtype, torch.float32)
    )
    testing._compare(f"{case.name} {how}, out, seed {seed}", out, exact.out, plain.out, 0.0)
    # Softcap of 16-bit inputs may use the hardware's tanh.
    plain_lse = plain.lse if case.softcap is not None else single.lse
    testing._compare(f"{case.name} {how}, lse, seed {seed}", lse, exact.lse, plain_lse, 0.0)


@interpreted
@pytest.mark.parametrize(
    ("shape", "count", "cols", "sinks"),
    [((1, 3, 33), 4, 64, True), ((2, 2, 17), 3, 128, False), ((1, 2, 20), 7, 96, True), ((1, 1, 2100), 2, 64, True)],
)
def test_combining_rows_at_a_time(shape: tuple[int, int, int], count: int, cols: int, sinks: bool) -> None:
    """Both kernels that combine splits give the sum over them, of those in which a row sees a key."""
    pytest.importorskip("triton")
    from torch_flash2.kernels.bundles import Sizes
    from torch_flash2.kernels.triton import splitting

    torch.manual_seed(0)
    lse, out = torch.empty(shape), torch.empty(*shape, cols)
    splits = splitting.left_by(count, lse, cols)
    assert splits is not None
    splits.out.normal_()
    splits.lse2.normal_().mul_(3)
    unseen = torch.rand(splits.lse2.shape) < 0.3
    unseen[5] = True
    splits.lse2[unseen] = -torch.inf
    splits.out[unseen] = torch.nan
    sink = torch.randn(shape[1]) if sinks else None
    call: Any = SimpleNamespace(sinks=sink, query=lse)
    sizes = Sizes.coded(*shape[:2], 1, shape[2], 100)
    parts = [splits.lse2.double() * math.log(2)]
    if sink is not None:
        parts.append(sink.double()[None, :, None].expand(shape).reshape(-1, 1))
    none = unseen.all(1)
    wanted_lse = torch.cat(parts, 1).logsumexp(1).masked_fill(none, -torch.inf)
    weights = (parts[0] - wanted_lse[:, None]).exp().masked_fill(unseen, 0)
    wanted = (weights[..., None] * splits.out.double().nan_to_num()).sum(1)
    combines = (splitting.combine, splitting.combine_rows) if lse.numel() < 1000 else (splitting.combine_rows,)
    for combine in combines:
        out.fill_(torch.nan)
        combine(splits, out, lse.fill_(torch.nan), call, sizes)
        torch.testing.assert_close(out.flatten(0, 2).double(), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse.flatten().double(), wanted_lse, atol=1e-5, rtol=1e-5)


@interpreted
@pytest.mark.parametrize("case, how", PAIRS, ids=[case.name for case, _ in PAIRS])
def test_pairs(case: Case, how: dict[str, Any]) -> None:
    check(case, **how)


@st.composite
def random_rows(draw: st.DrawFn) -> dict[str, Any]:
    row = {name: draw(st.sampled_from(values)) for name, values in FACTORS.items()}
    row["rows"] = draw(st.integers(1, 16))
    # The interpreter takes long over many rows.
    row["heads"] = draw(st.sampled_from([heads for heads in FACTORS["heads"] if heads[0] * row["rows"] <= 36]))
    row["keys"] = draw(st.integers(1, 150))
    row["page"] = draw(st.sampled_from([None, *range(16, 70)]))
    row["splits"] = draw(st.sampled_from([None, *range(1, 20)]))
    return row


@interpreted
@settings(phases=[Phase.explicit, Phase.reuse, Phase.generate], max_examples=settings().max_examples // 2)
@given(row=random_rows(), seed=st.integers(0, 2**16))
def test_random(row: dict[str, Any], seed: int) -> None:
    case, how = case_of(row, str(row))
    check(case, seed=seed, **how)


PREFILL = (
    dict(mask="causal @ bottom-right"),
    dict(mask="window(20, 3) @ bottom-right", bias="HMN", sinks=True, scale=-0.3),
    dict(mask="prefix(30) @ top-left", dense="MN", softcap=3.0, lengths="padded", documents=(1.0, 0.4, 0.9)),
)


@interpreted
@pytest.mark.parametrize("options", PREFILL, ids=str)
@pytest.mark.parametrize("page", [16, 40])
def test_prefill(options: dict[str, Any], page: int) -> None:
    case = Case("prefill", 3, 4, 2, 70, 130, 16, 24, "fp16", **options)
    check(case, page=page, kernel="triton")


@interpreted
def test_packed_prefill() -> None:
    """Packed queries, documents of different length, beside pages."""
    case = Case("packed", 3, 4, 2, 60, 100, 16, 16, "fp32", "causal @ bottom-right", lengths="packed_q_padded_k",
                documents=(1.0, 0.1, 0.5), documents_k=(1.0, 0.3, 0.6))  # fmt: skip
    check(case, page=16, kernel="triton")


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("options", PREFILL, ids=str)
def test_eager(options: dict[str, Any], kernel: str) -> None:
    check(Case("eager", 3, 4, 2, 50, 130, 16, 24, "fp32", **options), page=16, kernel=kernel)


# The value in the key.


def latent(page: int | None, rows: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, ...]:
    """Arguments of absorbed MLA: query, key, a value that is a view of it, options."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = dict(generator=generator, device=device, dtype=dtype)
    query = torch.randn(3, 6, rows, 80, **sizes)
    used = torch.tensor([100, 1, 65], dtype=torch.int32, device=device)
    options: dict[str, Any] = dict(mask="causal @ bottom-right", lengths=Lengths(used_k=used), return_lse=True)
    key = torch.randn(3, 1, 100, 80, **sizes)
    if page is not None:
        key = torch.randn(30, page, 1, 80, **sizes)
        table = torch.randperm(30, generator=generator, device=device)[:21].reshape(3, 7)
        options["pages"] = Pages(table.int(), page)
    return query, key, key[..., :64], options


@interpreted
@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("splits", [1, 3])
def test_value_in_key(page: int | None, rows: int, splits: int) -> None:
    query, key, value, options = latent(page, rows, torch.float32)
    assert "value in key" in str(torch_flash2.explain(query, key, value, **options))
    assert "value in key" not in str(torch_flash2.explain(query, key, value.clone(), **options))
    with torch_flash2.force("reference"):
        wanted = attention(query, key, value, **options)
    with torch_flash2.force("decode"), testing.poisoned():
        found = attention(query, key, value, num_splits=splits, **options)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@interpreted
def test_value_in_key_is_told_per_call() -> None:
    """Calls that differ in nothing but where the value lies."""
    query, key, value, options = latent(None, 1, torch.float32)
    other = torch.randn_like(key)[..., :64]
    assert other.stride() == value.stride()
    for v in (value, other, value):
        with torch_flash2.force("reference"):
            wanted = attention(query, key, v, **options)
        with torch_flash2.force("decode"):
            found = attention(query, key, v, **options)
        torch.testing.assert_close(found, wanted)


# Bits.


@interpreted
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("page", [None, 16])
def test_batch_invariant(splits: int, page: int | None) -> None:
    """The bits of a segment do not depend on its neighbours, on its pages or on the room of the cache."""
    case = Case("bits", 4, 6, 2, 2, 300, 16, 16, "fp16", "window(200, 0) @ bottom-right", sinks=True,
                lengths="padded_k", documents=(1.0, 0.3, 0.61, 0.0))  # fmt: skip
    together = case.inputs()
    out, lse = run(together, page, splits)
    for b, length in enumerate(together.lengths.used_k.tolist()):
        room = max(length, 1)
        alone = together._replace(
            query=together.query[b : b + 1],
            key=together.key[b : b + 1, :, :room],
            value=together.value[b : b + 1, :, :room],
            lengths=Lengths(used_k=together.lengths.used_k[b : b + 1]),
        )
        own_out, own_lse = run(alone, page, splits)
        assert torch.equal(own_out[0], out[b]) and torch.equal(own_lse[0], lse[b])


@interpreted
def test_same_bits_again() -> None:
    inputs = Case("again", 2, 4, 2, 3, 200, 16, 16, "fp16").inputs()
    first, second = run(inputs), run(inputs)
    assert all(map(torch.equal, first, second))


def test_split_count() -> None:
    """Few segments are split much, many little; never into less than some tiles."""
    pytest.importorskip("triton")
    from torch_flash2 import hardware
    from torch_flash2.kernels.triton import decode, splitting

    def count(batch: int, keys: int) -> int:
        gpu = hardware.simulated("sm90")
        posed = problem.Problem("forward", gpu, torch.bfloat16, batch, 32, 8, 1, keys, 128, 128)
        return (splitting.choose(posed, decode.work(posed, decode.config(posed)), keys).count - 3) // 2

    assert count(1, 128 * 1024) >= 16 and count(512, 8192) <= 4
    assert count(1, 100) == 1 and count(1, 512) <= 2


# What nobody sees leaks nowhere, and bad input reads nothing outside the cache.


@interpreted
@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("splits", [1, 3])
def test_no_leak(page: int | None, poison: float, where: str, splits: int) -> None:
    case = Case("leak", 1, 4, 2, 3, 100, 16, 16, "fp32", "window(30, 0) @ bottom-right")
    clean = case.inputs()
    # Row 0 sees keys 67 .. 97, row 2 keys 69 .. 99: the last row alone does not see the poison.
    tensor = getattr(clean, where).clone()
    tensor[:, :, 68, 5] = poison
    (out, lse), (wanted, wanted_lse) = run(clean._replace(**{where: tensor}), page, splits), run(clean, page, splits)
    torch.testing.assert_close(out[:, :, 2], wanted[:, :, 2])
    torch.testing.assert_close(lse[:, :, 2], wanted_lse[:, :, 2])
    if poison != poison:
        assert out[:, :, :2, 5].isnan().all()
        if where == "value":
            torch.testing.assert_close(out[:, :, :2, :5], wanted[:, :, :2, :5])
        else:
            assert out[:, :, :2].isnan().all() and lse[:, :, :2].isnan().all()


@pytest.mark.parametrize(
    "kernel", [pytest.param("decode", marks=interpreted), pytest.param("triton", marks=interpreted), "cpu"]
)
def test_wild_pages(kernel: str) -> None:
    """Page numbers and lengths out of range are clamped: the nearest page, the room there is."""
    query, key = torch.randn(2, 2, 1, 16), torch.randn(4, 16, 1, 16)
    table = torch.tensor([[0, 2**30, 1], [-(2**31), 2, -5]], dtype=torch.int32)
    used = torch.tensor([2**30, 40], dtype=torch.int32)
    nearest = torch.tensor([[0, 3, 1], [0, 2, 0]], dtype=torch.int32)
    room = torch.tensor([48, 40], dtype=torch.int32)
    with torch_flash2.force(kernel):
        found = attention(query, key, key, lengths=Lengths(used_k=used), pages=Pages(table, 16))
    with torch_flash2.force("reference"):
        wanted = attention(query, key, key, lengths=Lengths(used_k=room), pages=Pages(nearest, 16))
    torch.testing.assert_close(found, wanted)


def complaint(run: Callable[[], Any]) -> str:
    with pytest.raises((TypeError, ValueError, torch_flash2.UnsupportedError)) as caught:
        run()
    return f"{type(caught.value).__name__}: {caught.value}"


def test_rejections() -> None:
    query, pool = torch.randn(2, 4, 1, 16), torch.randn(6, 16, 2, 16)
    table = torch.zeros(2, 3, dtype=torch.int32)
    cu = torch.tensor([0, 3, 6], dtype=torch.int32)

    def call(pages: Pages | None = None, key: torch.Tensor = pool, **options: Any) -> Callable[[], Any]:
        return lambda: attention(query, key, pool, pages=pages or Pages(table, 16), **options)

    calls = (
        call(Pages(table.long(), 16)),
        call(Pages(table[0], 16)),
        call(Pages(table[:1], 16)),
        call(Pages(table, 32)),
        call(Pages(table.T.contiguous().T, 16)),
        call(key=pool[:, :, :1]),
        call(lengths=Lengths(cu_k=cu)),
        call(mask="causal"),
        call(num_splits=0),
        call(num_splits=257),
        call(bias=torch.zeros(1, 47)),
    )
    pytest.importorskip("expecttest").assert_expected_inline(
        "\n".join(map(complaint, calls)),
        """\
TypeError: block_table must be int32, got torch.int64
ValueError: block_table must be [B, pages per segment], B = 2, got (3,)
ValueError: block_table must be [B, pages per segment], B = 2, got (1, 3)
ValueError: paged keys are [pages, page_size, heads, head_dim] with page_size 32, got shape (6, 16, 2, 16)
ValueError: block_table must have unit stride in its last dimension, got 2
ValueError: key and value must agree in batch, heads and seqlen, got (6, 1, 16) and (6, 2, 16)
ValueError: paged keys have no cu_k: block_table says where they lie, used_k how many there are
ValueError: mask causal with block_table needs an explicit alignment: say align='bottom-right' (the last query row stands at the last used key, as in decoding) or align='top-left' (row 0 stands at key 0)
ValueError: num_splits must be from 1 to 256 (None leaves it to the library), got 0
ValueError: num_splits must be from 1 to 256 (None leaves it to the library), got 257
ValueError: bias of shape (1, 47) must broadcast to [B, H, M, N] = [2, 4, 1, 48]""",  # noqa: E501
    )


def test_no_backward_through_pages() -> None:
    query, pool = torch.randn(2, 4, 1, 16, requires_grad=True), torch.randn(6, 16, 2, 16)
    pages = Pages(torch.zeros(2, 3, dtype=torch.int32), 16)
    out = attention(query, pool, pool, pages=pages)
    with pytest.raises(torch_flash2.UnsupportedError, match="cpu: it has no backward through pages"):
        out.sum().backward()


@interpreted
def test_backward_of_few_rows() -> None:
    """Without pages the portable backward takes over."""
    case = Case("train", 2, 4, 2, 3, 70, 16, 16, "fp32", "causal @ bottom-right", softcap=3.0, sinks=True, bias="HMN")
    inputs = case.inputs()
    plan = str(torch_flash2.explain(*inputs.arguments, **inputs.keywords, needs_grad=True))
    assert "runs on decode" in plan and "not decode: it has no backward" in plan and "runs on triton" in plan
    testing.check(case)


# TORCH_FLASH2_CHECK=1.


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_flash2.settings.checks", lambda: True)


def bad_calls(device: str = "cpu") -> list[Callable[[], Any]]:
    """Calls whose shapes are right and whose numbers are not."""
    tensor = torch.randn(2, 2, 20, 16, device=device)
    packed = torch.randn(1, 2, 20, 16, device=device)
    pool = torch.randn(6, 16, 2, 16, device=device)

    def ints(*numbers: Any) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    def pages(lengths: Lengths, *rows: list[int]) -> Callable[[], Any]:
        return lambda: attention(tensor[:, :, :1], pool, pool, pages=Pages(ints(*rows), 16), lengths=lengths)

    good = ints(0, 20)
    return [
        lambda: attention(packed, packed, packed, lengths=Lengths(ints(0, 12, 8), ints(0, 10, 20))),
        lambda: attention(packed, packed, packed, lengths=Lengths(ints(-1, 12, 20), ints(0, 10, 20))),
        lambda: attention(packed, packed, packed, lengths=Lengths(good, ints(0, 21))),
        lambda: attention(packed, packed, packed, lengths=Lengths(good, good, ints(20), ints(-3))),
        lambda: attention(tensor, tensor, tensor, lengths=Lengths(used_k=ints(20, 21))),
        pages(Lengths(used_k=ints(17, 33)), [0, 5], [1, 2]),
        pages(Lengths(used_k=ints(17, 16)), [0, 6], [1, -9]),
        pages(Lengths(used_k=ints(17, 17)), [0, 5], [1, -9]),
        pages(Lengths(), [0, 5], [1, -9]),
    ]


def test_checks(checked: None) -> None:
    pytest.importorskip("expecttest").assert_expected_inline(
        "\n".join(map(complaint, bad_calls())),
        """\
ValueError: cu_q must not decrease; at [2] it is 8
ValueError: cu_q must lie between 0 and the 20 rows stored; at [0] it is -1
ValueError: cu_k must lie between 0 and the 20 rows stored; at [1] it is 21
ValueError: used_k must lie between 0 and its document's length; at [0] it is -3
ValueError: used_k must lie between 0 and the 20 that there is room for; at [1] it is 21
ValueError: used_k must lie between 0 and the 32 that there is room for; at [1] it is 33
ValueError: block_table must name pages from 0 to 5 where keys are used; at [0, 1] it is 6
ValueError: block_table must name pages from 0 to 5 where keys are used; at [1, 1] it is -9
ValueError: block_table must name pages from 0 to 5 where keys are used; at [1, 1] it is -9""",
    )
    query, pool = torch.randn(2, 2, 1, 16), torch.randn(6, 16, 2, 16)
    table = torch.tensor([[0, 5], [1, -9]], dtype=torch.int32)
    used = Lengths(used_k=torch.tensor([17, 16], dtype=torch.int32))
    attention(query, pool, pool, pages=Pages(table, 16), lengths=used)


def test_unchecked_calls_return() -> None:
    for run in bad_calls():
        assert run() is not None


def test_flops_of_pages() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    query, pool = torch.randn(2, 4, 1, 16), torch.randn(6, 16, 2, 16)
    pages = Pages(torch.zeros(2, 3, dtype=torch.int32), 16)
    with FlopCounterMode(display=False) as counter:
        attention(query, pool, pool, pages=pages)
    assert counter.get_total_flops() == 2 * 2 * 4 * 48 * (16 + 16)


@pytest.mark.parametrize(
    "mask, most",
    [("full", 1000), ("causal", 1000), ("window(9, -)", 1000), ("causal & window(9, -)", 10), ("window(9, 5)", 15),
     ("chunk(7) & window(9, 5)", 7), ("prefix(3)", 1000)],
)  # fmt: skip
def test_reach(mask: str, most: int) -> None:
    pytest.importorskip("triton")
    from torch_flash2.kernels.triton.splitting import _reach

    assert _reach(torch_flash2.masks.parse(mask), 1000) == most
