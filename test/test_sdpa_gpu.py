"""scaled_dot_product_attention, taken over on a GPU: random calls against PyTorch's math, compiled modes, choices.

SDPA_EXAMPLES sets how many random calls; --hypothesis-seed=N picks which.
B batch, H query heads, M query rows, N keys, D head dim.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import pytest
import sdpa_calls
import torch
from hypothesis import HealthCheck, given, settings
from sdpa_calls import SdpaCall
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_flash2
from torch_flash2 import dispatch, stock
from torch_flash2.frontends import sdpa
from torch_flash2.stock import Sdpa

pytestmark = pytest.mark.gpu
sdp = torch.nn.functional.scaled_dot_product_attention
EXAMPLES = int(os.environ.get("SDPA_EXAMPLES", "104"))
# Compiling takes most of the time: parts run beside one another.
PARTS = 8


def taken(label: str) -> bool:
    """Whether a label of stats() names kernels of ours."""
    return label.removeprefix("traced: ").split(" and ")[0] in dispatch.KERNELS


@pytest.fixture(autouse=True)
def on() -> Iterator[None]:
    sdpa_calls.forget_compiled()
    torch_flash2.stats(reset=True)
    with torch_flash2.enabled("always", device_type="cuda"):
        yield
    torch.cuda.empty_cache()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@settings(
    max_examples=EXAMPLES // PARTS, deadline=None, suppress_health_check=list(HealthCheck), derandomize=False,
    database=None,
)  # fmt: skip
@given(data=st.data())
def test_random_calls(part: int, data: st.DataObject) -> None:
    call = data.draw(sdpa_calls.gpu_calls(part, PARTS))
    torch_flash2.stats(reset=True)
    # The first of its signature launches the long way, the second by what was recorded.
    problems = sdpa_calls.disagreements(call, *(sdpa_calls.run(call, "cuda") for _ in range(2)), device="cuda")
    assert not problems, f"{call}: {problems}"
    assert sum(torch_flash2.stats().values()) == 2 and all(map(taken, torch_flash2.stats())), torch_flash2.stats()


@pytest.mark.parametrize("call", [
    SdpaCall(M=4160, N=4160, D=128, Dv=128, dtype="bf16", mask="bool", mask_shape="BMN"),
    SdpaCall(B=1, H=32, G=4, M=1024, N=1024, D=128, Dv=128, dtype="bf16", mask="causal"),
    SdpaCall(B=1, H=8, G=1, M=300, N=400, D=512, Dv=512, dtype="bf16", mask="causal"),
    SdpaCall(B=1, H=8, G=2, M=300, N=400, D=64, Dv=64, dtype="fp32", mask="learned", mask_shape="HMN"),
    SdpaCall(B=2, H=8, G=8, M=300, N=300, D=100, Dv=100, dtype="fp16"),
    SdpaCall(B=2, H=8, G=8, M=300, N=300, D=192, Dv=128, dtype="bf16", mask="causal"),
], ids=["pytorch-196678", "pytorch-193893", "d512-gqa", "fp32-gqa-bias", "d100", "mla"])  # fmt: skip
def test_what_users_met(call: SdpaCall) -> None:
    assert not sdpa_calls.disagreements(call, *(sdpa_calls.run(call, "cuda") for _ in range(2)), device="cuda")
    assert all(map(taken, torch_flash2.stats())), torch_flash2.stats()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("call", [
    SdpaCall(B=1, H=8, G=2, M=300, N=1000, D=128, Dv=128, dtype="bf16"),
    SdpaCall(B=2, H=8, G=1, M=1000, N=300, D=64, Dv=64, dtype="fp16"),
    SdpaCall(B=2, H=8, G=2, M=5, N=700, D=128, Dv=128, dtype="fp16", layouts=("bshd",) * 3),
    SdpaCall(B=1, H=4, G=4, M=200, N=333, D=64, Dv=64, dtype="fp32", dropout_p=0.25),
    SdpaCall(B=1, H=4, G=4, M=100, N=200, D=100, Dv=60, dtype="bf16", scale=0.3),
    SdpaCall(B=1, H=4, G=4, M=100, N=200, D=512, Dv=512, dtype="bf16"),
], ids=["gqa", "tall", "few", "fp32", "dv", "d512"])  # fmt: skip
def test_lower_right(call: SdpaCall, compiled: bool) -> None:
    """A CausalBias that PyTorch would give to its flash or efficient kernel, or make a tensor, is a band here."""
    attend = torch.compile(sdp, backend="aot_eager", fullgraph=True) if compiled else sdp
    call = dataclasses.replace(call, mask="lower-right")
    problems = sdpa_calls.disagreements(call, *(sdpa_calls.run(call, "cuda", attend) for _ in range(2)), device="cuda")
    assert not problems
    counted = torch_flash2.stats()
    assert all(map(taken, counted)) and sum(counted.values()) == (1 if compiled else 2), counted
    leaves = call.leaves("cuda")
    plan = torch_flash2.explain(*(leaves[name] for name in ("query", "key", "value")), "causal @ bottom-right")
    assert "with causal_lower_right would choose " in str(plan)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_compiled(mode: str) -> None:
    leaves = [torch.randn(2, 128, 4, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]

    def model(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return sdp(query.sin(), key, value, is_causal=True).transpose(1, 2).reshape(2, 128, 256).cos()

    compiled = torch.compile(model, fullgraph=True, mode=mode)
    wanted = model(*leaves)
    gradients = torch.autograd.grad(wanted.float().sum(), leaves)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = compiled(*leaves)
        torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)
        for one, other in zip(torch.autograd.grad(found.float().sum(), leaves), gradients, strict=True):
            torch.testing.assert_close(one, other, atol=4e-2, rtol=4e-2)


@pytest.mark.filterwarnings("default")
def test_hand_written_attention_compiled() -> None:
    leaves = [torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.float16) for _ in range(3)]

    def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.matmul(torch.matmul(query, key.transpose(-2, -1)).div(8.0).softmax(dim=-1), value)

    found = torch.compile(by_hand, fullgraph=True)(*leaves)
    torch.testing.assert_close(found, by_hand(*leaves), atol=1e-2, rtol=1e-2)
    assert [label for label in torch_flash2.stats() if label.startswith("traced: ") and taken(label)], (
        torch_flash2.stats()
    )


def test_cuda_graph() -> None:
    leaves = [torch.randn(2, 4, 128, 64, device="cuda", dtype=torch.float16) for _ in range(3)]
    for _ in range(3):
        sdp(*leaves, is_causal=True, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sdp(*leaves, is_causal=True)
        noisy = sdp(*leaves, is_causal=True, dropout_p=0.5)
    leaves[0].normal_()
    graph.replay()
    first = noisy.clone()
    graph.replay()
    torch.testing.assert_close(out, sdp(*leaves, is_causal=True))
    assert not torch.equal(first, noisy)


def test_choices() -> None:
    """What PyTorch chooses for real tensors, it is said to choose for traced ones; "fastest" leaves it cuDNN's."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def tensors(dtype: torch.dtype, D: int) -> list[torch.Tensor]:
        return [torch.randn(1, 8, 256, D, device="cuda", dtype=dtype) for _ in range(3)]

    chosen = {}
    for dtype, D in ((torch.bfloat16, 128), (torch.float32, 64), (torch.bfloat16, 512), (torch.bfloat16, 100)):
        inputs = tensors(dtype, D)
        found = stock.choice(Sdpa(*inputs))
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(tensor) for tensor in inputs]
            assert stock.choice(Sdpa(*fakes)) == found
        chosen[str(dtype), D] = found
    print(chosen)
    with torch_flash2.enabled("fastest", device_type="cuda"):
        torch_flash2.stats(reset=True)
        for dtype, D in ((torch.float32, 64), (torch.bfloat16, 512), (torch.bfloat16, 128)):
            sdp(*tensors(dtype, D))
        print(torch_flash2.stats())
        with sdpa_kernel([SDPBackend.MATH]):
            sdp(*tensors(torch.bfloat16, 64))
    assert any("switched flash" in label for label in torch_flash2.stats())


