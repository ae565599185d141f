"""Named cases, their inputs and error bounds: one list for test/ and benchmarks/.

    check(CASES["gpt2"].scaled(64, 2, 4))       # forward, lse and every gradient, against oracle.py

B batch entries or packed documents, H query heads, G key/value heads, M query rows, N keys,
D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from .attention import attention
from .oracle import Inputs, Results, math_attention
from .problem import Lengths

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = ("bhsd", "bshd", "sbhd", "packed_qkv", "odd", "expanded")
# Which length tensors each kind has.
LENGTHS: dict[str, tuple[str, ...]] = {
    "packed": ("cu_q", "cu_k"),
    "packed_used": ("cu_q", "cu_k", "used_q", "used_k"),
    "padded": ("used_q", "used_k"),
    "padded_k": ("used_k",),
    "packed_q_padded_k": ("cu_q", "used_k"),
}

# Documents of uneven length, one empty.
_SHARES = (1.0, 0.3, 0.0, 0.55, 0.8, 0.125, 0.01, 0.9)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call in words.

    `batch` counts segments. `bias` and `dense` name the dimensions ("HMN") in which an additive
    bias or a bool mask varies; `alibi` is the number of dimensions of its slopes. `lengths` is a
    key of LENGTHS; `documents` and `documents_k` then give the length of each segment as a share of
    seqlen_q and seqlen_k, and `tail` rows that belong to no document follow. `magnitude` multiplies
    the queries. `tags`: "model", "regression", "large" (tens of GiB), "inf_bias" (a bias with -inf,
    as a float mask), "large_logits" (scores of 1e4), "expanded_grad" (the gradient of out.sum()), "growing" (scores
    grow by 12 every 128 keys from the last one to the first, as kernels visit them: the worst for a running maximum).
    """

    name: str
    batch: int = 1
    heads: int = 2
    heads_kv: int = 2
    seqlen_q: int = 64
    seqlen_k: int = 64
    head_dim: int = 64
    head_dim_v: int = 64
    dtype: str = "bf16"
    mask: str = "full"
    dense: str | None = None
    bias: str | None = None
    bias_dtype: str | None = None
    softcap: float | None = None
    alibi: int = 0
    sinks: bool = False
    dropout_p: float = 0.0
    scale: float | None = None
    lengths: str | None = None
    documents: tuple[float, ...] = ()
    documents_k: tuple[float, ...] = ()
    tail: int = 0
    layout: str = "bhsd"
    magnitude: float = 1.0
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.dtype in DTYPES and self.layout in LAYOUTS, self
        assert (self.lengths is None) == (not self.documents) and self.lengths in (None, *LENGTHS)
        assert len(self.documents) in (0, self.batch) and self.heads % self.heads_kv == 0, self
        if self.layout == "packed_qkv":
            same = self.seqlen_q == self.seqlen_k and self.head_dim == self.head_dim_v
            assert same and self.lengths in (None, "packed"), self

    def scaled(self, max_seqlen: int, max_batch: int, max_heads: int) -> Case:
        """The same case, small.

        The mask's numbers shrink with the sequences; query heads per key head stay where they fit.
        """
        factor = min(1.0, max_seqlen / max(self.seqlen_q, self.seqlen_k, 1))

        def shrink(size: int) -> int:
            return max(round(size * factor), 1) if size else 0

        group = min(self.heads // self.heads_kv, max_heads)
        heads_kv = min(self.heads_kv, max(max_heads // group, 1))
        return dataclasses.replace(
            self,
            batch=min(self.batch, max_batch),
            heads=heads_kv * group,
            heads_kv=heads_kv,
            seqlen_q=shrink(self.seqlen_q),
            seqlen_k=shrink(self.seqlen_k),
            mask=re.sub(r"\d+", lambda number: str(shrink(int(number[0]))), self.mask),
            documents=self.documents[:max_batch],
            documents_k=self.documents_k[:max_batch],
        )

    def inputs(self, device: str | torch.device = "cpu", seed: int = 0) -> Inputs:
        """Random tensors, the same for the same seed. Rows that belong to no document are NaN."""
        generator = torch.Generator(device).manual_seed(seed)
        dtype = DTYPES[self.dtype]
        lengths, spans = self._lengths(torch.device(device))
        sizes = [total for total, _ in spans]
        query, key, value = self._tensors(generator, sizes[0], sizes[1])
        query.mul_(self.magnitude)
        if "growing" in self.tags:
            query[..., 0] = self.head_dim**0.5
            key[..., 0] = torch.arange(key.shape[2], 0, -1, device=device) * (12 / 128)
        for tensor, (_, unused) in zip((query, key, value), (spans[0], spans[1], spans[1]), strict=True):
            for batch, start, stop in unused:
                tensor[batch, :, start:stop] = torch.nan

        stored = (key.shape[0] if "cu_q" in self._kinds else query.shape[0], self.heads, *sizes)

        def dense_operand(varies: str) -> torch.Tensor:
            shape = [n if d in varies else 1 for d, n in zip("BHMN", stored, strict=True)]
            return torch.randn(shape, generator=generator, device=device)

        bias = dense = slopes = sinks = None
        if self.bias is not None:
            bias = dense_operand(self.bias).to(DTYPES[self.bias_dtype or self.dtype])
            if "inf_bias" in self.tags:
                # A float mask as callers of SDPA pass it; some rows see no key.
                bias.masked_fill_(dense_operand(self.bias) > 0.5, -torch.inf)
                bias[:, :, 3::11] = -torch.inf
        if self.dense is not None:
            dense = dense_operand(self.dense) > -0.5
            dense[:, :, 3::11] = False
        if self.alibi:
            shape = (self.batch, self.heads)[-self.alibi :]
            slopes = torch.rand(shape, generator=generator, device=device) / 2
        if self.sinks:
            sinks = torch.randn(self.heads, generator=generator, device=device).to(dtype)
        return Inputs(
            query, key, value, self.mask, dense, bias, slopes, sinks,
            self.softcap, self.dropout_p, self.scale, lengths,
        )  # fmt: skip

    @property
    def _kinds(self) -> tuple[str, ...]:
        return LENGTHS[self.lengths] if self.lengths is not None else ()

    def _lengths(self, device: torch.device) -> tuple[Lengths | None, list[tuple[int, list[Any]]]]:
        """Lengths, and per side the stored length and (batch, start, stop) of unused rows."""
        tensors: dict[str, Any] = {}
        spans: list[tuple[int, list[Any]]] = []
        for side, stored, shares in (
            ("q", self.seqlen_q, self.documents),
            ("k", self.seqlen_k, self.documents_k or self.documents),
        ):
            counts = [round(share * stored) for share in shares]
            unused: list[tuple[int, int, int]] = []
            starts = [0] * len(counts)
            room = [stored] * len(counts)
            if f"cu_{side}" in self._kinds:
                room = counts
                edges = [sum(counts[:i]) for i in range(len(counts) + 1)]
                starts, stored = edges[:-1], edges[-1] + self.tail
                unused.append((0, edges[-1], stored))
                tensors[f"cu_{side}"] = torch.tensor(edges, dtype=torch.int32, device=device)
                counts = [count - (count > 2) for count in counts]
            if f"used_{side}" in self._kinds:
                packed = f"cu_{side}" in self._kinds
                for b, (start, size, count) in enumerate(zip(starts, room, counts, strict=True)):
                    unused.append((0 if packed else b, start + count, start + size))
                tensors[f"used_{side}"] = torch.tensor(counts, dtype=torch.int32, device=device)
            spans.append((stored, unused))
        return (Lengths(**tensors) if tensors else None), spans

    def _tensors(self, generator: torch.Generator, M: int, N: int) -> tuple[torch.Tensor, ...]:
        batch_q = 1 if "cu_q" in self._kinds else self.batch
        batch_k = 1 if "cu_k" in self._kinds else self.batch
        options: dict[str, Any] = dict(generator=generator, device=generator.device, dtype=DTYPES[self.dtype])
        if self.layout == "packed_qkv":
            counts = [self.heads, self.heads_kv, self.heads_kv]
            joint = torch.randn(batch_q, M, sum(counts), self.head_dim, **options)
            return tuple(part.transpose(1, 2) for part in joint.split(counts, dim=2))
        shapes = (
            (batch_q, self.heads, M, self.head_dim),
            (batch_k, self.heads_kv, N, self.head_dim),
            (batch_k, self.heads_kv, N, self.head_dim_v),
        )
        return tuple(_laid_out(self.layout, which, shape, options) for which, shape in enumerate(shapes))


def _laid_out(layout: str, which: int, shape: tuple[int, ...], options: dict[str, Any]) -> torch.Tensor:
    """Random [B, H, S, D] in a memory layout; "odd" differs for query, key and value (`which`)."""
    B, H, S, D = shape
    if layout == "bshd":
        return torch.randn(B, S, H, D, **options).transpose(1, 2)
    if layout == "sbhd":
        return torch.randn(S, B, H, D, **options).permute(1, 2, 0, 3)
    if layout == "expanded" and which > 0:
        return torch.randn(1, H, S, D, **options).expand(B, H, S, D).detach()
    if layout == "odd":
        # Every second column; columns apart; a corner that starts off any alignment.
        if which == 0:
            return torch.randn(B, H, S, 2 * D, **options)[..., ::2]
        if which == 1:
            return torch.randn(B, H, D, S, **options).transpose(2, 3)
        return torch.randn(B, H, S + 1, D + 3, **options)[:, :, 1:, 1 : D + 1]
    return torch.randn(B, H, S, D, **options)


# fmt: off
_MODELS = (
    # Decoders: B, H, G, M, N, D, Dv.
    Case("llama3.1-8b", 1, 32, 8, 4096, 4096, 128, 128, mask="causal", layout="bshd"),
    Case("qwen3-30b", 1, 32, 4, 4096, 4096, 128, 128, mask="causal", layout="bshd"),
    Case("mistral-7b", 1, 32, 8, 8192, 8192, 128, 128, mask="window(4095, 0)", layout="bshd"),
    Case("gemma2-2b", 1, 8, 4, 8192, 8192, 256, 256, mask="window(4095, 0)", softcap=50.0),
    Case("gpt-oss-20b", 1, 64, 8, 4096, 4096, 64, 64, mask="window(127, 0)", sinks=True),
    Case("deepseek-v3", 1, 128, 128, 2048, 2048, 192, 128, mask="causal", scale=0.1352),
    Case("gpt2", 8, 12, 12, 1024, 1024, 64, 64, "fp16", "causal",
         dropout_p=0.1, layout="packed_qkv"),
    Case("falcon-7b", 1, 71, 1, 2048, 2048, 64, 64, mask="causal", layout="packed_qkv"),
    Case("bloom-7b", 1, 32, 32, 2048, 2048, 128, 128, mask="causal", alibi=1),
    Case("llama4-chunk", 1, 40, 8, 8192, 8192, 128, 128, mask="causal & chunk(2048)"),
    Case("paligemma", 2, 8, 1, 1280, 1280, 256, 256, mask="prefix(1024)"),
    Case("phi-2", 1, 32, 32, 2048, 2048, 80, 80, mask="causal", layout="packed_qkv"),
    # Encoders and cross attention.
    Case("bert-base", 8, 12, 12, 512, 512, 64, 64,
         dropout_p=0.1, lengths="padded_k", documents=_SHARES),
    Case("modernbert", 8, 12, 12, 1024, 1024, 64, 64, mask="window(64, 64)",
         lengths="packed", documents=_SHARES),
    Case("vit-b", 32, 12, 12, 197, 197, 64, 64, "fp16", layout="packed_qkv"),
    Case("t5-base", 4, 12, 12, 512, 512, 64, 64, bias="HMN", scale=1.0, dropout_p=0.1),
    Case("whisper-encoder", 1, 20, 20, 1500, 1500, 64, 64, "fp16"),
    Case("whisper-cross", 2, 20, 20, 448, 1500, 64, 64, "fp16"),
    Case("stable-diffusion", 2, 8, 8, 4096, 4096, 40, 40, "fp16", layout="bshd"),
    Case("swin", 64, 4, 4, 49, 49, 32, 32, "fp32", bias="BHMN", layout="packed_qkv"),
    # Packed training, and decoding against a cache.
    Case("llama-packed", 4, 32, 8, 4096, 4096, 128, 128, mask="causal",
         lengths="packed", documents=_SHARES[:4], tail=37),
    Case("llama-decode", 4, 32, 8, 1, 4096, 128, 128, mask="causal @ bottom-right",
         lengths="padded_k", documents=_SHARES[:4]),
    Case("llama-extend", 4, 32, 8, 128, 4096, 128, 128, mask="causal @ bottom-right",
         lengths="packed_q_padded_k", documents=_SHARES[:4]),
)
_REGRESSIONS = (
    Case("narrow-value-beside-64", 2, 4, 1, 37, 53, 40, 24, "bf16", "causal @ bottom-right", layout="bshd"),
    Case("narrow-value-beside-32", 2, 4, 4, 37, 53, 24, 16, "bf16", "causal", layout="bshd"),
    Case("narrow-key-beside-64", 2, 2, 2, 100, 130, 16, 64, "fp16", "causal"),
    # pytorch#196678: NaN in dq where S % 128 == 64 with a mask; #193893: wrong with few key heads.
    Case("pytorch-196678", 2, 8, 8, 4160, 4160, 128, 128, dense="BMN"),
    Case("pytorch-193893", 2, 32, 4, 1024, 1024, 128, 128, mask="causal"),
    # More than 2**16 heads; more than 2**31 elements; rows more than 2**22 elements apart.
    Case("many-heads", 1025, 64, 64, 16, 16, 16, 16, mask="causal"),
    Case("wide", 1, 264, 33, 65536, 65536, 128, 128, mask="window(128, 0)", tags=("large",)),
    Case("wide-rows", 64, 512, 64, 640, 640, 128, 128, mask="causal", layout="sbhd",
         tags=("large",)),
    Case("head-dim-512", 1, 8, 1, 4096, 4096, 512, 512, mask="causal"),
    Case("head-dim-512-fp32", 1, 4, 1, 512, 512, 512, 512, "fp32", "causal", softcap=20.0),
    Case("head-dim-1", 2, 4, 2, 130, 130, 1, 3, "fp32", "causal"),
    # Scores.
    Case("logits-1e4", 2, 4, 4, 256, 256, 64, 64, "fp32", "causal", magnitude=3e3, tags=("large_logits",)),
    Case("logits-1e4-bf16", 2, 4, 4, 256, 256, 64, 64, "bf16", "causal", magnitude=3e3),
    Case("rows-see-nothing", 2, 4, 2, 300, 100, 64, 64, "fp32", "causal @ bottom-right",
         sinks=True),
    Case("float-mask", 2, 4, 4, 200, 200, bias="BMN", bias_dtype="fp32", tags=("inf_bias",)),
    Case("float-mask-keys", 2, 4, 4, 200, 300, 64, 64, "bf16", "causal", bias="BN",
         tags=("inf_bias",)),
    Case("negative-scale", 2, 4, 2, 100, 130, 64, 64, "fp32", "causal", scale=-0.3),
    Case("scale-0", 2, 4, 2, 100, 130, 64, 64, "fp32", "causal", scale=0.0),
    # Memory.
    Case("expanded-grad", 2, 4, 2, 200, 200, mask="causal", tags=("expanded_grad",)),
    Case("expanded-keys", 4, 4, 2, 100, 200, layout="expanded"),
    Case("odd-strides", 2, 4, 2, 100, 130, 72, 40, mask="causal", layout="odd"),
    # Sizes.
    Case("one-query", 2, 8, 2, 1, 1000, 128, 128),
    Case("one-key", 2, 4, 2, 100, 1),
    Case("no-keys", 2, 4, 2, 100, 0, sinks=True),
    Case("no-queries", 2, 4, 2, 0, 100),
    Case("no-batch", 0, 4, 2, 100, 100),
    Case("empty-documents", 4, 4, 2, 100, 100, mask="causal", lengths="packed", tail=9,
         documents=(0.0, 1.0, 0.0, 0.3), documents_k=(0.5, 0.0, 0.0, 0.7)),
)
# fmt: on
CASES = {
    case.name: dataclasses.replace(case, tags=(*case.tags, tag))
    for tag, cases in (("model", _MODELS), ("regression", _REGRESSIONS))
    for case in cases
}


# Checking a kernel.


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """In this block, uninitialised memory is NaN, or 77 in an integer type."""
    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            stack.enter_context(mock.patch.object(owner, name, _poisoning(getattr(owner, name))))
        yield


def _poisoning(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned_make(*arguments: Any, **keywords: Any) -> torch.Tensor:
        tensor = make(*arguments, **keywords)
        with torch.no_grad():
            return tensor.fill_(torch.nan if tensor.is_floating_point() else 77)

    return poisoned_make


def run_attention(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """torch_flash2.attention on the inputs: out and lse."""
    out, lse = attention(*inputs.arguments, **inputs.keywords, return_lse=True)
    return out, lse


def dropout_seed(seed: int, device: torch.device) -> torch.Tensor:
    """The words that the first dropout after torch.manual_seed(seed) draws."""
    torch.manual_seed(seed)
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)


def check(
    case: Case,
    run: Callable[[Inputs], tuple[torch.Tensor, torch.Tensor]] = run_attention,
    device: str | torch.device = "cpu",
    seed: int = 0,
    strict_lse: bool = True,
) -> dict[str, float]:
    """Run a case forward and backward and hold out, lse and every gradient to the error bound.

    The bound is twice the largest error of plain PyTorch in the same dtype, plus rounding.

    Args:
        case: what to run.
        run: gives out and lse of some inputs, differentiable.
        device: where.
        seed: of the inputs, the upstream gradients and dropout.
        strict_lse: hold the lse of 16-bit inputs to the error of fp32, since the kernels sum in fp32.

    Returns:
        For each tensor, its error divided by its bound.

    Raises:
        AssertionError: a tensor breaks its bound; the text names it and the seed.
    """
    inputs = case.inputs(device, seed)
    words = dropout_seed(seed, inputs.query.device) if case.dropout_p > 0 else None
    torch.manual_seed(seed)
    leaves: dict[str, Any] = {name: leaf.detach().requires_grad_() for name, leaf in inputs.leaves.items()}
    with poisoned():
        out, lse = run(inputs._replace(**leaves))
    grad_out, grad_lse = upstream(case, out, lse, seed)
    with poisoned():
        found = torch.autograd.grad([out, lse], list(leaves.values()), [grad_out, grad_lse])
    actual = Results(out.detach(), lse.detach(), dict(zip(leaves, found, strict=True)))

    exact = math_attention(inputs, words, grad_out, grad_lse, torch.float64)
    dtype = inputs.query.dtype
    plain = math_attention(inputs, words, grad_out, grad_lse, dtype)
    # Softcap of 16-bit inputs may use the hardware's tanh.
    if strict_lse and dtype != torch.float32 and case.softcap is None:
        plain = plain._replace(lse=math_attention(inputs, words, grad_out, grad_lse, torch.float32).lse)
    noise = _noise(inputs, words, exact, grad_out, seed)
    ratios = {}
    wanted = {"out": dtype, "lse": torch.float32, **{k: leaf.dtype for k, leaf in leaves.items()}}
    found_all, exact_all, plain_all = ({"out": r.out, "lse": r.lse, **r.gradients} for r in (actual, exact, plain))
    for name, tensor in found_all.items():
        what = f"{case.name}, {name}, seed {seed}"
        assert tensor.dtype == wanted[name], f"{what}: {tensor.dtype} instead of {wanted[name]}"
        slack = _slack(leaves[name], exact, name, grad_out, dtype) + noise[name] if name in leaves else 0.0
        if "large_logits" in case.tags and dtype == torch.float32 and tensor.is_cuda and name == "out":
            # Scores are scaled to base 2: one rounding that math has not, and a probability has it as a relative error.
            slack = torch.finfo(torch.float32).eps / 2 * _largest(exact.lse) * _largest(exact.out)
        ratios[name] = _compare(what, tensor, exact_all[name], plain_all[name], slack)
    return ratios


def _noise(
    inputs: Inputs, words: torch.Tensor | None, exact: Results, grad_out: torch.Tensor, seed: int
) -> dict[str, float]:
    """What the rounding of the saved out costs each gradient, in any backward of linear memory.

    It is an error of delta = dO . O, half an ulp of each element of out at most, and delta is used as -dLSE is: so it
    costs what such a gradient at the lse would give. Math attention, which keeps the probabilities, has no such error.
    """
    size = torch.finfo(inputs.query.dtype).eps / 2 * (grad_out * exact.out).norm(dim=-1)
    generator = torch.Generator(size.device).manual_seed(seed + 2)
    signs = torch.randint(0, 2, size.shape, generator=generator, device=size.device) * 2 - 1
    found = math_attention(inputs, words, torch.zeros_like(grad_out), (size * signs).float(), torch.float32)
    return {name: _largest(gradient) for name, gradient in found.gradients.items()}


def _slack(leaf: torch.Tensor, exact: Results, name: str, grad_out: torch.Tensor, dtype: torch.dtype) -> float:
    """Rounding that any backward of linear memory has: that of the saved lse and out."""
    # Probabilities come from the fp32 lse and the score: each has a relative error of eps.
    largest = _largest(exact.lse) * _largest(exact.gradients[name])
    slack = 2 * torch.finfo(torch.float32).eps * largest
    if name == "bias" and leaf.shape[3] == 1 and leaf.numel() > 0:
        # Constant along a row, its gradient is what dO . O and the row's sum of P dP leave of one another: the rounding
        # of out, and in both sums over Dv that of the products and of log2(Dv) levels of additions, each half an ulp of
        # dO * O. It may be one number, for which a draw as in _noise or plain PyTorch's may be too small by chance.
        terms = (grad_out * exact.out).norm().item() / leaf.numel() ** 0.5
        levels = 2 * (1 + math.log2(max(exact.out.shape[3], 1)))
        slack += 2 * terms * math.hypot(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * levels**0.5)
    return slack


def upstream(case: Case, out: torch.Tensor, lse: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients that arrive at out and lse; 0 at an lse that is -inf."""
    if "expanded_grad" in case.tags:
        return out.new_ones(()).expand(out.shape), torch.zeros_like(lse)
    generator = torch.Generator(out.device).manual_seed(seed + 1)
    grad_out, grad_lse = (torch.randn(t.shape, generator=generator, device=t.device, dtype=t.dtype) for t in (out, lse))
    return grad_out, torch.where(torch.isfinite(lse), grad_lse, 0.0)


def _compare(what: str, actual: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, slack: float) -> float:
    """The error divided by its bound, which it must not pass."""
    assert actual.shape == exact.shape, f"{what}: {actual.shape} instead of {exact.shape}"
    assert torch.equal(actual == -torch.inf, exact == -torch.inf), f"{what}: -inf in other places"
    error, allowed, largest = _largest(actual, exact), _largest(plain, exact), _largest(exact)
    # Rounding of the result, and of fp32 intermediates where it cancels.
    rounding = torch.finfo(actual.dtype).eps * largest + 16 * torch.finfo(torch.float32).eps
    bound = 2 * allowed + rounding + slack
    assert error <= bound, (
        f"{what}: error {error:.3e} passes {bound:.3e}; plain PyTorch's error is {allowed:.3e}, "
        f"the largest value {largest:.3e}"
    )
    return error / bound


def _largest(tensor: torch.Tensor, exact: torch.Tensor | None = None) -> float:
    """The largest absolute value or difference; NaN counts as infinite, -inf in `exact` as 0."""
    found = 0.0
    others = (tensor if exact is None else exact).reshape(-1).split(1 << 28)
    for part, other in zip(tensor.reshape(-1).split(1 << 28), others, strict=True):
        size = (part.double() if exact is None else part.double() - other).abs()
        size = torch.where(other == -torch.inf, 0.0, size).nan_to_num(torch.inf)
        found = max(found, size.max().item()) if len(size) else found
    return found
