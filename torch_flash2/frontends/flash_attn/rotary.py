"""flash_attn.layers.rotary: rotary embeddings of rows, with their gradient.

B sequences, S rows, H heads, D head dim, R rotated dims.
"""

from __future__ import annotations

import torch

from .translate import packed_places


def apply_rotary_emb(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """Rows turned by the angles of their positions, computed in fp32.

    Args:
        x: [B, S, H, D], or packed [total, H, D] with cu_seqlens int32 [B + 1].
        cos, sin: [positions, R / 2].
        interleaved: pairs are (0, 1), (2, 3), ...; else (0, R / 2), (1, R / 2 + 1), ...
        inplace: write into x.
        seqlen_offsets: the position of each sequence's first row, one for all or int [B].

    Returns:
        As x; its dims from R on are x's.

    Raises:
        ValueError: cos and sin do not fit.
    """
    half = cos.shape[-1]
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * half > x.shape[-1]:
        raise ValueError(
            f"cos and sin must be [positions, R / 2] with R <= {x.shape[-1]}, "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    if cu_seqlens is None:
        place = torch.arange(x.shape[1], device=x.device)
        if isinstance(seqlen_offsets, torch.Tensor):
            place = place + seqlen_offsets[:, None]
        else:
            place = place + seqlen_offsets
    else:
        document, place = packed_places(cu_seqlens, x.shape[0])
        place = place + (seqlen_offsets[document] if isinstance(seqlen_offsets, torch.Tensor) else seqlen_offsets)
    out = turned(x, place, cos, sin, interleaved)
    return x.copy_(out) if inplace else out


def turned(
    x: torch.Tensor, place: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Rows [..., H, D] at positions `place`, which broadcast to the rows' dimensions."""
    half = cos.shape[-1]
    cos, sin = (table[place].float().unsqueeze(-2) for table in (cos, sin))
    rotated = x[..., : 2 * half].float()
    first, second = (rotated[..., ::2], rotated[..., 1::2]) if interleaved else rotated.split(half, -1)
    pair = first * cos - second * sin, first * sin + second * cos
    rotated = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([rotated.to(x.dtype), x[..., 2 * half :]], -1)
