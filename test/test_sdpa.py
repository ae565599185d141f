"""scaled_dot_product_attention, taken over: its own promises, and what must stay PyTorch's.

B batch, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import sdpa_calls
import torch
from hypothesis import given, settings
from sdpa_calls import SdpaCall
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left

import torch_flash2
from torch_flash2 import dispatch, judging
from torch_flash2.frontends import sdpa
from torch_flash2.stock import Sdpa

# Compilers and transforms warn of things that are none of ours.
compiled = pytest.mark.filterwarnings("default")
sdp = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def on() -> Iterator[None]:
    """Every test runs with the policy "always" on the CPU."""
    sdpa_calls.forget_compiled()
    torch_flash2.stats(reset=True)
    with torch_flash2.enabled("always", device_type="cpu"):
        yield
    assert sdpa.is_enabled() is None


def qkv(**options: Any) -> list[torch.Tensor]:
    leaves = SdpaCall(**options).leaves("cpu")
    return [leaves[name].requires_grad_() for name in ("query", "key", "value")]


def taken() -> int:
    return sum(n for label, n in torch_flash2.stats().items() if label.removeprefix("traced: ") == "cpu")


def left() -> list[str]:
    """Why calls were left to PyTorch."""
    return [label for label in torch_flash2.stats() if label.removeprefix("traced: ").startswith("stock")]


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """The directions in which the CPU's kernel ran, and with what mask."""
    found: list[str] = []
    kernel = dispatch.kernel("cpu", "forward")
    original = kernel.launch

    def launch(problem: Any, *arguments: Any) -> Any:
        found.append(f"{problem.direction}, {'dense' if problem.dense else problem.mask}")
        return original(problem, *arguments)

    with mock.patch.object(kernel, "launch", launch):
        yield found


def holds(call: SdpaCall, attend: Any = None) -> None:
    torch_flash2.stats(reset=True)
    found = sdpa_calls.run(call, attend=attend)
    assert taken() and not left(), torch_flash2.stats()
    assert not (problems := sdpa_calls.disagreements(call, found)), f"{call}: {problems}"


@given(sdpa_calls.calls())
def test_random_calls(call: SdpaCall) -> None:
    holds(call)


def test_layout_is_that_of_flash() -> None:
    for order in ((0, 1, 2), (0, 2, 1)):
        inputs = [t.detach().permute(*order, 3).contiguous().permute(*order, 3) for t in qkv(N=33)]
        out = sdp(*inputs)
        assert out.stride() == torch.empty_like(inputs[0]).stride()
        if torch.cuda.is_available():
            flash = torch.ops.aten._scaled_dot_product_flash_attention(*(t.half().cuda() for t in inputs))[0]
            assert flash.stride() == out.stride()


def test_dropout_differs_from_call_to_call_and_repeats_under_checkpoint() -> None:
    from torch.utils.checkpoint import checkpoint

    query, key, value = qkv()

    def attend(query: torch.Tensor) -> torch.Tensor:
        return sdp(query, key, value, dropout_p=0.5)

    assert not torch.equal(attend(query), attend(query))
    torch.manual_seed(3)
    (wanted,) = torch.autograd.grad(attend(query).sum(), query)
    torch.manual_seed(3)
    (found,) = torch.autograd.grad(checkpoint(attend, query, use_reentrant=False).sum(), query)
    assert torch.equal(found, wanted)


def test_backward_is_the_forwards_own() -> None:
    query, key, value = qkv()
    out = sdp(query, key, value)
    wanted = torch.autograd.grad(out.sum(), query, retain_graph=True)
    sdpa.disable()
    try:
        other = sdp(query, key, value)
        found = torch.autograd.grad(out.sum(), query)
    finally:
        torch_flash2.enable("always", device_type="cpu")
    assert torch.equal(found[0], wanted[0])
    torch_flash2.stats(reset=True)
    torch.autograd.grad(other.sum(), query)
    assert not torch_flash2.stats()


