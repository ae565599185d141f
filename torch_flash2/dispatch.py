"""Dispatch: which kernel runs a Problem, with the reasons of every kernel passed over.

A kernel is a module with four names:

    why_not(problem) -> Iterator[str]       reasons why it cannot run the problem; none: it can
    config(problem) -> Config               the configuration that it would use; a NamedTuple or None
    candidates(problem) -> Iterator[Config] what is worth measuring
    launch(problem, config, call, ...)      run it

and, where it has them, more:

    rather_not(problem) -> Iterator[str]    why it leaves to a later kernel what it could run; unless forced
    forbids(problem, config) -> Iterator[str]  what the problem does not allow in a forced config
    record(problem, config, call, ...)      run it, and record the launch for calls alike

Kernels are named by string and imported on first use.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import json
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.utils.deterministic

from . import settings
from .problem import Problem

# In order of preference; a kernel is a name and, per direction that it has, a module.
KERNELS: dict[str, dict[str, str]] = {
    "latent": {"forward": "kernels.hopper.latent"},
    "decode": {"forward": "kernels.triton.decode"},
    "hopper": {"forward": "kernels.hopper.forward", "backward": "kernels.hopper.backward"},
    "triton": {"forward": "kernels.triton.forward", "backward": "kernels.triton.backward"},
    "cpu": {"forward": "kernels.cpu", "backward": "kernels.cpu"},
    "reference": {"forward": "kernels.reference", "backward": "kernels.reference"},
}
_WRITES_ALL = ("latent", "decode", "hopper", "triton")


class UnsupportedError(RuntimeError):
    """No kernel can run the call; the text has every kernel's reasons."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A kernel, its configuration, and why the kernels before it were passed over."""

    problem: Problem
    kernel: str
    config: Any
    rejected: tuple[tuple[str, tuple[str, ...]], ...] = ()
    forced: bool = False

    @property
    def module(self) -> ModuleType:
        return kernel(self.kernel, self.problem.direction)

    def __str__(self) -> str:
        lines = [self.problem.describe(), f"  runs on {self.kernel}" + (" (forced)" if self.forced else "")]
        if self.config is not None:
            settings_shown = ", ".join(f"{name}={value}" for name, value in self.config._asdict().items())
            lines.append(f"  config: {settings_shown}")
        lines += [f"  copies: {copy}" for copy in copies(self.problem, self.kernel)]
        lines += [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.rejected]
        return "\n".join(lines)


@functools.cache
def kernel(name: str, direction: str) -> ModuleType:
    """The module of a kernel.

    Raises:
        ValueError: no kernel has that name.
        ImportError: it needs a package that is not there.
    """
    if name not in KERNELS:
        raise ValueError(f"no kernel is called {name!r}; known are {', '.join(KERNELS)}")
    return importlib.import_module(f".{KERNELS[name][direction]}", __package__)


def why_not(name: str, problem: Problem) -> tuple[str, ...]:
    """Why a kernel cannot run the problem; empty where it can."""
    if name in KERNELS and problem.direction not in KERNELS[name]:
        return (f"it has no {problem.direction}",)
    try:
        module = kernel(name, problem.direction)
    except ImportError as error:
        return (f"it needs a package that is not installed: {error}",)
    return tuple(module.why_not(problem))


def copies(problem: Problem, name: str) -> tuple[str, ...]:
    """The copies that a kernel makes of its inputs."""
    return tuple(getattr(kernel(name, problem.direction), "copies", lambda problem: ())(problem))


_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("torch_flash2_force", default=None)


