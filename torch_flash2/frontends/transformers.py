"""Hugging Face transformers: `register()`, then `attn_implementation="torch_flash2"`.

A model asks once per forward for a mask, and gets `Spans`: the bands of the mask, and lengths for padding and packed
sequences. Its layers then hand their query, key and value to `attend`. What spans cannot say (custom mask functions,
4-D masks, packed sequences under torch.compile) stays the dense bool mask that "sdpa" would get, and is right as well.
Continuous batching brings its own lengths and pages.

B batch entries, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of
value.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import masks
from ..attention import attention
from ..caches import append
from ..masks import DenseMask, Mask
from ..problem import Lengths, Pages

NAME = "torch_flash2"


def register() -> str:
    """Make "torch_flash2" an attn_implementation of transformers, and return that name.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, spans_of)
    _disown_flash_attention(besides=_batching())
    return NAME


def _batching() -> str:
    """The package of continuous batching, readied for this name; empty where transformers has none that fits."""
    package = "transformers.generation.continuous_batching"
    try:
        found = inspect.signature(importlib.import_module(f"{package}.cache").PagedAttentionCache.update)
        start: Any = importlib.import_module(f"{package}.initialization")
        load = start.lazy_import_flash_attention
    except (ImportError, AttributeError):
        return ""
    if "kwargs" not in found.parameters:
        return ""

    # It asks for flash-attn's function on paged caches, and uses block tables where there is one.
    @functools.wraps(load)
    def lazy_import_flash_attention(implementation: Any, *arguments: Any, **keywords: Any) -> Any:
        if implementation != NAME:
            return load(implementation, *arguments, **keywords)
        return (attend, attend, attend, None, None), (dict, dict)

    if load.__module__ != __name__:
        lazy_import_flash_attention.__module__ = __name__
        start.lazy_import_flash_attention = lazy_import_flash_attention
    return package


def _disown_flash_attention(besides: str) -> None:
    """Tell transformers, but for one of its packages, that this is not the flash-attn package.

    It takes every name with "flash" in it for a kind of flash-attn: it would look for that package, replace the name in
    models that list the kinds they know, refuse chunked masks, and not compile generate(). Continuous batching does
    well to: it then packs requests, and makes no masks.
    """
    from transformers.utils import generic

    asked: Any = getattr(generic, "is_flash_attention_requested", None)
    if asked is None or asked.__module__ == __name__:
        return

    original = asked.__name__

    @functools.wraps(asked, assigned=("__name__", "__doc__"))
    def is_flash_attention_requested(
        config: Any = None, requested_attention_implementation: Any = None, **keywords: Any
    ) -> bool:
        name = requested_attention_implementation if config is None else config._attn_implementation
        return name != NAME and asked(config, requested_attention_implementation, **keywords)

    for name, module in list(sys.modules.items()):
        if besides and name.startswith(besides):
            continue
        if name.startswith("transformers.") and vars(module).get(original) is asked:
            setattr(module, original, is_flash_attention_requested)


