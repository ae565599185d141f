"""The ops as PyTorch sees them: schema, autograd, compile, autocast, vmap, FLOPs, memory layout.

These run on the CPU's kernels. B batch, H query heads, M query rows, N keys, D head dim of query and key,
Dv head dim of value.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import torch_flash2
from torch_flash2 import Lengths, attention, testing
from torch_flash2.testing import CASES, Case, check

B, H, M, N, D, Dv = 2, 4, 7, 9, 8, 6
# Compilers warn of things that are none of ours.
compiled = pytest.mark.filterwarnings("default")


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, grad: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_(grad) for shape in shapes]


def qkv(**options: Any) -> list[torch.Tensor]:
    """query [B, H, M, D], key [B, H/2, N, D], value [B, H/2, N, Dv]."""
    return leaves((B, H, M, D), (B, H // 2, N, D), (B, H // 2, N, Dv), **options)


def cu(*edges: int) -> torch.Tensor:
    return torch.tensor(edges, dtype=torch.int32)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_named(case: Case) -> None:
    # ATen's flash kernel for the CPU has an lse of 16-bit inputs that is less exact than fp32.
    check(case.scaled(64, 4 if case.lengths else 2, 4), strict_lse=False)


# What torch.library asks of an op.

CALLS: dict[str, Callable[[], tuple[list[torch.Tensor], dict[str, Any]]]] = {
    "plain": lambda: (qkv(), {}),
    "causal": lambda: (qkv(), dict(mask="causal & window(3, 0) @ bottom-right", scale=0.3)),
    "dense": lambda: (qkv(), dict(mask=torch.rand(B, 1, M, N) > 0.4)),
    "scores": lambda: (qkv(), dict(softcap=2.0, alibi_slopes=torch.rand(H), dropout_p=0.2)),
    "bias": lambda: (
        qkv(),
        dict(bias=leaves((H, M, 1))[0], sinks=leaves((H,))[0], mask="prefix(3)"),
    ),
    "packed": lambda: (
        leaves((1, H, M, D), (1, H, N, D), (1, H, N, Dv)),
        dict(lengths=Lengths(cu(0, 2, 7), cu(0, 9, 9)), mask="chunk(3)"),
    ),
    "padded": lambda: (
        qkv(),
        dict(lengths=Lengths(used_q=cu(3, 7), used_k=cu(9, 0)), mask="causal @ top-left"),
    ),
    "half": lambda: (qkv(dtype=torch.bfloat16), dict(mask="causal")),
}


def call_of(name: str) -> tuple[Any, ...]:
    """The op's arguments for a call."""
    tensors, keywords = CALLS[name]()
    absent = dict.fromkeys(("mask", "bias", "softcap", "alibi_slopes", "sinks", "scale", "lengths", "pages"))
    module = importlib.import_module("torch_flash2.attention")
    return tuple(module._call(*tensors, **{**absent, "dropout_p": 0.0, **keywords}))


@compiled
@pytest.mark.parametrize("name", CALLS)
def test_opcheck_forward(name: str) -> None:
    torch.library.opcheck(torch.ops.torch_flash2.forward.default, call_of(name))


@compiled
@pytest.mark.parametrize("name", CALLS)
def test_opcheck_backward(name: str) -> None:
    call = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in call_of(name))
    out, lse = torch.ops.torch_flash2.forward(*call)
    named = dict(zip(torch_flash2.problem.Call._fields, call, strict=True))
    wanted = [True, True, True, named["bias"] is not None, named["sinks"] is not None]
    grad_lse = torch.where(torch.isfinite(lse), torch.randn_like(lse), 0.0)
    saved = (out, lse, torch.randn_like(out), grad_lse, wanted)
    torch.library.opcheck(torch.ops.torch_flash2.backward.default, (*saved, *call))


# torch.compile.


