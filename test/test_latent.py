"""Decoding with latent keys on Hopper: what ptxas made of the kernel, with no GPU here, and its results on one.

B segments, H query heads, G key heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import machine_code
import pytest
import torch
from test_decode import paged
from test_hopper import count, hopper, main_loops

import torch_flash2
from torch_flash2 import Lengths, Pages, attention, dispatch, hardware, oracle, problem, testing
from torch_flash2.problem import Problem
from torch_flash2.testing import Case

POSED = Problem(
    "forward", hardware.simulated("sm90"), torch.bfloat16, 64, 128, 1, 1, 8192, 576, 512,
    lengths=("used_k",), page_size=64, value_in_key=True,
)  # fmt: skip


def compiled(batch: int = 4, rows: int = 1, heads: int = 128, keys: int = 4096, **how: Any) -> Any:
    """The latent kernel of a call; `how`: dim, page, mask, dtype, splits, sinks."""
    from torch_flash2.kernels.triton import offline

    how = {"dim": 576, "page": 64, "mask": "full", "dtype": torch.bfloat16, "splits": None, "sinks": False, **how}
    options: dict[str, Any] = dict(dtype=how["dtype"], device="meta")
    query = torch.empty(batch, rows, heads, how["dim"], **options).transpose(1, 2)
    key, pages = torch.empty(batch, keys, 1, how["dim"], **options).transpose(1, 2), None
    if how["page"]:
        count = keys // how["page"]
        key = torch.empty(batch * count, how["page"], 1, how["dim"], **options)
        pages = Pages(torch.empty(batch, count, dtype=torch.int32, device="meta"), how["page"])
    absent = dict.fromkeys(("bias", "softcap", "alibi_slopes", "scale"))
    used = torch.empty(batch, dtype=torch.int32, device="meta")
    call = importlib.import_module("torch_flash2.attention")._call(
        query, key, key[..., :512], how["mask"], **absent, dropout_p=0.0, lengths=Lengths(used_k=used), pages=pages,
        sinks=torch.empty(heads, device="meta") if how["sinks"] else None, num_splits=how["splits"],
    )  # fmt: skip
    posed = dataclasses.replace(problem.of(call), hardware=hardware.simulated("sm90"), value_in_key=True)
    plan = dispatch.select(posed)
    assert plan.kernel == "latent"
    kernel, *others = offline.compile_call(plan.module, posed, plan.config, call)
    assert {other.name for other in others} <= {"decode_combine"}
    assert kernel.metadata.shared <= posed.hardware.shared_memory
    machine_code.check(kernel)
    return kernel


@pytest.mark.compile
@pytest.mark.parametrize(
    "how",
    [
        {},
        dict(page=None, mask="window(100, 0) @ bottom-right", splits=3),
        dict(page=16, mask="causal @ bottom-right", rows=4, sinks=True),
        dict(page=96, dim=512, dtype=torch.float16),
    ],
    ids=["plain", "dense", "small-pages", "no-rest"],
)
def test_main_loops(how: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    kernel = compiled(**how)
    # Depth of Q K^T in steps of 16, and of P V for both tiles of columns that a warpgroup has.
    product, weighing = how.get("dim", 576) // 16, 2 * 64 // 16
    # A thread has 64 * 64 / 128 scores, of two rows. A branch back from later on, to wait again, makes longer "loops".
    scoring = min(main_loops(kernel, product + weighing, 64 * 64 // 128 + 2), key=len)
    assert count(scoring, "STL") == 0, "registers spill in the main loop"
    assert count(scoring, "LDL") <= MOST_READ, "the main loop reads more than descriptors from the stack"
    first_wait = next(i for i, x in enumerate(scoring) if "WARPGROUP.DEPBAR" in x)
    issued = count(scoring[:first_wait], "HGMMA")
    assert issued == product + weighing, "P V and Q K^T are no longer in flight together"
    other = min(main_loops(kernel, weighing, 0), key=len)
    assert count(other, "STL") == 0 and count(other, "LDL") == 0, "registers spill in the other warpgroup's loop"


# Addresses of shared memory, which the loop's products take from the stack.
MOST_READ = 32


@pytest.mark.compile
def test_sizes_compile_nothing_anew() -> None:
    pytest.importorskip("triton")
    sizes = (dict(batch=1, heads=16), dict(batch=5, heads=128, keys=192), dict(batch=3, heads=20, keys=1024))
    assert len({compiled(**size, mask="window(9, 0) @ bottom-right").hash for size in sizes}) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(hardware=hardware.simulated("sm100")), "it is for Hopper GPUs (compute capability 9.0)"),
        (dict(value_in_key=False), "it is for values that are the first columns of the key, the same memory"),
        (dict(dtype=torch.float32), "it has float16 and bfloat16, got torch.float32"),
        (dict(layout="unit"), "TMA needs unit stride on D and multiples of 16 bytes everywhere else"),
        (dict(head_dim=640), "it has values of 512 columns in keys of up to 576, got 512 in 640"),
        (dict(head_dim_v=256), "it has values of 512 columns in keys of up to 576, got 256 in 576"),
        (dict(page_size=24), "it has pages of multiples of 16 keys, got 24"),
        (
            dict(steps=("softcap",)),
            "softcap, ALiBi, biases, dense masks and scales that are not positive stay on the portable kernel",
        ),
        (dict(lengths=("cu_q",)), "it has no packed documents"),
        (dict(dropout=True), "it has no dropout"),
    ],
)
def test_refused(changes: dict[str, Any], reason: str) -> None:
    pytest.importorskip("triton")
    assert dispatch.why_not("latent", POSED) == ()
    assert dispatch.why_not("latent", dataclasses.replace(POSED, **changes)) == (reason,)


def test_segments_alone_fill_the_gpu_or_are_split() -> None:
    """128 heads are two tiles of rows, 64 segments then keep 128 multiprocessors busy; 16 heads would keep 64."""
    pytest.importorskip("triton")
    from torch_flash2.kernels.triton import splitting

    def splits(heads: int) -> int:
        chosen = splitting.choose(
            dataclasses.replace(POSED, heads=heads), splitting.Work(64, 64, 64 * 576 * 2, 1), 8192
        )
        return (chosen.count - 3) // 2

    assert splits(128) == 1 and splits(16) > 1


# On a GPU.

# Each with the page sizes that it runs with, None for keys that are not paged.
CASES = (
    (Case("deepseek", 4, 128, 1, 1, 3000, 576, 512, "bf16", "causal @ bottom-right", layout="bshd", lengths="padded_k",
          documents=(1.0,) * 4, documents_k=(1.0, 0.0, 0.001, 0.683)), (None, 64, 16)),
    (Case("speculative", 3, 128, 1, 3, 1000, 576, 512, "bf16", "causal @ bottom-right", sinks=True, lengths="padded",
          documents=(1.0, 0.4, 1.0), documents_k=(1.0, 0.3, 0.0)), (64, 160)),
    (Case("shared-by-tensors", 2, 16, 1, 1, 5000, 576, 512, "bf16", layout="bshd"), (None, 64)),
    (Case("two-heads", 2, 40, 2, 4, 700, 544, 512, "fp16", "window(300, 0) @ bottom-right"), (None, 16)),
    (Case("chunks", 2, 24, 1, 5, 900, 512, 512, "bf16", "causal & chunk(128) @ bottom-right"), (160,)),
    (Case("prefill", 2, 8, 1, 300, 400, 576, 512, "fp16", "causal @ bottom-right"), (None, 64)),
)  # fmt: skip
PAIRS = [(case, page) for case, pages in CASES for page in pages]


def run(
    inputs: oracle.Inputs, page: int | None, splits: int | None, kernel: str = "latent"
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse; the value is the key's first columns. Rows of pages that nobody uses are NaN."""
    query, key, _, mask = inputs.arguments
    options = {**inputs.keywords, "num_splits": splits, "return_lse": True}
    if page is not None:
        key, _, options["pages"] = paged(inputs, page)
        if options["lengths"] is None:
            B, N = query.shape[0], inputs.key.shape[2]
            options["lengths"] = Lengths(used_k=torch.full((B,), N, dtype=torch.int32, device=query.device))
    with testing.poisoned(), torch_flash2.force(kernel):
        found: tuple[torch.Tensor, torch.Tensor] = attention(query, key, key[..., :512], mask, **options)
    return found