class Documents:
    """Packed sequences: `ids` int [B, M] change where one begins."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    @functools.cached_property
    def lengths(self) -> Lengths:
        """Where each begins in the batch laid end to end: the host waits for their number, once in a forward."""
        begins = torch.ones_like(self.ids, dtype=torch.bool)
        begins[:, 1:] = self.ids[:, 1:] != self.ids[:, :-1]
        starts = begins.flatten().nonzero().flatten()
        edges = torch.nn.functional.pad(starts, (0, 1), value=self.ids.numel()).to(torch.int32)
        return Lengths(edges, edges)


class Spans(NamedTuple):
    """Which keys the rows of a batch see.

    `used` int32 [B]: keys that count, from 0 on; of rows too where `square`. `columns` bool [B, 1, 1, N]: keys that
    count. `packed`: lengths of the batch laid end to end; `columns` says the same for calls that cannot be packed.
    `documents`: sequences that follow one another in the rows.
    """

    mask: Mask
    used: torch.Tensor | None = None
    square: bool = False
    columns: torch.Tensor | None = None
    packed: Lengths | None = None
    documents: Documents | None = None

    # generate() makes the mask of a static cache contiguous and hands it to the model, which asks whether it is 2-D.

    @property
    def ndim(self) -> int:
        """That of a mask that is ready."""
        return 4

    def contiguous(self) -> Spans:
        """Itself."""
        return self


# From a mask function to bands: it is called with symbols instead of indices.


class _UnknownError(Exception):
    """The mask function does what symbols cannot follow."""


@dataclasses.dataclass(frozen=True)
class _Range:
    """The pairs for which least <= key - row <= most."""

    least: int = -masks.FAR
    most: int = masks.FAR
    device: Any = None

    def to(self, device: Any) -> _Range:
        return self

    def __and__(self, other: Any) -> _Range:
        if not isinstance(other, _Range):
            raise _UnknownError
        return _Range(max(self.least, other.least), min(self.most, other.most))


@dataclasses.dataclass(frozen=True)
class _Index:
    """row * rows + key * keys + plus, or its absolute value."""

    rows: int
    keys: int
    plus: int = 0
    absolute: bool = False

    def new_ones(self, shape: Any, dtype: Any = None) -> _Range:
        return _Range()

    def _combined(self, other: Any, sign: int) -> _Index:
        if self.absolute:
            raise _UnknownError
        if isinstance(other, _Index):
            if other.absolute:
                raise _UnknownError
            return _Index(self.rows + sign * other.rows, self.keys + sign * other.keys, self.plus + sign * other.plus)
        if not isinstance(other, int):
            raise _UnknownError
        return _Index(self.rows, self.keys, self.plus + sign * other)

    def __add__(self, other: Any) -> _Index:
        return self._combined(other, 1)

    def __sub__(self, other: Any) -> _Index:
        return self._combined(other, -1)

    def __abs__(self) -> _Index:
        return _Index(self.rows, self.keys, self.plus, True)

    def __le__(self, other: Any) -> _Range:
        if self.absolute:
            if not isinstance(other, int) or (abs(self.rows), self.keys + self.rows, self.plus) != (1, 0, 0):
                raise _UnknownError
            return _Range(-other, other)
        difference = self - other
        if (difference.rows, difference.keys) == (-1, 1):
            return _Range(-masks.FAR, -difference.plus)
        if (difference.rows, difference.keys) == (1, -1):
            return _Range(difference.plus, masks.FAR)
        # Positions are never negative.
        if difference.rows <= 0 and difference.keys <= 0 and difference.plus <= 0:
            return _Range()
        raise _UnknownError

    def __lt__(self, other: Any) -> _Range:
        return self + 1 <= other

    def __ge__(self, other: Any) -> _Range:
        return _Index(-self.rows, -self.keys, -self.plus) <= (-other if isinstance(other, int) else _negative(other))

    def __gt__(self, other: Any) -> _Range:
        return self - 1 >= other


def _negative(index: Any) -> _Index:
    if not isinstance(index, _Index) or index.absolute:
        raise _UnknownError
    return _Index(-index.rows, -index.keys, -index.plus)


def _bands(mask_function: Callable[..., Any]) -> Mask | None:
    """The mask function as bands, without alignment; None where it is more than bands."""
    try:
        found = mask_function(None, None, _Index(1, 0), _Index(0, 1))
    except (_UnknownError, TypeError, AttributeError, IndexError):
        return None
    if not isinstance(found, _Range):
        return None
    if found.least > 0 or found.most < 0:
        return None
    left = -found.least if found.least > -masks.FAR else None
    right = found.most if found.most < masks.FAR else None
    if left is None:
        return Mask() if right is None else masks.causal() if right == 0 else masks.window(None, right)
    return masks.window(left, right)


def _documents(mask_function: Any) -> tuple[torch.Tensor, Callable[..., Any]] | None:
    """The sequence ids [B, M] of a mask function of packed sequences, and the mask function inside one sequence."""
    inside = _closure(mask_function, "and_masks").get("mask_functions", ())
    packed = [_closure(function, "packed_sequence_mask_function") for function in inside]
    if len(inside) != 2 or sum(map(bool, packed)) != 1:
        return None
    (ids,) = (found["packed_sequence_mask"] for found in packed if found)
    (function,) = (function for function, found in zip(inside, packed, strict=True) if not found)
    # Positions inside a sequence or in the whole row: bands go by differences.
    return ids, _closure(function, "remap_positions_for_packed_sequence").get("mask_function", function)


def _closure(function: Any, maker: str) -> dict[str, Any]:
    """What a function that `maker` made has closed over; empty for any other."""
    if not getattr(function, "__qualname__", "").startswith(f"{maker}.<locals>"):
        return {}
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


# The mask of a forward.


def spans_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Any = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    **others: Any,
) -> Any:
    """AttentionMaskInterface's function: Spans, or a bool [B, 1, M, N] where these cannot say it.

    Outside torch.compile it reads a padding mask once on the host, to tell padding at an end from holes.
    """
    if isinstance(attention_mask, Spans):
        return attention_mask
    from transformers import masking_utils

    # Row m stands at key position m + shift.
    shift = q_offset - kv_offset
    mask_function = mask_function or masking_utils.causal_mask_function
    packed = None if use_vmap or torch.compiler.is_compiling() else _documents(mask_function)
    bands = None if use_vmap else _bands(mask_function if packed is None else packed[1])
    static = isinstance(shift, torch.Tensor) or kv_length > shift + q_length
    if bands is not None and bands.bands:
        # Keys behind the last row are not in the cache yet, or are they: a mask that looks ahead must be read.
        ahead = any(getattr(band, "right", 0) != 0 for band in bands.bands)
        if ahead if static else kv_length != shift + q_length:
            bands = None
    if bands is None:
        others = dict(others, allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=use_vmap)
        return masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device=device, **others
        )
    if packed is not None:
        return Spans(Mask(bands.bands, "top-left"), documents=Documents(packed[0]))
    padding = _padding(attention_mask, kv_length, kv_offset)

    if bands.bands and static:
        # The cache is longer than what is in it.
        stop = torch.as_tensor(shift + q_length, dtype=torch.int32, device=device).reshape(1)
        if padding is not None:
            padding = padding | (torch.arange(kv_length, device=device) >= stop)
        _, columns = _ends(padding)
        return Spans(Mask(bands.bands, "bottom-right"), stop.repeat(batch_size), columns=columns)
    end, columns = _ends(padding)
    square = q_length == kv_length
    if bands.bands and not square:
        # The cache grows with the rows: the last stands at the last key.
        return Spans(Mask(bands.bands, "bottom-right"), columns=columns)
    if bands.bands:
        bands = Mask(bands.bands, "top-left")
    if columns is None or end == "holes" or (end == "left" and not square):
        return Spans(bands, columns=columns)
    assert padding is not None
    used = padding.sum(1, dtype=torch.int32)
    if end == "right":
        return Spans(bands, used, square)
    starts = torch.arange(1, batch_size + 1, device=used.device, dtype=torch.int32) * kv_length - used
    edges = torch.nn.functional.pad(starts, (0, 1), value=batch_size * kv_length)
    return Spans(bands, columns=columns, packed=Lengths(edges, edges, used, used))


def _padding(attention_mask: torch.Tensor | None, kv_length: int, kv_offset: int) -> torch.Tensor | None:
    """The keys that count, bool [B, N], of a mask [B, tokens so far]."""
    if attention_mask is None:
        return None
    stop = kv_offset + kv_length
    if attention_mask.shape[1] < stop:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, stop - attention_mask.shape[1]))
    return attention_mask[:, kv_offset:stop].bool()


def _ends(padding: torch.Tensor | None) -> tuple[str, torch.Tensor | None]:
    """Where the padding is, "right", "left" or "holes", and the keys that count, None where all do."""
    if padding is None:
        return "right", None
    columns = padding[:, None, None, :]
    if torch.compiler.is_compiling():
        return "holes", columns
    count, position = padding.sum(1, keepdim=True), torch.arange(padding.shape[1], device=padding.device)
    right = padding == (position < count)
    left = padding == (position >= padding.shape[1] - count)
    everything, at_right, at_left = torch.stack([padding.all(), right.all(), left.all()]).tolist()
    return "right" if at_right else "left" if at_left else "holes", None if everything else columns


# The attention of a layer.


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """AttentionInterface's function.

    Args:
        query: [B, H, M, D].
        key, value: [B, G, N, D] and [B, G, N, Dv], not repeated.
        attention_mask: Spans, a bool tensor (True: attend), a float tensor that is added, or None: causal where the
            module is, with row 0 at key 0.
        s_aux: [H], attention sinks.
        position_bias: broadcasts to [B, H, M, N]; added to the scores, with its gradient.
        others: cu_seq_lens_q and cu_seq_lens_k, int32, of packed sequences that a data collator knows; what continuous
            batching says of its `cache`.

    Returns:
        out [B, M, H, Dv], and None for the probabilities.

    Raises:
        ValueError: output_attentions is asked for, or a position bias meets packed sequences.
    """
    if others.get("output_attentions"):
        raise ValueError('output_attentions needs attn_implementation="eager": this library never has probabilities')
    if others.get("cache") is not None:
        paged: dict[str, Any] = dict(bias=position_bias, softcap=softcap, sinks=s_aux, scale=scaling)
        return _attend_pages(module, query, key, value, paged, others), None
    spans, bias, dense = attention_mask, position_bias, None
    if not isinstance(spans, Spans):
        spans = _without_spans(module, query, attention_mask is None, is_causal, others)
        if spans.packed is None and attention_mask is not None:
            if attention_mask.dtype == torch.bool:
                dense = attention_mask
            else:
                bias = attention_mask if bias is None else bias + attention_mask
    elif spans.used is None and spans.columns is None and others.get("cu_seq_lens_q") is not None:
        # The mask knows the bands, and not always that sequences are packed.
        spans = Spans(Mask(spans.mask.bands, "bottom-right"), packed=_told(others))
    if bias is not None and spans.packed is not None and spans.columns is None:
        raise ValueError("a position bias needs sequences that are padded: cu_seq_lens_q tells of packed ones")
    if bias is not None and bias.dtype not in (torch.float32, query.dtype):
        bias = bias.to(query.dtype)
    options: dict[str, Any] = dict(bias=bias, softcap=softcap, sinks=s_aux, dropout_p=dropout, scale=scaling)

    # Left padding is packed where that is a view; whole sequences always are, unless a bias has rows of its own.
    views = spans.columns is None or all(map(_lies_packed, (query, key, value)))
    packed = spans.packed
    if spans.documents is not None and bias is None:
        packed = spans.documents.lengths
    if packed is not None and bias is None and views:
        query_1, key_1, value_1 = (
            tensor.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for tensor in (query, key, value)
        )
        out = attention(query_1, key_1, value_1, spans.mask, lengths=packed, **options).transpose(1, 2)
        return out.reshape(query.shape[0], query.shape[2], *out.shape[2:]), None
    if spans.documents is not None:
        ids = spans.documents.ids
        dense = ids[:, None, :, None] == ids[:, None, None, :]
    elif spans.columns is not None:
        dense = spans.columns
    # Not `spans.mask & dense`, which torch.compile takes for an operator of tensors.
    mask = spans.mask if dense is None else DenseMask(spans.mask, dense)
    lengths = Lengths(used_q=spans.used if spans.square else None, used_k=spans.used)
    return attention(query, key, value, mask, lengths=lengths, **options).transpose(1, 2), None


def _without_spans(
    module: torch.nn.Module, query: torch.Tensor, alone: bool, is_causal: bool | None, others: dict[str, Any]
) -> Spans:
    """What the module's attributes say, as "sdpa" reads them, or with cumulative lengths, as "flash_attention_2"."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = others.get("sliding_window")
    if others.get("cu_seq_lens_q") is not None:
        bands = masks.causal(align="bottom-right") if causal else Mask()
        if window is not None:
            bands = masks.window(window - 1, 0 if causal else window - 1, align="bottom-right")
        return Spans(bands, packed=_told(others))
    # One row sees all keys.
    return Spans(masks.causal() if alone and causal and query.shape[2] != 1 else Mask())


