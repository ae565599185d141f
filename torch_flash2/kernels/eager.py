"""Attention written out in eager PyTorch, some rows at a time: `reference` and `cpu` share it.

B batch entries of one size, H query heads, G key/value heads, M query rows and N keys of a segment,
R of those rows, K of those keys, D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from .. import scores
from ..problem import Call, Gradients, Saved, output_like, parse_mask, segments


class Segment(NamedTuple):
    """Segments of one size that are computed together, and where they lie as stored.

    They are `entries` from number `first` on, and of them `heads` key heads from `head` on, each
    with its `group` of query heads.
    """

    first: int
    entries: int
    head: int
    heads: int
    group: int
    batch_q: int
    start_q: int
    M: int
    batch_k: int
    start_k: int
    N: int

    @property
    def batches(self) -> slice:
        return slice(self.first, self.first + self.entries)

    @property
    def query_heads(self) -> slice:
        return slice(self.head * self.group, (self.head + self.heads) * self.group)

    def queries(self, tensor: torch.Tensor) -> torch.Tensor:
        """Their part, a view, of a tensor that lies as the query does."""
        batches = slice(self.batch_q, self.batch_q + self.entries)
        return tensor[batches, self.query_heads, self.start_q : self.start_q + self.M]

    def keys(self, tensor: torch.Tensor) -> torch.Tensor:
        """Their part, a view, of a tensor that lies as the key does."""
        batches = slice(self.batch_k, self.batch_k + self.entries)
        heads = slice(self.head, self.head + self.heads)
        return tensor[batches, heads, self.start_k : self.start_k + self.N]

    def pairs(self, tensor: torch.Tensor) -> torch.Tensor:
        """Their part, a view, of a tensor that broadcasts to the stored [B, H, M, N]."""
        tensor = tensor[(None,) * (4 - tensor.dim())]
        rows = slice(self.start_q, self.start_q + self.M)
        columns = slice(self.start_k, self.start_k + self.N)
        parts = (self.batches, self.query_heads, rows, columns)
        return tensor[_unbroadcast(tensor, parts)]

    def call(self, call: Call) -> Call:
        """The call of these segments alone, without lengths."""
        alibi, sinks = call.alibi, call.sinks
        if alibi is not None:
            alibi = alibi[..., self.query_heads]
            alibi = alibi[self.batches] if alibi.dim() == 2 else alibi
        return call._replace(
            query=self.queries(call.query),
            key=self.keys(call.key),
            value=self.keys(call.value),
            dense=None if call.dense is None else self.pairs(call.dense),
            bias=None if call.bias is None else self.pairs(call.bias),
            alibi=alibi,
            sinks=None if sinks is None else sinks[self.query_heads],
            cu_q=None,
            cu_k=None,
            used_q=None,
            used_k=None,
        )

    def saved(self, saved: Saved) -> Saved:
        """What the forward saved of these segments."""
        return saved._replace(
            out=self.queries(saved.out),
            lse=self.queries(saved.lse),
            grad_out=None if saved.grad_out is None else self.queries(saved.grad_out),
            grad_lse=None if saved.grad_lse is None else self.queries(saved.grad_lse),
        )

    def gradients(self, gradients: Gradients) -> Gradients:
        """The parts, views, of gradients that these segments add to."""
        query, key, value, bias, sinks = gradients
        return Gradients(
            None if query is None else self.queries(query),
            None if key is None else self.keys(key),
            None if value is None else self.keys(value),
            None if bias is None else self.pairs(bias),
            None if sinks is None else sinks[self.query_heads],
        )


def unpaged(call: Call) -> Call:
    """The call with keys and values [B, G, N, dim] in place of pages; a bad page number counts as the nearest."""
    if call.block_table is None:
        return call
    pages = call.block_table.clamp(0, max(call.key.shape[0] - 1, 0)).long()

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[pages].flatten(1, 2).transpose(1, 2)

    return call._replace(key=gather(call.key), value=gather(call.value), block_table=None, page_size=None)


def split(call: Call, entries: int, heads: int) -> Iterator[Segment]:
    """The call's segments, `heads` key heads and at most `entries` batch entries together.

    Lengths are read on the host, and then segments come one by one.
    """
    count, G, M, N = segments(call), call.key.shape[1], call.query.shape[2], call.key.shape[2]
    if (call.cu_q, call.cu_k, call.used_q, call.used_k) == (None, None, None, None):
        places = [((b, 0, M), (b, 0, N)) for b in range(0, count, entries)]
    else:
        entries = 1
        queries = _places(count, M, call.cu_q, call.used_q)
        places = list(zip(queries, _places(count, N, call.cu_k, call.used_k), strict=True))
    for index, (place_q, place_k) in enumerate(places):
        b = index * entries
        for g in range(0, G, heads):
            sizes = (min(entries, count - b), g, min(heads, G - g), call.query.shape[1] // G)
            yield Segment(b, *sizes, *place_q, *place_k)


def _places(count: int, stored: int, cu: torch.Tensor | None, used: torch.Tensor | None) -> list[tuple[int, int, int]]:
    """(batch entry, start, used length) of every segment of one side, within what is stored."""
    places = [(b, 0, stored) for b in range(count)]
    if cu is not None:
        edges = [min(max(edge, 0), stored) for edge in cu.tolist()]
        places = [(0, edges[b], max(edges[b + 1] - edges[b], 0)) for b in range(count)]
    if used is not None:
        lengths = used.tolist()
        places = [(b, start, min(max(n, 0), size)) for (b, start, size), n in zip(places, lengths, strict=True)]
    return places


def _unbroadcast(tensor: torch.Tensor, parts: tuple[slice, ...]) -> tuple[slice, ...]:
    """Slices of a tensor's dimensions, but for those of size 1, which broadcast."""
    whole = slice(None)
    return tuple(whole if n == 1 else at for n, at in zip(tensor.shape, parts, strict=True))


