"""The Hopper forward: what ptxas made of it, with no GPU here, and its results on one."""

from __future__ import annotations

import heapq
import itertools
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import compile_all
import hypothesis
import hypothesis.strategies as st
import machine_code
import pytest
import torch

import torch_flash2
from torch_flash2 import masks, testing
from torch_flash2.testing import Case

triton = pytest.importorskip("triton")

FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": dict(mask="causal"),
    "window": dict(mask="window(1000, 10) @ bottom-right", sinks=True),
    "scores": dict(mask="causal", softcap=30.0, alibi=1),
    "alibi": dict(mask="causal", alibi=1),
    "softcap": dict(softcap=30.0),
    "packed": dict(mask="causal @ bottom-right", lengths="packed_used", documents=(1.0, 0.5), layout="bshd"),
    "dropout": dict(mask="causal", dropout_p=0.1),
}
WIDTHS = ((64, 64), (128, 128), (192, 128), (256, 256))
# ptxas parks some words that it uses once in a loop (up to 9 were seen); accumulators that spill make dozens.
FEW = 12


def compiled(width: tuple[int, int], feature: str, seqlen: int, many: int, splits: int, heads: int) -> Any:
    """The kernel of a call with so many key heads, its keys in so many splits, so many heads to a tile."""
    from torch_flash2.kernels.hopper import forward

    changes = dict(FEATURES[feature])
    segments = len(changes.get("documents", (1,)))
    case = Case("x", segments, 2 * many, many, seqlen, seqlen, *width, "bf16", **changes)
    ways = {"key_splits": lambda *_: splits, "packed": lambda *_: heads}
    with mock.patch.multiple(forward, **ways):
        posed, kernels = compile_all.compile_case(case, "forward", "sm90", "hopper")
    (kernel,) = (kernel for kernel in kernels if kernel.name == "attention_forward")
    assert posed.hardware.shared_memory >= kernel.metadata.shared
    machine_code.check(kernel)
    return kernel


def instructions(kernel: Any) -> tuple[list[str], dict[str, int]]:
    """The SASS of a compiled kernel, and the index of the instruction at each label."""
    found, labels = machine_code.instructions(machine_code.listing(kernel))
    return [text for _, text, _ in found], labels


def main_loops(kernel: Any, products: int, exponentials: int) -> list[list[str]]:
    """The innermost loops with so many tensor core instructions and exponentials: one for each warpgroup."""
    found, labels = instructions(kernel)
    return innermost(found, labels, products, exponentials, lambda start, end: found[start : end + 1])


def usual_turns(kernel: Any, products: int, exponentials: int) -> list[list[str]]:
    """What the innermost loops run on a tile that is neither the first of its task nor masked, and moves no base, where
    that has so many tensor core instructions and exponentials."""
    found, labels = instructions(kernel)
    return innermost(found, labels, products, exponentials, lambda start, end: usual_turn(found, labels, start, end))


def innermost(
    found: list[str], labels: dict[str, int], products: int, exponentials: int, body: Callable[[int, int], list[str]]
) -> list[list[str]]:
    """The bodies with so many tensor core instructions and exponentials, of loops that contain no other such."""
    bodies = {}
    for end, instruction in enumerate(found):
        start = labels.get(target(instruction), end + 1)
        if start <= end:
            bodies[start, end] = body(start, end)
    # Waits that must be repeated branch back from the end of the program, over loops that are not theirs.
    chosen: list[tuple[int, int]] = []
    for start, end in sorted(bodies, key=lambda span: span[1] - span[0]):
        loop = bodies[start, end]
        fits = count(loop, "HGMMA") == products and count(loop, "MUFU.EX2") == exponentials
        if fits and all(end < s or e < start for s, e in chosen):
            chosen.append((start, end))
    return [bodies[span] for span in chosen]