@contextlib.contextmanager
def force(kernel: str, config: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Run calls inside the block, and their backward, on one kernel; raise UnsupportedError where it cannot.

    Args:
        kernel: "latent", "decode", "hopper", "triton", "cpu" or "reference".
        config: fields of the kernel's configuration to override, for example {"BLOCK_M": 64}; those that a direction
        does not have
            are left to the other. A compiled function keeps the choice of the moment in which it was traced.

    Raises:
        ValueError: no kernel has that name.
    """
    if kernel not in KERNELS:
        raise ValueError(f"no kernel is called {kernel!r}; known are {', '.join(KERNELS)}")
    token = _forced.set(encode_force(kernel, config))
    try:
        yield
    finally:
        _forced.reset(token)


def encode_force(kernel: str, config: Mapping[str, Any] | None) -> str:
    """A forced kernel and config as the text that travels through the ops."""
    return f"{kernel} {json.dumps(dict(config), sort_keys=True)}" if config else kernel


def forced() -> str | None:
    """The choice that `force` or TORCH_FLASH2_KERNEL makes here, as the text that travels through the ops."""
    return _forced.get() or settings.forced_kernel()


# What torch.compiler.assume_constant_result does: a compiled function keeps the choice of the moment in which it was
# traced. The decorator itself would import torch._dynamo, one second, with this package.
forced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _override(config: Any, chosen: Mapping[str, Any]) -> Any:
    """The config with those fields of `chosen` that it has; a mapping overrides fields of a part, where there is
    one."""
    parts: dict[str, Any] = {}
    for name, value in chosen.items():
        part = getattr(config, name, None)
        if name in config._fields and not (isinstance(value, Mapping) and part is None):
            parts[name] = _override(part, value) if isinstance(value, Mapping) else value
    return config._replace(**parts)


def _optional(name: str, function: str, problem: Problem, *config: Any) -> tuple[str, ...]:
    """The reasons that a kernel's optional function gives; none where it has no such function."""
    return tuple(getattr(kernel(name, problem.direction), function, lambda *_: ())(problem, *config))


def select(problem: Problem, force: str | None = None) -> Plan:
    """The plan for a problem: the first kernel that can run it, or the forced one.

    Raises:
        UnsupportedError: none can; the text has every kernel's reasons.
    """
    plan = _select(problem.key, force)
    if not plan.kernel:
        lines = "\n".join(f"  {candidate}: {'; '.join(reasons)}" for candidate, reasons in plan.rejected)
        raise UnsupportedError(f"no kernel can run this call: {problem.describe()}\n{lines}")
    return plan


@functools.lru_cache(maxsize=4096)
def _select(problem: Problem, force: str | None) -> Plan:
    """The plan; its kernel is "" where none can run the problem."""
    name, _, overrides = (force or "").partition(" ")
    rejected: list[tuple[str, tuple[str, ...]]] = []
    for candidate in [name] if name else KERNELS:
        reasons = why_not(candidate, problem)
        if candidate == "reference" and not name:
            reasons = ("it runs only when forced: its memory grows with M * N",)
        elif not (reasons or name):
            reasons = _optional(candidate, "rather_not", problem)
        if not reasons:
            config = kernel(candidate, problem.direction).config(problem)
            if overrides and config is not None:
                config = _override(config, json.loads(overrides))
                reasons = _optional(candidate, "forbids", problem, config)
            if not reasons:
                return Plan(problem, candidate, config, tuple(rejected), bool(name))
        rejected.append((candidate, reasons))
    return Plan(problem, "", None, tuple(rejected), bool(name))


@contextlib.contextmanager
def unfilled(plan: Plan) -> Iterator[None]:
    """In this block new tensors are not filled, as PyTorch fills them where deterministic algorithms are on: up to a
    fifth of a short backward's time. The kernels of Triton and Gluon write every element of what they return. Packed
    documents are left out: rows behind the last belong to nobody, and nobody writes them. The switch is the process's
    own, so that a tensor which another thread makes meanwhile is not filled either."""
    switch: Any = torch.utils.deterministic
    whole = plan.kernel in _WRITES_ALL and not (plan.problem.packed_q or plan.problem.packed_k)
    if not (whole and torch.are_deterministic_algorithms_enabled() and switch.fill_uninitialized_memory):
        yield
        return
    switch.fill_uninitialized_memory = False
    try:
        yield
    finally:
        switch.fill_uninitialized_memory = True
