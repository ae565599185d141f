"""The Triton kernels in Triton's interpreter: every pair of features, and what must not leak.

The interpreter computes bfloat16 as integers, so float16 stands for the 16-bit types here.

B batch, H query heads, M query rows, N keys, Dv head dim of value.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import torch_flash2
from torch_flash2 import masks, oracle, scores, testing
from torch_flash2.testing import CASES, Case, check

pytestmark = [
    pytest.mark.interpreter,
    # Masked scores may overflow exp2 before they are dropped.
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]

FACTORS: dict[str, tuple[Any, ...]] = {
    "mask": (
        "full",
        "causal",
        "causal @ bottom-right",
        "window(7, 5)",
        "window(-, 3)",
        "window(9, -) @ bottom-right",
        "causal & chunk(13)",
        "prefix(17)",
    ),
    "bias": (None, "BHMN", "HMN", "N", "BM", "BH", ""),
    "lengths": (None, *testing.LENGTHS),
    "layout": testing.LAYOUTS,
    "sizes": ((40, 40), (70, 20), (20, 70), (1, 50), (20, 20)),
    "dims": ((8, 8), (16, 40), (72, 24), (64, 64), (33, 5)),
    "dense": (None, "MN", "BHMN", "BN"),
    "heads": ((2, 2), (2, 1), (3, 1)),
    "alibi": (0, 1, 2),
    "dtype": ("fp16", "fp32"),
    "softcap": (None, 3.0),
    "sinks": (False, True),
    "dropout_p": (0.0, 0.3),
    "scale": (None, -0.3),
}


def allowed(row: dict[str, Any]) -> bool:
    """Whether a (part of a) row of factors is a case."""
    if row.get("layout") == "packed_qkv":
        M, N = row.get("sizes", (1, 1))
        D, Dv = row.get("dims", (1, 1))
        return M == N and D == Dv and row.get("lengths") in (None, "packed")
    return not (row.get("layout") == "expanded" and row.get("lengths") is not None)


def pairwise(
    factors: dict[str, tuple[Any, ...]], allowed: Callable[[dict[str, Any]], bool]
) -> Iterator[dict[str, Any]]:
    """Rows in which every allowed pair of values of two factors occurs, chosen greedily."""
    rng = random.Random(0)
    todo = {
        frozenset([(a, x), (b, y)]): None
        for a, b in itertools.combinations(factors, 2)
        for x, y in itertools.product(factors[a], factors[b])
        if allowed({a: x, b: y})
    }
    while todo:
        row = dict(next(iter(todo)))
        for name in factors:
            if name in row:
                continue
            options = [x for x in factors[name] if allowed({**row, name: x})]
            rng.shuffle(options)

            def gain(x: Any, name: str = name, row: dict[str, Any] = row) -> int:
                return sum(frozenset([(name, x), item]) in todo for item in row.items())

            row[name] = max(options, key=gain)
        for pair in itertools.combinations(row.items(), 2):
            todo.pop(frozenset(pair), None)
        yield row


def case_of(row: dict[str, Any], name: str) -> Case:
    """The case that a row of factors describes."""
    row = dict(row)
    (M, N), (D, Dv), (heads, heads_kv) = row.pop("sizes"), row.pop("dims"), row.pop("heads")
    if row["lengths"] is not None:
        row.update(documents=(0.6, 1.0), tail=3 if row["layout"] != "packed_qkv" else 0)
        if M != N:
            row.update(documents_k=(1.0, 0.4))
        if "@" not in row["mask"] and "used_k" in testing.LENGTHS[row["lengths"]]:
            row["mask"] += " @ top-left" if row["mask"] != "full" else ""
    return Case(name, 2, heads, heads_kv, M, N, D, Dv, **row)


PAIRS = [case_of(row, f"pair{i}") for i, row in enumerate(pairwise(FACTORS, allowed))]


def small(case: Case) -> Case:
    """A named case at the interpreter's size."""
    case = case.scaled(40, 4 if case.lengths else 1, 2)
    if case.dtype == "bf16":
        case = dataclasses.replace(case, dtype="fp16")
    return case