def usual_turn(found: list[str], labels: dict[str, int], start: int, end: int) -> list[str]:
    """A loop without the long blocks that its branches jump over."""
    turn, at = [], start
    while at <= end:
        turn.append(found[at])
        past = labels.get(target(found[at]), 0)
        at = past if found[at].startswith("@") and at + 40 < past <= end else at + 1
    return turn


def target(instruction: str) -> str:
    """The label that an instruction jumps to."""
    branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction)
    return branch[1] if branch else ""


def count(loop: list[str], name: str) -> int:
    return sum(name in instruction for instruction in loop)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("width", "feature", "seqlen"),
    [
        *((width, "causal", 4096) for width in WIDTHS),
        ((64, 64), "full", 4096),
        ((64, 64), "full", 65536),
        ((256, 256), "full", 4096),
        ((64, 64), "causal", 512),
        ((128, 128), "full", 512),
        ((128, 128), "window", 4096),
        ((64, 64), "scores", 4096),
        ((128, 128), "scores", 4096),
        ((128, 128), "alibi", 8192),
        ((128, 128), "softcap", 8192),
        ((128, 128), "packed", 4096),
        ((64, 64), "dropout", 4096),
        ((128, 128), "dropout", 4096),
    ],
)  # fmt: skip
def test_main_loop(width: tuple[int, int], feature: str, seqlen: int) -> None:
    hold_main_loop(width, feature, seqlen)


