"""The eager kernels, reference and cpu, against attention written row by row in fp64.

B segments, H query heads, G key/value heads, M query rows and N keys of a segment, D head dim of
query and key, Dv head dim of value.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from torch_flash2 import hardware, masks, problem, scores
from torch_flash2.kernels import cpu, eager, reference
from torch_flash2.problem import Call, Gradients, Saved

LEAVES = ("query", "key", "value", "bias", "sinks")
LENGTHS = ("none", "padded", "packed", "packed_q", "packed_k")


class Place(NamedTuple):
    """Where a segment lies: batch entry, first row and number of rows, of queries and of keys."""

    batch_q: int
    start_q: int
    M: int
    batch_k: int
    start_k: int
    N: int


class Case(NamedTuple):
    """A call with what the row by row oracle needs to know of it."""

    call: Call
    mask: masks.Mask
    places: tuple[Place, ...]


def make_call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **other: Any) -> Call:
    """A call of three tensors, everything else absent unless given."""
    absent: dict[str, Any] = dict.fromkeys(Call._fields[3:])
    absent |= {"mask": "full", "mask_numbers": [], "scale": query.shape[3] ** -0.5}
    return Call(query, key, value, **absent | {"dropout_p": 0.0, "deterministic": False} | other)


# The oracle: one row at a time, from the definitions.


def sees(mask: masks.Mask, m: int, n: int, M: int, N: int) -> bool:
    """Whether row m sees key n."""
    at = m + (N - M if mask.align == "bottom-right" else 0)
    for band in mask.bands:
        if isinstance(band, masks.Causal):
            seen = n <= at
        elif isinstance(band, masks.Window):
            left = math.inf if band.left is None else band.left
            right = math.inf if band.right is None else band.right
            seen = at - left <= n <= at + right
        elif isinstance(band, masks.Chunk):
            seen = at // band.size == n // band.size
        else:
            assert isinstance(band, masks.Prefix)
            seen = n < band.length or n <= at
        if not seen:
            return False
    return True


def row(case: Case, b: int, h: int, m: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Out [Dv] and lse [] of one row; None where it sees no key."""
    call, place = case.call, case.places[b]
    shape = problem.stored_shape(call)
    entry = b if shape[0] > 1 else 0
    seen = [n for n in range(place.N) if sees(case.mask, m, n, place.M, place.N)]
    stored = place.start_q + m
    if call.dense is not None:
        dense = call.dense.expand(shape)[entry, h, stored]
        seen = [n for n in seen if dense[place.start_k + n]]
    if not seen:
        return None

    n, at = torch.tensor(seen), torch.tensor(seen) + place.start_k
    g = h // (call.query.shape[1] // call.key.shape[1])
    query = call.query[place.batch_q, h, stored].double()
    key, value = (x[place.batch_k, g][at].double() for x in (call.key, call.value))
    score = call.scale * (key @ query)
    if call.softcap is not None:
        score = call.softcap * torch.tanh(score / call.softcap)
    if call.alibi is not None:
        slope = call.alibi[b, h] if call.alibi.dim() == 2 else call.alibi[h]
        shift = place.N - place.M if case.mask.align == "bottom-right" else 0
        score = score - slope.double() * (m + shift - n).abs()
    if call.bias is not None:
        score = score + call.bias.expand(shape)[entry, h, stored][at].double()
    terms = score if call.sinks is None else torch.cat([score, call.sinks[h : h + 1].double()])
    lse = terms.logsumexp(0)
    p = torch.exp(score - lse)
    if call.dropout_p > 0:
        assert call.seed is not None
        counter = (torch.tensor(x) for x in (b, h, m))
        kept = scores.keep(call.seed, *counter, n, call.dropout_p)
        p = torch.where(kept, p / (1 - call.dropout_p), 0.0)
    return p @ value, lse


