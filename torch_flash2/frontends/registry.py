"""PyTorch's registry of flash attention: `torch.nn.attention.activate_flash_attention_impl("torch_flash2")`.

It replaces the kernels behind aten's flash attention ops where PyTorch has chosen them: graphs, lists of ops,
sharding rules and `sdpa_kernel` see aten's ops as before. These ops have no masks and align causal masks and windows at
the bottom right.

B batch, H query heads, G key/value heads, M query rows, N keys, T rows of all documents, D head dim.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from .. import direct, dispatch, masks
from ..problem import Call

NAME = "torch_flash2"


def register() -> None:
    """Make the name known to PyTorch; nothing is active by it."""
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=lambda: Overrides("CUDA"))


class Overrides:
    """Kernels in place of aten's, until `remove`."""

    def __init__(self, key: str):
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        present = [name for name in _IMPLEMENTATIONS if hasattr(torch.ops.aten, name)]
        stock = {name: _stock(f"aten::{name}", key) for name in present}
        with warnings.catch_warnings():
            # That kernels are overridden is what the caller asked for; torch 2.11 warns of it.
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            for name in present:
                self._library.impl(name, _or_stock(_IMPLEMENTATIONS[name], stock[name]), key, with_keyset=True)

    def remove(self) -> None:
        """Put aten's own kernels back."""
        if self._library is not None:
            self._library._destroy()
            self._library = None


class _DeclinedError(Exception):
    """A call that aten's own kernel must run."""


def _stock(op: str, key: str) -> Any:
    try:
        return torch.library.get_kernel(op, key)
    except RuntimeError:
        return None


def _or_stock(implementation: Callable[..., Any], stock: Any) -> Callable[..., Any]:
    def run(keyset: Any, *arguments: Any, **keywords: Any) -> Any:
        try:
            with torch.no_grad():
                return implementation(*arguments, **keywords)
        except _DeclinedError as reason:
            if stock is None:
                raise dispatch.UnsupportedError(str(reason)) from None
        return stock.call_boxed(keyset, *arguments, **keywords)

    return run


def _call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    seed: torch.Tensor | None,
    scale: float | None,
    options: dict[str, Any],
) -> Call:
    """The op's call for tensors [B, H, M, D], or [1, H, T, D] with cumulative lengths; keys and values of a block table
    are [pages, page size, G, D]."""
    options = {name: value for name, value in options.items() if value is not None}
    left, right = (options.pop(f"window_size_{side}", -1) for side in ("left", "right"))
    alibi, used_k = options.pop("alibi_slopes", None), options.pop("seqused_k", None)
    table, splits = options.pop("block_table", None), options.pop("num_splits", 0)
    if options:
        raise _DeclinedError(f"torch_flash2 has no {', '.join(options)} here")
    mask = masks.Mask((), None)
    if is_causal:
        mask = mask & masks.causal(align="bottom-right")
    if left >= 0 or right >= 0:
        edges = (None if size < 0 else size for size in (left, right))
        mask = mask & masks.window(*edges, align="bottom-right")
    packed = cu_q is not None
    return Call(
        query, key, value, None, None, alibi, None, seed, cu_q, None if table is not None else cu_k, None, used_k,
        table, mask.template, mask.numbers, query.shape[3] ** -0.5 if scale is None else scale, None, dropout_p,
        None if table is None else key.shape[1], max_q if packed else None, max_k if packed else None,
        torch.are_deterministic_algorithms_enabled(), dispatch.forced(), splits or None,
    )  # fmt: skip


def _draw(dropout_p: float, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """The op's seed, and what aten's ops return in its place: the state [2] and an unused tensor, both uint64."""
    unused = torch.empty((), dtype=torch.uint64, device=device)
    if dropout_p == 0:
        return None, torch.empty(2, dtype=torch.uint64, device=device), unused
    seed = torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)
    return seed, seed.view(torch.uint64), unused


def _sdpa_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    if return_debug_mask:
        raise _DeclinedError("torch_flash2 has no debug mask")
    M, N = query.shape[2], key.shape[2]
    seed, state, unused = _draw(dropout_p, query.device)
    out, lse = direct.run(_call(query, key, value, None, None, M, N, dropout_p, is_causal, seed, scale, {}))
    return out, lse, None, None, M, N, state, unused, query.new_empty(0)


def _sdpa_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    state: torch.Tensor,
    unused: torch.Tensor,
    *,
    scale: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    seed = state.view(torch.int64) if dropout_p > 0 else None
    call = _call(query, key, value, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, seed, scale, options)
    wanted = [True, True, True, False, False]
    gradients: tuple[torch.Tensor, ...] = torch.ops.torch_flash2.backward(out, lse, grad_out, None, wanted, *call)
    return gradients[:3]


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """Tensors are [B, M, H, D], or [T, H, D] with cumulative lengths; keys and values of a block table stay pages."""
    if return_debug_mask:
        raise _DeclinedError("torch_flash2 has no debug mask")
    seed, state, unused = _draw(dropout_p, query.device)
    q, k, v = _heads_first(query, cu_q), key, value
    if options.get("block_table") is None:
        k, v = _heads_first(key, cu_q), _heads_first(value, cu_q)
    call = _call(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, seed, scale, options)
    out, lse = direct.run(call)
    return _rows_first(out, cu_q), lse if cu_q is None else lse[0], state, unused, query.new_empty(0)


def _forward_in_place(out: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
    found, lse, *_ = _forward(*arguments, **keywords)
    out.copy_(found)
    return lse


def _backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    *rest: Any,
    **keywords: Any,
) -> tuple[torch.Tensor, ...]:
    do, q, k, v, o = (_heads_first(tensor, cu_q) for tensor in (grad_out, query, key, value, out))
    found = _sdpa_backward(do, q, k, v, o, lse if cu_q is None else lse[None], cu_q, cu_k, *rest, **keywords)
    return tuple(_rows_first(gradient, cu_q) for gradient in found)


def _heads_first(tensor: torch.Tensor, cu: torch.Tensor | None) -> torch.Tensor:
    return (tensor if cu is None else tensor[None]).transpose(1, 2)


def _rows_first(tensor: torch.Tensor, cu: torch.Tensor | None) -> torch.Tensor:
    return tensor.transpose(1, 2) if cu is None else tensor.transpose(1, 2)[0]


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention": _sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
    "_flash_attention_forward": _forward,
    "_flash_attention_forward_no_dropout_inplace": _forward_in_place,
    "_flash_attention_backward": _backward,
}
