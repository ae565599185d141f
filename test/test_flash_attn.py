"""flash-attn's functions: upstream's signatures, and its semantics against math.

B batch entries or packed documents, H query heads, G key/value heads, M query rows, N keys, D head dim.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import torch_flash2
from torch_flash2 import UnsupportedError, flash_attn, flash_attn_interface, masks
from torch_flash2.frontends.flash_attn import padding, rotary
from torch_flash2.oracle import Inputs
from torch_flash2.testing import Case, check

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
_SCORES = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
_DESCALE = "q_descale=None, k_descale=None, v_descale=None"
# Recorded from flash-attn 2.8.4 (flash_attn/flash_attn_interface.py), without annotations.
V2 = {
    "flash_attn_func": f"q, k, v, {_SCORES}",
    "flash_attn_qkvpacked_func": f"qkv, {_SCORES}",
    "flash_attn_kvpacked_func": f"q, kv, {_SCORES}",
    "flash_attn_varlen_func": (
        f"q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {_SCORES}, block_table=None"
    ),
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {_SCORES}",
    "flash_attn_varlen_kvpacked_func": (f"q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {_SCORES}"),
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False"
    ),
}
# Recorded from hopper/flash_attn_interface.py of the same release.
V3 = {
    "flash_attn_func": (
        f"q, k, v, softmax_scale=None, causal=False, qv=None, {_DESCALE}, window_size=(-1, -1), attention_chunk=0, "
        "softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_qkvpacked_func": (
        f"qkv, softmax_scale=None, causal=False, {_DESCALE}, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
        "deterministic=False, num_heads_q=None, sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_varlen_func": (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, "
        f"softmax_scale=None, causal=False, qv=None, {_DESCALE}, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
        "num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_combine": "out_partial, lse_partial, out=None, out_dtype=None",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, "
        f"max_seqlen_q=None, rotary_seqlens=None, {_DESCALE}, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, "
        "num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False"
    ),
}


ROTARY = "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None"


def signature(function: Callable[..., Any]) -> str:
    """Names, kinds and defaults of the parameters."""
    found = inspect.signature(function)
    plain = [parameter.replace(annotation=parameter.empty) for parameter in found.parameters.values()]
    return str(found.replace(parameters=plain, return_annotation=found.empty))[1:-1]


@pytest.mark.parametrize("module, recorded", [(flash_attn, V2), (flash_attn_interface, V3)], ids=["v2", "v3"])
def test_signatures(module: ModuleType, recorded: dict[str, str]) -> None:
    assert {name: signature(getattr(module, name)) for name in recorded} == recorded
    assert signature(rotary.apply_rotary_emb) == ROTARY


# Against math, through testing.check: out, lse and all gradients.


def words(mask: str) -> dict[str, Any]:
    """flash-attn's words for a bottom-right mask."""
    found: dict[str, Any] = {"causal": False, "window_size": (-1, -1)}
    parsed = masks.parse(mask)
    assert parsed.align == "bottom-right"
    for band in parsed.bands:
        if isinstance(band, masks.Causal):
            found["causal"] = True
        elif isinstance(band, masks.Window):
            found["window_size"] = tuple(-1 if side is None else side for side in (band.left, band.right))
        else:
            assert isinstance(band, masks.Chunk)
            found["attention_chunk"] = band.size
    return found


def rows_first(inputs: Inputs) -> list[torch.Tensor]:
    return [tensor.transpose(1, 2) for tensor in (inputs.query, inputs.key, inputs.value)]


def run_v2(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """A dense or packed case through flash-attn 2's functions."""
    options = dict(
        dropout_p=inputs.dropout_p,
        softmax_scale=inputs.scale,
        softcap=inputs.softcap or 0.0,
        alibi_slopes=inputs.alibi_slopes,
        deterministic=True,
        return_attn_probs=True,
        **words(inputs.bands),
    )
    q, k, v = rows_first(inputs)
    if inputs.lengths is None:
        out, lse, _ = flash_attn.flash_attn_func(q, k, v, **options)
        return out.transpose(1, 2), lse
    cu_q, cu_k = inputs.lengths.cu_q, inputs.lengths.cu_k
    longest = [int(cu.diff().max()) for cu in (cu_q, cu_k)]
    out, lse, _ = flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], cu_q, cu_k, *longest, **options)
    return out[None].transpose(1, 2), lse[None]


