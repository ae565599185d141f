"""The ops `torch.ops.torch_flash2.forward` and `.backward`: the only door between PyTorch and the kernels.

Defined with torch.library.Library: fakes, autograd, autocast, vmap and flop formulas are all here. The arguments are
those of problem.Call, in its order.

B batch, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch

from . import checks, dispatch, flops, problem, settings
from .problem import Call, Gradients, Saved

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? dense, Tensor? bias, Tensor? alibi, Tensor? sinks, Tensor? seed, "
    "Tensor? cu_q, Tensor? cu_k, Tensor? used_q, Tensor? used_k, Tensor? block_table, "
    "str mask, SymInt[] mask_numbers, float scale, float? softcap, float dropout_p, "
    "SymInt? page_size, SymInt? max_q, SymInt? max_k, bool deterministic, str? force, SymInt? num_splits"
)
_SAVED = "Tensor out, Tensor lse, Tensor? grad_out, Tensor? grad_lse, bool[] wanted"

_library = torch.library.Library("torch_flash2", "DEF")
_library.define(f"forward({_ARGUMENTS}) -> (Tensor out, Tensor lse)")
_library.define(
    f"backward({_SAVED}, {_ARGUMENTS}) -> (Tensor query, Tensor key, Tensor value, Tensor bias, Tensor sinks)",
)
_library.define(
    "append(Tensor(a!) key_cache, Tensor(b!)? value_cache, Tensor key, Tensor? value, Tensor used_k, "
    "Tensor? block_table, Tensor? batch_index, Tensor? cos, Tensor? sin, bool interleaved) -> ()"
)
_library.define("rotate(Tensor query, Tensor used_k, Tensor cos, Tensor sin, bool interleaved, bool advance) -> Tensor")
_SAVED_COUNT = len(Saved._fields)


# Problems and plans of calls seen before: building them takes longer than a small kernel.
_seen: dict[Any, tuple[problem.Problem, dispatch.Plan]] = {}
_MOST_SEEN = 4096


def _posed(call: Call, direction: str, bias_grad: bool) -> tuple[problem.Problem, dispatch.Plan]:
    """The Problem and Plan of a call on real tensors."""
    signature = (
        direction,
        bias_grad,
        problem.precision(call),
        problem.value_in_key(call),
        *(
            (value.shape, value.stride(), value.dtype, value.device, value.data_ptr() % 16)
            if isinstance(value, torch.Tensor)
            else (tuple(value) if isinstance(value, list) else value)
            for value in call
        ),
    )
    found = _seen.get(signature)
    if found is None:
        posed = problem.of(call, direction, needs_grad=direction == "backward", bias_grad=bias_grad)
        found = posed, dispatch.select(posed, call.force)
        if len(_seen) >= _MOST_SEEN:
            _seen.clear()
        _seen[signature] = found
    return found


def _forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = Call(*arguments)
    posed, plan = _posed(call, "forward", False)
    if settings.checks():
        checks.check(call)
    with dispatch.unfilled(plan):
        out, lse = plan.module.launch(posed, plan.config, call)
    return out, lse


def _backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    saved, call = _split(arguments)
    posed, plan = _posed(call, "backward", saved.wanted[3])
    with dispatch.unfilled(plan):
        gradients = plan.module.launch(posed, plan.config, call, saved)
    return tuple(call.query.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _split(arguments: tuple[Any, ...]) -> tuple[Saved, Call]:
    return Saved(*arguments[:_SAVED_COUNT]), Call(*arguments[_SAVED_COUNT:])


for _key in ("CPU", "CUDA"):
    _library.impl("forward", _forward, _key)
    _library.impl("backward", _backward, _key)


@torch.library.register_fake("torch_flash2::forward", lib=_library)
def _forward_fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = Call(*arguments)
    problem.validate(call)
    out = call.query.new_empty_strided(*problem.output_like(call))
    return out, call.query.new_empty(call.query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("torch_flash2::backward", lib=_library)
def _backward_fake(*arguments: Any) -> tuple[torch.Tensor, ...]:
    saved, call = _split(arguments)
    tensors = (call.query, call.key, call.value, call.bias, call.sinks)
    gradients = [
        torch.empty_like(t) if want and t is not None else None for t, want in zip(tensors, saved.wanted, strict=True)
    ]
    return tuple(call.query.new_empty(0) if gradient is None else gradient for gradient in gradients)


# Autograd.


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    call = Call(*inputs)
    tensors = [value for value in call if isinstance(value, torch.Tensor)]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *tensors)
    # Tensors go through save_for_backward; their places in the call are kept as `...`.
    ctx.call = tuple(... if isinstance(value, torch.Tensor) else value for value in call)


def _differentiate(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    out, lse, *tensors = ctx.saved_tensors
    stream = iter(tensors)
    call = Call(*(next(stream) if value is ... else value for value in ctx.call))
    wanted = {name: ctx.needs_input_grad[index] for index, name in enumerate(Call._fields)}
    order = [wanted[name] for name in Gradients._fields]
    if wanted["alibi"]:
        raise NotImplementedError("alibi_slopes has no gradient; detach it, or pass slopes * distance as bias=")
    found: dict[str, Any] = {}
    if grad_out is not None or grad_lse is not None:
        results = torch.ops.torch_flash2.backward(out, lse, grad_out, grad_lse, order, *call)
        found = {name: g for name, g, want in zip(Gradients._fields, results, order, strict=True) if want}
    return tuple(found.get(name) for name in Call._fields)


def _no_double_backward(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "torch_flash2 has no double backward yet; for gradients of gradients compute this attention with "
        "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
    )


torch.library.register_autograd("torch_flash2::forward", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("torch_flash2::backward", _no_double_backward, lib=_library)


# Autocast: query, key and value go to the autocast dtype; scores, slopes, sinks and biases stay as they are.


def _autocast(device_type: str) -> Any:
    key = getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}")
    exclude = torch._C.DispatchKeySet(key)

    def cast(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        call = Call(*arguments)
        dtype = torch.get_autocast_dtype(device_type)
        if call.query.dtype != torch.float64:
            call = call._replace(query=call.query.to(dtype), key=call.key.to(dtype), value=call.value.to(dtype))
        if call.bias is not None and call.bias.dtype not in (torch.float32, call.query.dtype):
            call = call._replace(bias=call.bias.to(call.query.dtype))
        with torch._C._ExcludeDispatchKeyGuard(exclude):
            result: tuple[torch.Tensor, torch.Tensor] = torch.ops.torch_flash2.forward(*call)
        return result

    return cast


def _keep_dtypes(device_type: str) -> Any:
    """The backward computes in its inputs' dtypes, whatever autocast says."""
    exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))

    def run(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(exclude):
            return torch.ops.torch_flash2.backward(*arguments)

    return run


_library.impl("backward", _keep_dtypes("cuda"), "AutocastCUDA")
_library.impl("backward", _keep_dtypes("cpu"), "AutocastCPU")
_library.impl("forward", _autocast("cuda"), "AutocastCUDA")
_library.impl("forward", _autocast("cpu"), "AutocastCPU")


# vmap: a batched query, key and value fold into the batch; anything else runs entry by entry.


@torch.library.register_vmap("torch_flash2::forward", lib=_library)
def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    call, dims, size = Call(*arguments), Call(*in_dims), info.batch_size
    packed = any(
        getattr(call, name) is not None for name in ("cu_q", "cu_k", "used_q", "used_k", "block_table", "seed")
    )
    mapped = [name for name in Call._fields if isinstance(getattr(dims, name), int)]
    per_batch = {name for name in ("dense", "bias") if getattr(call, name) is not None}
    if packed or per_batch or any(name not in ("query", "key", "value") for name in mapped):
        results = [torch.ops.torch_flash2.forward(*_entry(call, dims, index)) for index in range(size)]
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0, 0)
    folded = {}
    for name in ("query", "key", "value"):
        tensor, dim = getattr(call, name), getattr(dims, name)
        tensor = tensor.movedim(dim, 0) if dim is not None else tensor.expand(size, *tensor.shape)
        folded[name] = tensor.flatten(0, 1)
    out, lse = torch.ops.torch_flash2.forward(*call._replace(**folded))
    return (out.unflatten(0, (size, -1)), lse.unflatten(0, (size, -1))), (0, 0)