def oracle(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Out [B, H, M, Dv] and lse [B, H, M] in fp64, differentiable."""
    call = case.call
    B, H, M, _ = call.query.shape
    out = torch.zeros(B, H, M, call.value.shape[3], dtype=torch.float64)
    lse = torch.full((B, H, M), -torch.inf, dtype=torch.float64)
    for b, place in enumerate(case.places):
        for h, m in itertools.product(range(H), range(place.M)):
            found = row(case, b, h, m)
            if found is not None:
                out[place.batch_q, h, place.start_q + m] = found[0]
                lse[place.batch_q, h, place.start_q + m] = found[1]
    return out, lse


# Cases.


@st.composite
def bands(draw: st.DrawFn, explicit: bool) -> masks.Mask:
    """Any mask of bands, with an alignment where `explicit`."""
    aligns = ["top-left", "bottom-right"] if explicit else [None, "top-left", "bottom-right"]
    side = st.none() | st.integers(0, 8)
    mask = masks.Mask((), draw(st.sampled_from(aligns)))
    for name in draw(st.sets(st.sampled_from(sorted(masks.BANDS)), max_size=2)):
        if name == "causal":
            mask &= masks.causal()
        elif name == "window":
            mask &= masks.window(draw(side), draw(side))
        elif name == "chunk":
            mask &= masks.chunk(draw(st.integers(1, 8)))
        else:
            mask &= masks.prefix(draw(st.integers(0, 8)))
    return mask


class Side(NamedTuple):
    """Queries or keys: stored batch and length, cumulative and used lengths, segments' places."""

    batch: int
    stored: int
    cu: torch.Tensor | None
    used: torch.Tensor | None
    places: list[tuple[int, int, int]]


@st.composite
def sides(draw: st.DrawFn, batch: int, packed: bool, used: bool) -> Side:
    """One side of a call; packed ones may end in rows of no segment, used ones in rows unused."""
    if packed:
        sizes = draw(st.lists(st.integers(0, 9), min_size=batch, max_size=batch))
        edges = [0, *itertools.accumulate(sizes)]
        stored = edges[-1] + draw(st.integers(0, 3))
        places = [(0, start, size) for start, size in zip(edges, sizes, strict=False)]
    else:
        stored = draw(st.integers(0, 20))
        places = [(b, 0, stored) for b in range(batch)]
    if used:
        places = [(b, start, draw(st.integers(0, size))) for b, start, size in places]
    cu = torch.tensor(edges, dtype=torch.int32) if packed else None
    lengths = torch.tensor([n for _, _, n in places], dtype=torch.int32) if used else None
    return Side(1 if packed else batch, stored, cu, lengths, places)


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype = torch.float64, plain: bool = False, dropout: bool = True) -> Case:
    """Any small call; `plain` ones have no score steps, sinks or dropout and a causal mask at most.

    What no segment uses holds NaN.
    """
    batch, G, group = draw(st.integers(0, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    D, Dv, H = draw(st.integers(1, 9)), draw(st.integers(1, 9)), G * group
    flag = st.booleans()
    lengths = draw(st.sampled_from(LENGTHS))
    used_q, used_k = (lengths != "none" and draw(flag) for _ in range(2))
    q = draw(sides(batch, lengths in ("packed", "packed_q"), used_q))
    k = draw(sides(batch, lengths in ("packed", "packed_k"), used_k))
    if plain:
        mask = draw(st.sampled_from([masks.full(), masks.causal(align="top-left" if used_k else None)]))
    else:
        mask = draw(bands(explicit=used_k))

    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def normal(*shape: int, to: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(to)

    def tensor(heads: int, side: Side, dim: int) -> torch.Tensor:
        full = normal(side.batch, heads, side.stored, dim)
        used = torch.zeros(side.batch, side.stored, dtype=torch.bool)
        for b, start, size in side.places:
            used[b, start : start + size] = True
        layout = draw(st.sampled_from(["bhsd", "bshd", "bhds"]))
        full = torch.where(used[:, None, :, None], full, torch.nan)
        if layout == "bshd":
            return full.transpose(1, 2).contiguous().transpose(1, 2)
        return full if layout == "bhsd" else full.mT.contiguous().mT

    def broadcast() -> list[int]:
        batches = q.batch if q.cu is None else k.batch
        sizes = [n if draw(flag) else 1 for n in (batches, H, q.stored, k.stored)]
        return sizes[2:] if sizes[:2] == [1, 1] and draw(flag) else sizes

    other: dict[str, Any] = {"cu_q": q.cu, "cu_k": k.cu, "used_q": q.used, "used_k": k.used}
    other |= {"mask": mask.template, "mask_numbers": mask.numbers}
    if not plain:
        other["scale"] = draw(st.sampled_from([0.3, 1.0, -0.7]))
        if draw(flag):
            other["dense"] = normal(*broadcast()) > -0.5
        if draw(flag):
            other["softcap"] = 1.5
        if draw(flag):
            other["alibi"] = normal(*([batch] * draw(flag)), H, to=torch.float32).abs()
        if draw(flag):
            other["bias"] = normal(*broadcast())
        if draw(flag):
            other["sinks"] = normal(H, to=torch.float64 if dtype == torch.float64 else torch.float32)
        if dropout and draw(flag):
            other |= {"dropout_p": 0.3, "seed": torch.randint(2**62, (2,), generator=generator)}
    call = make_call(tensor(H, q, D), tensor(G, k, D), tensor(G, k, D if plain else Dv), **other)
    places = tuple(Place(*a, *b) for a, b in zip(q.places, k.places, strict=True))
    return Case(call, mask, places)


# Running.


@pytest.fixture(autouse=True, scope="module")
def steady() -> Iterator[None]:
    """The same random numbers; one thread, since tensors are small."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def forward(module: ModuleType, call: Call, config: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    posed = problem.of(call)
    return module.launch(posed, config or module.config(posed), call)


def backward(module: ModuleType, call: Call, saved: Saved, config: Any = None) -> Gradients:
    posed = problem.of(call, "backward", needs_grad=True, bias_grad=call.bias is not None)
    return module.launch(posed, config or module.config(posed), call, saved)


def saved_of(call: Call, which: str = "both", seed: int = 0) -> Saved:
    """What a backward gets: random gradients ("out", "lse" or "both"), NaN where nobody reads."""
    out, lse = forward(reference, call)
    generator = torch.Generator().manual_seed(seed)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    grad_lse = torch.randn(lse.shape, generator=generator)
    nobody = torch.ones(out.shape[0], 1, out.shape[2], dtype=torch.bool)
    for segment in eager.split(call, 1, call.key.shape[1]):
        segment.queries(nobody)[:] = False
    # Rows that see no key: their gradients are not read either.
    grad_lse = torch.where(lse == -torch.inf, torch.nan, grad_lse)
    out, grad_out = (torch.where(nobody[..., None], torch.nan, x) for x in (out, grad_out))
    wanted = (True, True, True, call.bias is not None, call.sinks is not None)
    grads = (grad_out if which != "lse" else None, grad_lse if which != "out" else None)
    return Saved(out, torch.where(nobody, torch.nan, lse), *grads, wanted)


def nothing(leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    """A 0 that depends on every leaf."""
    parts = [torch.nan_to_num(leaf, posinf=0.0, neginf=0.0).sum() for leaf in leaves.values()]
    return 0.0 * torch.stack([part.double() for part in parts]).sum()


def differentiate(results: tuple[Any, Any], leaves: dict[str, Any], saved: Saved) -> dict[str, Any]:
    """Gradients by autograd; rows of no segment and rows that see no key take no part."""
    total = torch.zeros((), dtype=torch.float64)
    for result, grad in zip(results, (saved.grad_out, saved.grad_lse), strict=True):
        if grad is not None:
            live = torch.isfinite(result.detach()) & ~torch.isnan(grad)
            total = total + torch.where(live, result * torch.where(live, grad, 0.0), 0.0).sum()
    total = total + nothing(leaves)
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def leaves_of(call: Call) -> dict[str, torch.Tensor]:
    return {name: t.detach().requires_grad_() for name in LEAVES if (t := getattr(call, name)) is not None}


def by_rows(call: Call, step: eager.Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse in fp64 by `eager.forward_rows`, under autograd."""
    out, lse = (x.double() for x in eager.outputs(call))
    for segment in eager.split(call, step.entries, step.heads):
        part = segment.call(call)
        for start in range(0, segment.M, step.rows):
            stop = min(start + step.rows, segment.M)
            rows = eager.forward_rows(part, segment, start, stop, torch.float64)
            segment.queries(out)[:, :, start:stop], segment.queries(lse)[:, :, start:stop] = rows
    return out, lse


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float, name: str = "") -> None:
    limits = {"atol": tolerance, "rtol": tolerance, "equal_nan": True}
    torch.testing.assert_close(found.double(), wanted.double(), **limits, msg=lambda text: f"{name}: {text}")


def all_close(found: Gradients, wanted: Any, call: Call, tolerance: float) -> None:
    """Compare gradients; each has its tensor's shape, dtype and order of dimensions."""
    for name, gradient in zip(LEAVES, found, strict=True):
        tensor = getattr(call, name)
        assert (gradient is None) == (tensor is None), name
        if gradient is not None:
            like = torch.empty_like(tensor)
            assert (gradient.shape, gradient.dtype) == (like.shape, like.dtype), name
            assert gradient.stride() == like.stride(), name
            close(gradient, getattr(wanted, name), tolerance, name)


# Reference and eager rows against the oracle.


@given(cases())
def test_reference_forward(case: Case) -> None:
    out, lse = forward(reference, case.call)
    wanted, wanted_lse = oracle(case)
    close(out, wanted, 1e-10)
    close(lse, wanted_lse, 1e-6)
    assert lse.dtype == torch.float32
    assert out.stride() == problem.output_like(case.call)[1]


@given(cases(), st.sampled_from(["out", "lse", "both"]), st.integers(0, 2**32))
def test_reference_backward(case: Case, which: str, seed: int) -> None:
    saved = saved_of(case.call, which, seed)
    leaves = leaves_of(case.call)
    wanted = differentiate(oracle(case._replace(call=case.call._replace(**leaves))), leaves, saved)
    wanted = Gradients(*(wanted.get(name) for name in LEAVES))
    all_close(backward(reference, case.call, saved), wanted, case.call, 1e-9)


@given(cases(), st.integers(1, 2), st.integers(1, 2), st.integers(1, 6))
def test_rows_under_autograd(case: Case, entries: int, heads: int, rows: int) -> None:
    step = eager.Step(entries, heads, rows)
    saved, leaves = saved_of(case.call), leaves_of(case.call)
    out, lse = by_rows(case.call._replace(**leaves), step)
    close(out.detach(), forward(reference, case.call)[0], 1e-10)
    wanted = Gradients(*map(differentiate((out, lse), leaves, saved).get, LEAVES))
    all_close(eager.backward(case.call, saved, step), wanted, case.call, 1e-9)


def test_only_wanted_gradients() -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    call = make_call(q, k, v, bias=torch.randn(5, 5), sinks=torch.randn(2))
    saved = saved_of(call)
    every = backward(reference, call, saved)
    for wanted in itertools.product((False, True), repeat=5):
        found = backward(reference, call, saved._replace(wanted=wanted))
        for gradient, full, want in zip(found, every, wanted, strict=True):
            assert gradient is None if not want else torch.equal(gradient, full)


# The CPU's paths against the reference.


def compare(call: Call, config: cpu.Config, tolerance: float, which: str = "both") -> None:
    """A path's forward and backward against the reference's."""
    out, lse = forward(cpu, call, config)
    wanted, wanted_lse = forward(reference, call)
    assert (out.dtype, lse.dtype) == (wanted.dtype, torch.float32)
    assert out.stride() == wanted.stride() and lse.stride() == wanted_lse.stride()
    close(out, wanted, tolerance)
    close(lse, wanted_lse, max(tolerance, 1e-5))
    saved = saved_of(call, which)
    all_close(backward(cpu, call, saved, config), backward(reference, call, saved), call, tolerance)


TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@given(st.sampled_from(sorted(TOLERANCES, key=str)).flatmap(cases), st.integers(1, 7), st.data())
def test_tiled(case: Case, rows: int, data: st.DataObject) -> None:
    """Blocks of any number of rows, heads and batch entries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "SCORES", data.draw(st.sampled_from([1, 100, 1000])))
        compare(case.call, cpu.Config("tiled", rows), TOLERANCES[case.call.query.dtype])


def taint(tensor: torch.Tensor, at: list[int], bad: float) -> torch.Tensor:
    """A copy with `bad` at some flat positions."""
    flat = tensor.flatten().clone()
    if flat.numel():
        flat[[position % flat.numel() for position in at]] = bad
    return torch.empty_like(tensor).copy_(flat.view(tensor.shape))


POSITIONS = st.lists(st.integers(0, 2**16), max_size=2)


@given(cases(torch.float32, plain=True), POSITIONS, POSITIONS, st.sampled_from(["out", "lse", "both"]))
def test_aten(case: Case, keys: list[int], values: list[int], which: str) -> None:
    """With NaN in some keys and values too, which ATen's kernel would leak or lose."""
    call = case.call
    call = call._replace(key=taint(call.key, keys, math.nan), value=taint(call.value, values, math.nan))
    posed = problem.of(call, "backward")
    empty = 0 in (posed.batch, posed.seqlen_q, posed.seqlen_k)
    assert cpu.config(posed).path == ("tiled" if empty else "aten")
    compare(call, cpu.config(posed), 2e-5, which)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_aten_larger(dtype: torch.dtype, mask: str) -> None:
    """Several of ATen's blocks."""
    query = torch.randn(2, 300, 6, 40, dtype=dtype).transpose(1, 2)
    key, value = torch.randn(2, 2, 2, 700, 40, dtype=dtype)
    call = make_call(query, key, value, mask=mask)
    # ATen rounds the lse of 16-bit inputs to 16 bits and sums their gradients so: they are tiled.
    assert cpu.config(problem.of(call)).path == ("tiled" if dtype.itemsize == 2 else "aten")
    path = "aten" if dtype == torch.float32 else "tiled"
    assert cpu.config(problem.of(call, "backward")).path == path
    saved = saved_of(call, "out")
    close(forward(cpu, call)[0], forward(reference, call)[0], TOLERANCES[dtype])
    wanted = backward(reference, call, saved)
    all_close(backward(cpu, call, saved), wanted, call, TOLERANCES[dtype])


def test_aten_needs_unit_stride_on_the_head_dim() -> None:
    tensors = torch.randn(3, 1, 2, 4, 6).mT
    call = make_call(*tensors)
    posed = problem.of(call)
    assert list(cpu.copies(posed)) == ["of query, key and value, those with strides in the head dim"]
    saved = saved_of(call, "out")
    # The gradient of out.sum() has stride 0 everywhere.
    saved = saved._replace(grad_out=torch.ones(()).expand(saved.out.shape))
    assert cpu.config(problem.of(call, "backward")).path == "aten"
    all_close(backward(cpu, call, saved), backward(reference, call, saved), call, 1e-5)


# NaN and infinities.


def close_where_finite(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    """The same entries are finite, and those are close."""
    finite = torch.isfinite(wanted)
    assert torch.equal(torch.isfinite(found), finite), name
    close(found[finite], wanted[finite], 1e-9, name)


@given(cases(dropout=False), POSITIONS, POSITIONS, st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(1, 6))
def test_hidden_nan_does_not_leak(case: Case, keys: list[int], values: list[int], bad: float, rows: int) -> None:
    """Rows that see a bad key or value show it, others do not; so for gradients."""
    call = case.call
    call = call._replace(key=taint(call.key, keys, torch.nan), value=taint(call.value, values, bad))
    leaves = leaves_of(call)
    out, lse = oracle(case._replace(call=call._replace(**leaves)))
    saved = saved_of(call, "out")
    assert saved.grad_out is not None
    gradients = torch.autograd.grad(out + nothing(leaves), list(leaves.values()), torch.nan_to_num(saved.grad_out))
    for module, config in ((reference, None), (cpu, cpu.Config("tiled", rows))):
        found_out, found_lse = forward(module, call, config)
        close_where_finite(found_out, out.detach(), "out")
        close(found_lse, lse.detach(), 1e-6, "lse")
        found = backward(module, call, saved, config)
        for name, gradient in zip(leaves, gradients, strict=True):
            close_where_finite(getattr(found, name), gradient, name)


@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_float_mask(module: ModuleType, dtype: torch.dtype) -> None:
    """A bias of -inf hides a score; a row of nothing else sees no key."""
    q, k, v = torch.randn(3, 1, 2, 6, 4, dtype=dtype)
    seen = torch.rand(6, 6) > 0.5
    seen[2] = False
    call = make_call(q, k, v, bias=torch.where(seen, 0.0, -torch.inf).to(dtype))
    plain = make_call(q, k, v, dense=seen)
    for found, wanted in zip(forward(module, call), forward(module, plain), strict=True):
        close(found, wanted, 1e-6)
    saved = saved_of(plain)._replace(wanted=(True, True, True, True, False))
    found, wanted = backward(module, call, saved), backward(module, plain, saved)
    for gradient, expected in zip(found[:3], wanted[:3], strict=True):
        close(gradient, expected, 1e-6)
    assert torch.isfinite(found.bias).all()


@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize("sinks", [None, 2e4, -2e4])
def test_large_logits(module: ModuleType, sinks: float | None) -> None:
    """Logits of 1e4 do not overflow."""
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    sink = None if sinks is None else torch.full((2,), sinks)
    call = make_call(q * 1e4, k, v, mask="causal", scale=1.0, sinks=sink)
    case = Case(call, masks.causal(), (Place(0, 0, 9, 0, 0, 9),))
    for found, wanted in zip(forward(module, call), oracle(case), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-3)
    for gradient in backward(module, call, saved_of(call)):
        assert gradient is None or torch.isfinite(gradient).all()


# Dropout.


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_rate(p: float) -> None:
    q = torch.zeros(2, 3, 64, 4)
    values = torch.eye(64).expand(2, 3, 64, 64)
    dropped = []
    for seed in range(3):
        call = make_call(q, q, values, dropout_p=p, seed=torch.tensor([seed, 7]))
        weights = forward(reference, call)[0]
        kept = weights > 0
        close(weights[kept], torch.full_like(weights[kept], 1 / 64 / (1 - p)), 1e-6)
        # Four standard deviations of a mean of 24576 draws.
        assert abs(kept.double().mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / kept.numel())
        dropped.append(~kept)
    # Seeds, batch entries and heads have masks of their own.
    each = torch.stack(dropped).flatten(0, 2).flatten(1).double()
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(each, 2))


# Plans, memory.


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that an operation returns."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.size = max([self.size, *(tensor.numel() for tensor in tensors)])
        return result


def test_tiled_memory_is_linear() -> None:
    q, k, v = torch.randn(3, 1, 4, 4096, 8)
    call = make_call(q, k, v, mask="causal & window(#, #)", mask_numbers=[100, 0], sinks=torch.ones(4))
    with LargestTensor() as largest:
        out, lse = forward(cpu, call)
        grads = (torch.ones_like(out), torch.ones_like(lse))
        backward(cpu, call, Saved(out, lse, *grads, (True, True, True, False, True)))
    # 64 rows see 164 keys.
    assert largest.size <= max(q.numel(), 4 * 64 * 164)

    for heads_kv in (32, 8, 1):
        posed = dataclasses.replace(problem.of(call), heads=32, heads_kv=heads_kv, seqlen_k=2**17)
        step = cpu._step(posed, cpu.config(posed).rows)
        scores_held = step.entries * step.heads * posed.group * step.rows * posed.seqlen_k
        assert scores_held <= cpu.MOST_SCORES


def test_rejections() -> None:
    q = torch.randn(2, 2, 5, 4)
    call = make_call(q, q, q)
    posed = problem.of(call)
    for config in (cpu.Config("fast", 64), cpu.Config("tiled", 0)):
        with pytest.raises(ValueError, match="needs path 'aten' or 'tiled' and rows >= 1"):
            forward(cpu, call, config)
    assert not list(cpu.why_not(posed)) and not list(reference.why_not(posed))
    tiled = [cpu.Config("tiled", rows) for rows in (64, 128, 32)]
    assert list(cpu.candidates(posed)) == [cpu.Config("aten", 64), *tiled]
    paged = dataclasses.replace(posed, direction="backward", page_size=16)
    for module in (cpu, reference):
        assert list(module.why_not(paged)) == ["it has no backward through pages"]
    gpu = dataclasses.replace(posed, hardware=hardware.simulated("sm90"))
    assert list(cpu.why_not(gpu)) == ["it runs on CPU tensors, these are on cuda"]
    assert list(reference.why_not(gpu)) == ["it runs on real tensors only"]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"mask": "window(#, #)", "mask_numbers": [2, 0]}, "no mask but causal"),
        ({"mask": "causal @ bottom-right"}, "top-left"),
        ({"dense": torch.ones(5, 5, dtype=torch.bool)}, "no mask but causal"),
        ({"scale": -1.0}, "masks before it scales"),
        ({"softcap": 1.0}, "no softcap"),
        ({"sinks": torch.ones(2)}, "no softcap"),
    ],
)
def test_aten_forced_where_it_cannot(other: dict[str, Any], reason: str) -> None:
    q = torch.randn(1, 2, 5, 4)
    call = make_call(q, q, q, **other)
    assert cpu.config(problem.of(call)).path == "tiled"
    with pytest.raises(ValueError, match=reason):
        forward(cpu, call, cpu.Config("aten", 64))