def run_v3(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """A dense or packed case through FlashAttention-3's functions."""
    options = dict(
        softmax_scale=inputs.scale, softcap=inputs.softcap or 0.0, return_attn_probs=True, **words(inputs.bands)
    )
    q, k, v = rows_first(inputs)
    if inputs.lengths is None:
        out, lse = flash_attn_interface.flash_attn_func(q, k, v, **options)
        return out.transpose(1, 2), lse
    cu_q, cu_k, used_q, used_k, _, _ = inputs.lengths
    out, lse = flash_attn_interface.flash_attn_varlen_func(
        q[0], k[0], v[0], cu_q, cu_k, None, None, used_q, used_k, **options
    )
    return out[None].transpose(1, 2), lse[None]


_SHARES = dict(documents=(1.0, 0.3, 0.0, 0.6), documents_k=(0.5, 0.7, 0.2, 1.0))
# fmt: off
DENSE = [
    Case("full", 2, 4, 2, 37, 53, 32, 32, "fp16", "full @ bottom-right"),
    Case("causal", 2, 4, 1, 37, 53, 40, 24, "bf16", "causal @ bottom-right"),
    Case("causal-tall", 2, 2, 2, 53, 37, 16, 16, "fp32", "causal @ bottom-right"),
    Case("window", 1, 4, 2, 60, 60, 32, 32, "fp32", "window(7, 3) @ bottom-right", scale=0.3),
    Case("window-causal", 2, 2, 1, 31, 70, 16, 16, "fp16", "causal & window(9, 0) @ bottom-right", softcap=5.0),
    Case("window-left", 1, 2, 2, 31, 70, 16, 16, "fp32", "window(9, -) @ bottom-right"),
    Case("packed", 4, 4, 2, 40, 50, 32, 32, "fp32", "causal @ bottom-right", lengths="packed", **_SHARES),
    Case("packed-window", 4, 2, 2, 40, 50, 16, 16, "fp16", "window(6, 2) @ bottom-right", lengths="packed", **_SHARES),
]
V2_ONLY = [
    Case("alibi", 2, 4, 2, 37, 53, 32, 32, "fp32", "causal @ bottom-right", alibi=1),
    Case("alibi-full", 2, 4, 2, 53, 37, 32, 32, "fp32", "full @ bottom-right", alibi=2),
    Case("dropout", 2, 4, 2, 37, 53, 32, 32, "fp32", "causal @ bottom-right", dropout_p=0.2),
    Case("packed-dropout", 4, 2, 1, 40, 50, 16, 16, "fp32", "full @ bottom-right", lengths="packed", dropout_p=0.4,
         alibi=2, **_SHARES),
]
V3_ONLY = [
    Case("chunk", 1, 2, 1, 31, 70, 16, 16, "fp32", "causal & chunk(16) @ bottom-right"),
    Case("packed-used", 4, 2, 1, 40, 50, 16, 16, "fp32", "causal @ bottom-right", lengths="packed_used", **_SHARES),
]
# fmt: on


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", DENSE + V2_ONLY, ids=lambda case: case.name)
def test_v2(case: Case, device: str) -> None:
    check(case, run_v2, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", DENSE + V3_ONLY, ids=lambda case: case.name)
def test_v3(case: Case, device: str) -> None:
    check(case, run_v3, device)


@pytest.mark.parametrize("M, N", [(3, 8), (8, 3), (5, 5), (1, 7)])
def test_window_is_upstreams(M: int, N: int) -> None:
    """Row i sees keys i + N - M - left .. i + N - M + right, in upstream's own words."""
    q, k, v = torch.zeros(1, M, 1, 8), torch.zeros(1, N, 1, 8), torch.eye(N).reshape(1, N, 1, N)
    sides = (-1, 0, 1, 4, 100)
    for causal, left, right in itertools.product((False, True), sides, sides):
        seen = flash_attn.flash_attn_func(q, k, v, causal=causal, window_size=(left, right))[0, :, 0] > 0
        stand = torch.arange(M)[:, None] + N - M
        wanted = torch.arange(N) >= (stand - left if left >= 0 else 0)
        wanted = wanted & (torch.arange(N) <= (stand if causal else stand + right if right >= 0 else N))
        assert torch.equal(seen, wanted.expand(M, N)), (causal, left, right)


# What the functions add: packed forms, probabilities, combining.


def randn(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=dtype)


@pytest.mark.parametrize("packed", ["qkv", "kv"])
@pytest.mark.parametrize("varlen", [False, True])
def test_packed_forms(packed: str, varlen: bool) -> None:
    """The same numbers and gradients as of tensors apart, without a copy."""
    cu = torch.tensor([0, 5, 5, 24], dtype=torch.int32)
    parts = len(packed)
    shape = (24, parts, 4, 16) if varlen else (2, 12, parts, 4, 16)
    joint = randn(*shape).requires_grad_()
    apart = [part.detach().requires_grad_() for part in joint.unbind(-3)]
    first = [randn(*apart[0].shape, seed=1)] if packed == "kv" else []
    options = dict(causal=True, softcap=3.0, return_attn_probs=True)
    name = f"flash_attn_{'varlen_' if varlen else ''}"
    lengths: tuple[Any, ...] = (cu, cu, 19, 19) if varlen else ()
    joint_lengths = lengths[::2] if packed == "qkv" else lengths
    found = getattr(flash_attn, f"{name}{packed}packed_func")(*first, joint, *joint_lengths, **options)
    wanted = getattr(flash_attn, f"{name}func")(*first, *apart, *lengths, **options)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    upstream = torch.randn_like(found[0])
    (grad,) = torch.autograd.grad(found[0], joint, upstream)
    assert torch.equal(grad, torch.stack(torch.autograd.grad(wanted[0], apart, upstream), -3))


def test_packed_forms_of_v3() -> None:
    joint = randn(2, 12, 8, 16)
    q, k, v = joint.split([4, 2, 2], 2)
    found = flash_attn_interface.flash_attn_qkvpacked_func(joint, num_heads_q=4, causal=True)
    assert torch.equal(found, flash_attn_interface.flash_attn_func(q, k, v, causal=True))
    joint = randn(2, 12, 3, 4, 16)
    found = flash_attn_interface.flash_attn_qkvpacked_func(joint, window_size=(2, 2))
    assert torch.equal(found, flash_attn_interface.flash_attn_func(*joint.unbind(2), window_size=(2, 2)))


@pytest.mark.parametrize("varlen", [False, True])
def test_probabilities(varlen: bool) -> None:
    """S_dmask, as upstream's tests read it: |S| is exp(score - row's largest), its signs are the output's dropout."""
    q, k, v = randn(2, 9, 4, 16), randn(2, 11, 2, 16, seed=1), randn(2, 11, 2, 16, seed=2)
    torch.manual_seed(0)
    if varlen:
        cu_q, cu_k = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (9, 11))
        packed = [tensor.flatten(0, 1) for tensor in (q, k, v)]
        out, _, S = flash_attn.flash_attn_varlen_func(
            *packed, cu_q, cu_k, 9, 11, dropout_p=0.5, causal=True, return_attn_probs=True
        )
        out = out.unflatten(0, (2, 9))
    else:
        out, _, S = flash_attn.flash_attn_func(q, k, v, 0.5, causal=True, return_attn_probs=True)
    score = (q.transpose(1, 2) @ k.repeat_interleave(2, 2).permute(0, 2, 3, 1)) / 4
    visible = torch.ones(9, 11, dtype=torch.bool).tril(2)
    score = score.masked_fill(~visible, -torch.inf)
    largest, total = score.amax(-1, keepdim=True), score.logsumexp(-1, keepdim=True)
    torch.testing.assert_close(S.abs(), (score - largest).exp())
    kept = S.clamp(min=0) * (largest - total).exp() / 0.5
    torch.testing.assert_close(out.transpose(1, 2), kept @ v.repeat_interleave(2, 2).transpose(1, 2))
    assert 0.3 < (S < 0).sum() / visible.sum() / 8 < 0.7


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True])
def test_combine(device: str, packed: bool) -> None:
    """Attention to parts of the keys, joined, is attention to all; a row that sees none of a part has NaN there."""
    q, k, v = (randn(2, n, 4, 16, device=device, seed=n) for n in (5, 30, 31))
    v = v[:, 1:]
    parts = []
    for keys in (slice(0, 10), slice(10, 28), slice(28, 30)):
        # Row i sees keys up to 25 + i.
        band = torch.arange(30, device=device)[keys] <= 25 + torch.arange(5, device=device)[:, None]
        out, lse = torch_flash2.attention(
            q.transpose(1, 2), k[:, keys].transpose(1, 2), v[:, keys].transpose(1, 2), band, return_lse=True
        )
        out = torch.where(lse[..., None] == -torch.inf, torch.nan, out)
        parts.append((out.transpose(1, 2), lse.transpose(1, 2)))
    outs, lses = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    if packed:
        outs, lses = outs.flatten(1, 2), lses.flatten(1, 2)
    out, lse = flash_attn_interface.flash_attn_combine(outs, lses)
    wanted, wanted_lse = flash_attn_interface.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    torch.testing.assert_close(out.reshape(wanted.shape), wanted)
    torch.testing.assert_close(lse.reshape(2, 5, 4), wanted_lse.transpose(1, 2))
    given = torch.empty_like(out, dtype=torch.bfloat16)
    found, _ = flash_attn_interface.flash_attn_combine(outs, lses, given, torch.bfloat16)
    assert found is given and torch.equal(found, out.bfloat16())


