"""The functions of FlashAttention-3's flash_attn_interface, with its signatures.

Scheduling hints (pack_gqa, sm_margin, scheduler_metadata) are accepted and change nothing. What else differs is what
v2.py lists; qv and descale tensors, which fp8 inputs need, raise UnsupportedError.

B batch entries or packed documents, H query heads, G key/value heads, M query rows, N keys, D head dim of query and
key, Dv head dim of value, Z parts to combine.
"""

from __future__ import annotations

from typing import Any

import torch

from ...dispatch import UnsupportedError
from ...problem import Lengths
from .cache import Cache, Rows, attend_cache, checked, rotary_of
from .translate import Options, attend, hint

Window = tuple[int, int]
Tensor = torch.Tensor


def _refuse(**tensors: Tensor | None) -> None:
    given = [name for name, tensor in tensors.items() if tensor is not None]
    if given == ["qv"]:
        raise UnsupportedError("qv is not supported: concatenate qv to q and v to k, and call with scale of both dims")
    if given:
        raise UnsupportedError(f"{', '.join(given)} not supported: no fp8 attention yet; dequantise q, k and v to bf16")


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q [B, M, H, D] on k [B, N, G, D] and v [B, N, G, Dv], all masks bottom-right.

    Args:
        window_size: keys left and right of a row's position; -1 is unlimited.
        attention_chunk: where positive, a row sees the keys of its own chunk of so many positions.
        softcap: scores become softcap * tanh(score / softcap) where it is positive.
        return_attn_probs: also return softmax_lse.

    Returns:
        out [B, M, H, Dv]; with return_attn_probs the pair of it and softmax_lse fp32 [B, H, M].

    Raises:
        UnsupportedError: qv or a descale tensor is given.
    """
    _refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    options = Options(
        causal, window_size, softmax_scale, softcap, None, 0.0, deterministic, attention_chunk, num_splits
    )
    out, lse, _ = attend(q, k, v, options)
    return (out, lse) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_func on qkv [B, M, 3, H, D], or [B, M, H + 2 G, D] with num_heads_q = H, without a copy."""
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        q, k, v = qkv.unbind(2)
    elif qkv.dim() == 4 and num_heads_q is not None and (qkv.shape[2] - num_heads_q) % 2 == 0:
        heads_kv = (qkv.shape[2] - num_heads_q) // 2
        q, k, v = qkv.split([num_heads_q, heads_kv, heads_kv], 2)
    else:
        raise ValueError(
            "qkv must be [B, M, 3, H, D], or [B, M, H + 2 * G, D] with num_heads_q=H, "
            f"got {list(qkv.shape)} and num_heads_q={num_heads_q}"
        )
    _refuse(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    options = Options(causal, window_size, softmax_scale, softcap, None, 0.0, deterministic, attention_chunk)
    out, lse, _ = attend(q, k, v, options)
    return (out, lse) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_func on packed documents: q [total_q, H, D], k [total_k, G, D], v [total_k, G, Dv].

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], where each document starts, and the last ends.
        seqused_q, seqused_k: int32 [B], how many rows or keys of each document count.

    Returns:
        out [total_q, H, Dv]; with return_attn_probs the pair of it and softmax_lse fp32 [H, total_q].
    """
    _refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    options = Options(
        causal, window_size, softmax_scale, softcap, None, 0.0, deterministic, attention_chunk, num_splits
    )
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, hint(max_seqlen_q), hint(max_seqlen_k))
    out, lse, _ = attend(q[None], k[None], v[None], options, lengths)
    return (out[0], lse[0]) if return_attn_probs else out[0]


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """FlashAttention-2's function of this name (see v2.py), besides which q and the new k, v may be packed.

    Args:
        q: [B, M, H, D], or [total_q, H, D] with cu_seqlens_q int32 [B + 1].
        k, v: [B, L, G, dim], or [total, G, dim] with cu_seqlens_k_new int32 [B + 1].
        page_table: int32 [B, pages], or rows of which cache_batch_idx picks B; the caches are then
            [pages, page size, G, dim].
        rotary_seqlens: int32 [B], the positions from which rotation counts, by default cache_seqlens.

    Returns:
        out, as q; with return_softmax_lse also softmax_lse fp32 [B, H, M] or [H, total_q], and two empty tensors
        where upstream has the parts of a split.
    """
    _refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    if isinstance(cache_seqlens, int):
        count = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        cache_seqlens = torch.full((count,), cache_seqlens, dtype=torch.int32, device=q.device)
    if page_table is not None and cache_batch_idx is not None:
        page_table, cache_batch_idx = page_table[cache_batch_idx.long()], None
    cache = Cache(k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, page_table)
    query = Rows(q, cu_seqlens_q, hint(max_seqlen_q))
    new = None if k is None or v is None else (Rows(k, cu_seqlens_k_new), v)
    checked(cache, query, new, rotary_cos is not None)
    options = Options(
        causal, window_size, softmax_scale, softcap, attention_chunk=attention_chunk, num_splits=num_splits
    )
    rotary = rotary_of(rotary_cos, rotary_sin, rotary_interleaved, rotary_seqlens, cache)
    out, lse = attend_cache(query, new, cache, options, rotary)
    return (out, lse, out.new_empty(0), out.new_empty(0)) if return_softmax_lse else out


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Join attention over Z parts of the keys into attention over all of them.

    Args:
        out_partial: fp32 [Z, B, M, H, Dv], or [Z, total, H, Dv].
        lse_partial: fp32 [Z, B, M, H], or [Z, total, H], natural logarithm; -inf where a part has no key.
        out: where to write the result.
        out_dtype: of the result, by default out_partial's.

    Returns:
        out [B, M, H, Dv] and lse fp32 [B, M, H]; a row that sees no key in any part gives 0 and -inf.
    """
    if out_partial.dim() not in (4, 5) or out_partial.shape[:-1] != lse_partial.shape:
        raise ValueError(
            "out_partial must be [Z, ..., H, Dv] and lse_partial [Z, ..., H], "
            f"got {list(out_partial.shape)} and {list(lse_partial.shape)}"
        )
    lse = torch.logsumexp(lse_partial.float(), dim=0)
    weight = torch.exp(lse_partial - torch.where(lse == -torch.inf, 0.0, lse))[..., None]
    # A part without keys may hold anything.
    joined = torch.where(weight > 0, out_partial * weight, 0.0).sum(0)
    joined = joined.to(out_dtype or out_partial.dtype)
    return (joined if out is None else out.copy_(joined)), lse


def get_scheduler_metadata(*arguments: Any, **keywords: Any) -> None:
    """None: what flash_attn_with_kvcache takes as scheduler_metadata; there is no schedule to compute ahead."""
