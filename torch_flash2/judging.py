"""Whether a call of scaled_dot_product_attention is worth taking from PyTorch, and the op's call that it becomes.

B batch, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from . import direct, dispatch, hardware, masks, policy, problem, settings, stock
from .dispatch import UnsupportedError
from .problem import Call, Problem
from .stock import Sdpa

_CAUSAL, _LOWER_RIGHT = masks.causal().template, masks.causal(align="bottom-right").template


class Verdict(NamedTuple):
    """Whether to take a call, and why.

    `kind` is "taken"; "slower": PyTorch's choice is the faster, or nobody measured; "unsupported": no kernel here can
    run it; "excluded": the caller asked for something else; "untouched": it is for PyTorch alone to run, or refuse.
    """

    kind: str
    reason: str
    plans: tuple[dispatch.Plan, ...] = ()
    stock: str = ""

    @property
    def taken(self) -> bool:
        return self.kind == "taken"

    @property
    def label(self) -> str:
        """How stats() counts it."""
        if self.taken:
            return " and ".join(dict.fromkeys(plan.kernel for plan in self.plans))
        return f"stock, {self.kind}: {self.reason}"

    def __str__(self) -> str:
        where = f"taken: {self.label}" if self.taken else f"left to PyTorch ({self.kind})"
        return f"{where}; {self.reason}"


# What calls become.


def normal(arguments: Sdpa) -> Sdpa | str:
    """The call with 4 dimensions and as many batch entries everywhere, as views; or why it is PyTorch's alone."""
    query, key, value, mask, dropout_p, is_causal, _, enable_gqa, _ = arguments
    dims = query.dim()
    if not 2 <= dims <= 4 or key.dim() != dims or value.dim() != dims:
        return f"tensors of {dims}, {key.dim()} and {value.dim()} dimensions"
    if len({(t.dtype, t.device) for t in (query, key, value)}) > 1 or query.dtype not in problem.DTYPES:
        return "query, key and value of " + ", ".join(f"{t.dtype} on {t.device}" for t in (query, key, value))
    if not 0 <= dropout_p < 1:
        return f"dropout_p {dropout_p}"
    if mask is not None:
        if is_causal:
            return "a mask and is_causal at once"
        if mask.dtype not in (torch.bool, torch.float32, query.dtype) or mask.dim() > 4 or mask.device != query.device:
            return f"a mask of {mask.dtype} with {mask.dim()} dimensions on {mask.device}"
    while query.dim() < 4:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)

    B = _common(query.shape[0], key.shape[0], value.shape[0])
    if B is None:
        return f"batches of {query.shape[0]}, {key.shape[0]} and {value.shape[0]}"
    H, G = query.shape[1], key.shape[1]
    if G != value.shape[1] or not (H == G or G == 1 or enable_gqa):
        heads = _common(H, G, value.shape[1])
        if heads is None or enable_gqa:
            return f"{H}, {G} and {value.shape[1]} heads, enable_gqa={enable_gqa}"
        query, key, value = (_expanded(tensor, 1, heads) for tensor in (query, key, value))
    query, key, value = (_expanded(tensor, 0, B) for tensor in (query, key, value))
    return arguments._replace(query=query, key=key, value=value)


def _common(*sizes: int) -> int | None:
    """What sizes broadcast to."""
    found = next((size for size in sizes if size != 1), 1)
    return found if all(size in (1, found) for size in sizes) else None


def _expanded(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    if tensor.shape[dim] == size:
        return tensor
    return tensor.expand(*(size if i == dim else -1 for i in range(4)))


def op_tensors(arguments: Sdpa, seed: torch.Tensor | None) -> direct.Tensors:
    """The tensors of the op's call, for normal arguments."""
    mask = arguments.attn_mask
    boolean = mask is not None and mask.dtype == torch.bool
    nothing = (None, None, None, None, None)
    return (
        arguments.query, arguments.key, arguments.value,
        mask if boolean else None, None if boolean else mask, None, None, seed, *nothing,
    )  # fmt: skip


def op_call(arguments: Sdpa, seed: torch.Tensor | None) -> Call:
    """The op's call, for normal arguments."""
    rest: tuple[Any, ...] = (
        _LOWER_RIGHT if arguments.lower_right else _CAUSAL if arguments.is_causal else "full",
        [],
        arguments.query.shape[3] ** -0.5 if arguments.scale is None else float(arguments.scale),
        None,
        float(arguments.dropout_p),
        *(None, None, None),
        torch.are_deterministic_algorithms_enabled(),
        dispatch.forced(),
    )
    return Call(*op_tensors(arguments, seed), *rest)


def draw_seed(arguments: Sdpa) -> torch.Tensor | None:
    if arguments.dropout_p == 0:
        return None
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=arguments.query.device)