class Block(NamedTuple):
    """Query rows start .. stop of a segment and the keys first .. last of which they see some.

    `hidden` [1 or B, 1 or H, R, K]: the pairs that the mask rules out, None where there are none.
    `distance` [R, K]: from a key to a row's position.
    """

    start: int
    stop: int
    first: int
    last: int
    hidden: torch.Tensor | None
    distance: torch.Tensor

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:, :, self.start : self.stop]

    def keys(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:, :, self.first : self.last]

    def pairs(self, tensor: torch.Tensor) -> torch.Tensor:
        """Their part, a view, of a tensor that broadcasts to the segment's [B, H, M, N]."""
        whole = slice(None)
        parts = (whole, whole, slice(self.start, self.stop), slice(self.first, self.last))
        return tensor[_unbroadcast(tensor, parts)]


def block(call: Call, start: int, stop: int) -> Block:
    """Rows start .. stop of a segment's call, and all keys that they see."""
    # From row to row a band's interval only moves right: its first and last row bound it.
    mask, M, N = parse_mask(call), call.query.shape[2], call.key.shape[2]
    first, first_stop = mask.keys(start, M, N)
    last_start, last = mask.keys(stop - 1, M, N)
    first = min(first, N)
    last = max(first, last)

    m = torch.arange(start, stop, device=call.query.device)[:, None]
    n = torch.arange(first, last, device=call.query.device)[None, :]
    found = Block(start, stop, first, last, None, m + mask.shift(M, N) - n)
    hidden = None
    if last_start > first or first_stop < last:
        hidden = ~mask.visible(m, n, M, N)[None, None]
    if call.dense is not None:
        unseen = ~found.pairs(call.dense)
        hidden = unseen if hidden is None else hidden | unseen
    return found._replace(hidden=hidden)


