"""Compile the Triton kernels for every architecture, with no GPU here, and hold them to its limits.

    python test/compile_all.py [--arch sm90] [--dtype bf16] [--jobs 2]

test_compile.py runs a fixed sample of the same matrix. D head dim of query and key.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# A script's own folder is on the path, the clone that it belongs to is not.
sys.path.insert(0, str(Path(__file__).parents[1]))

import machine_code  # noqa: E402

from torch_flash2 import dispatch, hardware, problem, settings  # noqa: E402
from torch_flash2.testing import DTYPES, Case  # noqa: E402


class Sums(NamedTuple):
    """A way in which Hopper's backward sums dQ: what forces it, the head dims that it is for, and whether those are
    calls without lengths, score steps and dropout alone."""

    config: dict[str, Any]
    narrowest: int
    widest: int
    plain: bool = False

    def takes(self, head_dim: int) -> bool:
        return self.narrowest <= head_dim <= self.widest


SUMS = {
    "hopper": Sums({"atomics": False}, 0, 256),
    "hopper-atomics": Sums({"atomics": True}, 0, 128),
    "hopper-ordered": Sums({"atomics": True, "fused": {"ORDERED": True, "TASKS": 2}}, 0, 64),
    "hopper-carried": Sums({"atomics": True, "fused": {"CARRIED": True, "STAGES": 3, "TASKS": 1}}, 96, 128, True),
}
KERNELS = ("triton", *SUMS)
ARCHS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120")
BUCKETS = (64, 128, 256, 512)
DIRECTIONS = ("forward", "backward")
# Tensor memory that one block may have on sm100, in columns.
TENSOR_MEMORY = 512
_PACKED: dict[str, Any] = dict(lengths="packed_used", documents=(1.0, 0.5))
# Hopper's kernels beside the portable ones: their head dims, and what they take of the mixes below, with more of each.
HOPPER_DIMS = (64, 96, 128, 192, 256)
HOPPER_MIXES = ("plain", "full", "left", "scores", "softcap", "documents", "dropout")
PORTABLE_MIXES = ("plain", "strided", "scores", "bias", "packed", "all")
# Features that change what a kernel keeps on the chip; "odd" strides take the path without TMA.
MIXES: dict[str, dict[str, Any]] = {
    "plain": dict(mask="causal"),
    "strided": dict(mask="causal", layout="odd"),
    "scores": dict(mask="window(100, 3)", softcap=30.0, alibi=1, sinks=True),
    "bias": dict(bias="HMN", dropout_p=0.1),
    "packed": dict(mask="causal @ top-left", dense="BMN", layout="odd", **_PACKED),
    "full": dict(),
    "left": dict(mask="window(100, 3) @ bottom-right", sinks=True),
    "softcap": dict(mask="causal", softcap=30.0),
    "dropout": dict(mask="window(100, 3)", softcap=30.0, alibi=1, dropout_p=0.1),
    "documents": dict(mask="causal @ bottom-right", layout="bshd", **_PACKED),
    "all": dict(
        mask="causal & chunk(64) @ bottom-right", dense="BMN", bias="BHMN", bias_dtype="fp32",
        softcap=30.0, alibi=2, sinks=True, dropout_p=0.1, **_PACKED,
    ),
}  # fmt: skip


class Job(NamedTuple):
    """One call, in one direction, for one architecture."""

    arch: str
    dtype: str
    head_dim: int
    mix: str
    direction: str
    kernel: str = "triton"


class Outcome(NamedTuple):
    """What one kernel of a job came to; `problem` is empty where it is within the limits."""

    job: Job
    kernel: str
    shared: int
    problem: str


def matrix() -> Iterator[Job]:
    """Every job."""
    yield from itertools.starmap(Job, itertools.product(ARCHS, DTYPES, BUCKETS, PORTABLE_MIXES, DIRECTIONS))
    jobs = itertools.product(("sm90",), ("fp16", "bf16"), HOPPER_DIMS, HOPPER_MIXES, DIRECTIONS, SUMS)
    for job in itertools.starmap(Job, jobs):
        sums = SUMS[job.kernel]
        taken = sums.takes(job.head_dim) and (not sums.plain or job.mix in ("plain", "full", "left"))
        # Forwards sum no dQ: once is enough.
        if job.kernel == "hopper" or (job.direction == "backward" and taken):
            yield job


def sample() -> Iterator[Job]:
    """At most 150 kernels: nearly every row of the table of configurations once, the other choices in turn.

    Rows are shared by a class of GPUs; the classes with several take turns too. Left to the full matrix is the bias's
    gradient in fp32 where shared memory is plentiful.
    """
    turn = itertools.count()
    classes = (("sm80",), ("sm86", "sm89", "sm120"), ("sm90",), ("sm100",))
    for archs, dtypes, head_dim in itertools.product(classes, (("fp16", "bf16"), ("fp32",)), BUCKETS):
        i = next(turn)
        arch, dtype = archs[i % len(archs)], dtypes[i % len(dtypes)]
        yield Job(arch, dtype, head_dim, PORTABLE_MIXES[i % len(PORTABLE_MIXES)], "forward")
        yield Job(arch, dtype, head_dim, "all" if len(archs) > 1 or dtype != "fp32" else "scores", "backward")
    # The rows with least room to spare: chosen for TMA, they serve other strides too.
    yield Job("sm90", "bf16", 512, "strided", "forward")
    yield Job("sm90", "bf16", 512, "strided", "backward")


def posed(case: Case, direction: str, arch: str) -> tuple[problem.Problem, problem.Call]:
    """A case's Problem and its call without data; allocates nothing, whatever its size."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from torch_flash2.kernels.triton import offline

    attention = importlib.import_module("torch_flash2.attention")
    with FakeTensorMode():
        inputs = case.inputs()
        call = attention._call(*inputs.arguments, **inputs.keywords, pages=None)
    call = offline.on_meta(call)
    found = problem.of(call, direction, direction == "backward", case.bias is not None)
    precision = settings.matmul_precision("cuda") if case.dtype == "fp32" else found.precision
    return dataclasses.replace(found, hardware=hardware.simulated(arch), precision=precision), call


