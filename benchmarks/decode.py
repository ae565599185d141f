"""The decode suite: few query rows against caches, every provider under CUDA graph replay, in bytes of keys and values.

Beside the peers stand the machine's own limits: "copy" is a device-to-device copy of the keys, "gemm" a square product.

B segments, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel

import torch_flash2
from torch_flash2 import Lengths, Pages, masks
from torch_flash2.oracle import Inputs

from . import check, providers
from .data import Sample
from .providers import SDPA, Provider, RefusedError
from .report import LIMITS
from .results import Row
from .runner import Run
from .suites import Shape, span
from .timing import Entry, replayed

GEMM = 8192
Step = Callable[[], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Caches:
    """One call: query [B, H, M, D], and per layer key and value, dense [B, G, N, dim] or in pages."""

    query: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    used: list[int]
    lengths: Lengths
    pages: Pages | None


def make(shape: Shape, device: torch.device) -> tuple[Inputs, Caches]:
    """Dense inputs, which the check takes, and the caches that providers take."""
    case = shape.case
    inputs = case.inputs(device)
    for tensor in (inputs.query, inputs.key, inputs.value):
        tensor.nan_to_num_(nan=0.0)
    if shape.latent:
        inputs = inputs._replace(value=inputs.key[..., : case.head_dim_v])
    key, value, pages = inputs.key, inputs.value, None
    if shape.page:
        key, pages = _paged(key, shape.page)
        value = key[..., : case.head_dim_v] if shape.latent else _paged(value, shape.page)[0]
    more = [(torch.randn_like(key), torch.randn_like(value)) for _ in range(shape.layers - 1)]
    used_k = inputs.lengths.used_k if inputs.lengths is not None else None
    used = [case.seqlen_k] * case.batch if used_k is None else used_k.tolist()
    if shape.page and used_k is None:
        used_k = torch.full((case.batch,), case.seqlen_k, dtype=torch.int32, device=device)
    return inputs, Caches(inputs.query, [(key, value), *more], used, Lengths(used_k=used_k), pages)


def _paged(tensor: torch.Tensor, size: int) -> tuple[torch.Tensor, Pages]:
    """[B, G, N, dim] as pages in random order, the same order for every tensor of that shape."""
    B, G, N, dim = tensor.shape
    count = -(-N // size)
    generator = torch.Generator(tensor.device).manual_seed(0)
    table = torch.randperm(B * count, generator=generator, device=tensor.device).reshape(B, count)
    pool = tensor.new_zeros(B * count, size, G, dim)
    for b in range(B):
        rows = torch.nn.functional.pad(tensor[b].transpose(0, 1), (0, 0, 0, 0, 0, count * size - N))
        pool[table[b]] = rows.unflatten(0, (count, size))
    return pool, Pages(table.int(), size)


def bytes_read(shape: Shape, caches: Caches) -> int:
    """Bytes of keys and values that the query rows see, each once."""
    case = shape.case
    width = case.head_dim + (0 if shape.latent else case.head_dim_v)
    mask, M = masks.parse(case.mask), case.seqlen_q
    keys = 0
    for used in caches.used:
        lo, hi = mask.keys(torch.arange(M), M, used)
        keys += int((hi.max() - lo.min()).clamp(min=0))
    return shape.layers * keys * case.heads_kv * width * caches.query.element_size()


def flops(shape: Shape, caches: Caches) -> float:
    """Operations of the two products on visible pairs."""
    case, mask = shape.case, masks.parse(shape.case.mask)
    pairs = 0
    for used in caches.used:
        lo, hi = mask.keys(torch.arange(case.seqlen_q), case.seqlen_q, used)
        pairs += int((hi - lo).clamp(min=0).sum())
    return 2.0 * shape.layers * pairs * case.heads * (case.head_dim + case.head_dim_v)


# Providers: an attention of one layer, which a stack repeats.


def _ours(shape: Shape, caches: Caches) -> Callable[..., torch.Tensor]:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        lengths, pages = caches.lengths, caches.pages
        scale = shape.case.scale
        return torch_flash2.attention(query, key, value, shape.case.mask, scale=scale, lengths=lengths, pages=pages)

    return attend


def _sdpa(shape: Shape, caches: Caches) -> Callable[..., torch.Tensor]:
    case = shape.case
    if caches.pages is not None:
        raise RefusedError("SDPA has no pages")
    keep: torch.Tensor | None = None
    if len(set(caches.used)) > 1 or span(case.mask.partition(" @")[0])[0] is not None:
        keep = torch.zeros(case.batch, 1, case.seqlen_q, case.seqlen_k, dtype=torch.bool, device=caches.query.device)
        for b, used in enumerate(caches.used):
            m, n = torch.arange(case.seqlen_q)[:, None], torch.arange(used)[None, :]
            keep[b, 0, :, :used] = masks.parse(case.mask).visible(m, n, case.seqlen_q, used).to(keep.device)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=keep, scale=case.scale, enable_gqa=case.heads != case.heads_kv
        )

    return attend


def _fa3(shape: Shape, caches: Caches) -> Callable[..., torch.Tensor]:
    providers.load_peer("fa3")
    case = shape.case
    left, _ = span(case.mask.partition(" @")[0])
    options: dict[str, Any] = dict(
        softmax_scale=case.scale or case.head_dim**-0.5,
        is_causal=case.seqlen_q > 1,
        window_size_left=-1 if left is None else left,
        window_size_right=-1 if left is None else 0,
        seqused_k=caches.lengths.used_k,
        page_table=None if caches.pages is None else caches.pages.block_table,
        num_splits=0,
    )

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if caches.pages is None:
            key, value = key.transpose(1, 2), value.transpose(1, 2)
        query, extra = query.transpose(1, 2), {}
        if shape.latent:
            width = value.shape[3]
            extra = {"q_v": query[..., :width]}
            query, key = query[..., width:], key[..., width:]
        out: torch.Tensor = torch.ops.flash_attn_3.fwd(query, key, value, **extra, **options)[0]
        return out.transpose(1, 2)

    return attend


def provider(name: str, shape: Shape, caches: Caches) -> Provider:
    """The provider of a name; its call takes no inputs.

    Raises:
        RefusedError: it cannot run the shape.
    """
    context: Callable[[], Any] = nullcontext
    family, _, rest = name.partition(":")
    if family == "torch_flash2":
        attend = _ours(shape, caches)
        if rest:
            kernel, _, overrides = rest.partition("@")
            config = providers.parse_config(overrides)
            context = lambda: torch_flash2.force(kernel, config)  # noqa: E731
    elif name == "sdpa" or name in SDPA:
        attend = _sdpa(shape, caches)
        if name in SDPA:
            context = lambda: sdpa_kernel(SDPA[name])  # noqa: E731
    elif name == "fa3":
        attend = _fa3(shape, caches)
    else:
        raise RefusedError("not measured in decoding")

    def stack(query: torch.Tensor) -> torch.Tensor:
        for key, value in caches.layers:
            # A layer's output stands for the next one's query.
            query = attend(query, key, value)
        return query

    if shape.layers > 1 and caches.query.is_cuda:
        stack = torch.compile(stack, fullgraph=True)
    return Provider(providers.label(name), lambda inputs: stack(inputs.query), context)


def limits(shape: Shape, caches: Caches, inputs: Inputs) -> list[Entry]:
    """The machine's own rates: bytes read and written by a copy, operations of a square product."""
    key, size = caches.layers[0][0], GEMM if caches.query.is_cuda else 64
    other = torch.empty_like(key)
    square = torch.randn(2, size, size, device=key.device).to(key.dtype)
    copied = 2 * key.numel() * key.element_size()
    return [
        Entry(shape, "copy", replayed(lambda: other.copy_(key), key.device), nullcontext, 0.0, copied),
        Entry(
            shape, "gemm", replayed(lambda: square[0] @ square[1], key.device), nullcontext, 2.0 * size**3, 6 * size**2
        ),
    ]