def test_double_backward_says_what_to_do() -> None:
    query, key, value = qkv()
    (gradient,) = torch.autograd.grad(sdp(query, key, value).sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        gradient.sum().backward()


def test_no_gradient_where_none_is_wanted() -> None:
    query, key, value = (t.detach() for t in qkv())
    value.requires_grad_()
    out = sdp(query, key, value)
    out.sum().backward()
    assert value.grad is not None and query.grad is None


# What is PyTorch's.


def stock_only(run: Callable[[], torch.Tensor], reason: str) -> None:
    """A call that PyTorch answers, with its own answer and a reason."""
    torch_flash2.stats(reset=True)
    found = run()
    assert taken() == 0
    assert [label for label in left() if reason in label], torch_flash2.stats()
    sdpa.disable()
    try:
        wanted = run()
    finally:
        torch_flash2.enable("always", device_type="cpu")
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@compiled
def test_functorch_is_untouched() -> None:
    query, key, value = (t.detach() for t in qkv())
    grad = torch.func.grad(lambda q: sdp(q, key, value).sum())
    stock_only(lambda: grad(query), "functorch")
    jacobian = torch.func.jacrev(lambda q: sdp(q, key[:1, :1], value[:1, :1]))
    stock_only(lambda: jacobian(query[:1, :1, :2]), "functorch")
    stock_only(lambda: torch.func.functional_call(torch.nn.Identity(), {}, grad(query)), "functorch")


@compiled
def test_vmap_is_untouched() -> None:
    query, key, value = (t.detach() for t in qkv())
    batched = torch.stack([query, query + 1])
    stock_only(lambda: torch.vmap(lambda q: sdp(q, key, value))(batched), "functorch")
    assert set(torch_flash2.stats().values()) == {1}


@compiled
def test_forward_mode_is_untouched() -> None:
    query, key, value = (t.detach() for t in qkv())

    def run() -> torch.Tensor:
        with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]), torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(query.double(), torch.ones_like(query).double())
            with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):
                out = sdp(dual, key.double(), value.double())
            return torch.autograd.forward_ad.unpack_dual(out).tangent

    stock_only(run, "forward-mode AD")


@compiled
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("inference", [False, True])
def test_nested_tensors_are_untouched(layout: torch.layout, inference: bool) -> None:
    parts = [torch.randn(5, 2, 8), torch.randn(3, 2, 8)]
    with torch.inference_mode(inference):
        nested = torch.nested.nested_tensor(parts, layout=layout).transpose(1, 2)
        nested = nested.contiguous() if layout == torch.strided else nested
        stock_only(lambda: torch.cat([t.flatten() for t in sdp(nested, nested, nested).unbind()]), "nested tensors")
    # What comes by in between, PyTorch made of it.
    assert torch_flash2.stats()["stock, untouched: nested tensors"] == 1


class Subclass(torch.Tensor):
    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrapped = [a.inner if isinstance(a, Subclass) else a for a in args]
        return func(*unwrapped, **(kwargs or {}))


def test_subclasses_are_untouched() -> None:
    query, key, value = (t.detach() for t in qkv())
    stock_only(lambda: sdp(Subclass(query), Subclass(key), Subclass(value)), "a tensor subclass, Subclass")


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION])
def test_sdpa_kernel_that_excludes_flash(backend: SDPBackend) -> None:
    query, key, value = (t.detach() for t in qkv())

    def run() -> torch.Tensor:
        with sdpa_kernel([backend, SDPBackend.MATH]):
            return sdp(query, key, value)

    stock_only(run, "switched flash attention off")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        sdp(query, key, value)
    assert taken() == 1


def test_mistakes_are_for_pytorch_to_refuse() -> None:
    query, key, value = (t.detach() for t in qkv())
    for arguments, keywords in (
        ((query, key.double(), value), {}),
        ((query, key[:, :3], value[:, :3]), {}),
        ((query, key, value, torch.ones(5, 5)), {}),
        ((query, key, value), {"dropout_p": 1.5}),
    ):
        with pytest.raises(RuntimeError) as found:
            sdp(*arguments, **keywords)
        sdpa.disable()
        try:
            with pytest.raises(RuntimeError) as wanted:
                sdp(*arguments, **keywords)
        finally:
            torch_flash2.enable("always", device_type="cpu")
        assert str(found.value) == str(wanted.value)
    assert taken() == 0


