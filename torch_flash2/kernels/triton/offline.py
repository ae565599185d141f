"""Compiling kernels for a GPU that is not here: what CI proves on a machine without one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from ...problem import Call, Problem, Saved
from . import launching


class _Driver:
    """Stands for a GPU while kernels are compiled; nothing is ever launched on it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps one cache of kernels for each device: an architecture is a device here.
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _driver(capability: int) -> Iterator[None]:
    config = triton.runtime.driver
    try:
        previous = config.active
    except RuntimeError:  # no GPU here: there is none to go back to
        previous = None
    config.set_active(_Driver(capability))
    try:
        yield
    finally:
        config.set_active(previous)


def on_meta(call: Call) -> Call:
    """The call with its tensors on the meta device: shapes, strides and dtypes without data."""
    return Call(*(_meta(value) if isinstance(value, torch.Tensor) else value for value in call))


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def compile_call(module: Any, problem: Problem, config: Any, call: Call) -> list[Any]:
    """Every kernel that `module.launch` would launch for a call, compiled for problem.hardware; each has metadata and
    asm."""
    major, minor = problem.hardware.capability
    compiled: list[Any] = []

    def handler(kernel: Any, grid: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        compiled.append(kernel.warmup(*arguments, grid=grid, **options))

    call = on_meta(call)
    extra: tuple[Any, ...] = ()
    if problem.direction == "backward":
        B, H, M, _ = call.query.shape
        out = call.query.new_empty(B, M, H, call.value.shape[3]).transpose(1, 2)
        lse = call.query.new_empty(B, H, M, dtype=torch.float32)
        extra = (Saved(out, lse, out, None, (True, True, True, problem.bias_grad, call.sinks is not None)),)
    with _driver(major * 10 + minor), launching.instead(handler):
        module.launch(dataclasses.replace(problem), config, call, *extra)
    return compiled