def test_strict_says_why() -> None:
    inputs = [torch.randn(1, 2, 16, 16, device="cuda", dtype=torch.float64) for _ in range(3)]
    sdp(*inputs)
    assert any("unsupported" in label and "float64" in label for label in torch_flash2.stats())
    with (
        torch_flash2.enabled("strict", device_type="cuda"),
        pytest.raises(torch_flash2.UnsupportedError, match="float64"),
    ):
        sdp(*inputs)


def test_other_device_types_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="enabled for cuda already"):
        torch_flash2.enable(device_type="cpu")
    assert sdpa.is_enabled() == "always"


@pytest.mark.filterwarnings("default")
def test_registry() -> None:
    """Activated, it runs what PyTorch gives to FLASH_ATTENTION: dense calls, nested tensors, packed ones."""
    from torch.nn import attention as registry

    counted: list[int] = []
    original = torch_flash2.direct.run

    def counting(call: Any) -> Any:
        counted.append(1)
        return original(call)

    sdpa.disable()
    registry.activate_flash_attention_impl("torch_flash2")
    try:
        with mock.patch.object(torch_flash2.direct, "run", counting), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            leaves = [
                torch.randn(2, 4, 130, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
            ]
            out = sdp(*leaves, is_causal=True)
            gradients = torch.autograd.grad(out.float().sum(), leaves)
            assert len(counted) == 1
            parts = [torch.randn(n, 4, 64, device="cuda", dtype=torch.bfloat16) for n in (50, 7, 90)]
            nested = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
            mixed = sdp(nested, nested, nested, is_causal=True)
            assert len(counted) == 2
            dropped = sdp(*leaves, dropout_p=0.5)
            torch.autograd.grad(dropped.float().sum(), leaves)
            # The same compiled graph serves both, since it has aten's op.
            compiled = torch.compile(lambda *tensors: sdp(*tensors, is_causal=True), fullgraph=True)
            torch.testing.assert_close(compiled(*leaves), out, atol=2e-2, rtol=2e-2)
            assert len(counted) == 4
    finally:
        registry.restore_flash_attention_impl()
        torch_flash2.enable("always", device_type="cuda")
    wanted = torch_flash2.attention(*leaves, "causal")
    torch.testing.assert_close(out, wanted, atol=2e-2, rtol=2e-2)
    for one, other in zip(gradients, torch.autograd.grad(wanted.float().sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, atol=4e-2, rtol=4e-2)
    for part, found in zip(parts, mixed.transpose(1, 2).unbind(), strict=True):
        tensors = [part.transpose(0, 1)[None]] * 3
        torch.testing.assert_close(found.transpose(0, 1)[None], sdp(*tensors, is_causal=True), atol=2e-2, rtol=2e-2)