# logits-1e4-bf16 lies past float16's range.
NAMED = [small(case) for name, case in CASES.items() if name != "logits-1e4-bf16"]


def test_pairwise_is_complete() -> None:
    rows = list(pairwise(FACTORS, allowed))
    for a, b in itertools.combinations(FACTORS, 2):
        for x, y in itertools.product(FACTORS[a], FACTORS[b]):
            if allowed({a: x, b: y}):
                assert any(row[a] == x and row[b] == y for row in rows), (a, x, b, y)


@pytest.mark.parametrize("case", NAMED, ids=lambda case: case.name)
def test_named(case: Case) -> None:
    with torch_flash2.force("triton"):
        check(case)


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: case.name)
def test_pairs(case: Case) -> None:
    with torch_flash2.force("triton"):
        check(case)


@st.composite
def random_rows(draw: st.DrawFn) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, values in FACTORS.items():
        row[name] = draw(st.sampled_from([x for x in values if allowed({**row, name: x})]))
    if row["layout"] != "packed_qkv":
        row["sizes"] = draw(st.tuples(st.integers(1, 50), st.integers(1, 50)))
        row["dims"] = draw(st.tuples(st.integers(1, 72), st.integers(1, 72)))
    return row


@settings(phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(row=random_rows(), seed=st.integers(0, 2**16))
def test_random(row: dict[str, Any], seed: int) -> None:
    with torch_flash2.force("triton"):
        check(case_of(row, str(row)), seed=seed)


def test_wide_fp32_loads_again() -> None:
    # Where shared memory is short, loops load at each product.
    with torch_flash2.force("triton"):
        check(Case("wide", 1, 2, 1, 20, 35, 300, 260, "fp32", "causal", dropout_p=0.2))


def test_rounding_of_out() -> None:
    # One row of few keys, where plain PyTorch is nearly exact: the key's gradient has the rounding of out in delta.
    case = Case("delta", 2, 2, 2, 1, 11, 11, 5, "fp16", bias="N", dropout_p=0.3, scale=-0.3)
    with torch_flash2.force("triton"):
        check(case, seed=39)


# Tiles that are not square, which the interpreter's own configuration never has.


@pytest.mark.parametrize("block_m, block_n", [(16, 64), (64, 16), (128, 32)])
def test_tiles(block_m: int, block_n: int) -> None:
    tile = dict(BLOCK_M=block_m, BLOCK_N=block_n)
    common = dict(mask="window(20, 7)", bias="HMN", dropout_p=0.2, softcap=4.0)
    packed = dict(lengths="packed", documents=(0.3, 1.0), tail=5)
    with torch_flash2.force("triton", {**tile, "kv": tile, "q": tile, "bias": tile}):
        check(Case("tiles", 1, 2, 1, 150, 150, 16, 16, "fp32", **common))
        check(Case("tiles", 2, 1, 1, 100, 100, 16, 16, "fp32", **common, **packed))


def test_dropout_is_scores_keep() -> None:
    # With the identity as values, out[m, n] is the probability of key n, 0 where it was dropped.
    B, H, M, N = 2, 3, 37, 50
    query, key = torch.randn(B, H, M, 16), torch.randn(B, H, N, 16)
    seed = testing.dropout_seed(7, torch.device("cpu"))
    torch.manual_seed(7)
    with torch_flash2.force("triton"):
        out = torch_flash2.attention(query, key, torch.eye(N).expand(B, H, N, N), "causal", dropout_p=0.4)
    places = (torch.arange(n) for n in (B, H, M, N))
    b, h, m, n = torch.meshgrid(*places, indexing="ij")
    kept = scores.keep(seed, b, h, m, n, 0.4) & (n <= m)
    assert torch.equal(out != 0, kept)


def test_same_bits_again() -> None:
    case = Case("again", 1, 2, 1, 40, 70, 16, 16, "fp16", "causal", bias="N", dropout_p=0.2)
    first, second = (run_all(case.inputs()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# What a row does not see does not reach it, not even NaN.

LEAKS = (
    dict(mask="causal"),
    dict(mask="window(5, 9)", dropout_p=0.2),
    dict(mask="chunk(16)", sinks=True),
    dict(mask="prefix(20)", bias="N"),
    dict(mask="causal @ bottom-right", seqlen_q=40),
    dict(dense="MN", softcap=3.0),
    dict(mask="causal", lengths="packed", documents=(0.5, 0.4)),
)


def run_all(inputs: oracle.Inputs, config: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """Out, lse and every gradient on the Triton kernels; the gradient that arrives at out is 1."""
    leaves: dict[str, Any] = {name: leaf.detach().requires_grad_() for name, leaf in inputs.leaves.items()}
    torch.manual_seed(0)
    with torch_flash2.force("triton", config), testing.poisoned():
        out, lse = testing.run_attention(inputs._replace(**leaves))
        gradients = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, gradients, strict=True))}


def sees(inputs: oracle.Inputs) -> torch.Tensor:
    """Which stored rows see which stored keys, [M, N], for masks that do not vary over B and H."""
    M, N = inputs.query.shape[2], inputs.key.shape[2]
    visible = torch.zeros(M, N, dtype=torch.bool)
    cu_q, cu_k = torch.tensor([0, M]), torch.tensor([0, N])
    if inputs.lengths is not None:
        cu_q, cu_k = inputs.lengths.cu_q, inputs.lengths.cu_k
    for m0, m1, n0, n1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        m, n = torch.arange(m1 - m0)[:, None], torch.arange(n1 - n0)[None, :]
        visible[m0:m1, n0:n1] = masks.parse(inputs.bands).visible(m, n, int(m1 - m0), int(n1 - n0))
    return visible if inputs.dense is None else visible & inputs.dense[0, 0].cpu()


@pytest.mark.parametrize("options", LEAKS, ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["key", "value"])
def test_no_leak(options: dict[str, Any], poison: float, where: str) -> None:
    check_leak(options, poison, where)


def check_leak(
    options: dict[str, Any], poison: float, where: str, config: dict[str, Any] | None = None, device: str = "cpu"
) -> None:
    """What a run gives where some keys or values are not finite, against a run where all are."""
    sizes = dict(heads=2, heads_kv=1, seqlen_q=70, seqlen_k=70, head_dim=16, head_dim_v=16)
    case = Case("leak", **{"dtype": "fp32", **sizes, **options, "batch": len(options.get("documents", "1"))})
    clean = case.inputs(device)
    bad = torch.tensor([3, 41, 42])
    column = 5
    tensor = getattr(clean, where).clone()
    tensor[:, :, bad, column] = poison
    dirty = clean._replace(**{where: tensor})
    found, wanted = run_all(dirty, config), run_all(clean, config)

    visible = sees(clean).to(device)
    rows = ~visible[:, bad].any(dim=1)
    keys = ~visible[~rows].any(dim=0)
    close = dict(rtol=1e-4, atol=1e-5) if case.dtype == "fp32" else dict(rtol=2e-2, atol=2e-2)
    for name, good in (
        ("out", rows),
        ("lse", rows),
        ("query", rows),
        ("key", keys),
        ("value", keys),
    ):
        torch.testing.assert_close(found[name][:, :, good], wanted[name][:, :, good], **close)
    if poison == poison:
        return
    # A NaN that a row does see shows: in the whole row from a key, in its own column from a value.
    out = found["out"][:, :, ~rows]
    assert out[..., column].isnan().all() and found["query"][:, :, ~rows].isnan().all()
    if where == "key":
        assert out.isnan().all() and found["lse"][:, :, ~rows].isnan().all()
    else:
        torch.testing.assert_close(out[..., :column], wanted["out"][:, :, ~rows, :column], **close)
