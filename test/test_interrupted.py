"""Results while other processes share the GPU, which then interrupts kernels in the middle and resumes them.

Kernels that kept a barrier nobody used had that barrier written over a tile when they were resumed: NaN in gradients,
and illegal accesses, beside any other process and never alone (H200, driver 580, 2026-11-21).
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import compile_all
import pytest
import torch

import torch_flash2
from torch_flash2 import Lengths

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

# Products that take about a millisecond each, until the pipe closes.
OTHER = """
import select, sys
import torch
a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    for _ in range(10):
        a @ a
    torch.cuda.synchronize()
"""
# A time slice was about 2.3 ms long: kernels begin at different distances from its end, in cycles of the GPU.
PAUSES = [int(0.3e6 * i) for i in range(12)]


# What one kernel is called with: results of the same bits each time, but for one, whose number is `close`.
Repeated = tuple[Callable[[], Any], int | None]


@contextlib.contextmanager
def busy_gpu() -> Iterator[None]:
    """Two other processes keep the GPU busy. One test at a time, for meanwhile all are slow."""
    # Windows has none; it has no GPU tests either.
    import fcntl

    with (Path(tempfile.gettempdir()) / "torch_flash2-busy-gpu").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        processes = [
            subprocess.Popen([sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        try:
            for process in processes:
                assert process.stdout is not None and process.stdout.readline() == "ready\n"
            yield
        finally:
            for process in processes:
                process.communicate("\n", timeout=60)


def same_each_time(calls: dict[str, Repeated]) -> None:
    """The results of each call are the same after every pause."""
    # Compiled, and computed once, while nothing else is in the way.
    firsts = {name: call() for name, (call, _) in calls.items()}
    torch.cuda.synchronize()
    with busy_gpu():
        for name, (call, close) in calls.items():
            for pause in PAUSES:
                torch.cuda.synchronize()
                torch.cuda._sleep(pause)
                for i, (found, expected) in enumerate(zip(call(), firsts[name], strict=True)):
                    if i == close:
                        error = float((found - expected).float().norm() / expected.float().norm())
                        assert error < 1e-3, (name, i, pause)
                    else:
                        assert torch.equal(found, expected), (name, i, pause)


def gradients(
    inputs: list[torch.Tensor], grad: torch.Tensor, mask: str | None, kernel: str, config: dict[str, Any] | None
) -> Any:
    with torch_flash2.force(kernel, config):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, lse = torch_flash2.attention(*leaves, mask, return_lse=True)
        torch.cuda.synchronize()
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def attended(inputs: list[torch.Tensor], mask: str | None, kernel: str) -> Any:
    with torch_flash2.force(kernel), torch.no_grad():
        return torch_flash2.attention(*inputs, mask, return_lse=True)


@pytest.mark.parametrize("kernel", compile_all.KERNELS)
def test_forward_and_backward(kernel: str) -> None:
    name, _, sums = kernel.partition("-")
    found = compile_all.SUMS.get(kernel)
    config = found and found.config
    if name == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a Hopper kernel")
    calls: dict[str, Repeated] = {}
    for head_dim in (dim for dim in (64, 128, 256) if found is None or found.takes(dim)):
        shape = 2, 768 // head_dim, 8192, head_dim
        inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        for mask in (None, "causal"):
            backward = gradients(inputs, torch.randn_like(inputs[0]), mask, name, config)
            calls[f"backward {head_dim} {mask}"] = backward, 0 if sums in ("atomics", "carried") else None
            if not sums:
                calls[f"forward {head_dim} {mask}"] = functools.partial(attended, inputs, mask, name), None
    same_each_time(calls)


@pytest.mark.parametrize("kernel", ["decode", "latent"])
def test_decode(kernel: str) -> None:
    if kernel == "latent" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a Hopper kernel")
    B, heads, D = (192, 128, 576) if kernel == "latent" else (64, 32, 128)
    options: dict[str, Any] = dict(device="cuda", dtype=torch.bfloat16)
    query = torch.randn(B, 1, heads, D, **options).transpose(1, 2)
    key = torch.randn(B, 8192, 1 if kernel == "latent" else 8, D, **options).transpose(1, 2)
    value = key[..., :512] if kernel == "latent" else torch.randn_like(key)
    lengths = Lengths(used_k=torch.full((B,), 8192, device="cuda", dtype=torch.int32))

    def call() -> Any:
        with torch_flash2.force(kernel), torch.no_grad():
            return torch_flash2.attention(query, key, value, lengths=lengths, return_lse=True)

    same_each_time({kernel: (call, None)})