def forward_rows(
    call: Call, segment: Segment, start: int, stop: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query rows start .. stop, at least one, of a segment's call, computed in `dtype`.

    Differentiable in query, key, value, bias and sinks.

    Args:
        call: the segment's (`Segment.call`).

    Returns:
        out [B, H, R, Dv] and lse [B, H, R].
    """
    at = block(call, start, stop)
    query, key, value = _operands(call, at, dtype)
    B, H, R, _ = query.shape
    if key.shape[2] == 0:
        return query.new_zeros(B, H, R, value.shape[3]), query.new_full((B, H, R), -torch.inf)

    score, _ = _scores(call, at, query, key)
    if at.hidden is not None:
        score = score.masked_fill_(at.hidden, -torch.inf)
    p, total, lse = _softmax(score, _sinks(call, dtype))
    if call.dropout_p > 0:
        p = p.masked_fill(_dropped(call, segment, at), 0.0)
        total = total * (1 - call.dropout_p)
    return _careful(_over_keys, p, value, at.hidden) / total, lse[..., 0]


def backward_rows(
    call: Call, segment: Segment, start: int, stop: int, saved: Saved, sums: Gradients, dtype: torch.dtype
) -> None:
    """The backward of `forward_rows` by explicit formulas, outside autograd.

    Args:
        call: the segment's (`Segment.call`).
        saved: the segment's (`Segment.saved`).
        sums: the segment's (`Segment.gradients`): the query's rows are written, all else is added.
    """
    at = block(call, start, stop)
    if at.first == at.last:
        return
    query, key, value = _operands(call, at, dtype)
    score, slope = _scores(call, at, query, key)
    sinks = _sinks(call, dtype)

    # Probabilities again; the saved lse is fp32, which would cost fp64 its precision.
    if dtype == torch.float64:
        if at.hidden is not None:
            score = score.masked_fill_(at.hidden, -torch.inf)
        p, total, lse = _softmax(score, sinks)
        p = p.div_(total)
    else:
        lse = at.rows(saved.lse).to(dtype)[..., None]
        p = score.sub_(torch.where(lse == -torch.inf, 0.0, lse)).exp_()
    if at.hidden is not None:
        p = p.masked_fill_(at.hidden, 0.0)
    dropped = _dropped(call, segment, at) if call.dropout_p > 0 else None

    # The sum of p * dP over the keys, which no row has that sees none.
    out = at.rows(saved.out).to(dtype)
    grad_out = torch.zeros_like(out)
    if saved.grad_out is not None:
        grad_out = at.rows(saved.grad_out).to(dtype)
    delta = (grad_out * out).sum(3, keepdim=True)
    if saved.grad_lse is not None:
        delta = delta - at.rows(saved.grad_lse).to(dtype)[..., None]
    delta = torch.where(lse == -torch.inf, 0.0, delta)
    if sums.sinks is not None and sinks is not None:
        share = torch.where(lse == -torch.inf, 0.0, torch.exp(sinks - lse))
        sums.sinks.sub_((share * delta).sum((0, 2, 3)))
    if sums.value is not None:
        kept = p
        if dropped is not None:
            kept = p.masked_fill(dropped, 0.0).div_(1 - call.dropout_p)
        at.keys(sums.value).add_(_careful(_over_rows, kept, grad_out, at.hidden, key.shape[1]))

    # Gradients of the scores, through the steps in reverse; bias is the last of them.
    ds = _products(grad_out, value)
    if dropped is not None:
        ds = ds.masked_fill_(dropped, 0.0).div_(1 - call.dropout_p)
    ds = ds.sub_(delta).mul_(p)
    if at.hidden is not None:
        ds = ds.masked_fill_(at.hidden, 0.0)
    if sums.bias is not None:
        grad_bias = at.pairs(sums.bias)
        grad_bias.add_(ds.sum_to_size(grad_bias.shape))
    if slope is not None:
        ds = ds.mul_(slope)
    if sums.query is not None:
        grad_query = _careful(_over_keys, ds, key, at.hidden)
        at.rows(sums.query).copy_(grad_query.mul_(call.scale))
    if sums.key is not None:
        at.keys(sums.key).add_(_careful(_over_rows, ds, query, at.hidden, key.shape[1]))


def _operands(call: Call, at: Block, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Rows of the query, scaled, and their keys and values."""
    query, key, value = at.rows(call.query), at.keys(call.key), at.keys(call.value)
    return query.to(dtype) * call.scale, key.to(dtype), value.to(dtype)


def _sinks(call: Call, dtype: torch.dtype) -> torch.Tensor | None:
    return None if call.sinks is None else call.sinks.to(dtype)[None, :, None, None]


def _scores(call: Call, at: Block, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores [B, H, R, K] after all steps, and their derivative by the first score, None for 1.

    Hidden pairs hold anything, NaN too; their slope is 0.
    """
    dtype, H = query.dtype, query.shape[1]
    operands: dict[str, Any] = {
        "softcap": call.softcap,
        "alibi": None if call.alibi is None else call.alibi.to(dtype).reshape(-1, H, 1, 1),
        "bias": None if call.bias is None else at.pairs(call.bias).to(dtype),
    }
    score, slope = _products(query, key), None
    for name, step in scores.STEPS.items():
        if operands[name] is None:
            continue
        score = step.value(score, operands[name], at.distance)
        if step.slope is not None:
            own = step.slope(score, operands[name])
            slope = own if slope is None else slope * own
    if slope is not None and at.hidden is not None:
        slope = slope.masked_fill(at.hidden, 0.0)
    return score, slope


def _softmax(score: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unnormalised probabilities [B, H, R, K], their totals and the lse, both [B, H, R, 1].

    A row whose scores are all -inf has probabilities 0, total 1 and lse -inf.
    """
    top = score.detach().amax(3, keepdim=True)
    none = top == -torch.inf
    if sinks is not None:
        top = torch.maximum(top, sinks.detach())
    top = torch.where(top == -torch.inf, 0.0, top)
    p = torch.exp(score - top)
    total = p.sum(3, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    total = torch.where(none, 1.0, total)
    return p, total, torch.where(none, -torch.inf, top + total.log())


def _dropped(call: Call, segment: Segment, at: Block) -> torch.Tensor:
    """Which scores [B, H, R, K] dropout drops: `scores.keep`, each Philox block computed once."""
    assert call.seed is not None
    device = call.query.device
    heads = segment.query_heads
    counter = (
        torch.arange(segment.first, segment.batches.stop, device=device)[:, None, None, None],
        torch.arange(heads.start, heads.stop, device=device)[:, None, None],
        torch.arange(at.start, at.stop, device=device)[:, None],
        torch.arange(at.first // 4, (at.last + 3) // 4, device=device),
    )
    words = scores.philox(scores.dropout_key(call.seed), counter)
    kept = torch.stack([word >= scores.keep_threshold(call.dropout_p) for word in words], dim=4)
    skip = at.first % 4
    return ~kept.flatten(3)[..., skip : skip + at.last - at.first]


# Products in which a key head serves a group of H / G query heads.


def _fold(tensor: torch.Tensor, G: int) -> torch.Tensor:
    """[B, H, R, C] as [B, G, H / G * R, C]."""
    B, H, R, C = tensor.shape
    return tensor.reshape(B, G, H // G * R, C)


def _products(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[B, H, R, K] from rows [B, H, R, C] and keys [B, G, K, C]."""
    found = _fold(rows, keys.shape[1]) @ keys.transpose(2, 3)
    return found.reshape(*rows.shape[:3], keys.shape[2])


def _over_keys(weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[B, H, R, C]: keys [B, G, K, C] summed with weights [B, H, R, K]."""
    found = _fold(weights, keys.shape[1]) @ keys
    return found.reshape(*weights.shape[:3], keys.shape[3])


def _over_rows(weights: torch.Tensor, rows: torch.Tensor, G: int) -> torch.Tensor:
    """[B, G, K, C]: rows [B, H, R, C] summed with weights [B, H, R, K]."""
    return _fold(weights, G).transpose(2, 3) @ _fold(rows, G)


def _careful(
    product: Callable[..., torch.Tensor],
    weights: torch.Tensor,
    summands: torch.Tensor,
    hidden: torch.Tensor | None,
    *groups: int,
) -> torch.Tensor:
    """A weighted sum in which a hidden summand counts for nothing, not as 0 * NaN."""
    found = product(weights, summands, *groups)
    if hidden is None or bool(torch.isfinite(found.detach().sum())):
        return found
    good = torch.isfinite(summands)
    seen = (~hidden).to(weights.dtype).expand(weights.shape)
    found = product(weights, torch.where(good, summands, 0.0), *groups)
    return torch.where(product(seen, (~good).to(weights.dtype), *groups) > 0, torch.nan, found)


# Whole calls.


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def outputs(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The results of rows that see no key: out 0, laid out as `output_like` says, and lse -inf."""
    B, H, M, _ = call.query.shape
    out = torch.empty_strided(*output_like(call), dtype=call.query.dtype, device=call.query.device).zero_()
    return out, call.query.new_full((B, H, M), -torch.inf, dtype=torch.float32)


class Step(NamedTuple):
    """How much is computed together: batch entries, key heads with their groups, query rows."""

    entries: int
    heads: int
    rows: int


def forward(call: Call, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Out [B, H, M, Dv] in the query's dtype and lse fp32 [B, H, M]."""
    dtype = working_dtype(call.query.dtype)
    out, lse = outputs(call)
    for segment in split(call, step.entries, step.heads):
        part = _widened(segment.call(call), dtype)
        part_out, part_lse = segment.queries(out), segment.queries(lse)
        for start in range(0, segment.M, step.rows):
            stop = min(start + step.rows, segment.M)
            rows_out, rows_lse = forward_rows(part, segment, start, stop, dtype)
            part_out[:, :, start:stop] = rows_out
            part_lse[:, :, start:stop] = rows_lse
    return out, lse


def backward(call: Call, saved: Saved, step: Step) -> Gradients:
    """The gradients of a call, each in the shape and dtype of its tensor."""
    dtype = working_dtype(call.query.dtype)
    tensors = (call.query, call.key, call.value, call.bias, call.sinks)
    # A row of the query is written once; all else is summed.
    kept = (call.query.dtype, dtype, dtype, dtype, dtype)
    sums = Gradients(
        *(
            torch.zeros_like(tensor, dtype=to) if want and tensor is not None else None
            for tensor, to, want in zip(tensors, kept, saved.wanted, strict=True)
        )
    )
    for segment in split(call, step.entries, step.heads):
        part = _widened(segment.call(call), dtype)
        part_saved, part_sums = segment.saved(saved), segment.gradients(sums)
        for start in range(0, segment.M, step.rows):
            stop = min(start + step.rows, segment.M)
            backward_rows(part, segment, start, stop, part_saved, part_sums, dtype)
    return Gradients(
        *(
            None if total is None or tensor is None else total.to(tensor.dtype)
            for total, tensor in zip(sums, tensors, strict=True)
        )
    )


def _widened(call: Call, dtype: torch.dtype) -> Call:
    """The call with keys and values in `dtype`, so that not every block of rows converts them."""
    return call._replace(key=call.key.to(dtype), value=call.value.to(dtype))
