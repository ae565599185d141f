"""PyTorch's context_parallel on this library: two processes against one.

B batch, H query heads, G key/value heads, S sequence, D head dim.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from torch_flash2 import UnsupportedError
from torch_flash2.frontends import context_parallel as frontend

if not dist.is_available():
    pytest.skip("torch.distributed is not available", allow_module_level=True)
experimental = pytest.importorskip("torch.distributed.tensor.experimental")
pytestmark = pytest.mark.filterwarnings("ignore")

# rotation, causal, load balancing (which needs causal), key heads.
KINDS = [
    (rotate, causal, balanced, heads_kv)
    for rotate, causal, balanced, heads_kv in itertools.product(
        ("alltoall", "allgather"), (True, False), (True, False), (4, 2)
    )
    if causal or not balanced
]
B, H, D = 2, 4, 32


def inputs_of(heads_kv: int, S: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """query, key, value and the gradient that arrives."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, heads, S, D, generator=generator, dtype=dtype) for heads in (H, heads_kv, heads_kv, H)]


def attend(tensors: list[torch.Tensor], causal: bool) -> list[torch.Tensor]:
    """Output and gradients."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors[:3]]
    # context_parallel replaces the function in this place.
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=True)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


def work(rank: int, world: int, folder: str, device_type: str, S: int, dtype: torch.dtype) -> None:
    """One process: every kind, the whole results saved by the first, with how often our kernels were called."""
    from torch.distributed.tensor.experimental import _attention

    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    mesh = dist.device_mesh.init_device_mesh(device_type, (world,))
    calls: list[Any] = []
    problem = frontend._problem
    frontend._problem = lambda *arguments: calls.append(1) or problem(*arguments)
    frontend.enable()
    found = []
    for rotate, causal, balanced, heads_kv in KINDS:
        _attention.set_rotate_method(rotate)
        inside = frontend._ring()
        inside._cp_options.enable_load_balance = balanced
        whole = [tensor.to(device) for tensor in inputs_of(heads_kv, S, dtype)]
        calls.clear()
        with experimental.context_parallel(mesh, buffers=whole, buffer_seq_dims=[2] * 4):
            assert whole[0].shape[2] == S // world
            results = attend(whole, causal)
            joined = _attention.context_parallel_unshard(mesh, results, [2] * 4)
        found.append(([tensor.cpu() for tensor in joined], len(calls)))
    dist.barrier()
    if rank == 0:
        torch.save(found, f"{folder}/found")
    # gloo's threads now and then abort a process that takes itself apart.
    os._exit(0)


def run(folder: Path, world: int, device_type: str, S: int, dtype: torch.dtype) -> list[Any]:
    torch.multiprocessing.spawn(work, (world, str(folder), device_type, S, dtype), world)
    found: list[Any] = torch.load(folder / "found")
    return found


def hold(found: list[Any], world: int, S: int, dtype: torch.dtype) -> None:
    """Every error against fp64 at most twice that of one process in the same dtype, plus rounding."""
    for (rotate, causal, balanced, heads_kv), (results, calls) in zip(KINDS, found, strict=True):
        tensors = inputs_of(heads_kv, S, dtype)
        exact, plain = attend([tensor.double() for tensor in tensors], causal), attend(tensors, causal)
        names = ("out", "query", "key", "value")
        for name, value, wanted, alone in zip(names, results, exact, plain, strict=True):
            allowed = 2 * (alone - wanted).abs().max() + 4 * torch.finfo(dtype).eps * wanted.abs().max()
            what = f"{rotate}, causal {causal}, balanced {balanced}, {heads_kv} key heads, {name}"
            assert value.dtype == dtype and (value - wanted).abs().max() <= allowed, what
        # Forward and backward, once for each block of keys; the first process skips those that it may not see.
        steps = 1 if causal and not balanced else world
        assert calls == 2 * steps


def test_two_processes(tmp_path: Path) -> None:
    hold(run(tmp_path, 2, "cpu", 48, torch.float32), 2, 48, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("world", [1, 2])
def test_gpus(tmp_path: Path, world: int) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    # Multicast over NVLink is not to be had everywhere.
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    hold(run(tmp_path, world, "cuda", 512, torch.bfloat16), world, 512, torch.bfloat16)


def test_refusals() -> None:
    op = torch.ops.aten._scaled_dot_product_flash_attention.default
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(UnsupportedError, match="dropout_p must be 0, got 0.1"):
        frontend._forward(op, (q, q, q, 0.1), {})
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
    with pytest.raises(UnsupportedError, match="no attention masks and biases"):
        frontend._forward(efficient, (q, q, q, q, True), {})


def test_disable_restores() -> None:
    handlers = frontend._ring().custom_ops
    before = dict(handlers)
    frontend.enable()
    frontend.enable()
    assert frontend.is_enabled() and all(handlers[op] != handler for op, handler in before.items())
    frontend.disable()
    assert not frontend.is_enabled() and handlers == before
