"""torch.distributed's context_parallel on this library's kernels: `enable()`, and nothing else changes.

context_parallel shards the sequence, catches the aten op that scaled_dot_product_attention has chosen, and runs that op
once for each block of keys that comes round. Here the same ring runs torch_flash2's forward and backward instead,
whichever op was chosen: PyTorch's rotation, load balancing and merging stay. On CPU tensors, whose op context_parallel
does not know, this is what makes it work.

B batch, H query heads, G key/value heads, M query rows of one rank, N keys of one rank, D head dim of query and key,
Dv head dim of value.
"""

from __future__ import annotations

from typing import Any

import torch

from ..attention import _call
from ..dispatch import UnsupportedError
from ..problem import Call

_OPS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)
_SEQUENCE = 2
# What context_parallel did with each op before.
_before: dict[Any, Any] = {}


def enable() -> None:
    """From now on every context_parallel of this process runs on this library's kernels.

    It holds for contexts that are entered later. Dropout and attention masks are refused: the ring has neither.

    Raises:
        UnsupportedError: this PyTorch has no context_parallel, or one whose inside is not known.
    """
    handlers = _ring().custom_ops
    if _before:
        return
    for name in _OPS:
        for full_name, handler in ((name, _forward), (f"{name}_backward", _backward)):
            op = getattr(torch.ops.aten, full_name).default
            _before[op] = handlers.get(op)
            handlers[op] = handler


def disable() -> None:
    """Undo `enable`, for contexts that are entered later."""
    handlers = _ring().custom_ops
    for op, handler in _before.items():
        if handler is None:
            handlers.pop(op, None)
        else:
            handlers[op] = handler
    _before.clear()


def is_enabled() -> bool:
    """Whether context_parallel runs on this library's kernels."""
    return bool(_before)


def _ring() -> Any:
    """PyTorch's implementation."""
    try:
        from torch.distributed.tensor.experimental._context_parallel import _attention

        for name in ("custom_ops", "_templated_ring_attention", "_templated_ring_attention_backward"):
            getattr(_attention, name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"context_parallel of torch {torch.__version__} cannot be used: {error}; torch 2.11 to 2.15 are known"
        ) from error
    return _attention


def _arguments(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an aten attention op by name."""
    found = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs
    if found.get("dropout_p"):
        raise UnsupportedError(f"context_parallel has no dropout: dropout_p must be 0, got {found['dropout_p']}")
    if found.get("attn_bias") is not None or found.get("attn_mask") is not None:
        raise UnsupportedError("context_parallel has no attention masks and biases but is_causal")
    return found


def _local(found: dict[str, Any], *names: str) -> list[torch.Tensor]:
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in (found[name] for name in names)]


def _problem(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: Any) -> Call:
    scores = (None, None, None, None, 0.0, scale)
    return _call(query, key, value, "causal" if is_causal else None, *scores, None, None)


def _forward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The handler of a forward op: its outputs, of which only out and logsumexp are more than placeholders."""
    from torch.distributed.tensor import DTensor

    found = _arguments(op, args, kwargs)
    placed, scale = found["query"], found.get("scale")

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = torch.ops.torch_flash2.forward(*_problem(query, key, value, is_causal, scale))
        return out, lse

    group = placed.device_mesh.get_group()
    is_causal = found.get("is_causal", False)
    out, lse = _ring()._templated_ring_attention(
        group, _SEQUENCE, attend, *_local(found, "query", "key", "value"), is_causal=is_causal
    )
    out, lse = (DTensor.from_local(x, placed.device_mesh, placed.placements, run_check=False) for x in (out, lse))
    rest = (out.to_local().new_empty(0) if "Tensor" in str(x.type) else 0 for x in op._schema.returns[2:])
    return out, lse, *rest


def _backward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The handler of a backward op: the gradients of query, key and value, and None for a bias."""
    from torch.distributed.tensor import DTensor

    found = _arguments(op, args, kwargs)
    placed, scale = found["query"], found.get("scale")
    arrives = "grad_out_" if "grad_out_" in found else "grad_out"

    def differentiate(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        logsumexp: torch.Tensor,
        is_causal: bool,
        grad_out: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        call = _problem(query, key, value, is_causal, scale)
        wanted = [True, True, True, False, False]
        gradients: tuple[torch.Tensor, ...] = torch.ops.torch_flash2.backward(
            out, logsumexp, grad_out, None, wanted, *call
        )
        return gradients[:3]

    grad_out, query, key, value, out, lse = _local(found, arrives, "query", "key", "value", "out", "logsumexp")
    gradients = _ring()._templated_ring_attention_backward(
        placed.device_mesh.get_group(), _SEQUENCE, differentiate, grad_out, "grad_out", query, key, value, out, lse,
        found["is_causal"],
    )  # fmt: skip
    places = [found[name] for name in ("query", "key", "value")]
    named = [
        DTensor.from_local(gradient, like.device_mesh, like.placements, run_check=False)
        for gradient, like in zip(gradients, places, strict=True)
    ]
    return *named, *[None] * (len(op._schema.returns) - 3)