def latent(case: Case) -> oracle.Inputs:
    inputs = case.inputs("cuda")
    return inputs._replace(value=inputs.key[..., :512])


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(("case", "page"), PAIRS, ids=[f"{case.name}-{page}" for case, page in PAIRS])
def test_against_math(case: Case, page: int | None) -> None:
    inputs = latent(case)
    shape = (case.batch, case.heads, case.seqlen_q)
    nothing = inputs.query.new_zeros(*shape, 512), inputs.query.new_zeros(shape, dtype=torch.float32)
    exact, plain, single = (
        oracle.math_attention(inputs, None, *nothing, dtype)
        for dtype in (torch.float64, inputs.query.dtype, torch.float32)
    )
    for splits in (None, 1, 3):
        out, lse = run(inputs, page, splits)
        testing._compare(f"{case.name}, out, {splits} splits", out, exact.out, plain.out, 0.0)
        testing._compare(f"{case.name}, lse, {splits} splits", lse, exact.lse, single.lse, 0.0)


@pytest.mark.gpu
@hopper
def test_it_is_chosen() -> None:
    inputs = latent(CASES[0][0])
    plan = torch_flash2.explain(*inputs.arguments, **inputs.keywords, needs_grad=False)
    assert "runs on latent" in str(plan)
    capped = torch_flash2.explain(*inputs.arguments, **{**inputs.keywords, "softcap": 3.0}, needs_grad=False)
    assert "runs on decode" in str(capped) and "stay on the portable kernel" in str(capped)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [3, 300, 570])
