"""The public call.

B batch entries or packed documents, H query heads, G key/value heads, M query rows, N keys, D head dim of query and
key,
Dv head dim of value.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from . import direct, dispatch, masks, ops, policy, stock
from .masks import DenseMask, Mask
from .problem import Call, Lengths, Pages


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Mask | DenseMask | str | torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    lengths: Lengths | None = None,
    pages: Pages | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
) -> Any:
    """Exact attention, softmax(scale * query @ key.T + ...) @ value, with memory linear in the sequence lengths.

    A score is, in this order: scale * (query . key); softcap * tanh(score / softcap); minus the ALiBi slope times the
    distance of positions; plus the bias. Scores that the mask leaves enter the softmax, together with the head's sink;
    dropout then zeroes probabilities and divides the others by 1 - dropout_p. A query row that sees no key gives 0.

    Args:
        query: [B, H, M, D], float16, bfloat16 or float32, on any strides, as key and value are. D and Dv up to 512.
        key: [B, G, N, D]; H is a multiple of G, and query head h reads key head h // (H / G).
        value: [B, G, N, Dv].
        mask: a Mask, its text ("causal & window(128, 0)"), or a bool tensor that broadcasts to [B, H, M, N] (True:
        attend); any of
            them joined by `&`. Causal and window masks stand top-left unless they say otherwise ("causal @
            bottom-right").
        bias: added to the scores; float32 or the query's dtype, broadcasts to [B, H, M, N]; has a gradient.
        softcap: positive number, or None.
        alibi_slopes: float32 [H] or [B, H]; a score loses slope * |m + shift - n|.
        sinks: [H], one more logit per head in the softmax's denominator; has a gradient.
        dropout_p: in [0, 1); the mask comes from PyTorch's generator of the device.
        scale: defaults to 1 / sqrt(D).
        lengths: packed documents (then query is [1, H, total, D]) or padding, as int32 tensors on the device.
        pages: key and value are paged, [pages, page_size, G, D] and [pages, page_size, G, Dv]; the block table says
            which pages are a segment's, `lengths.used_k` how many keys it has. There is no backward through pages.
        num_splits: of up to 16 query rows, into how many parts a segment's keys are split among programs; None leaves
            it to the library. With a number, a segment's result has the same bits whatever else is in its batch and
            however much room its cache has. Of more rows keys are then not split.
        return_lse: also return the log-sum-exp.

    Returns:
        out [B, H, M, Dv] in the query's dtype; with return_lse the pair (out, lse), lse being float32 [B, H, M],
        natural logarithm, sinks included, -inf for a row that sees no key. Both have gradients.

    Raises:
        TypeError, ValueError: an argument breaks the rule that the message names.
        UnsupportedError: no kernel can run the call; the message has every kernel's reasons.

    References:
        Dao et al. 2022 (arXiv 2205.14135), Dao 2023 (arXiv 2307.08691), Shah et al. 2024 (arXiv 2407.08608).
    """
    call = _call(
        query, key, value, mask, bias, softcap, alibi_slopes, sinks, dropout_p, scale, lengths, pages, num_splits
    )
    if torch.autograd.forward_ad._current_level >= 0:
        _refuse_forward_ad(call)
    out, lse = direct.run(call)
    return (out, lse) if return_lse else out


def _call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Mask | DenseMask | str | torch.Tensor | None,
    bias: torch.Tensor | None,
    softcap: float | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    dropout_p: float,
    scale: float | None,
    lengths: Lengths | None,
    pages: Pages | None,
    num_splits: int | None = None,
) -> Call:
    bands, dense = _split_mask(mask)
    seed = None
    if dropout_p > 0:
        # Two words per call: the generator's state moves on, so a checkpoint's replay and a CUDA graph's replay both
        # get theirs.
        seed = torch.randint(0, 2**62, (2,), dtype=torch.int64, device=query.device)
    cu_q, cu_k, used_q, used_k, max_q, max_k = lengths if lengths is not None else Lengths()
    return Call(
        query,
        key,
        value,
        dense,
        bias,
        alibi_slopes,
        sinks,
        seed,
        cu_q,
        cu_k,
        used_q,
        used_k,
        None if pages is None else pages.block_table,
        bands.template,
        bands.numbers,
        query.shape[-1] ** -0.5 if scale is None and query.shape[-1] else float(scale or 0.0),
        None if softcap is None else float(softcap),
        float(dropout_p),
        None if pages is None else pages.page_size,
        max_q,
        max_k,
        torch.are_deterministic_algorithms_enabled(),
        dispatch.forced(),
        num_splits,
    )


def _split_mask(mask: Mask | DenseMask | str | torch.Tensor | None) -> tuple[Mask, torch.Tensor | None]:
    if mask is None:
        return Mask(), None
    if isinstance(mask, str):
        return masks.parse(mask), None
    if isinstance(mask, torch.Tensor):
        mask = masks.dense(mask)
    if isinstance(mask, DenseMask):
        return mask.mask, mask.dense
    if isinstance(mask, Mask):
        return mask, None
    raise TypeError(f"mask must be a Mask, its text, a bool tensor or None, got {type(mask).__name__}")


def _refuse_forward_ad(call: Call) -> None:
    unpack = torch.autograd.forward_ad.unpack_dual
    if any(isinstance(value, torch.Tensor) and unpack(value).tangent is not None for value in call):
        raise NotImplementedError(
            "torch_flash2 has no forward-mode derivative yet; compute this attention with "
            "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
        )


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a call would run on: the forward's plan and, where gradients are needed, the backward's.

    `stock` says what scaled_dot_product_attention would do with it, by itself and under `enable()`.
    """

    plans: tuple[dispatch.Plan, ...]
    stock: str

    def __str__(self) -> str:
        return "\n".join([*map(str, self.plans), self.stock])


def explain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Mask | DenseMask | str | torch.Tensor | None = None,
    *,
    needs_grad: bool | None = None,
    **keywords: Any,
) -> Explanation:
    """What `attention` would do with these arguments, without doing it: kernel, configuration, copies of inputs, every
    rejection's reasons, and what PyTorch's scaled_dot_product_attention would choose.

    Args:
        query, key, value, mask: as for `attention`.
        needs_grad: also explain the backward; by default iff some tensor requires a gradient.
        keywords: the other keywords of `attention`.

    Raises:
        As `attention`.
    """
    options: dict[str, Any] = dict(
        bias=None, softcap=None, alibi_slopes=None, sinks=None, dropout_p=0.0, scale=None, lengths=None, pages=None,
        num_splits=None,
    )  # fmt: skip
    keywords.pop("return_lse", None)
    if unknown := set(keywords) - set(options):
        raise TypeError(f"attention has no keyword {', '.join(sorted(unknown))}")
    call = _call(query, key, value, mask, **{**options, **keywords})
    tensors = [tensor for tensor in call if isinstance(tensor, torch.Tensor)]
    if needs_grad is None:
        needs_grad = any(tensor.requires_grad for tensor in tensors)
    bias_grad = call.bias is not None and call.bias.requires_grad
    plans = tuple(ops.plans(call, needs_grad, bias_grad))
    return Explanation(plans, _explain_stock(call, plans[0]))


def _explain_stock(call: Call, plan: dispatch.Plan) -> str:
    same = stock.of_call(call)
    if isinstance(same, str):
        return f"scaled_dot_product_attention has no such call: {same}"
    choice = stock.choice(same)
    taken, reason = policy.faster(plan.problem, choice)
    verb = "takes" if taken else "leaves"
    given = " with causal_lower_right" if same.lower_right else ""
    return f"scaled_dot_product_attention{given} would choose {choice}; enable() {verb} such calls: {reason}"