# Judging a call.


def judge(arguments: Sdpa, needs_grad: bool, rule: str) -> Verdict:
    """Whether to take a call by a policy. Traced calls are judged by the sizes that they were traced with.

    Raises:
        UnsupportedError: the policy is "strict", and no kernel can run the call.
    """
    if not torch._C._get_flash_sdp_enabled():
        return Verdict("excluded", "sdpa_kernel or torch.backends.cuda has switched flash attention off")
    if 0 in (arguments.query.shape[-1], arguments.value.shape[-1]):
        return Verdict("untouched", "a head dim of 0")
    found = normal(arguments)
    if isinstance(found, str):
        return Verdict("untouched", found)
    mask_grad = needs_grad and found.attn_mask is not None and found.attn_mask.requires_grad
    try:
        posed = _pose(found, needs_grad, mask_grad)
    except (TypeError, ValueError) as error:
        return Verdict("untouched", str(error))
    try:
        plans = [dispatch.select(posed, dispatch.forced())]
        if needs_grad:
            plans.append(dispatch.select(dataclasses.replace(posed, direction="backward"), dispatch.forced()))
        # A plan is shared by problems that no kernel tells apart: this one's sizes go back in.
        plans = [
            dataclasses.replace(plan, problem=dataclasses.replace(posed, direction=plan.problem.direction))
            for plan in plans
        ]
    except UnsupportedError as error:
        if rule == "strict":
            raise
        # Its first line names the call's sizes, which would make a count of its own for each.
        return Verdict("unsupported", " ".join(line.strip() for line in str(error).splitlines()[1:]))
    if rule != "fastest":
        return Verdict("taken", f"policy {rule}", tuple(plans))
    if not _default_backends():
        return Verdict("taken", "sdpa_kernel or torch.backends.cuda names flash attention", tuple(plans))
    other = stock.choice(arguments)
    taken, reason = policy.faster(posed, other)
    return Verdict("taken" if taken else "slower", reason, tuple(plans), other)


def _default_backends() -> bool:
    """Whether PyTorch is free to choose, as it was when its choice was measured."""
    backends = torch._C
    return bool(
        backends._get_mem_efficient_sdp_enabled()
        and backends._get_math_sdp_enabled()
        and backends._get_cudnn_sdp_enabled()
    )


def _pose(arguments: Sdpa, needs_grad: bool, mask_grad: bool) -> Problem:
    device = arguments.query.device
    seed = torch.empty(2, dtype=torch.int64, device="meta") if arguments.dropout_p > 0 else None
    if direct.plain(arguments.tensors):
        seed = None if seed is None else torch.empty_like(seed, device=device)
        return problem.of(op_call(arguments, seed), needs_grad=needs_grad, bias_grad=mask_grad)
    with stock.outside_tracing():
        query, key, value, *mask = map(stock.on_meta, arguments.tensors)
        seed = None if seed is None else torch.empty(2, dtype=torch.int64, device="meta")
        scale = None if arguments.scale is None else 1.0
        like = arguments._replace(query=query, key=key, value=value, attn_mask=mask[0] if mask else None, scale=scale)
        found = problem.of(op_call(like, seed), needs_grad=needs_grad, bias_grad=mask_grad)
    fp32 = found.dtype == torch.float32
    precision = settings.matmul_precision(device.type) if fp32 else found.precision
    return dataclasses.replace(found, hardware=hardware.of(device), precision=precision)