def test_five_dimensions_are_pytorchs() -> None:
    query, key, value = (t.detach()[None] for t in qkv())
    stock_only(lambda: sdp(query, key, value), "5, 5 and 5 dimensions")


def test_value_in_key_is_told_per_call() -> None:
    """Kernels may read keys and values once where they are one; calls that differ in nothing else must not."""
    query, key, value = (t.detach() for t in qkv())
    shared: list[bool] = []
    kernel = dispatch.kernel("cpu", "forward")
    original = kernel.launch

    def launch(problem: Any, *arguments: Any) -> Any:
        shared.append(problem.value_in_key)
        return original(problem, *arguments)

    with mock.patch.object(kernel, "launch", launch):
        for other in (key, value, key):
            sdp(query, key, other)
    assert shared == [True, False, True]


def test_broadcast_batches_and_heads() -> None:
    query, key, value = qkv()
    found = sdp(query, key[:1], value[:1])
    torch.testing.assert_close(found, sdp(query, key[:1].expand_as(key), value[:1].expand_as(value)))
    (gradient,) = torch.autograd.grad(found.sum(), key)
    assert gradient[1:].abs().max() == 0 and gradient[0].abs().max() > 0
    assert sdp(query[:, :1], key, value).shape == (2, 4, 33, 16)
    assert sdp(query, key[:, :1], value).shape == (2, 4, 33, 16)
    assert taken() == 4 and not left()


# Modes and transforms that see ops.


def test_modes_see_the_op() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    query, key, value = (t.detach() for t in qkv())
    with FlopCounterMode(display=False) as counter:
        sdp(query, key, value)
    assert counter.get_total_flops() == 2 * 2 * 4 * 33 * 47 * 32


def test_selective_checkpointing_saves_attention() -> None:
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    query, key, value = qkv()

    def block(query: torch.Tensor) -> torch.Tensor:
        return sdp(query.sin(), key, value).cos()

    def counted(**options: Any) -> int:
        with launches() as count:
            checkpoint(block, query, use_reentrant=False, **options).sum().backward()
        return count.count("forward, full")

    assert counted() == 2
    assert counted(context_fn=lambda: create_selective_checkpoint_contexts(torch_flash2.sac_ops())) == 1


def test_jit_trace() -> None:
    query, key, value = (t.detach() for t in qkv())
    with pytest.warns((DeprecationWarning, FutureWarning), match="deprecated"):
        traced = torch.jit.trace(lambda *inputs: sdp(*inputs) + 1, (query, key, value))
    assert torch.equal(traced(query, key, value), sdp(query, key, value) + 1)


def test_modules_of_pytorch() -> None:
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    inputs = torch.randn(2, 10, 32, requires_grad=True)
    found = layer(inputs, inputs, inputs, need_weights=False)[0]
    assert taken() == 1
    sdpa.disable()
    try:
        wanted = layer(inputs, inputs, inputs, need_weights=False)[0]
    finally:
        torch_flash2.enable("always", device_type="cpu")
    torch.testing.assert_close(found, wanted)


# Compiling.


@compiled
def test_compiled_once_for_all_lengths() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda q, k, v: sdp(q, k, v, is_causal=True), backend=counter, fullgraph=True, dynamic=True)
    for M, N in ((7, 9), (12, 5), (33, 64), (64, 64)):
        inputs = qkv(M=M, N=N)
        found, wanted = run(*inputs), sdp(*inputs, is_causal=True)
        torch.testing.assert_close(found, wanted)
        found.sum().backward()
    assert counter.frame_count == 1


