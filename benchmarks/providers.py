"""Providers: a name becomes a callable made for a shape, differentiable in the inputs' leaves.

    torch_flash2                            whatever it selects
    torch_flash2:triton                     one kernel, forced
    torch_flash2:triton@BLOCK_M=64,...      with fields of its config overridden
    sdpa fa2 cudnn efficient math           PyTorch's default choice, and each of its backends
    flex                                    FlexAttention, compiled
    fa3 fa4                                 installed packages, see README.md beside this file

B batch, H query heads, M query rows, N keys
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_flash2
from torch_flash2.oracle import Inputs

from . import data
from .suites import Shape, span

# Libraries that are installed apart, and what must be importable.
PEERS = {"fa3": "flash_attn_3._C", "fa3fwd": "fa3_fwd_interface", "fa4": "flash_attn.cute.interface"}
SDPA = {
    "fa2": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Fewer than a GPU's multiprocessors.
FEW_TILES = 132
Call = Callable[[Inputs], torch.Tensor]


class RefusedError(Exception):
    """The provider cannot run the shape; the text says why."""


@dataclasses.dataclass(frozen=True)
class Provider:
    """`call(inputs)` gives out [B, H, M, Dv]; `context()` surrounds calls and their backward."""

    label: str
    call: Call
    context: Callable[[], AbstractContextManager[Any]]


def label(name: str) -> str:
    """The name in results: Triton code compiled as for another GPU says so, "torch_flash2@sm80".

    Raises:
        ValueError: nothing has that name.
    """
    family = name.partition(":")[0]
    known = ("torch_flash2", "sdpa", *SDPA, "flex", *PEERS)
    if family not in known or (family != name and family != "torch_flash2"):
        raise ValueError(f"no provider is called {name!r}; known are {', '.join(known)}")
    arch = os.environ.get("TRITON_OVERRIDE_ARCH")
    return f"{name}@{arch}" if arch and family in ("torch_flash2", "flex") else name


def make(name: str, shape: Shape, inputs: Inputs) -> Provider:
    """The provider of a name, for a shape whose tensors `inputs` has an example of.

    Raises:
        RefusedError: it cannot run the shape.
    """
    family, _, rest = name.partition(":")
    kernel, _, overrides = rest.partition("@")
    call: Call
    inner: Callable[[], AbstractContextManager[Any]] = nullcontext
    if family == "torch_flash2":
        call = _ours
        if kernel:
            config = parse_config(overrides)
            inner = lambda: torch_flash2.force(kernel=kernel, config=config)  # noqa: E731
    elif name in SDPA or name == "sdpa":
        call = _sdpa(shape, inputs)
        if name in SDPA:
            inner = lambda: sdpa_kernel(SDPA[name])  # noqa: E731
    else:
        if inputs.query.device.type != "cuda":
            raise RefusedError("measured on CUDA only")
        call = {"flex": _flex, "fa3": _fa3, "fa3fwd": _fa3_forward, "fa4": _fa4}[name](shape, inputs)

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with inner(), _deterministic() if shape.deterministic else nullcontext():
            yield

    return Provider(label(name), call, context)


def config_text(config: Mapping[str, Any], prefix: str = "") -> str:
    """A config as in a provider's name: "BLOCK_M=64,num_warps=4"; of a part, "kv.BLOCK_M=64"."""
    fields = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            fields.append(config_text(value, f"{prefix}{name}."))
        else:
            fields.append(f"{prefix}{name}={value}")
    return ",".join(fields)


def parse_config(text: str) -> dict[str, Any]:
    """The config of a text that `config_text` made."""
    config: dict[str, Any] = {}
    words: dict[str, Any] = {"True": True, "False": False, "None": None}
    for field in filter(None, text.split(",")):
        path, _, value = field.partition("=")
        *parts, name = path.split(".")
        target = config
        for part in parts:
            target = target.setdefault(part, {})
        target[name] = int(value) if value.isdigit() else words.get(value, value)
    return config


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """PyTorch's deterministic mode; kernels that have none only warn, and are shown too."""
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def _ours(inputs: Inputs) -> torch.Tensor:
    return torch_flash2.attention(*inputs.arguments, **inputs.keywords)


def _refuse(name: str, shape: Shape, *fields: str) -> None:
    """Refuse a shape that has one of the named fields of Case."""
    has = [field for field in fields if getattr(shape.case, field)]
    if has:
        raise RefusedError(f"{name} has no {', '.join(has)}")


