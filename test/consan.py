"""Run Hopper's kernels under Gluon's concurrency sanitizer (ConSan), one process for each call.

    python test/consan.py [NAME ...] [--jobs 8] [--without EDIT]

ConSan checks each access to shared memory, also those of TMA and of the tensor core, against what mbarriers, commits
and fences order; a race is a device assertion, which ends the process. Needs a Hopper GPU and Triton 3.9: what earlier
ones make of these kernels is too large for ptxas. EDIT names a synchronisation to leave out, which must be reported.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

# A script's own folder is on the path, the clone that it belongs to is not.
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import triton  # noqa: E402
from compile_all import SUMS  # noqa: E402

import torch_flash2  # noqa: E402
from torch_flash2 import hardware  # noqa: E402
from torch_flash2.oracle import Inputs, math_attention  # noqa: E402
from torch_flash2.testing import Case, check, dropout_seed, poisoned, run_attention  # noqa: E402

# So few programs that each has more tasks than the ring between scheduler and warpgroups has places.
PROGRAMS = 2


class Checked(NamedTuple):
    """A call, how it is forced, whether its backward runs, by which kernel, and on how many multiprocessors."""

    case: Case
    config: dict[str, Any] | None = None
    backward: bool = False
    kernel: str = "hopper"
    programs: int = PROGRAMS


def _case(head_dim: int, mask: str = "causal", **more: Any) -> Case:
    sizes = dict(batch=1, heads=2, heads_kv=1, seqlen_q=520, seqlen_k=520) | more
    wide = 128 if head_dim == 192 else head_dim
    return Case("consan", head_dim=head_dim, head_dim_v=wide, mask=mask, **sizes)


_PACKED: dict[str, Any] = dict(batch=3, lengths="packed", documents=(1.0, 0.0, 0.3), seqlen_q=400, seqlen_k=400, tail=9)
PAIR = SUMS["hopper"].config
CALLS = {
    "64-full": Checked(_case(64, "full")),
    "64-full-three": Checked(_case(64, "full"), {"GROUPS": 3, "HELD": False}),
    "64-causal": Checked(_case(64)),
    "64-padded": Checked(_case(64, "causal @ bottom-right", batch=2, lengths="padded", documents=(0.9, 0.4))),
    "64-dropout": Checked(_case(64, "full", dropout_p=0.2)),
    "96-causal": Checked(_case(96)),
    "128-full": Checked(_case(128, "full")),
    "128-causal": Checked(_case(128, dtype="fp16")),
    "128-window": Checked(_case(128, "window(200, 0) @ bottom-right", seqlen_k=700)),
    "128-packed": Checked(_case(128, **_PACKED)),
    "128-alibi": Checked(_case(128, alibi=1)),
    "128-softcap-sinks": Checked(_case(128, softcap=20.0, sinks=True)),
    "128-splits": Checked(_case(128, "causal @ bottom-right", seqlen_q=130, seqlen_k=3000), programs=132),
    "128-heads": Checked(_case(128, "causal @ bottom-right", batch=3, heads=8, heads_kv=2, seqlen_q=30, sinks=True)),
    # As where no multiprocessor has more than one task.
    "64-one": Checked(_case(64), {"Q_STAGES": 1, "TURNS": False, "LATE": True, "APART": False, "HELD": False}),
    "128-one": Checked(_case(128), {"Q_STAGES": 1, "TURNS": False, "LATE": False, "APART": False}),
    "128-narrow": Checked(
        _case(128), {"BLOCK_N": 64, "STAGES": 4, "Q_STAGES": 1, "TURNS": False, "LATE": False, "APART": False}
    ),
    "192-causal": Checked(_case(192)),
    "256-full": Checked(_case(256, "full")),
    "256-causal": Checked(_case(256)),
    "256-packed": Checked(_case(256, **_PACKED)),
    "latent": Checked(Case("consan", 1, 128, 1, 2, 700, 576, 512, mask="causal @ bottom-right"), kernel="latent"),
    "latent-window": Checked(
        Case("consan", 2, 40, 2, 3, 700, 544, 512, "fp16", "window(300, 0) @ bottom-right"), kernel="latent"
    ),
    # Not here: warpgroups that meet at a named barrier, of which ConSan does not know. They do where they share keys
    # (head dim 256), with lengths, and beyond head dim 64 where they add to sums in memory.
    "backward-64": Checked(_case(64), backward=True),
    "backward-64-ordered": Checked(_case(64), SUMS["hopper-ordered"].config, backward=True),
    "backward-64-pair": Checked(_case(64, "full"), PAIR, backward=True),
    "backward-96-pair": Checked(_case(96, "window(200, 0)"), PAIR, backward=True),
    "backward-128-pair": Checked(_case(128), PAIR, backward=True),
    "backward-192": Checked(_case(192), backward=True),
}


class Edit(NamedTuple):
    """A line of a kernel, in whose place another one stands, and the call that then races."""

    module: str
    function: str
    line: str
    call: str = ""
    instead: str = "pass"


# The backward's producer has no fence between ordinary reads of a buffer, all done by then, and TMA's next write to it:
# with one for each tile of rows it took 1 % longer (H200, 2026-11-22, near the noise). ConSan asks for it in every such
# place; with them here it sees the rest.
FENCES = (
    Edit("backward_feeding", "_load_rows", "freed(q, j, SHAPE.STAGES)", instead="freed(q, j, SHAPE.STAGES); FENCE"),
    Edit(
        "backward_feeding", "_load_rows", "freed(do, j, SHAPE.STAGES_V)", instead="freed(do, j, SHAPE.STAGES_V); FENCE"
    ),
    Edit("backward_feeding", "produce", "_load_keys(inputs,", instead="FENCE; _load_keys(inputs,"),
)
EDITS = {
    # Values are read before they have come.
    "values": Edit("forward_kernel", "_turns", "mbarrier.wait(buffers.v.filled.index(stage_v), phase_v)", "256-causal"),
    # Buffers are filled again while they are read.
    "free": Edit("feeding", "_load", "mbarrier.wait(ring.free.index(stage), phase ^ 1)", "128-causal"),
    # Rows are written over those that TMA still stores.
    "stored": Edit("storing", "_store_by_tma", "compat.store_wait(0)", "256-full"),
    # TMA writes queries over those that a warpgroup has read.
    "fence": Edit("feeding", "produce", "fence_async_shared()", "64-full"),
    # Tasks are written over those that are still read.
    "tasks": Edit(
        "pipeline", "put_task", "mbarrier.wait(ring.free.index(slot), ((index // TASKS) & 1) ^ 1)", "64-causal"
    ),
}


def edit(change: Edit) -> None:
    """Change a kernel that this process has not compiled yet."""
    module = importlib.import_module(f"torch_flash2.kernels.hopper.{change.module}")
    kernel = getattr(module, change.function)
    assert kernel.src.count(change.line) == 1, change
    kernel._unsafe_update_src(kernel.src.replace(change.line, change.instead.replace("FENCE", "fence_async_shared()")))


def sanitize(on: bool) -> None:
    """Compile kernels with ConSan from here on, or without."""
    triton.knobs.compilation.instrumentation_mode = "consan" if on else ""


def attended(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward as it is, before a backward under ConSan."""
    found = run_attention(inputs)
    sanitize(True)
    return found


