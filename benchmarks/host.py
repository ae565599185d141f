"""What a call of scaled_dot_product_attention costs the host, in microseconds; GPU time hides behind nothing here.

    python -m benchmarks.host            # on a GPU
    python -m benchmarks.host --stub     # anywhere: everything but Triton's launcher, on CPU tensors

B1 H8 S128 D64, the least over some rounds of the mean over some calls.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import pstats
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

import torch_flash2
from torch_flash2 import hardware
from torch_flash2.frontends import sdpa

sdp = torch.nn.functional.scaled_dot_product_attention
CALLS, ROUNDS = 300, 15


class Nothing:
    """Stands for a compiled kernel."""

    function, packed_metadata = 0, 0

    def run(self, *arguments: Any) -> None:
        """Launch nothing."""


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """CPU tensors pass for those of an H100, and kernels are not launched."""
    from torch_flash2.kernels.triton import launching

    nothing = Nothing()
    with (
        mock.patch.object(hardware, "of", lambda device: hardware.simulated("sm90")),
        mock.patch.object(launching, "_run", lambda *arguments: nothing),
    ):
        yield


def cost(run: Callable[[], Any], synchronize: Callable[[], None]) -> float:
    """Microseconds of one call."""
    for _ in range(20):
        run()
    best = float("inf")
    for _ in range(ROUNDS):
        synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        best = min(best, (time.perf_counter() - start) / CALLS * 1e6)
    synchronize()
    return best


def rows(device: str) -> Iterator[tuple[str, float]]:
    """Name and microseconds of everything measured."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    plain = [torch.randn(1, 8, 128, 64, device=device, dtype=dtype) for _ in range(3)]
    leaves = [tensor.clone().requires_grad_() for tensor in plain]

    def train(attend: Callable[..., torch.Tensor] = sdp) -> None:
        torch.autograd.grad(attend(*leaves), leaves, plain[0])

    def measured(prefix: str) -> Iterator[tuple[str, float]]:
        yield f"{prefix}, no grad", cost(lambda: sdp(*plain), synchronize)
        yield f"{prefix}, grad", cost(lambda: sdp(*leaves), synchronize)
        yield f"{prefix}, forward and backward", cost(train, synchronize)

    if device == "cuda":
        yield from measured("stock")
    with torch_flash2.enabled("always", device_type=device):
        yield from measured("always")
        if device == "cuda":
            with torch.nn.attention.sdpa_kernel(
                [torch.nn.attention.SDPBackend.CUDNN_ATTENTION, torch.nn.attention.SDPBackend.MATH]
            ):
                yield from measured("passed on (sdpa_kernel)")
    if device == "cuda":
        with mock.patch.object(sdpa.policy, "faster", lambda *arguments: (False, "host benchmark")):
            with torch_flash2.enabled("fastest", device_type=device):
                yield from measured("passed on")
    yield "attention(), no grad", cost(lambda: torch_flash2.attention(*plain), synchronize)
    yield "attention(), grad", cost(lambda: torch_flash2.attention(*leaves), synchronize)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--stub", action="store_true", help="launch nothing, on CPU tensors")
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    arguments = parser.parse_args()
    device = "cpu" if arguments.stub else "cuda"
    profiler = cProfile.Profile()
    with stubbed() if arguments.stub else contextlib.nullcontext():
        if arguments.profile:
            profiler.enable()
        for name, microseconds in rows(device):
            print(f"{name:40s} {microseconds:6.1f} us")
        profiler.disable()
    if arguments.profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(35)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
