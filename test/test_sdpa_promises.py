"""Every argument of scaled_dot_product_attention x eager, inference mode, autocast and compiled, against math in fp64.

They run on the GPU where there is one, else on the CPU.
B batch, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sdpa_calls
import torch
from sdpa_calls import SdpaCall
from torch.nn.attention.bias import CausalBias, CausalVariant

import torch_flash2
from torch_flash2 import dispatch

# Compilers warn of things that are none of ours; PyTorch warns of lower-right masks whose first rows see nothing.
pytestmark = pytest.mark.filterwarnings("default")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
sdp = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def on() -> Iterator[None]:
    """Every test runs with the policy "always"."""
    sdpa_calls.forget_compiled()
    with torch_flash2.enabled("always", device_type=DEVICE):
        yield


def all_taken() -> bool:
    """Whether calls came by since the last time, and kernels of ours ran all of them."""
    labels = [label.removeprefix("traced: ").split(" and ")[0] for label in torch_flash2.stats(reset=True)]
    return bool(labels) and all(label in dispatch.KERNELS for label in labels)


# The ways to call it.


def eager(call: SdpaCall, attend: Callable[..., torch.Tensor] = sdp) -> list[str]:
    return sdpa_calls.disagreements(call, sdpa_calls.run(call, DEVICE, attend), device=DEVICE)


def inference(call: SdpaCall) -> list[str]:
    with torch.inference_mode():
        found = sdpa_calls.run(call, DEVICE, sdp, grad=False)
    return sdpa_calls.disagreements(call, found, device=DEVICE, grad=False)


def autocast(call: SdpaCall) -> list[str]:
    """fp32 tensors that hold bf16 numbers: casting them back loses nothing, so that the call is one in bf16.

    Those beside a lower-right mask, which PyTorch casts in some cases, are in bf16 already.
    """

    def cast(*tensors: torch.Tensor, **given: Any) -> torch.Tensor:
        mask = given.get("attn_mask")
        given.update(zip(("query", "key", "value"), tensors, strict=False))
        if not (isinstance(mask, CausalBias) and mask.variant == CausalVariant.LOWER_RIGHT):
            if mask is not None and mask.is_floating_point() and not isinstance(mask, CausalBias):
                given["attn_mask"] = mask.float()
            given.update({name: given[name].float() for name in ("query", "key", "value")})
        with torch.autocast(DEVICE, torch.bfloat16):
            out = sdp(**given)
        assert out.dtype == torch.bfloat16
        return out

    return eager(dataclasses.replace(call, dtype="bf16", mask_fp32=False), cast)


def compiled(call: SdpaCall) -> list[str]:
    torch._dynamo.reset()
    problems = eager(call, torch.compile(sdp, backend="aot_eager", fullgraph=True))
    assert any(label.startswith("traced: ") for label in torch_flash2.stats())
    return problems


MODES = (eager, inference, autocast, compiled)


# The arguments.

# What is not the default, by what it shows.
CALLS: dict[str, SdpaCall] = {
    "plain": SdpaCall(),
    "3d": SdpaCall(dims=3, mask="bool", mask_shape="HMN"),
    "2d": SdpaCall(dims=2, mask="causal"),
    "causal-wide": SdpaCall(M=20, N=50, mask="causal"),
    "causal-tall": SdpaCall(M=50, N=20, mask="causal"),
    "upper-left": SdpaCall(M=20, N=50, mask="upper-left"),
    "lower-right": SdpaCall(M=20, N=50, mask="lower-right"),
    "lower-right-square": SdpaCall(H=6, G=2, M=33, N=33, mask="lower-right", dtype="fp16"),
    "lower-right-tall": SdpaCall(M=50, N=20, D=64, Dv=64, mask="lower-right", dtype="bf16"),
    "lower-right-gqa": SdpaCall(H=6, G=2, M=20, N=50, mask="lower-right", dtype="fp16"),
    "lower-right-gqa-fp32": SdpaCall(H=6, G=2, M=40, N=150, D=36, Dv=20, mask="lower-right", scale=0.3),
    "lower-right-3d": SdpaCall(dims=3, M=1, N=50, mask="lower-right", dtype="bf16", dropout_p=0.25),
    "bool": SdpaCall(mask="bool", mask_shape="BMN", dtype="bf16"),
    "float": SdpaCall(mask="float", mask_shape="BN", dtype="fp16", mask_fp32=True),
    "learned": SdpaCall(mask="learned", mask_shape="HMN"),
    "gqa-learned-fp32": SdpaCall(H=6, G=2, mask="learned", mask_shape="BHMN"),
    "gqa-bool-fp32": SdpaCall(H=6, G=2, mask="bool", mask_shape="BN"),
    "mqa-half": SdpaCall(H=4, G=1, mask="bool", dtype="fp16"),
    "dropout": SdpaCall(dropout_p=0.3, mask="causal"),
    "dropout-bool": SdpaCall(dropout_p=0.5, mask="bool", mask_shape="BMN", dtype="bf16"),
    "scale": SdpaCall(scale=-0.3, mask="causal"),
    "dv": SdpaCall(D=24, Dv=8, scale=0.1),
    "d512": SdpaCall(D=512, Dv=512, M=9, N=11, dtype="bf16"),
    "d512-learned": SdpaCall(D=512, Dv=40, M=9, N=11, mask="learned", dtype="fp16"),
    "no-keys": SdpaCall(N=0),
    "no-queries": SdpaCall(M=0),
    "no-batch": SdpaCall(B=0, mask="causal"),
    "transposed": SdpaCall(layouts=("bshd", "bshd", "bshd")),
    "expanded": SdpaCall(layouts=("bhsd", "expanded", "expanded"), mask="bool"),
    "strided": SdpaCall(layouts=("strided", "bshd", "strided"), mask="causal", dtype="fp16"),
    # NaN in dq where S % 128 == 64 with a mask (pytorch#196678), wrong with few key heads (pytorch#193893).
    "pytorch-196678": SdpaCall(M=192, N=192, D=32, Dv=32, mask="bool", mask_shape="BMN", dtype="bf16"),
    "pytorch-193893": SdpaCall(H=8, G=2, M=64, N=64, D=32, Dv=32, mask="causal", dtype="bf16"),
}


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("name", CALLS)
def test_arguments(name: str, mode: Callable[..., list[str]]) -> None:
    torch_flash2.stats(reset=True)
    assert not (problems := mode(CALLS[name])), problems
    assert all_taken()


@pytest.mark.parametrize("mode", (eager, inference, autocast), ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float", "learned", "lower-right"])
def test_arguments_together(mask: str, mode: Callable[..., list[str]]) -> None:
    """A mask with each number of heads and dimensions, head dims, layout and dtype."""
    torch_flash2.stats(reset=True)
    heads = [dict(H=2, G=2), dict(H=6, G=2), dict(H=3, G=1), dict(H=2, G=2, dims=3)]
    widths = [dict(D=16, Dv=16), dict(D=24, Dv=8, scale=0.2), dict(D=8, Dv=40, M=21, N=9)]
    layouts = [("bhsd", "bhsd", "bhsd"), ("bshd", "bshd", "bshd"), ("bhsd", "expanded", "expanded")]
    for number, (head, width, layout) in enumerate(itertools.product(heads, widths, layouts)):
        dtype = ("fp32", "bf16", "fp16")[number % 3 if DEVICE == "cpu" else number // 9 % 3]
        options: dict[str, Any] = {"M": 13, "N": 21, **head, **width}
        call = SdpaCall(**options, mask=mask, mask_shape="BHMN", layouts=layout, dtype=dtype, seed=number)
        assert not (problems := mode(call)), f"{call}: {problems}"
    assert all_taken()


@pytest.mark.parametrize("name", ["learned", "lower-right-gqa"])
def test_inductor(name: str) -> None:
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        problems = eager(CALLS[name], torch.compile(sdp, fullgraph=True, dynamic=True))
    assert not problems and all_taken()


def test_dropout_keeps_its_share() -> None:
    """Uniform weights and one-hot values show what was dropped, and that the rest is scaled up."""
    N, p = 64, 0.3
    query = torch.zeros(4, 8, 128, 16, device=DEVICE)
    value = torch.eye(N, device=DEVICE).expand(4, 8, N, N)
    out = sdp(query, query[:, :, :N], value, dropout_p=p)
    kept = out > 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (N * (1 - p))))
    deviation = (p * (1 - p) / out.numel()) ** 0.5
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * deviation
    by_row, by_key = kept.double().mean(-1), kept.double().mean(-2)
    assert (by_row.mean((0, 1)) - (1 - p)).abs().max() < 6 * (p * (1 - p) / (4 * 8 * N)) ** 0.5
    assert (by_key.mean((0, 1)) - (1 - p)).abs().max() < 6 * (p * (1 - p) / (4 * 8 * 128)) ** 0.5