def hold_main_loop(width: tuple[int, int], feature: str, seqlen: int, splits: int = 1, heads: int = 1) -> None:
    # So few tiles, or so many, as have splits.
    many = 2 if splits > 1 else 64
    kernel = compiled(width, feature, seqlen, many, splits, heads)
    config = kernel_config(width, feature, seqlen, many)
    # Depth of Q K^T in steps of 16, and of P V for each tile of columns.
    columns = -(-width[0] // config.WIDTH_D) * config.WIDTH_D
    products = columns // 16 + -(-width[1] // config.WIDTH_V) * config.BLOCK_N // 16
    # A thread has 64 * BLOCK_N / 128 scores, of two rows.
    loops = usual_turns(kernel, products, config.BLOCK_N // 2 + 2)
    assert len(loops) == config.GROUPS, f"each warpgroup has one loop of {products} tensor core instructions"
    for loop in loops:
        assert count(loop, "STL") <= FEW and count(loop, "LDL") <= FEW, "registers spill in the main loop"
        last_exponential = max(i for i, x in enumerate(loop) if "MUFU.EX2" in x)
        waits = [i for i, x in enumerate(loop) if "WARPGROUP.DEPBAR" in x]
        assert len(waits) == 2, "ptxas makes products wait for one another (its messages C7510 to C7515 say why)"
        assert waits[-1] > last_exponential, (
            "ptxas moved the wait for P V above the softmax: the barrier wait before it no longer ends the basic block"
        )


def forward_config(case: Case) -> Any:
    from torch_flash2.kernels.hopper import forward

    return forward.config(compile_all.posed(case, "forward", "sm90")[0])


def kernel_config(width: tuple[int, int], feature: str, seqlen: int, many: int) -> Any:
    changes = {
        name: FEATURES[feature][name] for name in ("mask", "softcap", "alibi", "dropout_p") if name in FEATURES[feature]
    }
    case = Case("x", 1, 2 * many, many, seqlen, seqlen, *width, "bf16", **changes)
    return forward_config(case)


@pytest.mark.compile
def test_numbers_compile_nothing_anew() -> None:
    """Lengths, batch, heads, the size of groups, the window: none decides what is compiled."""
    found = set()
    for B, H, G, M, N, left in ((1, 2, 1, 256, 1000, 16), (2, 6, 2, 255, 513, 1), (3, 8, 1, 65, 600, 0)):
        case = Case("x", B, H, G, M, N, 64, 64, "fp16", f"window({left}, 0)")
        _, kernels = compile_all.compile_case(case, "forward", "sm90", "hopper")
        found.add(tuple(kernel.hash for kernel in kernels))
    assert len(found) == 1


@pytest.mark.compile
def test_compiling_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Once with its seconds for a new class of calls; nothing for what Triton has on disk."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    case = Case("x", 1, 2, 1, 100, 100, 64, 64, "fp16", softcap=3.0)
    with caplog.at_level("INFO", "torch_flash2"):
        compile_all.compile_case(case, "forward", "sm90", "hopper")
    assert re.search(r"compiled attention_forward for the first call of its class in \d+\.\d s", caplog.text)
    caplog.clear()
    with caplog.at_level("INFO", "torch_flash2"):
        compile_all.compile_case(case, "forward", "sm90", "hopper")
    assert not caplog.records


def test_configs_are_candidates() -> None:
    """`python -m benchmarks tune` measures every row of the table."""
    from torch_flash2.kernels.hopper import calls, forward

    for row in calls.table("configs.json"):
        N, mask = max(row["seqlen_k"], 128), "causal" if row["masked"] else "full"
        changes = {None: {}, "alibi": dict(alibi=1), "dropout": dict(dropout_p=0.1)}[row["step"]]
        case = Case("x", 1, 4, 2, N, N, row["head_dim"], row["head_dim_v"], "bf16", mask=mask, **changes)
        posed, _ = compile_all.posed(case, "forward", "sm90")
        found = list(forward.candidates(posed))
        assert forward.Config(**row["config"]) in found
        assert all(forward.shared_bytes(posed, config) <= posed.hardware.shared_memory for config in found)


@hypothesis.given(
    head_dim=st.sampled_from((64, 128, 256)), seqlen=st.integers(300, 9000), heads_kv=st.integers(1, 40),
    group=st.sampled_from((1, 4)), batch=st.integers(1, 40), keys=st.booleans(),
    mask=st.sampled_from(("causal", "causal & window(3000, 0)", "full")),
)  # fmt: skip
def test_multiprocessors_share_the_work_evenly(
    head_dim: int, seqlen: int, heads_kv: int, group: int, batch: int, mask: str, keys: bool
) -> None:
    """Each tile of query rows, or of keys, comes once, and none is left with much to do when the others are done."""
    from torch_flash2.kernels.hopper import calls, forward, pipeline

    shape = (batch, heads_kv * group, heads_kv, seqlen, seqlen, head_dim, head_dim)
    case = Case("x", *shape, "bf16", mask=mask, layout="bshd")
    posed, call = compile_all.posed(case, "backward" if keys else "forward", "sm90")
    size, other = (128, 64) if keys else (64 * forward.config(posed).GROUPS, forward.config(posed).BLOCK_N)
    per_head, count = triton.cdiv(seqlen, size), posed.hardware.multiprocessors
    heads = batch * heads_kv * (1 if keys else group)
    total = per_head * heads
    hypothesis.assume(4 * count <= total <= 10000)
    # What the kernel's function does with numbers.
    arithmetic = types.SimpleNamespace(where=lambda which, one, other: one if which else other, minimum=min)
    placed = types.FunctionType(pipeline.placed.fn.__code__, {"gl": arithmetic})
    order = calls.key_order(posed, call, size) if keys else calls.order(posed, call, size)
    places = [placed(index, per_head, heads, order) for index in range(total)]
    assert len(set(places)) == total
    assert {*places} == set(itertools.product(range(heads), range(per_head)))
    turns = torch.tensor([turn for _, turn in places])
    if keys:
        lo, hi = masks.parse(mask).queries(turns * size, seqlen, seqlen)
    else:
        lo, hi = masks.parse(mask).keys(((per_head - turns) * size).clamp(max=seqlen) - 1, seqlen, seqlen)
    visits = (hi - lo + other - 1) // other * (group if keys else 1)
    # What comes before and after a task takes as long as about two tiles of keys, four of rows.
    costs = (visits + (4 if keys else 2)).tolist()
    # Longest first is about the best that there is, but for L2.
    assert duration(costs, count) <= 1.1 * duration(sorted(costs, reverse=True), count)


def duration(costs: list[int], workers: int) -> int:
    """How long workers take that each claim the next cost when they are done."""
    ends = [0] * workers
    for cost in costs:
        heapq.heapreplace(ends, ends[0] + cost)
    return max(ends)


hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


CASES = [
    Case("d64", 4, 8, 4, 300, 333, 64, 64, "bf16", "causal"),
    Case("d64-long", 2, 8, 8, 1000, 2500, 64, 64, "fp16"),
    Case("d128", 2, 8, 2, 1024, 1024, 128, 128, "bf16", "causal"),
    Case("d128-unequal", 2, 6, 6, 1000, 777, 128, 128, "fp16"),
    Case("d256", 4, 8, 8, 300, 333, 256, 256, "bf16", "causal"),
    Case("d256-unequal", 3, 8, 2, 300, 777, 256, 256, "fp16", "causal @ bottom-right", sinks=True),
    Case("d256-chunk", 2, 8, 1, 513, 513, 256, 256, "bf16", "causal & chunk(100)", softcap=20.0, alibi=2),
    Case("d256-used", 3, 8, 2, 300, 400, 256, 256, "bf16", "causal @ bottom-right", lengths="padded",
         documents=(1.0, 0.0, 0.1)),
    Case("d256-packed", 4, 4, 2, 500, 500, 256, 256, "bf16", "causal @ bottom-right", lengths="packed_used", alibi=1,
         documents=(1.0, 0.4, 0.0, 0.6)),
    Case("deepseek", 4, 8, 8, 300, 500, 192, 128, "bf16", "causal @ bottom-right"),
    Case("deepseek-packed", 5, 4, 2, 600, 600, 192, 128, "fp16", "causal", lengths="packed",
         documents=(0.2, 0.0, 0.5, 0.05, 1.0)),
    Case("odd-dims", 4, 8, 4, 500, 300, 72, 40, "fp16", "window(100, 20) @ bottom-right"),
    Case("scores", 2, 8, 1, 513, 513, 64, 64, "bf16", "causal & chunk(100)", softcap=20.0, sinks=True, alibi=2),
    Case("alibi", 4, 8, 2, 500, 700, 128, 128, "bf16", "causal @ bottom-right", sinks=True, alibi=1),
    Case("alibi-softcap", 4, 8, 2, 500, 700, 128, 128, "bf16", "causal", softcap=20.0, alibi=1),
    Case("softcap", 4, 8, 2, 500, 700, 128, 128, "fp16", "causal @ bottom-right", softcap=10.0),
    Case("softcap-full", 8, 8, 4, 300, 500, 128, 128, "bf16", softcap=30.0, sinks=True),
    Case("alibi-window", 4, 4, 4, 700, 700, 64, 64, "fp16", "window(200, 100)", alibi=2),
    Case("one-tile", 8, 32, 8, 300, 100, 128, 128, "fp16"),
    Case("d72", 3, 3, 3, 1000, 777, 72, 72, "fp16"),
    Case("sharp", 2, 4, 4, 1100, 1100, 64, 64, "bf16", "window(150, 0)", magnitude=8.0),
    Case("sharp-fp16", 2, 4, 4, 1100, 1100, 64, 64, "fp16", magnitude=8.0),
    Case("used", 3, 8, 2, 300, 400, 128, 128, "bf16", "causal @ bottom-right", lengths="padded",
         documents=(1.0, 0.0, 0.1)),
    Case("packed", 5, 4, 2, 600, 600, 128, 128, "bf16", "causal", lengths="packed",
         documents=(0.2, 0.0, 0.5, 0.05, 1.0), tail=40),
    Case("packed-window", 4, 4, 2, 500, 500, 256, 256, "fp16", "window(50, 0)", lengths="packed", softcap=30.0,
         documents=(1.0, 0.4, 0.0, 0.6)),
    Case("dropout", 4, 8, 4, 300, 333, 64, 64, "bf16", "causal", dropout_p=0.2),
    Case("dropout-long", 2, 8, 8, 1000, 1500, 128, 128, "fp16", dropout_p=0.5),
    Case("dropout-window", 4, 8, 8, 300, 500, 256, 256, "bf16", "window(100, 20) @ bottom-right", sinks=True,
         dropout_p=0.1),
    Case("dropout-scores", 2, 8, 1, 513, 513, 64, 64, "bf16", "causal & chunk(100)", softcap=20.0, sinks=True, alibi=2,
         dropout_p=0.3),
    Case("dropout-alibi", 4, 8, 2, 500, 700, 128, 128, "bf16", "causal @ bottom-right", alibi=1, dropout_p=0.2),
    Case("dropout-odd-dims", 4, 8, 4, 500, 300, 72, 40, "fp16", "prefix(170)", dropout_p=0.9),
    Case("dropout-used", 3, 8, 2, 300, 400, 128, 128, "bf16", "causal @ bottom-right", lengths="padded",
         documents=(1.0, 0.0, 0.1), dropout_p=0.2),
    Case("dropout-deepseek-packed", 5, 4, 2, 600, 600, 192, 128, "fp16", "causal", lengths="packed",
         documents=(0.2, 0.0, 0.5, 0.05, 1.0), tail=40, dropout_p=0.2),
]  # fmt: skip


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_math(case: Case) -> None:
    hold_to_math(case)


def hold_to_math(case: Case) -> None:
    """The Hopper kernel is chosen, and right."""
    inputs = case.inputs("cuda")
    plan = torch_flash2.explain(*inputs.arguments, **inputs.keywords)
    assert "runs on hopper" in str(plan)
    testing.check(case, device="cuda")


# Compiled once each, whatever the numbers that are drawn for them.
DROPOUTS: tuple[dict[str, Any], ...] = (
    dict(head_dim=64, head_dim_v=64),
    dict(head_dim=64, head_dim_v=64, mask="causal"),
    dict(head_dim=96, head_dim_v=128, mask="causal @ bottom-right", dtype="fp16", sinks=True, scale=0.01),
    dict(head_dim=128, head_dim_v=128, mask="window(90, 30)", lengths="packed"),
    dict(head_dim=192, head_dim_v=128, mask="causal @ bottom-right", lengths="padded_k"),
    dict(head_dim=256, head_dim_v=256, mask="causal & chunk(100)", softcap=20.0, layout="bshd"),
)


@pytest.mark.gpu
@hopper
@hypothesis.settings(max_examples=30)
@hypothesis.given(
    features=st.sampled_from(DROPOUTS), batch=st.integers(1, 4), heads_kv=st.integers(1, 3),
    group=st.sampled_from((1, 4)), M=st.integers(1, 500), N=st.integers(1, 500),
    shares=st.lists(st.floats(0, 1), min_size=4, max_size=4), seed=st.integers(0, 2**16),
    dropout_p=st.sampled_from((1e-10, 0.1, 0.5, 0.999)),
)  # fmt: skip
def test_dropout_is_scores_keep(
    features: dict[str, Any], batch: int, heads_kv: int, group: int, M: int, N: int, shares: list[float], seed: int,
    dropout_p: float,
) -> None:  # fmt: skip
    """With ones and zeros as values, an output is a weight, 0 where it was dropped."""
    documents = tuple(shares[:batch]) if "lengths" in features else ()
    sizes = dict(batch=batch, heads=heads_kv * group, heads_kv=heads_kv, seqlen_q=M, seqlen_k=N, documents=documents)
    inputs = Case("x", **sizes, **features, magnitude=0.1, dropout_p=dropout_p).inputs("cuda", seed)
    width = inputs.value.shape[3]
    inputs.key.nan_to_num_()
    for first in range(0, inputs.value.shape[2], width):
        shown = torch.arange(inputs.value.shape[2], device="cuda")[:, None] - first == torch.arange(
            width, device="cuda"
        )
        inputs.value.copy_(shown.expand(inputs.value.shape))
        found = []
        for kernel in ("hopper", "reference"):
            torch.manual_seed(seed + first)
            with torch_flash2.force(kernel):
                found.append(torch_flash2.attention(*inputs.arguments, **inputs.keywords).nan_to_num() != 0)
        assert torch.equal(*found)


@pytest.mark.gpu
@hopper
def test_dropout_where_nan_lies_behind_the_mask() -> None:
    """The path that repairs such tiles drops the same weights."""
    q, k, v = (torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    outs = []
    for hidden in (0.0, float("nan")):
        v[:, :, 200:] = hidden
        torch.manual_seed(0)
        with torch_flash2.force("hopper"):
            outs.append(torch_flash2.attention(q, k, v, "causal", dropout_p=0.5)[:, :, :200])
    assert outs[1].isfinite().all()
    torch.testing.assert_close(*outs, atol=2e-2, rtol=2e-2)


# Three warpgroups take a tile's maxima before its weights; the table has them for many long rows alone.
THREE = {"GROUPS": 3, "LATE": False, "APART": True}


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("name", ["d64", "d64-long", "scores", "alibi-window", "sharp", "sharp-fp16"])
def test_three_warpgroups(name: str) -> None:
    (case,) = (case for case in CASES if case.name == name)
    with torch_flash2.force("hopper", THREE):
        testing.check(case, device="cuda")


def test_three_warpgroups_need_many_rows() -> None:
    chosen = [
        forward_config(Case("x", batch, heads, 1, M, N, 64, 64, "bf16")).GROUPS
        for batch, heads, M, N in ((32, 32, 1024, 8192), (4, 32, 4096, 1024), (1, 4, 4096, 4096), (4, 32, 4096, 4096))
    ]
    assert chosen == [2, 2, 2, 3]


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(("mask", "dim"), [("causal", 64), ("causal", 128), ("window(100, 50)", 128)])
def test_nothing_leaks_from_behind_a_mask(mask: str, dim: int) -> None:
    """NaN and infinite keys and values reach the rows that see them and no others."""
    hold_leaks(mask, (2, 4, 500, dim), 600, 200)


def hold_leaks(mask: str, shape: tuple[int, int, int, int], N: int, at: int, group: int = 1) -> None:
    """What is wrong with keys at, at + 1 and at + 2 is so in the rows alone that see them; shape is the query's with a
    head for each of the key's."""
    torch.manual_seed(0)
    B, H, M, dim = shape
    heads = ((H * group, M), (H, N), (H, N))
    q, k, v = (torch.randn(B, h, n, dim, device="cuda", dtype=torch.bfloat16) for h, n in heads)
    with torch_flash2.force("hopper"):
        clean = torch_flash2.attention(q, k, v, mask)
        v[:, :, at] = float("nan")
        v[:, 1, at + 2, 3] = float("inf")
        k[:, :, at + 1] = float("inf")
        out = torch_flash2.attention(q, k, v, mask)
    visible = torch_flash2.masks.parse(mask).visible(
        torch.arange(M, device="cuda")[:, None], torch.arange(N, device="cuda")[None], M, N
    )
    touched = visible[:, at : at + 3].any(-1)
    assert out[:, :, visible[:, at] | visible[:, at + 1]].isnan().all()
    torch.testing.assert_close(out[:, :, ~touched], clean[:, :, ~touched], atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize(
    ("dtype", "dim", "config"),
    [(torch.bfloat16, 64, {}), (torch.float16, 64, THREE), (torch.bfloat16, 128, {}), (torch.float16, 256, {})],
)
def test_rows_whose_scores_grow(dtype: torch.dtype, dim: int, config: dict[str, Any], mask: str) -> None:
    """Along the keys, slowly or by far more than an exponential holds; and scores far below 0."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 8, 1100, dim, device="cuda", dtype=dtype) for _ in range(3))
    q[..., 0] = dim**0.5
    for step in (0.005, 0.05, 0.5, -0.05, -0.1, -0.2, -0.5, -1.0):
        k[..., 0] = step * torch.arange(-1000, 100, device="cuda")
        with torch_flash2.force("hopper", config):
            out, lse = torch_flash2.attention(q, k, v, mask, return_lse=True)
        with torch_flash2.force("reference"):
            expected, expected_lse = torch_flash2.attention(q.double(), k.double(), v.double(), mask, return_lse=True)
        # Weights and results are rounded once each.
        bound = torch.finfo(dtype).eps * v.abs().max()
        assert (out - expected).abs().max() <= bound
        torch.testing.assert_close(lse, expected_lse.float(), rtol=4e-6, atol=1e-5)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(("dim", "config"), [(64, {}), (64, THREE), (128, {})])
def test_single_nan_keys_reach_the_rows_that_see_them(dim: int, config: dict[str, Any]) -> None:
    """One NaN, one infinity of a sign that only some rows make negative."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(8, 8, 300, dim, device="cuda", dtype=torch.float16) for _ in range(3))
    place = torch.arange(8, device="cuda")
    for value in (float("nan"), float("inf")):
        bad = k.clone()
        bad[place[:, None], place[None], 128 + 8 * place[:, None] + place[None], 3] = value
        with torch_flash2.force("hopper", config):
            out = torch_flash2.attention(q, bad, v, softcap=30.0 if dim == 128 else None)
        with torch_flash2.force("reference"):
            expected = torch_flash2.attention(q, bad, v, softcap=30.0 if dim == 128 else None)
        assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("softcap", [None, 1000.0])
def test_weights_of_every_size(softcap: float | None) -> None:
    """A row's lse is its weights' sum to fp32 accuracy, whatever the fraction of their logarithms."""
    dim = 64 if softcap is None else 128
    q, k, v = (torch.zeros(1, 1, n, dim, device="cuda", dtype=torch.float16) for n in (1024, 1100, 1100))
    distance = torch.cat((torch.linspace(0, 3, 800), torch.linspace(3, 150, 224))).half().cuda()
    q[0, 0, :, 0] = distance
    k[0, 0, :-1, 0] = -1.0
    with torch_flash2.force("hopper"):
        _, lse = torch_flash2.attention(q, k, v, scale=1.0, softcap=softcap, return_lse=True)
    far = distance.double()
    if softcap is not None:
        far = softcap * torch.tanh(far / softcap)
    expected = torch.log1p(1099 * torch.exp(-far))
    # The hardware's tanh has 11 bits.
    bound = 5e-6 if softcap is None else far * 2.0**-10 + 5e-6
    assert ((lse[0, 0] - expected).abs() <= bound).all()


@pytest.mark.interpreter
@hypothesis.given(
    dtype=st.sampled_from((torch.float16, torch.float32)), batch=st.integers(1, 2), heads_kv=st.integers(1, 2),
    group=st.integers(1, 2), M=st.integers(1, 600), N=st.integers(1, 600), dims=st.tuples(*[st.integers(1, 72)] * 2),
    bad=st.sampled_from((None, "key", "value")), seed=st.integers(0, 100),
)  # fmt: skip
def test_largest_norms(
    dtype: torch.dtype, batch: int, heads_kv: int, group: int, M: int, N: int, dims: tuple[int, int],
    bad: str | None, seed: int,
) -> None:  # fmt: skip
    from torch_flash2.kernels.bundles import Sizes, Strided, coded
    from torch_flash2.kernels.hopper import reach

    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, length, heads, dim, dtype=dtype, generator=generator).transpose(1, 2)
        for heads, length, dim in ((heads_kv * group, M, dims[0]), (heads_kv, N, dims[0]), (heads_kv, N, dims[1]))
    )
    if bad == "key":
        k[0, 0, N // 2, 0] = torch.nan
    elif bad == "value":
        v[0, 0, N // 2, -1] = torch.inf
    parts, parts_k = triton.cdiv(M, reach.PART), triton.cdiv(N, reach.PART)
    of_queries, of_keys = batch * heads_kv * group * parts, batch * heads_kv * parts_k
    found = torch.full((of_queries + of_keys,), torch.nan)
    sizes = Sizes.coded(batch, heads_kv * group, group, M, N)
    columns = map(triton.next_power_of_2, dims)
    reach.note_norms[(of_queries + of_keys,)](
        *map(Strided.of, (q, k, v)), found, sizes, coded(of_queries), reach.PART, *columns
    )
    expected = torch.cat([_norms(x, reach.PART).flatten() for x in (q, k)])
    if bad:
        expected[of_queries + N // 2 // reach.PART] = torch.inf
    torch.testing.assert_close(found, expected)


def _norms(x: torch.Tensor, part: int) -> torch.Tensor:
    """The largest norm of each so many rows [..., parts]."""
    norms = x.float().norm(dim=-1)
    return torch.stack([rows.amax(-1) for rows in norms.split(part, -1)], -1)


HEADS = ((4, 4100), (2, 4500), (2, 4500))
SLOPES = (0.5, 0.25, 0.05, 0.0)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("bad", [None, "key", "value"])
@pytest.mark.parametrize(("mask", "dim"), [("causal @ bottom-right", 64), ("causal", 128), ("causal", 256)])
def test_keys_out_of_reach_change_nothing(
    mask: str, dim: int, bad: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_flash2.kernels.hopper import reach

    torch.manual_seed(0)
    slopes = torch.tensor(SLOPES, device="cuda")
    q, k, v = (torch.randn(2, heads, n, dim, device="cuda", dtype=torch.bfloat16) for heads, n in HEADS)
    if bad is not None:
        {"key": k, "value": v}[bad][1, :, 5, 3] = torch.inf
    found = []
    for pays in (reach.pays, lambda problem, tilted: False):
        monkeypatch.setattr(reach, "pays", pays)
        # What was recorded of the first call is not run again for another configuration.
        with torch_flash2.force("hopper", {"GROUPS": 2} if found else {}):
            found.append(torch_flash2.attention(q, k, v, mask, alibi_slopes=slopes, return_lse=True))
    for few, all_keys in zip(*found, strict=True):
        torch.testing.assert_close(few, all_keys, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@hopper
def test_keys_out_of_reach_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_flash2.kernels.hopper import reach

    def claimed(problem: Any, call: Any) -> torch.Tensor:
        """Norms of 0, whatever the keys are."""
        return torch.zeros(1 << 12, device="cuda")

    monkeypatch.setattr(reach, "norms", claimed)
    q, k, v = (torch.randn(1, 4, 4608, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    k[:, :, 0] = torch.nan
    with torch_flash2.force("hopper"):
        out = torch_flash2.attention(q, k, v, "causal", alibi_slopes=torch.tensor(SLOPES, device="cuda"))
    for h, slope in enumerate(SLOPES):
        # The tile that holds the reach of the first of 128 rows is visited whole.
        far = 1 + 104 / slope + 3 * 128 if slope else 4608
        rows = out[0, h].isnan().all(-1)
        assert rows[:100].all() and not rows[int(min(far, 4608)) :].any()
        assert slope or rows.all()


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(("dim", "mask"), [(64, "full"), (64, "causal"), (128, "causal")])
def test_two_launches_are_bit_equal(dim: int, mask: str) -> None:
    q, k, v = (torch.randn(4, 16, 4096, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with torch_flash2.force("hopper"):
        first = torch_flash2.attention(q, k, v, mask, return_lse=True)
        for _ in range(20):
            again = torch_flash2.attention(q, k, v, mask, return_lse=True)
            assert all(map(torch.equal, first, again))