class DecodeRun(Run):
    """The suite on one device; "gbps" counts keys and values alone."""

    def entries(self, shape: Shape, names: list[str]) -> list[Entry]:
        """The providers that can run the shape and are right on it, and the machine's limits."""
        inputs, caches = make(shape, self.device)
        grad_out = inputs.query.new_zeros(*inputs.query.shape[:3], shape.case.head_dim_v)
        sample = Sample(inputs, grad_out)
        # A stack's layers are checked where they stand alone.
        reference = check.Reference(shape, sample) if shape.layers == 1 else None
        counts = flops(shape, caches), bytes_read(shape, caches)
        found = []
        for name in names:
            try:
                each = provider(name, shape, caches)
                if reference is not None and not self.right(shape, each, sample, reference):
                    continue
                with torch.no_grad(), each.context():
                    run = replayed(lambda each=each: each.call(inputs), self.device)  # type: ignore[misc]
                found.append(Entry(shape, each.label, run, each.context, *counts))
            except Exception as error:
                self.refuse(shape, providers.label(name), str(error)[:300] or type(error).__name__)
                if self.device.type == "cuda":
                    # Nothing after a fault of the device can be trusted: this raises then.
                    torch.cuda.synchronize(self.device)
        return [*found, *limits(shape, caches, inputs)]

    def group(self, group: Any) -> None:
        super().group(group)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def compare(self, entries: list[Entry]) -> None:
        """Ratios to peers, not to the machine's limits."""
        super().compare([entry for entry in entries if entry.label not in LIMITS])

    def identity(self, shape: Shape, label: str) -> Row:
        return super().identity(shape, label) | {"seqlen": str(shape.case.seqlen_k)}