def compile_case(case: Case, direction: str, arch: str, kernel: str = "triton") -> tuple[problem.Problem, list[Any]]:
    """Compile the kernels of a case, with a kernel as `dispatch.encode_force` names it."""
    from torch_flash2.kernels.triton import offline

    found, call = posed(case, direction, arch)
    plan = dispatch.select(found, kernel)
    return found, offline.compile_call(plan.module, found, plan.config, call)


def run_job(job: Job) -> list[Outcome]:
    """Compile a job's kernels."""
    mix = MIXES[job.mix]
    segments = len(mix.get("documents", "12"))
    wide = 128 if job.head_dim == 192 and job.kernel != "triton" else job.head_dim
    case = Case(str(job), segments, 4, 2, 256, 256, job.head_dim, wide, job.dtype, **mix)
    config = SUMS[job.kernel].config if job.kernel in SUMS and job.direction == "backward" else None
    force = dispatch.encode_force(job.kernel.partition("-")[0], config)
    try:
        found, kernels = compile_case(case, job.direction, job.arch, force)
    except dispatch.UnsupportedError as error:
        # A refusal is an answer where the smallest tiles do not fit; any other is a failure.
        return [Outcome(job, "refused", 0, "" if "bytes of shared memory" in str(error) else str(error))]
    except Exception as error:
        return [Outcome(job, "", 0, f"{type(error).__name__}: {str(error)[:500]}")]
    limit = found.hardware.shared_memory
    outcomes = []
    for kernel in kernels:
        shared, tensor = kernel.metadata.shared, getattr(kernel.metadata, "tmem_size", None) or 0
        over = f"shared memory {shared} of {limit}" if shared > limit else ""
        if tensor > TENSOR_MEMORY:
            over += f" tensor memory {tensor} of {TENSOR_MEMORY}"
        if job.kernel in SUMS:
            over += " ".join([*machine_code.unused_barriers(kernel), *machine_code.unset_registers(kernel)[:3]])
        outcomes.append(Outcome(job, kernel.name, shared, over))
    return outcomes


def run(jobs: list[Job], workers: int, progress: bool = False) -> list[Outcome]:
    """Compile jobs in processes of their own."""
    start, outcomes = time.time(), []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        for i, found in enumerate(pool.map(run_job, jobs)):
            outcomes += found
            if progress:
                bad = sum(bool(outcome.problem) for outcome in outcomes)
                line = f"{i + 1}/{len(jobs)} jobs, {len(outcomes)} kernels, {bad} failures"
                print(f"\r{line}, {time.time() - start:.0f} s", end="", flush=True, file=sys.stderr)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = {"arch": ARCHS, "dtype": DTYPES, "mix": MIXES, "direction": DIRECTIONS, "kernel": KERNELS}
    for name, choices in names.items():
        parser.add_argument(f"--{name}", choices=choices, nargs="+", default=list(choices))
    parser.add_argument("--head_dim", type=int, nargs="+", default=sorted({*BUCKETS, *HOPPER_DIMS}))
    parser.add_argument("--sample", action="store_true", help="only what test_compile.py compiles")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    given = parser.parse_args()
    jobs = [
        job
        for job in (sample() if given.sample else matrix())
        if all(getattr(job, name) in getattr(given, name) for name in Job._fields)
    ]
    outcomes = run(jobs, given.jobs, progress=True)
    failures = [outcome for outcome in outcomes if outcome.problem]
    print(f"\n{len(outcomes)} kernels of {len(jobs)} calls, {len(failures)} failures")
    for outcome in failures:
        print(*outcome.job, outcome.kernel, outcome.problem, sep="  ")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
