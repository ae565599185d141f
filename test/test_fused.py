"""The backward that adds dQ atomically: what it refuses, what ptxas made of it, and its results as Ampere code on a
GPU."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from typing import Any

import compile_all
import pytest
import torch

from torch_flash2 import dispatch
from torch_flash2.testing import Case, check

pytest.importorskip("triton")

ATOMICS = dispatch.encode_force("triton", {"atomics": True})
FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": dict(mask="causal"),
    "window": dict(mask="window(70, 5) @ bottom-right", sinks=True, layout="bshd"),
    "scores": dict(mask="causal", softcap=3.0, alibi=2),
    "bias": dict(mask="prefix(20)", bias="HMN"),
    "packed": dict(mask="causal @ top-left", lengths="packed_used", documents=(0.6, 1.0, 0.0, 0.13), tail=5),
    "padded": dict(mask="causal @ bottom-right", lengths="padded", documents=(0.3, 1.0), softcap=5.0),
}


def case_of(feature: str, dims: tuple[int, int], dtype: str, heads_kv: int, sizes: tuple[int, int]) -> Case:
    changes = FEATURES[feature]
    batch = len(changes.get("documents", "12"))
    return Case(f"{feature}-{dims}-{dtype}", batch, 4, heads_kv, *sizes, *dims, dtype, **changes)


@pytest.mark.compile
@pytest.mark.parametrize("arch", ["sm80", "sm86"])
@pytest.mark.parametrize(("head_dim", "feature"), [(64, "window"), (64, "packed"), (128, "scores"), (256, "packed")])
def test_compiles(arch: str, head_dim: int, feature: str) -> None:
    case = case_of(feature, (head_dim, head_dim), "bf16", 2, (300, 300))
    posed, call = compile_all.posed(case, "backward", arch)
    plan = dispatch.select(posed, ATOMICS)
    from torch_flash2.kernels.triton import offline

    kernels = {kernel.name: kernel for kernel in offline.compile_call(plan.module, posed, plan.config, call)}
    if plan.config.fused is None:
        assert "backward_keys" in kernels
    else:
        fused = kernels["backward_fused"]
        assert fused.metadata.shared <= posed.hardware.shared_memory
        assert "red.global" in fused.asm["ptx"] or "atom.global" in fused.asm["ptx"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"deterministic": True}, "atomics add in an order that varies, and PyTorch's deterministic algorithms are on"),
    ],
)
def test_refusal(change: dict[str, Any], reason: str) -> None:
    posed, _ = compile_all.posed(case_of("full", (256, 256), "bf16", 4, (64, 64)), "backward", "sm80")
    import dataclasses

    found = dataclasses.replace(posed, **change)
    if reason:
        with pytest.raises(dispatch.UnsupportedError, match=reason):
            dispatch.select(found, ATOMICS)
    else:
        assert dispatch.select(found, ATOMICS).config.atomics


GPU_CASES = [
    case_of("full", (256, 256), "bf16", 4, (640, 640)),
    case_of("causal", (256, 256), "fp16", 1, (333, 700)),
    case_of("window", (192, 128), "bf16", 2, (700, 333)),
    case_of("scores", (256, 200), "fp16", 4, (500, 500)),
    case_of("bias", (256, 256), "bf16", 4, (200, 300)),
    case_of("packed", (256, 256), "bf16", 2, (300, 300)),
    case_of("packed", (136, 136), "fp16", 4, (700, 700)),
    case_of("padded", (256, 256), "bf16", 2, (300, 400)),
]


def run(case: Case) -> str:
    """Run a case as Ampere code in this process; what is wrong, or nothing."""
    import torch_flash2
    from torch_flash2.kernels.triton import fused

    launches = []
    launch = fused.launch
    fused.launch = lambda *given: (launches.append(1), launch(*given))  # type: ignore[assignment]
    try:
        with torch_flash2.force("triton", {"atomics": True}):
            check(case, device="cuda")
    except Exception as error:
        return f"{case.name}: {type(error).__name__}: {error}"
    return "" if launches else f"{case.name}: the kernel with atomics did not run"


@pytest.mark.gpu
def test_as_ampere_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_OVERRIDE_ARCH", "sm80")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(len(GPU_CASES), os.cpu_count() or 1), mp_context=context) as pool:
        wrong = [text for text in pool.map(run, GPU_CASES) if text]
    assert not wrong, "\n".join(wrong)
    assert torch.cuda.is_available()
