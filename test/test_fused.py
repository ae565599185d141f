"""The backward that adds dQ atomically: what it refuses, what ptxas made of it, and its results as Ampere code on a
GPU."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
import re
from typing import Any

import compile_all
import pytest
import torch
from test_hopper import instructions

from torch_flash2 import dispatch, oracle
from torch_flash2.testing import Case, check

pytest.importorskip("triton")
offline = pytest.importorskip("torch_flash2.kernels.triton.offline")

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


def compiled(case: Case, force: str) -> dict[str, Any]:
    """The kernels of a case's backward on sm80, by name."""
    posed, call = compile_all.posed(case, "backward", "sm80")
    plan = dispatch.select(posed, force)
    kernels = offline.compile_call(plan.module, posed, plan.config, call)
    assert all(kernel.metadata.shared <= posed.hardware.shared_memory for kernel in kernels)
    return {kernel.name: kernel for kernel in kernels}


@pytest.mark.compile
@pytest.mark.parametrize(
    ("head_dim", "feature"), [(128, "causal"), (128, "scores"), (192, "bias"), (256, "window"), (256, "packed")]
)
def test_atomics(head_dim: int, feature: str) -> None:
    case = case_of(feature, (head_dim, head_dim), "bf16", 2, (300, 300))
    kernels = compiled(case, ATOMICS)
    assert set(kernels) - {"bias_gradient"} == {"backward_stats", "backward_fused", "backward_queries"}
    sass, _ = instructions(kernels["backward_fused"])
    adds = [instruction for instruction in sass if "RED.E.ADD.F32" in instruction]
    # 64 rows of dQ over 256 threads: an instruction for each element of a thread, and from few addresses.
    assert len(adds) == head_dim // 4
    assert len(set(re.findall(r"R\d+(?=\.64)", " ".join(adds)))) <= len(adds) // 4


@pytest.mark.compile
def test_without_atomics() -> None:
    # Where dK and dV would be two launches, the same kernel makes both, and adds nothing.
    kernels = compiled(case_of("causal", (256, 256), "bf16", 2, (300, 300)), "triton")
    assert set(kernels) == {"backward_stats", "backward_fused", "backward_queries"}
    assert "RED." not in " ".join(instructions(kernels["backward_fused"])[0])
    # Dropout keeps the portable kernels.
    case = dataclasses.replace(case_of("causal", (256, 256), "bf16", 2, (300, 300)), dropout_p=0.1)
    assert "backward_fused" not in compiled(case, ATOMICS)


def test_refused_where_bits_must_repeat() -> None:
    posed, _ = compile_all.posed(case_of("full", (256, 256), "bf16", 4, (64, 64)), "backward", "sm80")
    assert dispatch.select(posed, ATOMICS).config.atomics
    with pytest.raises(dispatch.UnsupportedError, match="atomics add in an order that varies"):
        dispatch.select(dataclasses.replace(posed, deterministic=True), ATOMICS)


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


class FarBelow(Case):
    """Every score near -40: the lse is far below 0, and a key past the end, of score 0, would outweigh all."""

    def inputs(self, device: str | torch.device = "cpu", seed: int = 0) -> oracle.Inputs:
        inputs = super().inputs(device, seed)
        sign = torch.ones(self.head_dim, device=device, dtype=inputs.query.dtype)
        query, key = (0.1 * tensor + s * 1.6 * sign for tensor, s in ((inputs.query, 1), (inputs.key, -1)))
        return inputs._replace(query=query, key=key)


PACKED: dict[str, Any] = dict(lengths="packed", documents=(1.0, 0.3))
GPU_CASES += [
    FarBelow("far-below", 2, 4, 2, 200, 333, 256, 256, "fp16"),
    FarBelow("far-below-packed", 2, 4, 2, 200, 300, 128, 128, "fp16", **PACKED),
]
LEAKS = (
    dict(mask="causal"),
    dict(mask="window(5, 9)"),
    dict(mask="causal", lengths="packed", documents=(0.5, 0.4), heads_kv=2),
)


def run(job: tuple[Case | dict[str, Any], bool]) -> str:
    """Run a case, or look for a leak, as Ampere code in this process; what is wrong, or nothing."""
    from test_triton import check_leak

    import torch_flash2
    from torch_flash2.kernels.triton import fused

    what, atomics = job
    sums = []
    launch = fused.launch
    fused.launch = lambda *given: (sums.append(given[-1]), launch(*given))  # type: ignore[assignment]
    config = {"atomics": atomics}
    try:
        if isinstance(what, Case):
            with torch_flash2.force("triton", config):
                # Tensor cores round sums downwards; sums of one sign show it in the lse, beside fp32 sums that do not.
                check(what, device="cuda", strict_lse=not isinstance(what, FarBelow))
        else:
            for where in ("key", "value"):
                check_leak(dict(dtype="bf16", head_dim=256, head_dim_v=256, **what), torch.nan, where, config, "cuda")
    except Exception as error:
        return f"{job}: {type(error).__name__}: {error}"
    assert sums and all((tensor is not None) == atomics for tensor in sums), f"{job}: the kernel did not run"
    return ""


@pytest.mark.gpu
def test_as_ampere_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_OVERRIDE_ARCH", "sm80")
    jobs = [(what, True) for what in (*GPU_CASES, *LEAKS)] + [(GPU_CASES[i], False) for i in (1, 2, 5)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), mp_context=context) as pool:
        wrong = [text for text in pool.map(run, jobs) if text]
    assert not wrong, "\n".join(wrong)