@compiled
def test_export_keeps_pytorchs_op() -> None:
    class Model(torch.nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return sdp(query, key, value, is_causal=True)

    inputs = tuple(t.detach() for t in qkv())
    for strict in (False, True):
        program = torch.export.export(Model(), inputs, strict=strict)
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert targets == ["aten.scaled_dot_product_attention.default"]
        assert taken() == 0 and set(left()) == {"stock, untouched: torch.export"}
    torch.testing.assert_close(program.module()(*inputs), Model()(*inputs))


@compiled
@pytest.mark.parametrize("training", [False, True])
def test_inductor_and_attention_written_by_hand(training: bool) -> None:
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    counters.clear()
    query, key, value = (t.detach().requires_grad_(training) for t in qkv(M=32, N=32))

    def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores = torch.matmul(query, key.transpose(-2, -1))
        scores = scores * 0.25 if training else scores.div(4.0)
        return sdp(query, key, value, is_causal=True) + torch.matmul(scores.softmax(dim=-1), value)

    with launches() as count, fresh_cache():
        found = torch.compile(by_hand, fullgraph=True)(query, key, value)
    assert counters["inductor"]["fuse_attention"] >= 1
    assert count == ["forward, causal", "forward, full"]
    torch.testing.assert_close(found, by_hand(query, key, value))
    if training:
        gradients = torch.autograd.grad(found.sum(), [query, key, value])
        wanted = torch.autograd.grad(by_hand(query, key, value).sum(), [query, key, value])
        torch.testing.assert_close(gradients, wanted)


@settings(max_examples=10)
@given(sdpa_calls.calls())
def test_strict_refuses_nothing_that_always_takes(call: SdpaCall) -> None:
    with torch_flash2.enabled("strict", device_type="cpu"):
        holds(call)


def test_strict_says_why_nothing_can_run_a_call() -> None:
    """Where "always" leaves the call to PyTorch, with the same reasons."""
    query, key, value = (t.detach() for t in qkv())
    with torch_flash2.force("triton"):
        stock_only(lambda: sdp(query, key, value), "unsupported: triton: it needs a CUDA GPU")
        with (
            torch_flash2.enabled("strict", device_type="cpu"),
            pytest.raises(torch_flash2.UnsupportedError, match="triton: it needs a CUDA GPU"),
        ):
            sdp(query, key, value)


def test_explain_says_what_is_copied() -> None:
    query, key, value = (t.detach() for t in qkv(layouts=("bhsd", "strided", "bhsd"), D=16, Dv=16, dtype="fp32"))
    assert "copies: of query, key and value, those with strides in the head dim" in str(
        torch_flash2.explain(query, key, value)
    )


def test_explain_says_what_pytorch_would_choose() -> None:
    query, key, value = (t.detach() for t in qkv(N=33))
    text = str(torch_flash2.explain(query, key, value, "causal"))
    assert "runs on cpu" in text and "config: path=" in text and "not triton: it needs a CUDA GPU" in text
    assert text.endswith(
        "scaled_dot_product_attention would choose FLASH_ATTENTION; enable() leaves such calls: "
        "not measured on CPU, and PyTorch would choose FLASH_ATTENTION, which is fast"
    )
    bias = torch.zeros(33, 33, requires_grad=True)
    assert "would choose MATH; enable() takes such calls" in str(torch_flash2.explain(query, key, value, bias=bias))
    text = str(torch_flash2.explain(query, key, value, "causal & window(3, 0)", softcap=3.0))
    assert text.endswith("has no such call: softcap, mask causal & window(3, 0)")
    assert "two masks at once" in str(torch_flash2.explain(query, key, value, "causal", bias=bias))


# Masks of which PyTorch knows more than their numbers.


def test_a_mask_tensor_is_not_guessed_to_be_causal() -> None:
    query, key, value = (t.detach() for t in qkv(N=33))
    for mask in (
        torch.ones(33, 33, dtype=torch.bool).tril(),
        torch.zeros(33, 33).masked_fill_(torch.ones(33, 33).triu(1) > 0, -torch.inf),
    ):
        found = judging.judge(Sdpa(query, key, value, mask), False, "always").plans[0].problem
        assert not found.mask.bands and (found.dense or found.steps == ("bias",))
    assert judging.judge(Sdpa(query, key, value, is_causal=True), False, "always").plans[0].problem.mask.bands


def biases(M: int, N: int) -> tuple[CausalBias, CausalBias]:
    with warnings.catch_warnings():
        # Of rows that see nothing.
        warnings.simplefilter("ignore")
        return causal_upper_left(M, N), causal_lower_right(M, N)


@pytest.mark.parametrize("M, N", [(33, 47), (33, 33), (20, 47), (47, 20), (1, 9)])
def test_causal_bias(M: int, N: int) -> None:
    query, key, value = qkv(M=M, N=N)
    for bias, align in zip(biases(M, N), ("top-left", "bottom-right"), strict=True):
        with launches() as seen:
            found = sdp(query, key, value, bias)
        torch.testing.assert_close(found, torch_flash2.attention(query, key, value, f"causal @ {align}"))
        band = "causal @ bottom-right" if align == "bottom-right" and M != N else "causal"
        assert found.requires_grad and seen == [f"forward, {band}"]
    assert taken() == 2 and not left()


@compiled
def test_causal_bias_compiled() -> None:
    run = torch.compile(sdp, backend="aot_eager", fullgraph=True)
    for M, N in ((20, 47), (47, 20)):
        query, key, value = qkv(M=M, N=N)
        bias = biases(M, N)[1]
        torch_flash2.stats(reset=True)
        with launches() as seen:
            found, wanted = (attend(query, key, value, bias) for attend in (run, sdp))
        assert torch_flash2.stats() == {"traced: cpu": 1, "cpu": 1}
        assert seen == ["forward, causal @ bottom-right"] * 2
        torch.testing.assert_close(found, wanted)
        gradients = [torch.autograd.grad(out.square().sum(), (query, key, value)) for out in (found, wanted)]
        torch.testing.assert_close(*gradients)


@compiled
def test_causal_bias_left_to_pytorch() -> None:
    """Its own answer, eager and compiled, whoever asked for it."""
    query, key, value = (t.detach() for t in qkv(M=20))
    bias = biases(20, 47)[1]

    def run() -> torch.Tensor:
        return sdp(query, key, value, bias)

    stock_only(lambda: torch.vmap(lambda q: sdp(q, key, value, bias))(query[None])[0], "functorch")
    stock_only(lambda: torch.func.grad(lambda q: sdp(q, key, value, bias).sum())(query), "functorch")

    def without_flash() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return run()

    stock_only(without_flash, "switched flash attention off")
    stock_only(torch.compile(without_flash, backend="aot_eager"), "traced: stock, excluded: sdpa_kernel")
    with torch_flash2.enabled("fastest", device_type="cpu"):
        torch_flash2.stats(reset=True)
        run()
        assert not taken() and left()
    torch_flash2.stats(reset=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
        assert cast.dtype == torch.bfloat16 and [label for label in left() if "autocast of other dtypes" in label]
        torch_flash2.stats(reset=True)
        half = sdp(query.bfloat16(), key.bfloat16(), value.bfloat16(), bias)
        assert taken() == 1 and not left() and half.dtype == torch.bfloat16
    torch.testing.assert_close(cast, half, atol=2e-2, rtol=2e-2)
    with pytest.raises(ValueError, match="should not be used with causal=True"):
        sdp(query, key, value, bias, is_causal=True)


def test_causal_bias_is_pytorchs_again_afterwards() -> None:
    query, key, value = (t.detach() for t in qkv(M=20))
    bias = biases(20, 47)[1]
    replaced = CausalBias._dispatch
    sdpa.disable()
    try:
        assert replaced.__wrapped__ is CausalBias._dispatch  # type: ignore[attr-defined]
        torch_flash2.stats(reset=True)
        sdp(query, key, value, bias)
        assert not torch_flash2.stats()
    finally:
        torch_flash2.enable("always", device_type="cpu")


def test_explain_names_the_lower_right_mask() -> None:
    query, key, value = (t.detach() for t in qkv(M=20, N=33))
    text = str(torch_flash2.explain(query, key, value, "causal @ bottom-right"))
    assert "mask causal @ bottom-right" in text
    assert "scaled_dot_product_attention with causal_lower_right would choose FLASH_ATTENTION; enable() leaves" in text
