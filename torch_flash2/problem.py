"""Problem: everything about one attention call except the data, built and validated in one place.

B batch entries or packed documents, H query heads, G key/value heads, M query rows, N keys, D head dim of query and
key,
Dv head dim of value.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import torch

from . import hardware, masks, scores, settings
from .hardware import Hardware
from .masks import Mask

# Into how many parts a segment's keys may be split.
MOST_SPLITS = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Lengths(NamedTuple):
    """Where segments lie and how long they are; every tensor is int32, one-dimensional, on the device of the query.

    `cu_q`, `cu_k` [B + 1]: cumulative starts of packed documents; the packed tensors are [1, heads, total, dim].
    `used_q`, `used_k` [B]: how many rows or keys of a segment count; the rest is padding, read by nobody, written as 0.
    `max_q`, `max_k`: the longest segment, a hint that may save empty tiles; never needed, never read from the
    device.
    """

    cu_q: torch.Tensor | None = None
    cu_k: torch.Tensor | None = None
    used_q: torch.Tensor | None = None
    used_k: torch.Tensor | None = None
    max_q: int | None = None
    max_k: int | None = None


class Pages(NamedTuple):
    """Paged keys and values [pages, page_size, G, dim]: `block_table` int32 [B, pages per segment] names a segment's
    pages, in any order; entries past a segment's used keys are not read."""

    block_table: torch.Tensor
    page_size: int


class Rotary(NamedTuple):
    """Rotary embeddings: cos and sin [positions, R], of any floating dtype. The first 2 R columns of a row are turned:
    column i with R + i, or with its neighbour where `interleaved`."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False


class Append(NamedTuple):
    """New rows for a cache, as caches.append describes them."""

    key_cache: torch.Tensor
    value_cache: torch.Tensor | None
    key: torch.Tensor
    value: torch.Tensor | None
    used_k: torch.Tensor
    block_table: torch.Tensor | None
    batch_index: torch.Tensor | None
    rotary: Rotary | None


class Call(NamedTuple):
    """The arguments of the ops, in the order of their schema."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    dense: torch.Tensor | None
    bias: torch.Tensor | None
    alibi: torch.Tensor | None
    sinks: torch.Tensor | None
    seed: torch.Tensor | None
    cu_q: torch.Tensor | None
    cu_k: torch.Tensor | None
    used_q: torch.Tensor | None
    used_k: torch.Tensor | None
    block_table: torch.Tensor | None
    mask: str
    mask_numbers: list[int]
    scale: float
    softcap: float | None
    dropout_p: float
    page_size: int | None
    max_q: int | None
    max_k: int | None
    deterministic: bool
    force: str | None
    num_splits: int | None = None


class Saved(NamedTuple):
    """What the backward has besides the call: the forward's results, the gradients that arrive, and which are
    wanted."""

    out: torch.Tensor
    lse: torch.Tensor
    grad_out: torch.Tensor | None
    grad_lse: torch.Tensor | None
    wanted: tuple[bool, bool, bool, bool, bool]


