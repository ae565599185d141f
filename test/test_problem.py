"""Problem and dispatch: what a caller's mistakes say, what cannot run and why, what explain prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import torch_flash2
from torch_flash2 import Lengths, Pages, attention, dispatch, hardware, masks
from torch_flash2.problem import Problem

expecttest = pytest.importorskip("expecttest")
expect = expecttest.assert_expected_inline

B, H, G, M, N, D = 2, 4, 2, 6, 8, 16


def make(*sizes: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(sizes, dtype=dtype, device=device)


QUERY, KEY, VALUE = make(B, H, M, D), make(B, G, N, D), make(B, G, N, D)


def cu(*edges: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(edges, dtype=dtype)


def complaints(*calls: dict[str, Any]) -> str:
    """What attention says to each call that differs from a good one in the arguments given."""
    lines = []
    for changes in calls:
        arguments: dict[str, Any] = {"query": QUERY, "key": KEY, "value": VALUE, **changes}
        with pytest.raises((TypeError, ValueError, dispatch.UnsupportedError)) as caught:
            attention(**arguments)
        lines.append(f"{caught.type.__name__}: {caught.value}")
    return "\n".join(lines)


def test_tensors() -> None:
    expect(
        complaints(
            dict(query=make(M, D)),
            dict(key=make(B, G, N)),
            dict(query=make(B, H, M, D, dtype=torch.int64)),
            dict(value=make(B, G, N, D, dtype=torch.float16)),
            dict(key=make(B, G, N, D, device="meta")),
            dict(bias=make(M, N, device="meta")),
            dict(key=make(B, G, N, 8)),
            dict(query=make(B, H, M, 0), key=make(B, G, N, 0)),
            dict(value=make(B, G, N, 0)),
            dict(value=make(B, G, N + 1, D)),
            dict(key=make(B, 3, N, D), value=make(B, 3, N, D)),
            dict(key=make(B, 0, N, D), value=make(B, 0, N, D)),
            dict(key=make(B + 1, G, N, D), value=make(B + 1, G, N, D)),
        ),
        """\
ValueError: query must have 4 dimensions [batch, heads, seqlen, head_dim], got shape (6, 16)
ValueError: key must have 4 dimensions [batch, heads, seqlen, head_dim], got shape (2, 2, 8)
TypeError: query must be float16, bfloat16, float32 or float64, got torch.int64
TypeError: query, key and value must have one dtype, got torch.float32 and value torch.float16
TypeError: every tensor must be on cpu as the query is, got key on meta
TypeError: every tensor must be on cpu as the query is, got bias on meta
ValueError: query and key must have one head_dim, got 16 and 8
ValueError: head_dim must be at least 1, got query (2, 4, 6, 0) and value (2, 2, 8, 16)
ValueError: head_dim must be at least 1, got query (2, 4, 6, 16) and value (2, 2, 8, 0)
ValueError: key and value must agree in batch, heads and seqlen, got (2, 2, 8) and (2, 2, 9)
ValueError: query heads must be a multiple of key heads, got 4 and 3
ValueError: query heads must be a multiple of key heads, got 4 and 0
ValueError: key must have batch 2 (the call has 2 segments), got 3""",
    )


def test_masks() -> None:
    expect(
        complaints(
            dict(mask=make(M, N)),
            dict(mask=3),
            dict(mask="causl"),
            dict(mask="window(-1, 0)"),
            dict(mask=make(M, N + 1) == 0),
            dict(mask=make(1, B, H, M, N) == 0),
            dict(mask="causal", lengths=Lengths(used_k=cu(3, 4))),
            dict(
                mask="causal",
                key=make(4, 8, G, D),
                value=make(4, 8, G, D),
                pages=Pages(make(B, 1, dtype=torch.int32), 8),
            ),
        ),
        """\
