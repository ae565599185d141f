"""The short way from a call on plain tensors to its kernels, past PyTorch's dispatcher.

A Route is what calls of one signature share: sizes, strides, dtypes, alignment and every argument that is not a tensor.
It holds the plan of the forward, those of the backwards seen, and what their kernels recorded of a launch. Calls that
something looks at while they run (tracing, modes, transforms, tensor subclasses) go through the op instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import dispatch, problem, settings
from .problem import Call, Gradients, Saved

# How many fields of a Call, the first, are tensors.
TENSORS = Call._fields.index("mask")
MOST_ROUTES = 4096
_GRADIENTS = tuple(Call._fields.index(name) for name in Gradients._fields)
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# Tensors or None, in the order of Call.
Tensors = tuple[Any, ...]


def unwatched() -> bool:
    """Whether no mode, transform or tracer wants to see the ops that run now."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and not torch._C._is_tracing()
    )


def plain(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether these are tensors and nothing more."""
    return all(tensor is None or type(tensor) in _PLAIN for tensor in tensors)


def signature(tensors: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    """What a route depends on in its tensors."""
    return tuple(
        [
            None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16)
            for t in tensors
        ]
    )  # fmt: skip


class _Run:
    """One direction of a route: its plan, and how to launch it."""

    def __init__(self, posed: problem.Problem, plan: dispatch.Plan):
        self._posed, self._plan = posed, plan
        self._module = plan.module
        self._record: Callable[..., Any] | None = getattr(self._module, "record", None)
        self._recording: Any = None
        self._called = False

    def __call__(self, tensors: Tensors, call: Callable[[], Call], *extra: Saved) -> Any:
        if torch.are_deterministic_algorithms_enabled():
            with dispatch.unfilled(self._plan):
                return self._launch(tensors, call, *extra)
        return self._launch(tensors, call, *extra)

    def _launch(self, tensors: Tensors, call: Callable[[], Call], *extra: Saved) -> Any:
        recording = self._recording
        if recording is not None and recording.usable():
            return recording(tensors)
        # Many signatures are called once (of a cache that grows with every token): the second call is recorded.
        first, self._called = not self._called, True
        if first or self._record is None or recording is not None:
            return self._module.launch(self._posed, self._plan.config, call(), *extra)
        result, self._recording = self._record(self._posed, self._plan.config, call(), *extra)
        if self._recording is None:
            # What cannot be recorded once is not tried again.
            self._record = None
        return result


class Route:
    """Calls of one signature, on plain tensors.

    Raises:
        TypeError, ValueError: an argument breaks the rule that the message names.
        UnsupportedError: no kernel can run the forward.
    """

    def __init__(self, call: Call):
        self._rest: tuple[Any, ...] = call[TENSORS:]
        posed = problem.of(call)
        self._forward = _Run(posed, dispatch.select(posed, call.force))
        self._backwards: dict[Any, _Run] = {}

    def forward(self, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """Out and lse; not differentiable."""
        found: tuple[torch.Tensor, torch.Tensor] = self._forward(tensors, lambda: Call(*tensors, *self._rest))
        return found

    def attend(self, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """Out and lse, differentiable."""
        found: tuple[torch.Tensor, torch.Tensor] = _Attention.apply(self, *tensors)
        return found

    def through_op(self, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """Out and lse, by the op."""
        found: tuple[torch.Tensor, torch.Tensor] = torch.ops.torch_flash2.forward(*tensors, *self._rest)
        return found

    def backward(self, tensors: Tensors, saved: Saved) -> Gradients:
        """The gradients of a call."""
        inputs = (*tensors, saved.out, saved.lse, saved.grad_out, saved.grad_lse)
        key = (saved.wanted, signature(inputs))
        run = self._backwards.get(key)
        if run is None:
            call = Call(*tensors, *self._rest)
            posed = problem.of(call, "backward", needs_grad=True, bias_grad=saved.wanted[3])
            run = _Run(posed, dispatch.select(posed, call.force))
            if len(self._backwards) >= MOST_ROUTES:
                self._backwards.clear()
            self._backwards[key] = run
        found: Gradients = run(inputs, lambda: Call(*tensors, *self._rest), saved)
        return found


class _Attention(torch.autograd.Function):
    """A route's forward and backward under autograd; double backward goes through the op, which refuses it."""

    @staticmethod
    def forward(ctx: Any, route: Route, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = route.forward(tensors)
        ctx.save_for_backward(out, lse, *tensors)
        ctx.set_materialize_grads(False)
        ctx.route = route
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        grad_out, grad_lse = gradients
        found: list[torch.Tensor | None] = [None] * (TENSORS + 1)
        if grad_out is None and grad_lse is None:
            return tuple(found)
        out, lse, *rest = ctx.saved_tensors
        tensors, route = tuple(rest), ctx.route
        wanted = tuple([ctx.needs_input_grad[index + 1] for index in _GRADIENTS])
        saved = Saved(out, lse, grad_out, grad_lse, wanted)
        autocast = torch.is_autocast_enabled(out.device.type)
        watched = autocast or torch.is_grad_enabled() or not unwatched()
        if not watched and plain((*tensors, out, grad_out, grad_lse)):
            results: Sequence[Any] = route.backward(tensors, saved)
        else:
            call = Call(*tensors, *route._rest)
            results = torch.ops.torch_flash2.backward(out, lse, grad_out, grad_lse, list(wanted), *call)
        for index, gradient, want in zip(_GRADIENTS, results, wanted, strict=True):
            if want:
                found[index + 1] = gradient
        return tuple(found)


def _direct(call: Call) -> bool:
    """Whether the op would do nothing more for a call."""
    tensors: Tensors = call[:TENSORS]
    return (
        plain(tensors)
        and not settings.checks()
        and unwatched()
        and not torch.is_autocast_enabled(call.query.device.type)
        and not (call.alibi is not None and call.alibi.requires_grad)
    )


_routes: dict[Any, Route] = {}


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse of a call, differentiable: by a route where nothing looks, else by the op."""
    tensors: Tensors = call[:TENSORS]
    if torch.compiler.is_compiling() or not _direct(call):
        found: tuple[torch.Tensor, torch.Tensor] = torch.ops.torch_flash2.forward(*call)
        return found
    numbers, rest = tuple(call.mask_numbers), call[TENSORS + 2 :]
    key = (signature(tensors), call.mask, numbers, rest, problem.precision(call), problem.value_in_key(call))
    route = _routes.get(key)
    if route is None:
        if len(_routes) >= MOST_ROUTES:
            _routes.clear()
        route = _routes[key] = Route(call)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return route.attend(tensors)
    return route.forward(tensors)