def _entry(call: Call, dims: Call, index: int) -> list[Any]:
    pairs: list[tuple[Any, Any]] = list(zip(call, dims, strict=True))
    return [
        value.select(dim, index) if isinstance(dim, int) and isinstance(value, torch.Tensor) else value
        for value, dim in pairs
    ]


# Caches.


def _cache_module(tensor: torch.Tensor) -> Any:
    return importlib.import_module(".kernels.triton.append" if tensor.is_cuda else ".kernels.append", __package__)


def _rotary(cos: torch.Tensor | None, sin: torch.Tensor | None, interleaved: bool) -> problem.Rotary | None:
    return None if cos is None or sin is None else problem.Rotary(cos, sin, interleaved)


def _append(*arguments: Any) -> None:
    *tensors, cos, sin, interleaved = arguments
    call = problem.Append._make([*tensors, _rotary(cos, sin, interleaved)])
    _cache_module(call.key).launch(call)


def _rotate(query: Any, used_k: Any, cos: Any, sin: Any, interleaved: bool, advance: bool) -> torch.Tensor:
    out: torch.Tensor = _cache_module(query).rotate(query, used_k, _rotary(cos, sin, interleaved), advance)
    return out


@torch.library.register_fake("torch_flash2::append", lib=_library)
def _append_fake(*arguments: Any) -> None:
    """It writes into its arguments alone."""


@torch.library.register_fake("torch_flash2::rotate", lib=_library)
def _rotate_fake(query: torch.Tensor, *arguments: Any) -> torch.Tensor:
    B, H, S, D = query.shape
    return query.new_empty(B, S, H, D).transpose(1, 2)


for _key in ("CPU", "CUDA"):
    _library.impl("append", _append, _key)
    _library.impl("rotate", _rotate, _key)


flops.register_when_imported()


def plans(call: Call, needs_grad: bool, bias_grad: bool) -> list[dispatch.Plan]:
    """What would run: the forward's plan and, where gradients are needed, the backward's."""
    posed = problem.of(call, needs_grad=needs_grad, bias_grad=bias_grad)
    found = [dispatch.select(posed, call.force)]
    if needs_grad:
        found.append(dispatch.select(dataclasses.replace(posed, direction="backward"), call.force))
    return [
        dataclasses.replace(plan, problem=dataclasses.replace(posed, direction=plan.problem.direction))
        for plan in found
    ]