class Gradients(NamedTuple):
    """Gradients of a call, each in the shape and dtype of its tensor; None where not wanted."""

    query: torch.Tensor | None
    key: torch.Tensor | None
    value: torch.Tensor | None
    bias: torch.Tensor | None
    sinks: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything about one call except the data; sizes may be symbolic while tracing.

    `batch` counts segments; `seqlen_q` and `seqlen_k` are those of the tensors as stored, so totals where packed.
    `steps` names the score steps, `lengths` the length tensors that are present. `bias_dims` says in which of (B, H, M,
    N) the bias varies. `page_size` is None where keys are not paged; where they are, `seqlen_k` is the room of a
    segment's pages. `value_in_key`: the value is the first columns of the key, the same memory. `layout` is "aligned"
    (unit stride on D, everything else a multiple of 16 bytes), "unit" (unit stride on D) or "strided".
    """

    direction: str
    hardware: Hardware
    dtype: torch.dtype
    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    mask: Mask = Mask()
    dense: bool = False
    steps: tuple[str, ...] = ()
    positive_scale: bool = True
    bias_dims: tuple[bool, ...] | None = None
    bias_grad: bool = False
    sinks: bool = False
    lengths: tuple[str, ...] = ()
    page_size: int | None = None
    dropout: bool = False
    needs_grad: bool = False
    deterministic: bool = False
    precision: str = "ieee"
    layout: str = "aligned"
    wide: bool = False
    value_in_key: bool = False

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.heads_kv

    @property
    def packed_q(self) -> bool:
        return "cu_q" in self.lengths

    @property
    def packed_k(self) -> bool:
        return "cu_k" in self.lengths

    @property
    def key(self) -> Problem:
        """The part that a plan depends on: numbers of the mask left out, sizes rounded to what configs distinguish."""
        return dataclasses.replace(
            self,
            batch=_bucket(self.batch),
            seqlen_q=_bucket(self.seqlen_q),
            seqlen_k=_bucket(self.seqlen_k),
            mask=_without_numbers(self.mask),
        )

    def describe(self) -> str:
        """One line for people."""
        parts = [
            f"{self.direction} on {self.hardware}",
            str(self.dtype).removeprefix("torch."),
            f"B={self.batch} H={self.heads}" + (f"/{self.heads_kv}" if self.group != 1 else ""),
            f"M={self.seqlen_q} N={self.seqlen_k} D={self.head_dim}"
            + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else ""),
            f"mask {self.mask}" + (" & dense" if self.dense else ""),
            *self.steps,
            *(["sinks"] if self.sinks else []),
            *(["dropout"] if self.dropout else []),
            *([f"lengths {', '.join(self.lengths)}"] if self.lengths else []),
            *([f"pages of {self.page_size}"] if self.page_size is not None else []),
            *(["value in key"] if self.value_in_key else []),
        ]
        return ", ".join(parts)


def _bucket(size: int) -> int:
    """The next power of two: tables know no finer sizes."""
    return 1 << max(int(size) - 1, 0).bit_length() if size > 0 else 0


@functools.lru_cache(maxsize=1024)
def _without_numbers(mask: Mask) -> Mask:
    def plain(band: masks.Band) -> masks.Band:
        set_fields = {f.name: 1 for f in dataclasses.fields(band) if getattr(band, f.name) is not None}
        return dataclasses.replace(band, **set_fields)

    return Mask(tuple(map(plain, mask.bands)), mask.align)


@functools.lru_cache(maxsize=1024)
def _parse(mask: str, numbers: tuple[int, ...]) -> Mask:
    return masks.parse(mask, numbers)


def parse_mask(call: Call) -> Mask:
    """The call's bands; cached where the numbers are plain."""
    if all(type(number) is int for number in call.mask_numbers):
        return _parse(call.mask, tuple(call.mask_numbers))
    return masks.parse(call.mask, call.mask_numbers)


def segments(call: Call) -> int:
    """How many segments the call has."""
    if call.cu_q is not None:
        return call.cu_q.shape[0] - 1
    if call.cu_k is not None:
        return call.cu_k.shape[0] - 1
    return call.query.shape[0]


