"""PyTorch's registry of flash attention: aten's flash ops on this library's kernels.

B batch, H query heads, G key/value heads, M query rows, N keys, T rows of all documents, D head dim.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import torch_flash2
from torch_flash2 import Lengths
from torch_flash2.frontends import registry

aten = torch.ops.aten
B, H, G, M, D = 2, 4, 2, 20, 16


@pytest.fixture
def active() -> Iterator[None]:
    overrides = registry.Overrides("CPU")
    try:
        yield
    finally:
        overrides.remove()


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape) for shape in shapes]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("N", [20, 30])
def test_sdpa_ops(active: None, N: int, dropout_p: float) -> None:
    query, key, value, grad = tensors((B, H, M, D), (B, G, N, D), (B, G, N, D), (B, H, M, D))
    torch.manual_seed(0)
    found = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, True, scale=0.3)
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    torch.manual_seed(0)
    out, lse = torch_flash2.attention(*leaves, "causal @ bottom-right", scale=0.3, dropout_p=dropout_p, return_lse=True)
    assert torch.equal(found[0], out) and torch.equal(found[1], lse) and found[4:6] == (M, N)
    gradients = aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, *found[:6], dropout_p, True, *found[6:8], scale=0.3
    )
    for one, other in zip(gradients, torch.autograd.grad(out, leaves, grad), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("window", [(-1, -1), (3, 0), (4, 2)])
def test_packed_ops(active: None, window: tuple[int, int]) -> None:
    edges = torch.tensor([0, 7, 7, 20], dtype=torch.int32)
    query, key, value, grad = tensors((20, H, D), (20, G, D), (20, G, D), (20, H, D))
    options = dict(window_size_left=window[0], window_size_right=window[1])
    found = aten._flash_attention_forward(
        query, key, value, edges, edges, 13, 13, 0.0, window == (-1, -1), False, scale=0.3, **options
    )
    mask = "causal" if window == (-1, -1) else f"window{window}"
    leaves = [t.transpose(0, 1)[None].clone().requires_grad_() for t in (query, key, value)]
    out, lse = torch_flash2.attention(
        *leaves, f"{mask} @ bottom-right", scale=0.3, lengths=Lengths(edges, edges), return_lse=True
    )
    torch.testing.assert_close(found[0], out[0].transpose(0, 1))
    assert found[1].shape == (H, 20)
    torch.testing.assert_close(found[1], lse[0])
    gradients = aten._flash_attention_backward(
        grad, query, key, value, *found[:2], edges, edges, 13, 13, 0.0, window == (-1, -1), *found[2:4],
        scale=0.3, **options,
    )  # fmt: skip
    wanted = torch.autograd.grad(out, leaves, grad.transpose(0, 1)[None])
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other[0].transpose(0, 1))


# Of torch 2.11's own compiler, on Python 3.12.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_varlen_attn(device: str) -> None:
    """PyTorch's own function of packed documents, compiled too: causal ones, windows, and their gradients."""
    from torch.nn.attention.varlen import varlen_attn

    torch._dynamo.reset()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    edges = torch.tensor([0, 7, 7, 20], dtype=torch.int32, device=device)
    query, key, value, grad = (t.to(device, dtype) for t in tensors(*[(20, H, D)] * 4))
    bound: dict[str, Any] = {} if device == "cpu" else dict(atol=2e-2, rtol=2e-2)
    overrides = registry.Overrides(device.upper())
    try:
        for size, mask in (((-1, 0), "causal"), ((3, 0), "window(3, 0)"), ((-1, -1), "full")):
            packed = [t.clone().requires_grad_() for t in (query, key, value)]
            compiled = torch.compile(varlen_attn, backend="aot_eager") if size == (3, 0) else varlen_attn
            with mock.patch.object(registry.direct, "run", wraps=registry.direct.run) as run:
                out = compiled(*packed, edges, edges, 13, 13, window_size=size)
            assert run.call_count == 1
            leaves = [t.transpose(0, 1)[None].clone().requires_grad_() for t in (query, key, value)]
            wanted = torch_flash2.attention(*leaves, f"{mask} @ bottom-right", lengths=Lengths(edges, edges))
            torch.testing.assert_close(out, wanted[0].transpose(0, 1), **bound)
            gradients = torch.autograd.grad(wanted, leaves, grad.transpose(0, 1)[None])
            for one, other in zip(torch.autograd.grad(out, packed, grad), gradients, strict=True):
                torch.testing.assert_close(one, other[0].transpose(0, 1), **bound)
    finally:
        overrides.remove()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_varlen_attn_on_pages(device: str) -> None:
    """New rows of sequences whose keys lie in pages, in one piece and in two splits."""
    from torch.nn.attention.varlen import varlen_attn

    if "block_table" not in inspect.signature(varlen_attn).parameters:
        pytest.skip(f"varlen_attn of torch {torch.__version__} has no pages")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    query, key, value = (t.to(device, dtype) for t in tensors((5, H, D), (6, 256, G, D), (6, 256, G, D)))
    bound: dict[str, Any] = {} if device == "cpu" else dict(atol=2e-2, rtol=2e-2)
    edges = torch.tensor([0, 1, 5], dtype=torch.int32, device=device)
    used, table = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([300, 41], [[4, 1], [2, 0]]))
    overrides = registry.Overrides(device.upper())
    try:
        for splits in (None, 1, 2):
            with mock.patch.object(registry.direct, "run", wraps=registry.direct.run) as run:
                found = varlen_attn(
                    query, key, value, edges, None, 4, 512, window_size=(-1, 0), enable_gqa=True, seqused_k=used,
                    block_table=table, num_splits=splits,
                )  # fmt: skip
            assert run.call_args.args[0].num_splits == splits
            for b, count in enumerate(used.tolist()):
                part = query[edges[b] : edges[b + 1]].transpose(0, 1)[None]
                rows = [t[table[b].long()].flatten(0, 1)[:count].transpose(0, 1)[None] for t in (key, value)]
                wanted = torch_flash2.attention(part, *rows, "causal @ bottom-right")[0].transpose(0, 1)
                torch.testing.assert_close(found[edges[b] : edges[b + 1]], wanted, **bound)
    finally:
        overrides.remove()