def model(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    out, lse = attention(query * 2, key, value, "causal", softcap=3.0, return_lse=True)
    return out.sin().sum(dim=3) + lse


def trained(run: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    out = run(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]


@compiled
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("Inductor needs g++ for the CPU")
    torch._dynamo.reset()
    found = trained(torch.compile(model, backend=backend, fullgraph=True), qkv())
    for a, b in zip(found, trained(model, qkv()), strict=True):
        torch.testing.assert_close(a, b)


def compilations(run: Callable[..., torch.Tensor], calls: list[tuple[Any, ...]]) -> int:
    """How often a function is compiled again after the first of some calls."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for call in calls:
        torch.manual_seed(0)
        found = compiled(*call)
        torch.manual_seed(0)
        torch.testing.assert_close(found, run(*call))
        found.sum().backward()
        counts.append(counter.frame_count)
    return int(counts[-1] - counts[0])


SIZES = ((7, 9), (12, 5), (33, 64), (2, 100))


@compiled
def test_compiled_once_for_all_lengths() -> None:
    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attention(query, key, value, "causal & window(3, 0)", dropout_p=0.1)

    calls = [tuple(leaves((B, H, m, D), (B, H, n, D), (B, H, n, Dv))) for m, n in SIZES]
    assert compilations(run, calls) == 0


@compiled
def test_compiled_once_for_all_packings() -> None:
    def run(query: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        return attention(query, query, query, "causal", lengths=Lengths(edges, edges))

    edges = (cu(0, 3, 9), cu(0, 5, 8, 20), cu(0, 1, 2, 3, 40))
    calls = [(*leaves((1, H, int(edge[-1]), D)), edge) for edge in edges]
    assert compilations(run, calls) == 0


@compiled
def test_compiled_once_for_all_windows() -> None:
    def run(query: torch.Tensor, left: int) -> torch.Tensor:
        return attention(query, query, query, torch_flash2.masks.window(left, 0))

    calls = [(*leaves((B, H, M, D)), left) for left in (3, 5, 11)]
    assert compilations(run, calls) == 0


@compiled
def test_export_shows_the_op() -> None:
    class Model(torch.nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return attention(query, key, value, "causal")

    program = torch.export.export(Model(), tuple(qkv(grad=False)))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.torch_flash2.forward.default in targets
    torch.testing.assert_close(program.module()(*qkv(grad=False)), Model()(*qkv(grad=False)))


# Function transforms and modes.


def test_autocast() -> None:
    inputs = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attention(*inputs, "causal", return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs]
    wanted = attention(*low, "causal")
    assert torch.equal(out, wanted)
    found = torch.autograd.grad(out.float().sum(), inputs)
    for a, b in zip(found, torch.autograd.grad(wanted.float().sum(), low), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


def test_backward_under_autocast() -> None:
    inputs = leaves((B, H, 80, D), (B, H, 80, D), (B, H, 80, D), dtype=torch.bfloat16)
    wanted = trained(attention, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = trained(attention, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_autocast_keeps_float32_bias_and_casts_others() -> None:
    inputs = qkv()
    single, half = torch.randn(M, N), torch.randn(M, N).half()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*inputs, bias=single)
        other = attention(*inputs, bias=half)
    low = [tensor.detach().bfloat16() for tensor in inputs]
    assert torch.equal(out, attention(*low, bias=single))
    assert torch.equal(other, attention(*low, bias=half.bfloat16()))


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, None), (0, 2, None), (None, None, 4)])
def test_vmap(in_dims: tuple[int | None, ...]) -> None:
    size = 3
    inputs = [
        tensor if dim is None else torch.stack([tensor + i for i in range(size)], dim)
        for tensor, dim in zip(qkv(grad=False), in_dims, strict=True)
    ]

    def run(*one: torch.Tensor) -> torch.Tensor:
        return attention(*one, "causal")

    found = torch.vmap(run, in_dims)(*inputs)
    each = [
        run(*(t if d is None else t.select(d, i) for t, d in zip(inputs, in_dims, strict=True))) for i in range(size)
    ]
    torch.testing.assert_close(found, torch.stack(each))


def test_vmap_over_bias_and_mask() -> None:
    inputs = qkv(grad=False)
    bias, dense = torch.randn(3, M, N), torch.rand(3, M, N) > 0.3

    def run(bias: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        return attention(*inputs, dense, bias=bias)

    each = [run(*pair) for pair in zip(bias, dense, strict=True)]
    torch.testing.assert_close(torch.vmap(run)(bias, dense), torch.stack(each))


def test_flops_are_counted_as_pytorch_counts() -> None:
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    inputs = qkv()
    shapes = [tensor.shape for tensor in inputs]
    expanded = [shapes[0], *((B, H, *shape[2:]) for shape in shapes[1:])]
    with FlopCounterMode(display=False) as counter:
        out = attention(*inputs)
    assert counter.get_total_flops() == sdpa_flop_count(*expanded)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == sdpa_backward_flop_count(out.shape, *expanded)


def test_checkpoint_keeps_dropout() -> None:
    def run(*inputs: torch.Tensor) -> torch.Tensor:
        return attention(*inputs, "causal", dropout_p=0.4)

    torch.manual_seed(5)
    wanted = trained(run, qkv())
    torch.manual_seed(5)
    found = trained(lambda *inputs: checkpoint(run, *inputs, use_reentrant=False), qkv())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_dropout_draws_again() -> None:
    inputs = qkv(grad=False)
    first, second = (attention(*inputs, dropout_p=0.4) for _ in range(2))
    assert not torch.equal(first, second)


def test_functional_call() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = torch.nn.Linear(H * D, 3 * H * D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query, key, value = self.qkv(x).unflatten(2, (3, H, D)).permute(2, 0, 3, 1, 4)
            return attention(query, key, value, "causal").transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(B, M, H * D)
    weights = {name: torch.randn_like(weight) for name, weight in layer.named_parameters()}
    found = torch.func.functional_call(layer, weights, (x,))
    layer.load_state_dict(weights)
    torch.testing.assert_close(found, layer(x))


# Gradients.


def test_gradients_only_where_wanted() -> None:
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (True, False, True)):
        inputs = [t.requires_grad_(want) for t, want in zip(qkv(grad=False), wanted, strict=True)]
        reference = trained(attention, qkv())[1:]
        attention(*inputs).sum().backward()
        for tensor, want, expected in zip(inputs, wanted, reference, strict=True):
            assert (tensor.grad is not None) == want
            if want:
                torch.testing.assert_close(tensor.grad, expected)


def test_no_graph_without_gradients() -> None:
    with torch.no_grad():
        assert attention(*qkv()).grad_fn is None
    assert attention(*qkv(grad=False)).grad_fn is None


def test_gradient_of_lse_alone() -> None:
    inputs = qkv(dtype=torch.float64)
    bias = torch.randn(M, N, dtype=torch.float64, requires_grad=True)

    def lse(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return attention(query, key, value, bias=bias, return_lse=True)[1].double()

    found = torch.autograd.grad(lse(*inputs, bias).sum(), [*inputs, bias])
    score = inputs[0] @ inputs[1].repeat_interleave(2, 1).transpose(2, 3) * D**-0.5 + bias
    wanted = torch.autograd.grad(torch.logsumexp(score, 3).sum(), [*inputs[:2], bias])
    for a, b in zip([*found[:2], found[3]], wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert not found[2].any()


def test_double_backward_says_the_way_out() -> None:
    inputs = qkv()
    (gradient,) = torch.autograd.grad(attention(*inputs).sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward yet.*SDPBackend.MATH"):
        gradient.sum().backward()


@compiled
def test_forward_mode_says_the_way_out() -> None:
    query, key, value = qkv(grad=False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative.*SDPBackend.MATH"):
            attention(dual, key, value)
        attention(query, key, value)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: attention(q, key, value), (query,), (query,))


def test_alibi_slopes_have_no_gradient() -> None:
    slopes = torch.rand(H, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"detach it, or pass .* as bias="):
        attention(*qkv(), alibi_slopes=slopes).sum().backward()


# The call.


def test_layout_of_out() -> None:
    for kernel in ("cpu", "reference"):
        with torch_flash2.force(kernel):
            query, key, value = qkv()
            for order in ((0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0)):
                # The query's memory order, whatever it is, is the output's; the head dim is innermost.
                back = (*(order.index(i) for i in range(3)), 3)
                out = attention(query.permute(*order, 3).contiguous().permute(back), key, value)
                assert out.shape == (B, H, M, Dv) and out.permute(*order, 3).is_contiguous()
                wide = query.new_zeros(B, H, M, 2 * D).permute(*order, 3).contiguous().permute(back)
                out = attention(wide[..., :D], key, value)
                assert out.permute(*order, 3).is_contiguous()
            out = attention(query[:1].expand(B, H, M, D), key, value)
            assert out.transpose(1, 2).is_contiguous()


def test_masks_in_every_form_are_the_same() -> None:
    inputs = qkv(grad=False)
    m, n = torch.arange(M)[:, None], torch.arange(N)[None, :]
    forms = ("causal", torch_flash2.masks.causal(), n <= m, torch_flash2.masks.dense(n <= m), "full", n >= 0, None)
    outs = [attention(*inputs, form) for form in forms]
    for i, out in enumerate(outs):
        torch.testing.assert_close(out, outs[0] if i < 4 else outs[4])
    joined = (n <= m) & torch_flash2.masks.window(2)
    torch.testing.assert_close(attention(*inputs, joined), attention(*inputs, "causal & window(2, -)"))


def test_operands_broadcast_from_the_right() -> None:
    inputs = qkv(grad=False)
    for shape in ((), (N,), (M, 1), (H, 1, 1), (1, H, M, N)):
        bias = torch.randn(shape)
        torch.testing.assert_close(attention(*inputs, bias=bias), attention(*inputs, bias=bias.expand(B, H, M, N)))
        dense = bias > 0
        torch.testing.assert_close(attention(*inputs, dense), attention(*inputs, dense.expand(B, H, M, N)))


def test_hints_change_nothing() -> None:
    inputs = leaves((1, H, M, D), (1, H, M, D), (1, H, M, Dv), grad=False)
    lengths = Lengths(cu(0, 2, 7), cu(0, 2, 7))
    hinted = lengths._replace(max_q=5, max_k=5)
    assert torch.equal(attention(*inputs, lengths=lengths), attention(*inputs, lengths=hinted))


def test_deterministic_mode_gives_the_same() -> None:
    wanted = trained(lambda *inputs: attention(*inputs, "causal"), qkv())
    torch.use_deterministic_algorithms(True)
    try:
        found = trained(lambda *inputs: attention(*inputs, "causal"), qkv())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_dropout_draws_two_words() -> None:
    """What testing.dropout_seed relies on."""
    inputs, seen = qkv(grad=False), testing.dropout_seed(11, torch.device("cpu"))
    torch.manual_seed(11)
    module = importlib.import_module("torch_flash2.attention")
    call = module._call(*inputs, None, None, None, None, None, 0.5, None, None, None)
    assert torch.equal(call.seed, seen)