def validate(call: Call) -> Mask:
    """Reject a caller's mistakes; also returns the parsed bands.

    Raises:
        TypeError: a dtype or device is wrong, or dtypes and devices are mixed.
        ValueError: a shape or number breaks the rule that the message names.
    """
    query, key, value = call.query, call.key, call.value
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions [batch, heads, seqlen, head_dim], got shape {tuple(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"query, key and value must have one dtype, got {query.dtype} and {name} {tensor.dtype}")
    for name, argument in zip(call._fields, call, strict=True):
        if isinstance(argument, torch.Tensor) and argument.device != query.device:
            raise TypeError(f"every tensor must be on {query.device} as the query is, got {name} on {argument.device}")
    if call.block_table is not None:
        _check_pages(call)
    _check_key_value(query, *key_value(call))
    if call.num_splits is not None and not 1 <= call.num_splits <= MOST_SPLITS:
        raise ValueError(
            f"num_splits must be from 1 to {MOST_SPLITS} (None leaves it to the library), got {call.num_splits}"
        )
    _check_lengths(call)
    _check_scores(call)
    mask = parse_mask(call)
    late = [name for name in ("used_k", "block_table") if getattr(call, name) is not None]
    if mask.bands and mask.align is None and late:
        raise ValueError(
            f"mask {mask} with {late[0]} needs an explicit alignment: say align='bottom-right' (the last query row "
            "stands at the last used key, as in decoding) or align='top-left' (row 0 stands at key 0)"
        )
    return mask


def key_value(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value as [B, G, N, dim], or as views [pages, G, page_size, dim] where they are paged."""
    if call.block_table is None:
        return call.key, call.value
    return call.key.transpose(1, 2), call.value.transpose(1, 2)


def stored_keys(call: Call) -> int:
    """How many keys a segment has room for; of packed keys, their total."""
    if call.block_table is None:
        return call.key.shape[2]
    return call.block_table.shape[1] * call.key.shape[1]


def value_in_key(call: Call) -> bool:
    """Whether the value is the key's first columns, the same memory, as in absorbed MLA."""
    key, value = call.key, call.value
    same = value.stride() == key.stride() and value.shape[3] <= key.shape[3]
    return same and value.data_ptr() == key.data_ptr() != 0


def _check_pages(call: Call) -> None:
    table = call.block_table
    assert table is not None
    if table.dtype != torch.int32:
        raise TypeError(f"block_table must be int32, got {table.dtype}")
    if table.dim() != 2 or table.shape[0] != segments(call):
        raise ValueError(f"block_table must be [B, pages per segment], B = {segments(call)}, got {tuple(table.shape)}")
    if table.stride(1) != 1 and table.shape[1] > 1:
        raise ValueError(f"block_table must have unit stride in its last dimension, got {table.stride(1)}")
    if call.cu_k is not None:
        raise ValueError("paged keys have no cu_k: block_table says where they lie, used_k how many there are")
    if call.page_size != call.key.shape[1] or call.page_size == 0:
        raise ValueError(
            f"paged keys are [pages, page_size, heads, head_dim] with page_size {call.page_size}, "
            f"got shape {tuple(call.key.shape)}"
        )
    if call.key.shape[0] == 0 and table.shape[1] > 0:
        raise ValueError(f"block_table of shape {tuple(table.shape)} needs pages, the key has none")


def _check_key_value(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must have one head_dim, got {query.shape[3]} and {key.shape[3]}")
    if query.shape[3] == 0 or value.shape[3] == 0:
        raise ValueError(f"head_dim must be at least 1, got query {tuple(query.shape)} and value {tuple(value.shape)}")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            "key and value must agree in batch, heads and seqlen, "
            f"got {tuple(key.shape[:3])} and {tuple(value.shape[:3])}"
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1] != 0:
        raise ValueError(f"query heads must be a multiple of key heads, got {query.shape[1]} and {key.shape[1]}")


def _check_lengths(call: Call) -> None:
    count = segments(call)
    for name, tensor, size in (
        ("cu_q", call.cu_q, count + 1),
        ("cu_k", call.cu_k, count + 1),
        ("used_q", call.used_q, count),
        ("used_k", call.used_k, count),
    ):
        if tensor is None:
            continue
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {tensor.dtype}")
        if tensor.dim() != 1 or tensor.shape[0] != size:
            raise ValueError(f"{name} must have shape [{size}], got {tuple(tensor.shape)}")
        if tensor.stride(0) != 1 and size > 1:
            raise ValueError(f"{name} must be contiguous, got stride {tensor.stride(0)}")
    if count < 0:
        raise ValueError("cumulative lengths need at least one entry")
    for name, tensor, cu in (("query", call.query, call.cu_q), ("key", call.key, call.cu_k)):
        if name == "key" and call.block_table is not None:
            continue
        batch = 1 if cu is not None else count
        if tensor.shape[0] != batch:
            why = "a packed tensor has batch 1" if cu is not None else f"the call has {count} segments"
            raise ValueError(f"{name} must have batch {batch} ({why}), got {tensor.shape[0]}")
    for name, hint in (("max_q", call.max_q), ("max_k", call.max_k)):
        if hint is not None and hint < 0:
            raise ValueError(f"{name} must not be negative, got {hint}")


def output_like(call: Call) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Sizes [B, H, M, Dv] and strides of the output: dense, its dimensions in memory in the query's order, as PyTorch's
    own flash attention lays it out, D innermost.

    A query of overlapping memory says nothing of an order; the output then lies as B, M, H, Dv.
    """
    B, H, M, _ = call.query.shape
    sizes = (B, H, M, call.value.shape[3])
    strides = call.query.stride()
    order = [0, 2, 1]
    if all(type(stride) is not int or stride != 0 for stride in strides[:3]):
        order = []
        for i in range(3):
            place = i
            while place > 0 and _definitely(strides[i] > strides[order[place - 1]]):
                place -= 1
            order.insert(place, i)
    found, step = [0, 0, 0], sizes[3]
    for i in reversed(order):
        found[i] = step
        step = step * sizes[i] if type(sizes[i]) is not int else step * max(sizes[i], 1)
    return sizes, (found[0], found[1], found[2], 1)


def _definitely(condition: bool | torch.SymBool) -> bool:
    """The condition, False where its sizes are known at run time alone."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def stored_shape(call: Call) -> tuple[int, int, int, int]:
    """[B, H, M, N] of the tensors as stored, to which dense masks and biases broadcast."""
    if call.block_table is not None:
        batch = segments(call)
    else:
        batch = call.query.shape[0] if call.cu_q is None else call.key.shape[0]
    return batch, call.query.shape[1], call.query.shape[2], stored_keys(call)


def _check_scores(call: Call) -> None:
    shape = stored_shape(call)
    for name, tensor in (("mask", call.dense), ("bias", call.bias)):
        if tensor is None:
            continue
        padded = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
        if len(padded) != 4 or any(have not in (1, want) for have, want in zip(padded, shape, strict=True)):
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} must broadcast to [B, H, M, N] = {list(shape)}")
    if call.dense is not None and call.dense.dtype != torch.bool:
        raise TypeError(
            f"a mask tensor must be bool (True: attend), got {call.dense.dtype}; pass a float tensor as bias="
        )
    if call.bias is not None and call.bias.dtype not in (call.query.dtype, torch.float32):
        raise TypeError(f"bias must be float32 or the query's {call.query.dtype}, got {call.bias.dtype}")
    heads, batch = shape[1], segments(call)
    if call.alibi is not None:
        if tuple(call.alibi.shape) not in ((heads,), (batch, heads)):
            raise ValueError(f"alibi_slopes must be [{heads}] or [{batch}, {heads}], got {tuple(call.alibi.shape)}")
        if call.alibi.dtype != torch.float32:
            raise TypeError(f"alibi_slopes must be float32, got {call.alibi.dtype}")
    if call.sinks is not None:
        if tuple(call.sinks.shape) != (heads,):
            raise ValueError(f"sinks must be [{heads}], one logit a query head, got {tuple(call.sinks.shape)}")
        if not call.sinks.dtype.is_floating_point:
            raise TypeError(f"sinks must be floating point, got {call.sinks.dtype}")
    if call.softcap is not None and not call.softcap > 0:
        raise ValueError(f"softcap must be positive (None is no cap), got {call.softcap}")
    if not 0 <= call.dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {call.dropout_p}")
    if call.dropout_p > 0 and (call.seed is None or call.seed.dtype != torch.int64 or tuple(call.seed.shape) != (2,)):
        raise ValueError("dropout needs a seed: an int64 tensor [seed, offset]")
    if not math.isfinite(call.scale):
        raise ValueError(f"scale must be finite, got {call.scale}")


def of(call: Call, direction: str = "forward", needs_grad: bool = False, bias_grad: bool = False) -> Problem:
    """The Problem of a call on real tensors, validated.

    Raises:
        TypeError, ValueError: the caller's mistakes, as `validate` says.
    """
    mask = validate(call)
    operands: dict[str, Any] = {"softcap": call.softcap, "alibi": call.alibi, "bias": call.bias}
    lengths = tuple(name for name in ("cu_q", "cu_k", "used_q", "used_k") if getattr(call, name) is not None)
    query = call.query
    return Problem(
        direction=direction,
        hardware=hardware.of(query.device),
        dtype=query.dtype,
        batch=segments(call),
        heads=query.shape[1],
        heads_kv=key_value(call)[0].shape[1],
        seqlen_q=query.shape[2],
        seqlen_k=stored_keys(call),
        head_dim=query.shape[3],
        head_dim_v=call.value.shape[3],
        mask=mask,
        dense=call.dense is not None,
        steps=tuple(name for name in scores.STEPS if operands[name] is not None),
        positive_scale=call.scale > 0,
        bias_dims=None if call.bias is None else bias_dims(call.bias),
        bias_grad=bias_grad,
        sinks=call.sinks is not None,
        lengths=lengths,
        page_size=call.page_size,
        dropout=call.dropout_p > 0,
        needs_grad=needs_grad,
        deterministic=call.deterministic,
        precision=precision(call),
        layout=_layout(call),
        wide=_wide(call),
        value_in_key=value_in_key(call),
    )


def precision(call: Call) -> str:
    """How products are computed: as PyTorch's settings say for fp32, exactly for other dtypes."""
    return settings.matmul_precision(call.query.device.type) if call.query.dtype == torch.float32 else "ieee"


def bias_dims(bias: torch.Tensor) -> tuple[bool, ...]:
    """In which of (B, H, M, N) the bias varies."""
    return tuple(size != 1 for size in (1,) * (4 - bias.dim()) + tuple(bias.shape))


def _layout(call: Call) -> str:
    tensors = (call.query, *key_value(call))
    if any(t.stride(3) != 1 and t.shape[3] != 1 for t in tensors):
        return "strided"
    return "aligned" if all(map(tma_ready, tensors)) else "unit"


def tma_ready(tensor: torch.Tensor) -> bool:
    """Whether a [B, H, S, D] tensor meets TMA's rules: unit stride on D, the rest multiples of 16 bytes."""
    size = tensor.element_size()
    if tensor.stride(3) != 1 or tensor.data_ptr() % 16:
        return False
    return all(
        s * size % 16 == 0 and s > 0 for s, n in zip(tensor.stride()[:3], tensor.shape[:3], strict=True) if n != 1
    )


def _wide(call: Call) -> bool:
    """Whether offsets inside one tile can pass 2**31 elements: rows far apart."""
    tensors = (call.query, *key_value(call))
    return any(t.stride(2) >= 2**31 // 512 or t.stride(3) >= 2**31 // 512 for t in tensors)