TypeError: a mask tensor must be bool (True: attend), got torch.float32; pass a float tensor as bias=
TypeError: mask must be a Mask, its text, a bool tensor or None, got int
ValueError: 'causl' is no band; known are causal, window, chunk, prefix (in mask 'causl')
ValueError: window's left must be at least 0 (None is unlimited), got -1
ValueError: mask of shape (6, 9) must broadcast to [B, H, M, N] = [2, 4, 6, 8]
ValueError: mask of shape (1, 2, 4, 6, 8) must broadcast to [B, H, M, N] = [2, 4, 6, 8]
ValueError: mask causal with used_k needs an explicit alignment: say align='bottom-right' (the last query row stands at the last used key, as in decoding) or align='top-left' (row 0 stands at key 0)
ValueError: mask causal with block_table needs an explicit alignment: say align='bottom-right' (the last query row stands at the last used key, as in decoding) or align='top-left' (row 0 stands at key 0)""",  # noqa: E501
    )


def test_scores() -> None:
    expect(
        complaints(
            dict(bias=make(H, M, N + 1)),
            dict(bias=make(M, N, dtype=torch.float16)),
            dict(softcap=0.0),
            dict(softcap=float("nan")),
            dict(alibi_slopes=make(H + 1)),
            dict(alibi_slopes=make(H, dtype=torch.float64)),
            dict(sinks=make(B, H)),
            dict(sinks=make(H, dtype=torch.int32)),
            dict(dropout_p=1.0),
            dict(dropout_p=-0.1),
            dict(scale=float("inf")),
        ),
        """\
ValueError: bias of shape (4, 6, 9) must broadcast to [B, H, M, N] = [2, 4, 6, 8]
TypeError: bias must be float32 or the query's torch.float32, got torch.float16
ValueError: softcap must be positive (None is no cap), got 0.0
ValueError: softcap must be positive (None is no cap), got nan
ValueError: alibi_slopes must be [4] or [2, 4], got (5,)
TypeError: alibi_slopes must be float32, got torch.float64
ValueError: sinks must be [4], one logit a query head, got (2, 4)
TypeError: sinks must be floating point, got torch.int32
ValueError: dropout_p must be in [0, 1), got 1.0
ValueError: dropout_p must be in [0, 1), got -0.1
ValueError: scale must be finite, got inf""",
    )


def test_lengths() -> None:
    packed = dict(query=make(1, H, M, D), key=make(1, G, N, D), value=make(1, G, N, D))
    expect(
        complaints(
            dict(lengths=Lengths(used_k=cu(3, 4, dtype=torch.int64))),
            dict(lengths=Lengths(used_q=cu(3, 4, 5))),
            dict(lengths=Lengths(used_q=cu(1, 2, 3, 4)[::2])),
            dict(lengths=Lengths(used_q=cu(3, 4), max_q=-1)),
            dict(lengths=Lengths(cu_q=cu(0, 3, 6), cu_k=cu(0, 4, 8))),
            dict(**packed, lengths=Lengths(cu_q=cu(0, 3, 6))),
            dict(**packed, lengths=Lengths(cu_q=cu(0, 3, 6), cu_k=cu(0, 8))),
            dict(**packed, lengths=Lengths(cu_q=cu(0, 3, 6), cu_k=cu(0, 4, 8), used_k=cu(1))),
            dict(**packed, lengths=Lengths(cu_q=cu(), cu_k=cu())),
            dict(lengths=Lengths(used_q=make(B, dtype=torch.int32, device="meta"))),
        ),
        """\
TypeError: used_k must be int32, got torch.int64
ValueError: used_q must have shape [2], got (3,)
ValueError: used_q must be contiguous, got stride 2
ValueError: max_q must not be negative, got -1
ValueError: query must have batch 1 (a packed tensor has batch 1), got 2
ValueError: key must have batch 2 (the call has 2 segments), got 1
ValueError: cu_k must have shape [3], got (2,)
ValueError: used_k must have shape [2], got (1,)
ValueError: cumulative lengths need at least one entry
TypeError: every tensor must be on cpu as the query is, got used_q on meta""",
    )


# Kernels that cannot.


def unsupported(run: Callable[[], Any]) -> str:
    with pytest.raises(dispatch.UnsupportedError) as caught:
        run()
    return str(caught.value)


def test_unsupported() -> None:
    pages = Pages(torch.zeros(B, 3, dtype=torch.int32), 8)
    out = attention(QUERY.clone().requires_grad_(), make(4, 8, G, D), make(4, 8, G, D), pages=pages)
    expect(
        unsupported(lambda: out.sum().backward()),
        """\