# Mistakes.


def message(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    with pytest.raises((ValueError, TypeError, UnsupportedError)) as caught:
        function(*arguments, **keywords)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_mistakes() -> None:
    expecttest = pytest.importorskip("expecttest")
    q, k = randn(2, 5, 4, 16), randn(2, 5, 3, 16)
    three = flash_attn_interface
    mistakes = [
        message(flash_attn.flash_attn_func, q, k, k),
        message(flash_attn.flash_attn_func, q, q.double(), q),
        message(flash_attn.flash_attn_func, q, q, q, 1.0),
        message(flash_attn.flash_attn_func, q, q, q, alibi_slopes=torch.ones(3)),
        message(flash_attn.flash_attn_qkvpacked_func, q),
        message(flash_attn.flash_attn_varlen_kvpacked_func, q[0], q, None, None, 1, 1),
        message(three.flash_attn_func, q, q, q, q_descale=torch.ones(2, 4), v_descale=torch.ones(2, 4)),
        message(three.flash_attn_func, q, q, q, qv=q),
        message(three.flash_attn_qkvpacked_func, q[0]),
        message(three.flash_attn_combine, q[0], q[0]),
    ]
    expecttest.assert_expected_inline(
        "\n".join(mistakes),
        """\
ValueError: query heads must be a multiple of key heads, got 4 and 3
TypeError: query, key and value must have one dtype, got torch.float32 and key torch.float64
ValueError: dropout_p must be in [0, 1), got 1.0
ValueError: alibi_slopes must be [4] or [2, 4], got (3,)
ValueError: qkv must be [batch, seqlen, 3, heads, head_dim], got [2, 5, 4, 16]
ValueError: kv must be [total, 2, heads, head_dim], got [2, 5, 4, 16]
UnsupportedError: q_descale, v_descale not supported: no fp8 attention yet; dequantise q, k and v to bf16
UnsupportedError: qv is not supported: concatenate qv to q and v to k, and call with scale of both dims
ValueError: qkv must be [B, M, 3, H, D], or [B, M, H + 2 * G, D] with num_heads_q=H, got [5, 4, 16] and num_heads_q=None
ValueError: out_partial must be [Z, ..., H, Dv] and lse_partial [Z, ..., H], got [5, 4, 16] and [5, 4, 16]""",
    )


# Standing in.

ROOT = Path(__file__).parents[1]


def run(code: str) -> tuple[str, str]:
    """What code prints on stdout and stderr in a fresh process, warnings being errors."""
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip(), result.stderr.strip()


def test_install() -> None:
    expecttest = pytest.importorskip("expecttest")
    if any(map(importlib.util.find_spec, ("flash_attn", "flash_attn_interface"))):
        pytest.skip("flash-attn is installed here")
    out, err = run(
        "import importlib.util, torch_flash2\n"
        "print(torch_flash2.flash_attn.install(), torch_flash2.flash_attn.install())\n"
        "import flash_attn, flash_attn_interface\n"
        "from flash_attn import flash_attn_func\n"
        "from flash_attn.bert_padding import pad_input, unpad_input\n"
        "from flash_attn.flash_attn_interface import _get_block_size_n, flash_attn_varlen_func\n"
        "from flash_attn.layers.rotary import apply_rotary_emb\n"
        "from flash_attn_interface import flash_attn_with_kvcache as three\n"
        "assert flash_attn_func is torch_flash2.flash_attn.flash_attn_func is flash_attn.flash_attn_func\n"
        "assert three is torch_flash2.flash_attn_interface.flash_attn_with_kvcache\n"
        "assert importlib.util.find_spec('flash_attn') and flash_attn.__version__.startswith('2.8')\n"
    )
    expecttest.assert_expected_inline(
        f"{out}\n{err}",
        """\
['flash_attn', 'flash_attn_interface'] ['flash_attn', 'flash_attn_interface']
torch_flash2: `import flash_attn` now finds torch_flash2.flash_attn
torch_flash2: `import flash_attn_interface` now finds torch_flash2.flash_attn_interface""",
    )


def test_install_leaves_the_real_one() -> None:
    expecttest = pytest.importorskip("expecttest")
    out, err = run(
        "import sys, types, torch_flash2\n"
        "sys.modules['flash_attn'] = real = types.ModuleType('flash_attn')\n"
        "print(torch_flash2.flash_attn.install())\n"
        "import flash_attn\n"
        "assert flash_attn is real\n"
    )
    expecttest.assert_expected_inline(
        f"{out}\n{err}",
        """\
['flash_attn_interface']
torch_flash2: flash_attn is imported already and stays what it is
torch_flash2: `import flash_attn_interface` now finds torch_flash2.flash_attn_interface""",
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved: bool) -> None:
    """Rows as complex numbers, turned by the angle of their place; packed ones likewise; with its gradient."""
    angle = torch.outer(torch.arange(40.0), 1.5 ** -torch.arange(4.0))
    cos, sin = angle.cos(), angle.sin()
    x, offsets = randn(2, 7, 3, 12).requires_grad_(), torch.tensor([5, 0], dtype=torch.int32)
    real, imaginary = (x[..., :8:2], x[..., 1:8:2]) if interleaved else x[..., :8].chunk(2, -1)
    turned = (
        torch.complex(real, imaginary)
        * torch.polar(torch.ones(40, 4), angle)[offsets[:, None] + torch.arange(7)][:, :, None]
    )
    pair = turned.real, turned.imag
    wanted = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    wanted = torch.cat([wanted, x[..., 8:]], -1)
    found = rotary.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets)
    torch.testing.assert_close(found, wanted)
    upstream = randn(2, 7, 3, 12, seed=1)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, upstream, retain_graph=True) for out in (found, wanted)))
    cu = torch.tensor([0, 7, 14], dtype=torch.int32)
    packed = x.detach().flatten(0, 1).clone()
    again = rotary.apply_rotary_emb(packed, cos, sin, interleaved, True, offsets, cu, 7)
    assert again is packed and torch.equal(packed, found.detach().flatten(0, 1))
    one = rotary.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=5)
    assert torch.equal(one[:1], found[:1]) and not torch.equal(one[1:], found[1:])
    with pytest.raises(ValueError, match="R <= 12, got"):
        rotary.apply_rotary_emb(x, cos.repeat(1, 2), sin.repeat(1, 2))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_padding(lengths: list[int]) -> None:
    S = max(*lengths, 1)
    x = randn(len(lengths), S, 3).requires_grad_()
    mask = torch.arange(S) < torch.tensor(lengths)[:, None]
    packed, indices, cu, longest, used = padding.unpad_input(x, mask)
    assert cu.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)] and cu.dtype == torch.int32
    assert longest == max(lengths) and used.tolist() == lengths
    assert torch.equal(packed, torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)]))
    again = padding.pad_input(packed, indices, len(lengths), S)
    assert torch.equal(again, x * mask[..., None])
    (grad,) = torch.autograd.grad(again.sum(), x)
    assert torch.equal(grad, mask[..., None].expand_as(x).float())