def _sdpa(shape: Shape, inputs: Inputs) -> Call:
    _refuse("SDPA", shape, "softcap", "sinks")
    causal = inputs.bands == "causal" and inputs.lengths is None
    mask: torch.Tensor | None = None
    if not causal and (inputs.bands != "full" or inputs.lengths is not None):
        mask = data.visible(inputs)
    if inputs.bias is not None and (causal or mask is not None):
        raise RefusedError("a bias with its gradient is measured without other masks")
    if inputs.alibi_slopes is not None:
        rows, keys = inputs.query.shape[2], inputs.key.shape[2]
        visible = data.visible(inputs)
        distance = torch.arange(rows)[:, None] - torch.arange(keys)[None, :]
        alibi = -inputs.alibi_slopes[:, None, None] * distance.abs().to(visible.device)
        mask, causal = alibi.masked_fill(~visible, -torch.inf).to(inputs.query.dtype), False

    def call(inputs: Inputs) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            attn_mask=mask if inputs.bias is None else inputs.bias,
            dropout_p=inputs.dropout_p,
            is_causal=causal,
            scale=inputs.scale,
            enable_gqa=inputs.query.shape[1] != inputs.key.shape[1],
        )

    return call


def _flex(shape: Shape, inputs: Inputs) -> Call:
    import torch._dynamo.config
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _refuse("FlexAttention", shape, "dropout_p")
    # Each shape closes over masks of its own; the timed backward runs again and again on one graph.
    torch._dynamo.config.recompile_limit = 1000
    torch._functorch.config.donated_buffer = False
    lengths, softcap = inputs.lengths, inputs.softcap
    left, right = span(inputs.bands)
    rows, keys = inputs.query.shape[2], inputs.key.shape[2]
    documents = used = None
    if lengths is not None:
        used = lengths.used_k
        documents = None if lengths.cu_q is None else data.segment_ids(lengths.cu_q, rows)

    def mask_mod(b: Any, h: Any, m: Any, n: Any) -> Any:
        keep = n >= 0
        if left is not None:
            keep = keep & (n >= m - left)
        if right is not None:
            keep = keep & (n <= m + right)
        if documents is not None:
            keep = keep & (documents[m] == documents[n])
        if used is not None:
            keep = keep & (n < used[b])
        return keep

    block_mask = None
    if inputs.bands != "full" or lengths is not None:
        batch, device = None if used is None else inputs.query.shape[0], str(inputs.query.device)
        block_mask = create_block_mask(mask_mod, batch, None, rows, keys, device=device)

    def run(inputs: Inputs) -> torch.Tensor:
        def score_mod(score: Any, b: Any, h: Any, m: Any, n: Any) -> Any:
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            if inputs.alibi_slopes is not None:
                score = score - inputs.alibi_slopes[h] * (m - n).abs()
            if inputs.bias is not None:
                score = score + inputs.bias[0, h, m, n]
            return score

        plain = softcap is None and inputs.alibi_slopes is None and inputs.bias is None
        out, lse = flex_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            score_mod=None if plain else score_mod,
            block_mask=block_mask,
            scale=inputs.scale,
            enable_gqa=inputs.query.shape[1] != inputs.key.shape[1],
            return_lse=True,
        )
        if inputs.sinks is None:
            return out
        share = torch.sigmoid(lse - inputs.sinks[None, :, None])
        return out * share.to(out.dtype)[..., None]

    return torch.compile(run, dynamic=False)


def load_peer(name: str) -> None:
    """Make one of PEERS importable.

    Raises:
        RefusedError: it is not there.
    """
    if "PEERS_HOME" in os.environ:
        import peers  # type: ignore[import-not-found]

        peers.load({"fa3fwd": "fa3fp8"}.get(name, name))
        return
    module = PEERS[name]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise RefusedError(f"{error}; benchmarks/README.md says where {name} comes from") from None