def test_nothing_leaks_from_behind_a_mask(poison: float, column: int) -> None:
    """NaN and infinite keys reach the rows that see them and no others."""
    inputs = latent(Case("leak", 2, 32, 1, 4, 600, 576, 512, "bf16", "window(200, 0) @ bottom-right"))
    clean, clean_lse = run(inputs, None, 2)
    # Row m sees keys 396 + m .. 596 + m.
    for key, seen_by in ((397, (0, 1)), (598, (2, 3)), (300, ())):
        touched = inputs.key.clone()
        touched[:, :, key, column] = poison
        for page in (None, 64):
            out, lse = run(inputs._replace(key=touched), page, 2)
            for m in range(4):
                if m in seen_by:
                    assert poison == torch.inf or out[:, :, m].isnan().all()
                else:
                    torch.testing.assert_close(out[:, :, m], clean[:, :, m], rtol=1e-2, atol=1e-3)
                    torch.testing.assert_close(lse[:, :, m], clean_lse[:, :, m])


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("page", [None, 64])
def test_bits_do_not_depend_on_the_batch(splits: int, page: int | None) -> None:
    case = Case("bits", 4, 128, 1, 2, 5000, 576, 512, "bf16", "causal @ bottom-right", lengths="padded_k",
                documents=(1.0,) * 4, documents_k=(1.0, 0.3, 0.61, 0.01))  # fmt: skip
    together = latent(case)
    assert together.lengths is not None and together.lengths.used_k is not None
    out, lse = run(together, page, splits)
    again = run(together, page, splits)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    for b, length in enumerate(together.lengths.used_k.tolist()):
        alone = together._replace(
            query=together.query[b : b + 1].clone(),
            key=together.key[b : b + 1, :, :length].clone(),
            lengths=Lengths(used_k=together.lengths.used_k[b : b + 1].clone()),
        )
        own_out, own_lse = run(alone._replace(value=alone.key[..., :512]), page, splits)
        assert torch.equal(own_out[0], out[b]) and torch.equal(own_lse[0], lse[b])


@pytest.mark.gpu
@hopper
def test_cuda_graph() -> None:
    """Captured once, replayed with other lengths and pages; nothing waits for the device."""
    generator = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = dict(generator=generator, device="cuda", dtype=torch.bfloat16)
    query, key = torch.randn(3, 128, 1, 576, **options), torch.randn(40, 64, 1, 576, **options)

    def shuffled() -> torch.Tensor:
        return torch.randperm(40, generator=generator, device="cuda").int()[:39].reshape(3, 13)

    table = shuffled()
    used = torch.tensor([800, 333, 1], dtype=torch.int32, device="cuda")

    def step(kernel: str) -> torch.Tensor:
        lengths, pages = Lengths(used_k=used), Pages(table, 64)
        with torch_flash2.force(kernel):
            found: torch.Tensor = attention(
                query, key, key[..., :512], "causal @ bottom-right", lengths=lengths, pages=pages
            )
        return found

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step("latent")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step("latent")
    for numbers in ([800, 333, 1], [0, 17, 640], [16, 832, 799]):
        used.copy_(torch.tensor(numbers, dtype=torch.int32))
        table.copy_(shuffled())
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(captured, step("reference"), rtol=2e-2, atol=1e-2)
