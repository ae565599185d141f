"""The functions of flash-attn 2.8, with its signatures.

What differs: fp32 and fp64 inputs, head dims up to 512, softcap together with dropout and any page size are accepted;
softmax_lse is differentiable, and -inf, not +inf, for a row that sees no key; every result but dQ on Hopper is
deterministic, asked for or not. A broken rule is a ValueError or TypeError rather than a RuntimeError.

B batch entries or packed documents, H query heads, G key/value heads, M query rows, N keys, D head dim of query and
key, Dv head dim of value.
"""

from __future__ import annotations

from typing import Any

import torch

from ...problem import Call, Lengths, Pages
from .cache import Cache, Rows, attend_cache, checked, rotary_of
from .translate import Options, attend, hint, signed_probabilities

Window = tuple[int, int]
Output = Any  # out, or (out, softmax_lse, S_dmask)


def _results(out: torch.Tensor, lse: torch.Tensor, call: Call, return_attn_probs: bool) -> Output:
    if not return_attn_probs:
        return out
    # As upstream, empty without dropout.
    return out, lse, signed_probabilities(call) if call.dropout_p > 0 else out.new_empty(0)


def _get_block_size_n(device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """How many columns of S_dmask are scaled alike: all. Upstream's tests ask."""
    return 2**31 - 1


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """Attention of q [B, M, H, D] on k [B, N, G, D] and v [B, N, G, Dv]; H is a multiple of G.

    Args:
        dropout_p: 0 outside training.
        softmax_scale: by default 1 / sqrt(D).
        causal: row i sees keys up to i + N - M (bottom-right).
        window_size: row i sees keys i + N - M - left .. i + N - M + right; -1 is unlimited.
        softcap: scores become softcap * tanh(score / softcap) where it is positive.
        alibi_slopes: fp32 [H] or [B, H]; a score loses slope * |i + N - M - j|.
        return_attn_probs: also return softmax_lse and S_dmask.

    Returns:
        out [B, M, H, Dv]; with return_attn_probs also softmax_lse fp32 [B, H, M] and, where there is dropout,
        S_dmask [B, H, M, N]: exp(score - the largest of its row), dropped ones negative, of a size and cost for tests.
    """
    options = Options(causal, window_size, softmax_scale, softcap, alibi_slopes, dropout_p, deterministic)
    return _results(*attend(q, k, v, options), return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """flash_attn_func on qkv [B, M, 3, H, D], without a copy."""
    options = Options(causal, window_size, softmax_scale, softcap, alibi_slopes, dropout_p, deterministic)
    q, k, v = _unpacked(qkv, "qkv", 3, 5)
    return _results(*attend(q, k, v, options), return_attn_probs)


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """flash_attn_func on q [B, M, H, D] and kv [B, N, 2, G, D], without a copy."""
    options = Options(causal, window_size, softmax_scale, softcap, alibi_slopes, dropout_p, deterministic)
    k, v = _unpacked(kv, "kv", 2, 5)
    return _results(*attend(q, k, v, options), return_attn_probs)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Output:
    """Attention of packed documents: q [total_q, H, D] on k [total_k, G, D] and v [total_k, G, Dv].

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], where each document starts, and the last ends.
        max_seqlen_q, max_seqlen_k: the longest document, a hint.
        block_table: int32 [B, pages]; k and v are then [pages, page size, G, dim].
        others: as for flash_attn_func, positions counting from each document's start.

    Returns:
        out [total_q, H, Dv]; with return_attn_probs also softmax_lse fp32 [H, total_q] and, where there is dropout,
        S_dmask [B, H, longest, longest].
    """
    options = Options(causal, window_size, softmax_scale, softcap, alibi_slopes, dropout_p, deterministic)
    if block_table is None:
        lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_q=hint(max_seqlen_q), max_k=hint(max_seqlen_k))
        out, lse, call = attend(q[None], k[None], v[None], options, lengths)
    else:
        if return_attn_probs and dropout_p > 0:
            raise ValueError("S_dmask of paged keys is not available: return_attn_probs needs dropout_p=0 with pages")
        lengths = Lengths(cu_seqlens_q, used_k=cu_seqlens_k.diff(), max_q=hint(max_seqlen_q), max_k=hint(max_seqlen_k))
        out, lse, call = attend(q[None], k, v, options, lengths, Pages(block_table, k.shape[1]))
    return _results(out[0], lse[0], call, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """flash_attn_varlen_func on qkv [total, 3, H, D], without a copy."""
    scores = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    q, k, v = _unpacked(qkv, "qkv", 3, 4)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *scores)


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """flash_attn_varlen_func on q [total_q, H, D] and kv [total_k, 2, G, D], without a copy."""
    scores = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    k, v = _unpacked(kv, "kv", 2, 4)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *scores)


def _unpacked(packed: torch.Tensor, name: str, parts: int, dims: int) -> Any:
    if packed.dim() != dims or packed.shape[-3] != parts:
        rows = "batch, seqlen" if dims == 5 else "total"
        raise ValueError(f"{name} must be [{rows}, {parts}, heads, head_dim], got {list(packed.shape)}")
    return packed.unbind(-3)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of q [B, M, H, D] to a cache, into which k and v are written first. There is no gradient.

    Args:
        k_cache, v_cache: [cache rows, N, G, dim], or [pages, page size, G, dim] with a block_table.
        k, v: [B, L, G, dim], written in place from cache_seqlens on; the cache must have room for them.
        rotary_cos, rotary_sin: [positions, R / 2]; k is rotated by positions cache_seqlens, cache_seqlens + 1, ..., q
            likewise where there is a causal mask or window, else all its rows by cache_seqlens.
        cache_seqlens: int32 [B], or one number: positions of the cache that are taken. By default all.
        cache_batch_idx: int32 [B], the row of the cache of each sequence.
        cache_leftpad: int32 [B], the position at which each sequence starts.
        block_table: int32 [B, pages].
        rotary_interleaved: pairs are (0, 1), (2, 3), ...; else (0, R / 2), (1, R / 2 + 1), ...
        num_splits: into how many parts the keys are cut, 0 to let the library choose.
        others: as for flash_attn_func.

    Returns:
        out [B, M, H, Dv]; with return_softmax_lse the pair of it and softmax_lse fp32 [B, H, M].
    """
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    cache = Cache(k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    query, new = Rows(q), None if k is None or v is None else (Rows(k), v)
    checked(cache, query, new, rotary_cos is not None)
    options = Options(causal, window_size, softmax_scale, softcap, alibi_slopes, num_splits=num_splits)
    rotary = rotary_of(rotary_cos, rotary_sin, rotary_interleaved, None, cache)
    out, lse = attend_cache(query, new, cache, options, rotary)
    return (out, lse) if return_softmax_lse else out