no kernel can run this call: backward on CPU, float32, B=2 H=4/2, M=6 N=24 D=16, mask full, pages of 8
  latent: it has no backward
  decode: it has no backward
  hopper: it is for Hopper GPUs (compute capability 9.0)
  triton: it needs a CUDA GPU, the tensors are on the CPU; it has no backward through pages
  cpu: it has no backward through pages
  reference: it runs only when forced: its memory grows with M * N""",
    )


def test_force() -> None:
    known = "known are latent, decode, hopper, triton, cpu, reference"
    with pytest.raises(ValueError, match=f"no kernel is called 'cuda'; {known}"):
        with torch_flash2.force("cuda"):
            pass

    def forced() -> None:
        with torch_flash2.force("triton"):
            attention(QUERY, KEY, VALUE)

    expect(
        unsupported(forced),
        """\
no kernel can run this call: forward on CPU, float32, B=2 H=4/2, M=6 N=8 D=16, mask full
  triton: it needs a CUDA GPU, the tensors are on the CPU""",
    )


def test_force_reaches_backward_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    select, seen = dispatch.select, []

    def spy(problem: Problem, force: str | None = None) -> dispatch.Plan:
        seen.append((problem.direction, force))
        return select(problem, force)

    monkeypatch.setattr(dispatch, "select", spy)
    query = QUERY.clone().requires_grad_()
    with torch_flash2.force("reference"):
        out = attention(query, KEY, VALUE)
    out.sum().backward()
    attention(query, KEY, VALUE)
    assert seen == [("forward", "reference"), ("backward", "reference"), ("forward", None)]


def posed(**changes: Any) -> Problem:
    gpu = hardware.simulated("sm90")
    return dataclasses.replace(Problem("forward", gpu, torch.bfloat16, B, H, G, 512, 512, 64, 64), **changes)


def test_triton_reasons() -> None:
    pytest.importorskip("triton")
    old = hardware.Hardware("cuda", "Tesla T4", (7, 5), 40, 65536)
    expect(
        "\n".join(
            reason
            for changes in (
                dict(hardware=old),
                dict(hardware=hardware.Hardware("mps", "mps")),
                dict(dtype=torch.float64),
                dict(head_dim=513),
                dict(head_dim_v=1024),
                dict(direction="backward", page_size=16),
                dict(batch=2**16, seqlen_q=2**20),
            )
            for reason in dispatch.why_not("triton", posed(**changes))
        ),
        """\
it needs compute capability 8.0, the GPU has 7.5
it runs on CUDA GPUs, the tensors are on mps
it has no float64
it has head dims up to 512, got 513 and 64
it has head dims up to 512, got 64 and 1024
it has no backward through pages
the call has more tiles than a grid has programs""",
    )
    assert dispatch.select(posed(hardware=hardware.simulated("sm80"))).kernel == "triton"


def test_hopper_reasons() -> None:
    pytest.importorskip("triton")
    expect(
        "\n".join(
            reason
            for changes in (
                dict(hardware=hardware.simulated("sm100")),
                dict(dtype=torch.float32),
                dict(layout="unit"),
                dict(head_dim_v=100),
                dict(head_dim=257),
                dict(dense=True),
                dict(steps=("softcap", "bias")),
                dict(positive_scale=False),
                dict(page_size=16),
                dict(batch=2**20, seqlen_q=2**18),
            )
            for reason in dispatch.why_not("hopper", posed(**changes))
        ),
        """\