def _rows_first(shape: Shape, tensor: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] as [B, S, H, D], or as [total, H, D] where packed."""
    swapped = tensor.transpose(1, 2)
    return swapped[0] if shape.packed else swapped


def _heads_first(shape: Shape, tensor: torch.Tensor) -> torch.Tensor:
    return (tensor[None] if shape.packed else tensor).transpose(1, 2)


class _FA3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, options: dict[str, Any]) -> Any:
        # Where tiles of rows are few it chooses its splits of keys itself (0).
        few = query.dim() == 4 and query.shape[0] * query.shape[2] * -(-query.shape[1] // 128) < FEW_TILES
        out, lse = torch.ops.flash_attn_3.fwd(query, key, value, num_splits=0 if few else 1, **options)[:2]
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Any) -> Any:
        deterministic = torch.are_deterministic_algorithms_enabled()
        gradients = torch.ops.flash_attn_3.bwd(grad_out, *ctx.saved_tensors, deterministic=deterministic, **ctx.options)
        return *gradients[:3], None


def _peer_window(shape: Shape, *lacks: str) -> tuple[bool, int | None, int | None]:
    """Whether a peer's call is plainly causal, and how far rows see to the left and right.

    Raises:
        RefusedError: the shape has one of `lacks`, lengths unlike the peer's, or another alignment.
    """
    _refuse("the peer", shape, "alibi", "bias", "dropout_p", *lacks)
    case = shape.case
    if case.lengths not in (None, "packed", "padded_k"):
        raise RefusedError(f"the peer is not measured on lengths {case.lengths!r}")
    left, right = span(case.mask)
    if (left, right) != (None, None) and case.seqlen_q != case.seqlen_k:
        raise RefusedError("the peer's masks stand bottom-right")
    return left is None and right == 0, left, right


def _fa3(shape: Shape, inputs: Inputs) -> Call:
    causal, left, right = _peer_window(shape, "sinks")
    load_peer("fa3")
    options: dict[str, Any] = dict(
        softmax_scale=inputs.scale or shape.case.head_dim**-0.5,
        is_causal=causal,
        window_size_left=-1 if left is None else left,
        window_size_right=-1 if right is None or causal else right,
        softcap=inputs.softcap or 0.0,
    )
    if inputs.lengths is not None:
        places = data.segments(inputs)
        options |= dict(
            cu_seqlens_q=inputs.lengths.cu_q,
            cu_seqlens_k=inputs.lengths.cu_k,
            seqused_k=inputs.lengths.used_k,
            max_seqlen_q=max(place.rows for place in places),
            max_seqlen_k=max(place.keys for place in places),
        )

    def call(inputs: Inputs) -> torch.Tensor:
        tensors = [_rows_first(shape, t) for t in (inputs.query, inputs.key, inputs.value)]
        return _heads_first(shape, _FA3.apply(*tensors, options))

    return call


def _fa3_forward(shape: Shape, inputs: Inputs) -> Call:
    causal, left, right = _peer_window(shape, "sinks", "lengths")
    if shape.direction == "backward":
        raise RefusedError("this build of FlashAttention-3 has forwards alone")
    load_peer("fa3fwd")
    from fa3_fwd_interface import flash_attn_func  # type: ignore[import-not-found]

    options: dict[str, Any] = dict(causal=causal, softmax_scale=inputs.scale, softcap=inputs.softcap or 0.0)
    if not causal:
        options["window_size"] = (-1 if left is None else left, -1 if right is None else right)

    def call(inputs: Inputs) -> torch.Tensor:
        out = flash_attn_func(*(_rows_first(shape, t) for t in (inputs.query, inputs.key, inputs.value)), **options)
        return _heads_first(shape, out[0] if isinstance(out, tuple) else out)

    return call


def _fa4(shape: Shape, inputs: Inputs) -> Call:
    causal, left, right = _peer_window(shape)
    if shape.case.lengths == "padded_k":
        raise RefusedError("FlashAttention-4 is measured without padding")
    load_peer("fa4")
    from flash_attn.cute import (  # type: ignore[import-not-found]
        flash_attn_func,
        flash_attn_varlen_func,
    )

    options: dict[str, Any] = dict(causal=causal, softmax_scale=inputs.scale)
    if not causal:
        options["window_size"] = (left, right)
    if inputs.softcap is not None:
        options["softcap"] = inputs.softcap
    function = flash_attn_func
    if inputs.lengths is not None:
        function = flash_attn_varlen_func
        options |= dict(cu_seqlens_q=inputs.lengths.cu_q, cu_seqlens_k=inputs.lengths.cu_k)

    def call(inputs: Inputs) -> torch.Tensor:
        sinks = {} if inputs.sinks is None else {"learnable_sink": inputs.sinks}
        tensors = [_rows_first(shape, t) for t in (inputs.query, inputs.key, inputs.value)]
        out = function(*tensors, **options, **sinks)
        return _heads_first(shape, out[0] if isinstance(out, tuple) else out)

    return call
