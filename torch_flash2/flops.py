"""FLOP formulas of the ops, for torch.utils.flop_counter.

Counted as PyTorch counts its own attention: every pair of row and key, masked or not.
B batch, H query heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

from typing import Any

import torch

from .problem import Call
from .replacing import WhenImported

_BLOCK_TABLE = Call._fields.index("block_table")


def _pairs(query: torch.Size, keys: int) -> int:
    B, H, M, _ = query
    return B * H * M * keys


def forward_flops(query: Any, key: Any, value: Any, *rest: Any, **keywords: Any) -> int:
    """Two products: with D and with Dv. Paged keys count with all the room that a segment has."""
    table = rest[_BLOCK_TABLE - 3]
    keys = key[2] if table is None else table[1] * key[1]
    return 2 * _pairs(query, keys) * (query[3] + value[3])


def backward_flops(
    out: Any,
    lse: Any,
    grad_out: Any,
    grad_lse: Any,
    wanted: Any,
    query: Any,
    key: Any,
    value: Any,
    *rest: Any,
    **keywords: Any,
) -> int:
    """The scores again, and two products for each of dQ, dK (with D) and dP, dV (with Dv)."""
    return 2 * _pairs(query, key[2]) * (3 * query[3] + 2 * value[3])


def _register(counter: Any) -> None:
    counter.register_flop_formula(torch.ops.torch_flash2.forward)(forward_flops)
    counter.register_flop_formula(torch.ops.torch_flash2.backward)(backward_flops)


def register_when_imported() -> None:
    """Register now or, because the counter imports Triton, when somebody imports it."""
    WhenImported("torch.utils.flop_counter", _register)