it is for Hopper GPUs (compute capability 9.0)
it has float16 and bfloat16, got torch.float32
TMA needs unit stride on D and multiples of 16 bytes everywhere else
TMA needs unit stride on D and multiples of 16 bytes everywhere else
it has head dims up to 256, got 257 and 64
dense masks and biases stay on the portable kernel
dense masks and biases stay on the portable kernel
a scale that is not positive stays on the portable kernel
it has no paged keys and values
the call has more tiles than its counter can count""",
    )
    many = posed(batch=16)
    assert dispatch.select(many).kernel == "hopper"
    # Two heads fill a tile.
    assert dispatch.select(dataclasses.replace(many, batch=64, seqlen_q=64)).kernel == "hopper"
    for few, reason in (
        (dataclasses.replace(many, seqlen_q=32), "half of its tiles would be empty"),
        (dataclasses.replace(many, batch=1), "less than half of the GPU busy"),
    ):
        assert dispatch.select(few).kernel == "triton" and reason in str(dispatch.select(few))
        assert dispatch.select(few, "hopper").kernel == "hopper"
    back = dataclasses.replace(many, direction="backward")
    assert dispatch.select(back).kernel == "hopper"
    for few, reason in (
        (dataclasses.replace(back, seqlen_k=64), "half of its tiles would be empty"),
        (dataclasses.replace(back, batch=1), "less than half of the GPU busy"),
    ):
        assert dispatch.select(few).kernel == "triton" and reason in str(dispatch.select(few))
        assert dispatch.select(few, "hopper").kernel == "hopper"
    for changes in (
        dict(dense=True),
        dict(steps=("bias",)),
        dict(head_dim=100),
        dict(batch=2**12, seqlen_q=2**18),
    ):
        assert dispatch.why_not("hopper", posed(direction="backward", **changes))


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, direction: str) -> None:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(dispatch, "kernel", missing)
    assert dispatch.why_not("triton", posed()) == (
        "it needs a package that is not installed: No module named 'triton'",
    )


def test_plans_are_cached_by_key() -> None:
    pytest.importorskip("triton")
    window, other = masks.window(100, 0), masks.window(200, 0)
    plan = dispatch.select(posed(mask=window))
    assert dispatch.select(posed(mask=other, seqlen_q=400, batch=B)) is plan
    assert dispatch.select(posed(mask=masks.window(100))) is not plan


def test_explain() -> None:
    query = QUERY.clone().requires_grad_()
    explanation = torch_flash2.explain(
        query, KEY, VALUE, "causal & window(3, 0)", softcap=2.0, dropout_p=0.1, return_lse=True
    )
    expect(
        str(explanation),
        """\
forward on CPU, float32, B=2 H=4/2, M=6 N=8 D=16, mask causal & window(3, 0), softcap, dropout
  runs on cpu
  config: path=tiled, rows=64
  not latent: it is for Hopper GPUs (compute capability 9.0)
  not decode: it needs a CUDA GPU, the tensors are on the CPU; it has no dropout
  not hopper: it is for Hopper GPUs (compute capability 9.0)
  not triton: it needs a CUDA GPU, the tensors are on the CPU
backward on CPU, float32, B=2 H=4/2, M=6 N=8 D=16, mask causal & window(3, 0), softcap, dropout
  runs on cpu
  config: path=tiled, rows=64
  not latent: it has no backward
  not decode: it has no backward
  not hopper: it is for Hopper GPUs (compute capability 9.0)
  not triton: it needs a CUDA GPU, the tensors are on the CPU
scaled_dot_product_attention has no such call: softcap, mask causal & window(3, 0)""",
    )
    assert len(torch_flash2.explain(query, KEY, VALUE, needs_grad=False).plans) == 1
    with pytest.raises(TypeError, match="attention has no keyword softcaps"):
        torch_flash2.explain(query, KEY, VALUE, softcaps=2.0)


@pytest.mark.parametrize("arch", ["sm80", "sm_90", "sm90a", "sm100"])
def test_simulated(arch: str) -> None:
    assert hardware.simulated(arch).shared_memory > 100_000


def test_simulated_unknown() -> None:
    with pytest.raises(ValueError, match="unknown architecture 'sm75'; known are sm80, sm86"):
        hardware.simulated("sm75")