def _told(others: dict[str, Any]) -> Lengths:
    """Lengths of packed sequences that a data collator knows."""
    edges, edges_k = others["cu_seq_lens_q"], others.get("cu_seq_lens_k")
    return Lengths(edges, edges if edges_k is None else edges_k)


def _attend_pages(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: dict[str, Any],
    told: dict[str, Any],
) -> torch.Tensor:
    """Rows [1, H, total, D] of requests packed end to end, on their pages of a PagedAttentionCache.

    Args:
        key, value: [1, G, total, D] and [1, G, total, Dv]: new ones, which the cache takes.

    Returns:
        out [1, total, H, Dv].
    """
    # It writes what is new and says the keys of every request; with a block table it leaves the writing to us.
    key, value = told["cache"].update(key, value, module.layer_idx, told)
    edges, edges_k, window = told["cu_seq_lens_q"], told["cu_seq_lens_k"], told.get("sliding_window")
    mask = masks.causal(align="bottom-right")
    if window is not None:
        mask = masks.window(window - 1, 0, align="bottom-right")
    table = told.get("block_table")
    if table is None:
        lengths = Lengths(edges.to(torch.int32), edges_k)
        return attention(query, key, value, mask, lengths=lengths, **options).transpose(1, 2)
    # One new row a request.
    query, key, value = (tensor.transpose(0, 2) for tensor in (query, key, value))
    used = edges_k.diff()[: query.shape[0]]
    pages = Pages(table[: query.shape[0]], told["k_cache"].shape[1])
    append(told["k_cache"], told["v_cache"], key, value, used - 1, pages=pages)
    out = attention(
        query, told["k_cache"], told["v_cache"], mask, lengths=Lengths(used_k=used), pages=pages, **options
    )  # fmt: skip
    return out[:, :, 0][None]


def _lies_packed(tensor: torch.Tensor) -> bool:
    """Whether batch entries [B, heads, S, D] follow one another as rows of one sequence."""
    return tensor.shape[0] == 1 or tensor.stride(0) == tensor.shape[2] * tensor.stride(2)
