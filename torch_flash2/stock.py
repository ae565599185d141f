"""PyTorch's own scaled_dot_product_attention: its arguments as one value, and which of its backends it would choose.

B batch, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend

from . import masks
from .problem import Call, parse_mask


class Sdpa(NamedTuple):
    """The arguments of scaled_dot_product_attention, in its order.

    `lower_right`, beside `is_causal`, stands for the mask torch.nn.attention.bias.causal_lower_right(M, N), M not N.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    lower_right: bool = False

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Query, key, value and, where there is one, the mask."""
        three = (self.query, self.key, self.value)
        return three if self.attn_mask is None else (*three, self.attn_mask)


def of_call(call: Call) -> Sdpa | str:
    """The call as scaled_dot_product_attention would take it, or what it does not have."""
    mask = parse_mask(call)
    absent = {
        "softcap": call.softcap, "ALiBi slopes": call.alibi, "sinks": call.sinks, "cumulative lengths": call.cu_q,
        "packed keys": call.cu_k, "used lengths": call.used_q, "used keys": call.used_k, "pages": call.block_table,
    }  # fmt: skip
    missing = [name for name, value in absent.items() if value is not None]
    causal = mask.bands == masks.causal().bands
    lower_right = causal and mask.align == "bottom-right" and call.query.shape[2] != call.key.shape[2]
    if mask.bands and not causal:
        missing.append(f"mask {mask}")
    if sum((causal, call.dense is not None, call.bias is not None)) > 1:
        missing.append("two masks at once")
    if missing:
        return ", ".join(missing)
    attn_mask = call.bias if call.dense is None else call.dense
    shared = call.query.shape[1] != call.key.shape[1]
    return Sdpa(call.query, call.key, call.value, attn_mask, call.dropout_p, causal, call.scale, shared, lower_right)


def hint(size: Any) -> int:
    """A size as a number without a guard; a symbolic one by the example that it was traced with."""
    if isinstance(size, torch.SymInt):
        found = size.node.hint
        return int(found) if found is not None else 4096
    return int(size)


def on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same sizes, strides and dtype, without memory; symbolic sizes by their hints."""
    sizes, strides = ([hint(n) for n in part] for part in (tensor.shape, tensor.stride()))
    return torch.empty_strided(sizes, strides, dtype=tensor.dtype, device="meta")


@contextlib.contextmanager
def outside_tracing() -> Iterator[None]:
    """In this block nothing is traced: PyTorch's modes do not see what it computes."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


def choice(arguments: Sdpa) -> str:
    """The backend that PyTorch would choose here and now, by its name in SDPBackend; "ERROR" where it would raise.

    Traced tensors are judged by the sizes that they were traced with; "ERROR" too where their device is not here.
    """
    if all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in arguments.tensors):
        return _choice(arguments)
    device = arguments.query.device
    if device.type == "cuda" and not torch.cuda.is_available():
        return "ERROR"
    with outside_tracing():
        # PyTorch looks at sizes, dtypes, devices and the last stride: tensors of one row stand for the others.
        query, key, value, *mask = (
            torch.empty(hint(tensor.shape[-1]), dtype=tensor.dtype, device=device)
            .expand([hint(n) for n in tensor.shape])
            .requires_grad_(tensor.requires_grad)
            for tensor in arguments.tensors
        )
        return _choice(arguments._replace(query=query, key=key, value=value, attn_mask=mask[0] if mask else None))


def _choice(arguments: Sdpa) -> str:
    query, key, value, mask, dropout_p, is_causal, scale, enable_gqa, lower_right = arguments
    if lower_right:
        # Such a mask is given to a backend without a choice, or else made a tensor.
        cuda = torch.backends.cuda
        given = cuda.SDPAParams(query, key, value, None, dropout_p, False, enable_gqa)
        if cuda.can_use_flash_attention(given):
            return "FLASH_ATTENTION"
        if cuda.can_use_efficient_attention(given):
            return "EFFICIENT_ATTENTION"
        mask = torch.empty(1, dtype=torch.bool, device=query.device).expand(query.shape[-2], key.shape[-2])
        is_causal = False
    try:
        found = torch._fused_sdp_choice(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    except (RuntimeError, NotImplementedError):
        return "ERROR"
    return str(SDPBackend(found).name)
