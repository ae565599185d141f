"""flash_attn.bert_padding: padded tensors to packed ones and back.

B batch entries, S padded length, T tokens that count.
"""

from __future__ import annotations

import torch


def index_first_axis(input: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows of [first, ...], differentiable."""
    return input[indices]


def index_put_first_axis(values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int) -> torch.Tensor:
    """[first_axis_dim, ...] with rows `values` at `indices` and zeros elsewhere, differentiable."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_put((indices,), values)


def unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """The tokens of [B, S, ...] that a mask [B, S] keeps, packed. Reads sizes on the host.

    Args:
        attention_mask: bool or int, 1 for tokens that count.
        unused_mask: [B, S], 1 for tokens that are kept in the tensor and do not count.

    Returns:
        The rows [T, ...], their indices in [B * S], cumulative lengths int32 [B + 1], the longest length, and how
        many tokens of each entry count, int32 [B].
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    return hidden_states.flatten(0, 1)[indices], indices, cu, int(lengths.max()), used


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """Packed [T, ...] to [batch, seqlen, ...], zeros where there is no token."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