def run(name: str, without: str | None) -> str:
    """Run one call in this process and hold its results to math attention's; says what they were."""
    real = hardware.of
    case, config, backward, kernel, programs = CALLS[name]
    hardware.of = lambda device: dataclasses.replace(real(device), multiprocessors=programs)  # type: ignore[assignment]
    if without is not None:
        edit(EDITS[without])
    if backward:
        for change in FENCES:
            edit(change)
        with torch_flash2.force(kernel, config):
            return f"error {max(check(case, attended, 'cuda').values()):.2f} of its bound"
    sanitize(True)
    inputs = case.inputs("cuda")
    if kernel == "latent":
        inputs = inputs._replace(value=inputs.key[..., : case.head_dim_v])
    torch.manual_seed(0)
    with torch_flash2.force(kernel, config), torch.no_grad(), poisoned():
        out, lse = run_attention(inputs)
    torch.cuda.synchronize()
    sanitize(False)
    words = dropout_seed(0, inputs.query.device) if case.dropout_p > 0 else None
    nothing = torch.zeros_like(out), torch.zeros_like(lse)
    exact = math_attention(inputs, words, *nothing, torch.float64).out
    plain = math_attention(inputs, words, *nothing, inputs.query.dtype).out
    found, bound = (float((x.double() - exact).abs().max()) for x in (out, plain))
    assert found <= 2 * bound + 1e-6, (found, bound)
    return f"error {found / bound:.2f} of PyTorch's in the same dtype"


def in_process(name: str, without: str | None, seconds: float) -> tuple[int, str]:
    """Run one call in a process of its own: its exit status and what it said: a race's first line, or its result."""
    command = [sys.executable, __file__, name, "--here"] + (["--without", without] if without else [])
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return 124, f"still running after {seconds:.0f} s"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    races = [line for line in lines if "Assertion" in line and "block:" in line]
    said = [done.stdout.strip()] if done.returncode == 0 else races[:1] or lines[-1:]
    return done.returncode, f"{''.join(said)[-400:]} ({time.perf_counter() - start:.0f} s)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CALLS))
    parser.add_argument("--without", choices=EDITS)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--here", action="store_true", help="run the one call in this process")
    options = parser.parse_args()
    default = [EDITS[options.without].call] if options.without else list(CALLS)
    names = options.names or default
    if options.here:
        print(run(names[0], options.without))
        return 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda name: in_process(name, options.without, options.seconds), names))
    for name, (status, said) in zip(names, results, strict=True):
        print(f"{name:20} {'clean' if status == 0 else f'status {status}'}: {said}")
    return int(any(status for status, _ in results))


if __name__ == "__main__":
    sys.exit(main())
