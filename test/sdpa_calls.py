"""Calls of scaled_dot_product_attention in words, made at random, run, and held to PyTorch's own math in fp64.

B batch, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import sys
import warnings
from typing import Any

import torch
from hypothesis import strategies as st
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left

import torch_flash2
from torch_flash2 import scores, testing

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
LAYOUTS = ("bhsd", "bshd", "strided", "expanded")
BIASES = {"upper-left": causal_upper_left, "lower-right": causal_lower_right}
MASKS = ("none", "causal", "bool", "float", "learned", *BIASES)


@dataclasses.dataclass(frozen=True)
class SdpaCall:
    """One call in words.

    The tensors have the last `dims` of (B, H, rows, width). `mask` is one of MASKS: "learned" is a float mask with a
    gradient, "upper-left" and "lower-right" are CausalBias. `mask_shape` names the dimensions in which it varies
    ("BHMN"), `mask_fp32` makes a float mask fp32. `layouts` are those of query, key and value: of LAYOUTS.
    """

    B: int = 2
    H: int = 4
    G: int = 4
    M: int = 33
    N: int = 47
    D: int = 16
    Dv: int = 16
    dtype: str = "fp32"
    dims: int = 4
    mask: str = "none"
    mask_shape: str = "MN"
    mask_fp32: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    layouts: tuple[str, str, str] = ("bhsd", "bhsd", "bhsd")
    seed: int = 0

    def leaves(self, device: str) -> dict[str, torch.Tensor]:
        """Query, key, value and a learned mask."""
        generator = torch.Generator(device).manual_seed(self.seed)

        def tensor(layout: str, heads: int, rows: int, width: int) -> torch.Tensor:
            sizes = (self.B, heads, rows, width)[4 - self.dims :]
            options: dict[str, Any] = dict(generator=generator, device=device, dtype=DTYPES[self.dtype])
            if layout == "bshd" and self.dims == 4:
                return torch.randn(self.B, rows, heads, width, **options).transpose(1, 2)
            if layout == "strided":
                return torch.randn(*sizes[:-1], 2 * width, **options)[..., ::2]
            if layout == "expanded" and self.dims > 2:
                return torch.randn(1, *sizes[1:], **options).expand(sizes)
            return torch.randn(sizes, **options)

        heads_kv = self.G if self.dims == 4 else self.H
        found = {
            "query": tensor(self.layouts[0], self.H, self.M, self.D),
            "key": tensor(self.layouts[1], heads_kv, self.N, self.D),
            "value": tensor(self.layouts[2], heads_kv, self.N, self.Dv),
        }
        if self.mask in BIASES:
            visible = torch.ones(self.M, self.N, dtype=torch.bool, device=device)
            found["attn_mask"] = visible.tril(self.N - self.M if self.mask == "lower-right" else 0)
        elif self.mask in ("bool", "float", "learned"):
            shown = "BHMN"[4 - self.dims :]
            stored = dict(zip("BHMN", (self.B, self.H, self.M, self.N), strict=True))
            shape = [stored[d] if d in self.mask_shape else 1 for d in shown]
            noise = torch.randn(shape, generator=generator, device=device)
            if self.mask == "bool":
                found["attn_mask"] = noise > -0.5
                if "M" in self.mask_shape and self.M > 3:
                    found["attn_mask"][..., 3, :] = False
            else:
                found["attn_mask"] = noise.to(torch.float32 if self.mask_fp32 else DTYPES[self.dtype])
                if self.mask == "float":
                    found["attn_mask"].masked_fill_(noise > 1.0, -torch.inf)
        return found

    @property
    def keywords(self) -> dict[str, Any]:
        """The arguments that are no tensors."""
        found: dict[str, Any] = {"scale": self.scale, "dropout_p": self.dropout_p, "is_causal": self.mask == "causal"}
        if self.G != self.H and self.dims == 4:
            found["enable_gqa"] = True
        return found


@st.composite
def calls(draw: Any) -> SdpaCall:
    """Random calls, small ones."""
    dims = draw(st.sampled_from((4, 4, 4, 3, 2)))
    G = draw(st.sampled_from((1, 2, 3)))
    lengths, widths = st.integers(0, 40), st.sampled_from((1, 3, 8, 16, 33))
    return SdpaCall(
        B=draw(st.integers(1, 3)),
        H=G * (draw(st.sampled_from((1, 1, 2, 4))) if dims == 4 else 1),
        G=G,
        M=draw(lengths),
        N=draw(lengths),
        D=draw(widths),
        Dv=draw(widths),
        dtype=draw(st.sampled_from(tuple(DTYPES))),
        dims=dims,
        mask=draw(st.sampled_from(MASKS)),
        mask_shape=draw(st.sampled_from(("MN", "N", "BN", "BMN", "HMN", "BHMN", "M"))),
        mask_fp32=draw(st.booleans()),
        scale=draw(st.sampled_from((None, None, 0.3, -0.5, 0.0))),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.25))),
        layouts=(draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))),
        seed=draw(st.integers(0, 2**16)),
    )


def gpu_kinds() -> list[SdpaCall]:
    """Calls that differ in what is compiled for a GPU; random ones are these at other sizes."""
    found = []
    # An upper-left CausalBias is is_causal.
    masks = [mask for mask in MASKS if mask != "upper-left"]
    for dtype, mask, group, dropout_p in itertools.product(("fp16", "bf16", "fp32"), masks, (1, 4), (0.0, 0.25)):
        masked = mask not in ("none", "causal")
        if masked and dropout_p > 0 and not (dtype == "bf16" and mask == "bool"):
            continue
        for D in (64,) if masked else (64, 128):
            found.append(
                SdpaCall(2, 2 * group, 2, 129, 133, D, D, dtype, mask=mask, mask_shape="MN", dropout_p=dropout_p)
            )
    return found


@st.composite
def gpu_calls(draw: Any, part: int, parts: int) -> SdpaCall:
    """Random calls that share compiled kernels: few kinds, many sizes. Each of the parts has kinds of its own."""
    kind = draw(st.sampled_from(gpu_kinds()[part::parts]))
    M, N = draw(st.integers(0, 300)), draw(st.integers(0, 300))
    if kind.mask in ("bool", "float", "learned"):
        # A row's stride that is a multiple of 16 is compiled apart.
        N = N // 16 * 16 + 5
    dims = 4 if kind.H != kind.G else draw(st.sampled_from((4, 4, 3)))
    G = draw(st.integers(1, 3))
    return dataclasses.replace(
        kind,
        B=draw(st.integers(1, 3)),
        H=G * (kind.H // kind.G),
        G=G,
        M=M,
        N=N,
        dims=dims,
        scale=draw(st.sampled_from((None, None, 0.25))),
        layouts=(draw(st.sampled_from(("bhsd", "bshd"))),) * 3,
        seed=draw(st.integers(0, 2**16)),
    )


def run(call: SdpaCall, device: str = "cpu", attend: Any = None, grad: bool = True) -> dict[str, torch.Tensor]:
    """Output and gradients of a call of torch.nn.functional.scaled_dot_product_attention, or of `attend`."""
    leaves = call.leaves(device)
    wanted = [name for name, t in leaves.items() if name != "attn_mask" or call.mask == "learned"] if grad else []
    for name in wanted:
        leaves[name] = leaves[name].detach().requires_grad_()
    if call.mask in BIASES:
        with warnings.catch_warnings():
            # Of rows that see nothing.
            warnings.simplefilter("ignore")
            leaves["attn_mask"] = BIASES[call.mask](call.M, call.N)
    torch.manual_seed(call.seed)
    with testing.poisoned():
        out = (attend or torch.nn.functional.scaled_dot_product_attention)(**leaves, **call.keywords)
    found = {"out": out}
    if grad:
        gradients = torch.autograd.grad(out, [leaves[name] for name in wanted], upstream(call, out))
        found.update(zip(wanted, gradients, strict=True))
    return {name: tensor.detach() for name, tensor in found.items()}


def upstream(call: SdpaCall, out: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator(out.device).manual_seed(call.seed + 1)
    return torch.randn(out.shape, generator=generator, device=out.device, dtype=torch.float32).to(out.dtype)


def stock_math(call: SdpaCall, device: str, dtype: torch.dtype, grad: bool = True) -> dict[str, torch.Tensor]:
    """What PyTorch's math backend gives in a dtype; dropout drops what this library's generator drops."""
    kept = None
    if call.dropout_p > 0:
        words = testing.dropout_seed(call.seed, torch.device(device))
        sizes = (call.B if call.dims == 4 else 1, call.H if call.dims > 2 else 1)
        places = [torch.arange(n, device=device) for n in (*sizes, call.M, call.N)]
        b, h, m, n = (place.view([-1 if i == j else 1 for j in range(4)]) for i, place in enumerate(places))
        kept = scores.keep(words, b, h, m, n, call.dropout_p)
        kept = kept.reshape(kept.shape[4 - call.dims :])

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        **keywords: Any,
    ) -> torch.Tensor:
        mask = attn_mask._materialize(query.device) if isinstance(attn_mask, CausalBias) else attn_mask
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
        elif mask is not None:
            mask = mask.to(dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Dropout mask should only be used for testing")
            found, _ = torch.ops.aten._scaled_dot_product_attention_math(
                *(tensor.to(dtype) for tensor in (query, key, value)),
                mask,
                keywords["dropout_p"],
                keywords["is_causal"],
                kept,
                scale=keywords["scale"],
                enable_gqa=keywords.get("enable_gqa", False),
            )
        return found

    return run(call, device, attend, grad)


def disagreements(
    call: SdpaCall, *results: dict[str, torch.Tensor], device: str = "cpu", grad: bool = True
) -> list[str]:
    """What passes the bound: twice the error of PyTorch's math in the same dtype, plus rounding."""
    exact = stock_math(call, device, torch.float64, grad)
    plain = stock_math(call, device, DTYPES[call.dtype], grad)
    problems = []
    for found, name in itertools.product(results, exact):
        tensor, want = found[name], exact[name]
        if tensor.shape != want.shape:
            problems.append(f"{name}: {tuple(tensor.shape)} instead of {tuple(want.shape)}")
        if tensor.shape != want.shape or tensor.numel() == 0:
            continue
        largest = _largest(want)
        eps = torch.finfo(tensor.dtype).eps
        allowed = 2 * _largest(plain[name].double() - want) + 2 * eps * largest + 32 * 2**-24
        if call.dtype == "fp64":
            # The lse is fp32.
            allowed += 1e-6 * max(largest, 1.0)
        if name in ("query", "key", "attn_mask"):
            # The backward takes dO . O from the rounded output; GPUs multiply fp32 with 22 bits.
            rounding = torch.finfo(DTYPES[call.dtype]).eps / 2
            if device == "cuda" and call.dtype == "fp32":
                rounding = 2**-21
            dots = _largest((upstream(call, found["out"]).double() * exact["out"]).abs().sum(-1))
            scale = call.D**-0.5 if call.scale is None else abs(call.scale)
            if name == "attn_mask":
                # Summed over what the mask was broadcast over.
                allowed += rounding * dots * (call.B * call.H) ** 0.5
            else:
                other = _largest(call.leaves(device)["key" if name == "query" else "query"])
                rows = max(call.M * call.H / call.G / call.N, 1.0) if name == "key" else 1.0
                allowed += rounding * dots * other * scale * rows**0.5
        error = _largest((tensor.double() - want).nan_to_num(torch.inf))
        if error > allowed:
            problems.append(f"{name}: error {error:.3e} passes {allowed:.3e}; the largest value is {largest:.3e}")
    return problems


def forget_compiled() -> None:
    """torch._dynamo.reset(), where anything may have been compiled; importing it warns of what is none of ours."""
    if "torch._dynamo" in sys.modules:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch._dynamo.reset()


def _largest(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def compile_share(number: int, workers: int) -> None:
    """Compile one worker's share of the kernels that gpu_calls need into Triton's cache."""
    with torch_flash2.enabled("always", device_type="cuda"):
        for call in gpu_kinds()[number::workers]:
            run(call, "cuda")


if __name__ == "__main__":
    WORKERS = 14
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        pool.starmap(compile_share, [(number, WORKERS) for number in range(WORKERS)], chunksize=1)