def test_dense_op_and_in_place(active: None) -> None:
    query, key, value = tensors((B, M, H, D), (B, M, G, D), (B, M, G, D))
    found = aten._flash_attention_forward(query, key, value, None, None, M, M, 0.0, True, False)
    wanted = torch_flash2.attention(*(t.transpose(1, 2) for t in (query, key, value)), "causal")
    torch.testing.assert_close(found[0], wanted.transpose(1, 2))
    if hasattr(aten, "_flash_attention_forward_no_dropout_inplace"):
        out = torch.empty_like(query)
        lse = aten._flash_attention_forward_no_dropout_inplace(
            out, query, key, value, None, None, M, M, 0.0, True, False
        )
        assert torch.equal(out, found[0]) and torch.equal(lse, found[1])


def test_what_it_does_not_have_is_refused(active: None) -> None:
    query = torch.randn(B, M, H, D)
    with pytest.raises(torch_flash2.UnsupportedError, match="no debug mask"):
        aten._flash_attention_forward(query, query, query, None, None, M, M, 0.0, False, True)


def test_activation() -> None:
    """Twice, in a process of its own; importing activates nothing."""
    code = """
import torch, torch.nn.attention as attention, torch_flash2
assert "torch_flash2" in attention.list_flash_attention_impls()
assert attention.current_flash_attention_impl() is None
for _ in range(2):
    attention.activate_flash_attention_impl("torch_flash2")
    assert attention.current_flash_attention_impl() == "torch_flash2"
    attention.restore_flash_attention_impl()
    assert attention.current_flash_attention_impl() is None
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_aten_is_itself_again_afterwards() -> None:
    query = torch.randn(B, H, M, D)
    registry.Overrides("CPU").remove()
    with pytest.raises(NotImplementedError):
        aten._scaled_dot_product_flash_attention(query, query, query)
