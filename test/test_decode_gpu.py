"""Decoding, compiled for GPUs that are not here, and at full size on one that is.

B segments, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from typing import Any
from unittest import mock

import pytest
import torch
from test_decode import bad_calls, check, complaint, run
from torch.utils.flop_counter import FlopCounterMode

import torch_flash2
from torch_flash2 import Lengths, Pages, attention, dispatch, hardware, problem, testing
from torch_flash2.testing import Case

# Compiled for GPUs that are not here.

COMPILED = [
    (arch, ("bf16", "fp16", "fp32")[i % 3], dim, ("plain", "paged", "latent", "scores")[(i + j) % 4])
    for i, arch in enumerate(("sm80", "sm86", "sm90", "sm100", "sm120"))
    for j, dim in enumerate((64, 128, 256, 512))
    if arch == "sm90" or (i + j) % 2 == 0
]


def compile_kernels(
    arch: str, dtype: str, dim: int, mix: str, batch: int = 4, heads: int = 32, keys: int = 4096
) -> Any:
    """The kernels of a decoding call, and the shared memory there is."""
    from torch_flash2.kernels.triton import offline

    options: dict[str, Any] = dict(dtype=testing.DTYPES[dtype], device="meta")
    latent = mix == "latent"
    G, width = (1, dim + 64) if latent else (heads // 4, dim)
    query = torch.empty(batch, 1, heads, width, **options).transpose(1, 2)
    extra: dict[str, Any] = {}
    if mix == "plain":
        key = torch.empty(batch, keys, G, width, **options).transpose(1, 2)
    else:
        key = torch.empty(batch * keys // 16, 16, G, width, **options)
        extra["pages"] = Pages(torch.empty(batch, keys // 16, dtype=torch.int32, device="meta"), 16)
    if mix == "scores":
        bias, slopes = (torch.empty(n, device="meta") for n in ((batch, heads, 1, keys), (heads,)))
        extra |= dict(bias=bias, alibi_slopes=slopes, sinks=slopes, softcap=3.0)
    used = torch.empty(batch, dtype=torch.int32, device="meta")
    absent = dict.fromkeys(("bias", "softcap", "alibi_slopes", "sinks", "scale", "pages"))
    call = importlib.import_module("torch_flash2.attention")._call(
        query, key, key[..., :dim], "window(100, 0) @ bottom-right",
        **{**absent, **extra, "dropout_p": 0.0, "lengths": Lengths(used_k=used), "num_splits": 20},
    )  # fmt: skip
    posed = dataclasses.replace(problem.of(call), hardware=hardware.simulated(arch), value_in_key=latent)
    plan = dispatch.select(posed, "decode")
    return offline.compile_call(plan.module, posed, plan.config, call), posed.hardware.shared_memory


@pytest.mark.compile
@pytest.mark.parametrize("arch, dtype, dim, mix", COMPILED)
def test_compiles(arch: str, dtype: str, dim: int, mix: str) -> None:
    pytest.importorskip("triton")
    kernels, limit = compile_kernels(arch, dtype, dim, mix)
    assert [kernel.name for kernel in kernels] == ["attention_decode", "decode_combine"]
    assert all(kernel.metadata.shared <= limit for kernel in kernels)


@pytest.mark.compile
@pytest.mark.parametrize("mix", ["plain", "paged"])
def test_sizes_compile_nothing_anew(mix: str) -> None:
    pytest.importorskip("triton")
    sizes = (dict(batch=1, heads=4), dict(batch=4, heads=32, keys=160), dict(batch=3, heads=16, keys=1024))
    found = {tuple(kernel.hash for kernel in compile_kernels("sm80", "fp16", 64, mix, **size)[0]) for size in sizes}
    assert len(found) == 1


# On a GPU.

gpu = pytest.mark.gpu
FULL = (
    Case("llama", 8, 32, 8, 1, 16384, 128, 128, "bf16", "causal @ bottom-right", layout="bshd", lengths="padded_k",
         documents=(1.0,) * 8, documents_k=(1.0, 0.3, 0.0, 0.7, 0.11, 0.9, 0.5, 0.001)),
    Case("speculative", 4, 32, 8, 7, 9000, 128, 128, "fp16", "causal @ bottom-right", sinks=True),
    Case("multi-query", 4, 64, 1, 4, 4000, 64, 64, "bf16", "window(1024, 0) @ bottom-right", softcap=30.0),
    Case("one-segment", 1, 32, 8, 1, 131072, 128, 128, "bf16", alibi=1),
    Case("wide", 2, 8, 4, 1, 3000, 256, 256, "fp16", "causal & chunk(2048) @ bottom-right", bias="HMN"),
    Case("widest", 2, 8, 1, 3, 3000, 512, 512, "bf16", "prefix(100) @ bottom-right"),
    Case("fp32", 2, 8, 2, 16, 2000, 80, 40, "fp32", "causal @ bottom-right", dense="MN"),
)  # fmt: skip


@gpu
@pytest.mark.parametrize("case", FULL, ids=lambda case: case.name)
@pytest.mark.parametrize("page", [None, 16, 64, 100])
def test_full_size(case: Case, page: int | None) -> None:
    for splits in (None, 1, 5):
        check(case, "cuda", page=page, splits=splits)


@gpu
@pytest.mark.parametrize("page", [16, 256])
def test_full_prefill(page: int) -> None:
    for dtype in ("bf16", "fp32"):
        case = Case("prefill", 2, 8, 2, 1000, 3000, 128, 128, dtype, "causal @ bottom-right", lengths="padded_k",
                    documents=(1.0, 1.0), documents_k=(1.0, 0.6))  # fmt: skip
        check(case, "cuda", page=page, kernel="triton")


@gpu
@pytest.mark.parametrize("page", [None, 16, 64])
@pytest.mark.parametrize("rows", [1, 4])
def test_deepseek(page: int | None, rows: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    sizes: dict[str, Any] = dict(generator=generator, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(4, 128, rows, 576, **sizes)
    used = torch.tensor([3000, 1, 0, 2049], dtype=torch.int32, device="cuda")
    options: dict[str, Any] = dict(mask="causal @ bottom-right", lengths=Lengths(used_k=used), return_lse=True)
    if page is None:
        key = torch.randn(4, 1, 3008, 576, **sizes)
    else:
        count = -(-3000 // page)
        key = torch.randn(4 * count, page, 1, 576, **sizes)
        table = torch.randperm(4 * count, generator=generator, device="cuda").int().reshape(4, count)
        options["pages"] = Pages(table, page)
    with torch_flash2.force("reference"):
        wanted = attention(query, key, key[..., :512], **options)
    for splits in (None, 1, 3):
        with torch_flash2.force("decode"), testing.poisoned():
            found = attention(query, key, key[..., :512], num_splits=splits, **options)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2)


@gpu
@pytest.mark.parametrize("splits", [1, 6])
def test_bits_on_gpu(splits: int) -> None:
    case = Case("bits", 4, 32, 8, 2, 5000, 128, 128, "bf16", "causal @ bottom-right", lengths="padded_k",
                documents=(1.0,) * 4, documents_k=(1.0, 0.3, 0.61, 0.01))  # fmt: skip
    together = case.inputs("cuda")
    assert together.lengths is not None and together.lengths.used_k is not None
    for page in (None, 16):
        out, lse = run(together, page, splits)
        for b, length in enumerate(together.lengths.used_k.tolist()):
            alone = together._replace(
                query=together.query[b : b + 1].clone(),
                key=together.key[b : b + 1, :, :length].clone(),
                value=together.value[b : b + 1, :, :length].clone(),
                lengths=Lengths(used_k=together.lengths.used_k[b : b + 1].clone()),
            )
            own_out, own_lse = run(alone, page, splits)
            assert torch.equal(own_out[0], out[b]) and torch.equal(own_lse[0], lse[b])


@gpu
@pytest.mark.parametrize("rows", [1, 200])
def test_cuda_graph(rows: int) -> None:
    """Captured once, replayed with other lengths and pages; nothing waits for the device."""
    generator = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = dict(generator=generator, device="cuda", dtype=torch.float16)
    query = torch.randn(3, 8, rows, 64, **options)
    key, value = (torch.randn(200, 16, 2, 64, **options) for _ in range(2))
    table = torch.randperm(200, generator=generator, device="cuda").int()[:150].reshape(3, 50)
    used = torch.tensor([800, 333, 1], dtype=torch.int32, device="cuda")

    def step() -> torch.Tensor:
        lengths, pages = Lengths(used_k=used), Pages(table, 16)
        found: torch.Tensor = attention(query, key, value, "causal @ bottom-right", lengths=lengths, pages=pages)
        return found

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for numbers in ([800, 333, 1], [0, 17, 640], [16, 800, 799]):
        used.copy_(torch.tensor(numbers, dtype=torch.int32))
        table.copy_(torch.randperm(200, generator=generator, device="cuda").int()[:150].reshape(3, 50))
        graph.replay()
        torch.cuda.synchronize()
        with torch_flash2.force("reference"):
            torch.testing.assert_close(captured, step(), rtol=1e-2, atol=2e-3)


@gpu
@pytest.mark.parametrize("kernel", ["decode", "latent"])
@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("splits", [1, 5])
def test_calls_again(kernel: str, page: int | None, splits: int) -> None:
    """The third call and later ones do again what was recorded: with their own lengths, pages and memory."""
    options: dict[str, Any] = dict(device="cuda", dtype=torch.bfloat16)
    if kernel == "latent" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is Hopper's")
    G, D = (1, 576) if kernel == "latent" else (4, 128)
    module = dispatch.kernel(kernel, "forward")
    for turn in range(5):
        query = torch.randn(3, 16, 2, D, **options)
        used = torch.randint(0, 801, (3,), device="cuda", dtype=torch.int32)
        extra: dict[str, Any] = dict(lengths=Lengths(used_k=used), return_lse=True, num_splits=splits)
        if page is None:
            key, value = (torch.randn(3, G, 800, D, **options) for _ in range(2))
        else:
            key, value = (torch.randn(200, page, G, D, **options) for _ in range(2))
            extra["pages"] = Pages(torch.randperm(200, device="cuda").int()[:150].reshape(3, 50), page)
        if kernel == "latent":
            value = key[..., :512]
        with torch_flash2.force(kernel):
            with contextlib.ExitStack() as stack:
                if turn > 1:
                    stack.enter_context(testing.poisoned())
                    stack.enter_context(mock.patch.object(module, "launch", side_effect=AssertionError("the long way")))
                found = attention(query, key, value, "causal @ bottom-right", **extra)
            with FlopCounterMode(display=False):
                wanted = attention(query, key, value, "causal @ bottom-right", **extra)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@gpu
@pytest.mark.filterwarnings("default")
def test_compiled_step() -> None:
    """A decode step, append and attention, compiled without graph breaks and under CUDA graphs."""
    query = torch.randn(2, 8, 1, 64, device="cuda", dtype=torch.float16)
    key, value = (torch.randn(20, 16, 2, 64, device="cuda", dtype=torch.float16) for _ in range(2))
    table = torch.randperm(20, device="cuda").int().reshape(2, 10)
    new = torch.randn(2, 2, 1, 64, device="cuda", dtype=torch.float16)

    def step(query: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        torch_flash2.append(key, value, new, new * 2, used, pages=Pages(table, 16))
        lengths = Lengths(used_k=used + 1)
        out = attention(query, key, value, "causal @ bottom-right", lengths=lengths, pages=Pages(table, 16))
        return out.sin()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for numbers in ([3, 100], [4, 101], [5, 102], [60, 9]):
        used = torch.tensor(numbers, dtype=torch.int32, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        found = compiled(query, used).clone()
        torch.testing.assert_close(found, step(query, used), rtol=1e-2, atol=1e-3)


@gpu
def test_checked_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_flash2.settings.checks", lambda: True)
    for call in bad_calls("cuda"):
        assert complaint(call).startswith("ValueError: ")


@gpu
def test_unchecked_calls_on_gpu() -> None:
    for call in bad_calls("cuda"):
        assert call() is not None
    torch.cuda.synchronize()
