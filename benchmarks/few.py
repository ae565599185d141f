"""Few query rows beside many keys, as in chunks of a long prompt or heads shared out among GPUs: `--suite few`.

The time is the GPU's: a CUDA graph of several calls is replayed, since the host would take longer than most of them. No
masks, so that all peers count the same. It appends to benchmarks/results/<gpu>/few.csv.

B batch, H query heads, G key/value heads, M query rows, N keys, D head dim.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter

import torch

from torch_flash2.oracle import Inputs
from torch_flash2.testing import Case

from . import providers
from .results import COLUMNS, Row, Table, environment
from .runner import Options, progress
from .suites import Shape

# B, H, G, M, N, D and Dv.
CASES = (
    Case("2k-of-32k-h4", 1, 4, 1, 2048, 32768, 128, 128, layout="bshd"),
    Case("1k-of-4k-h4", 1, 4, 4, 1024, 4096, 128, 128, layout="bshd"),
    Case("512-of-8k-h8", 1, 8, 1, 512, 8192, 128, 128, layout="bshd"),
    Case("512-of-2k-h8", 1, 8, 8, 512, 2048, 128, 128, layout="bshd"),
    Case("128-of-16k-h32", 1, 32, 8, 128, 16384, 128, 128, layout="bshd"),
    Case("32-of-16k-h32", 1, 32, 8, 32, 16384, 128, 128, layout="bshd"),
    Case("d64-512-of-4k-h12", 1, 12, 12, 512, 4096, 64, 64, layout="bshd"),
    Case("d256-512-of-8k-h8", 1, 8, 4, 512, 8192, 256, 256, layout="bshd"),
)
PROVIDERS = ("torch_flash2", "torch_flash2:triton", "fa3", "cudnn", "fa2")
CALLS = 8


def timer(provider: providers.Provider, inputs: Inputs) -> Callable[[], float]:
    """Runs a provider's forward CALLS times and gives the milliseconds of one."""

    def calls() -> None:
        with provider.context(), torch.no_grad():
            for _ in range(CALLS):
                provider.call(inputs)

    calls()
    if inputs.query.device.type != "cuda":

        def measured() -> float:
            start = perf_counter()
            calls()
            return (perf_counter() - start) * 1e3 / CALLS

        return measured
    calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()

    def replayed() -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / CALLS

    return replayed


def run(options: Options) -> None:
    """Every case with every provider, in the same rounds."""
    device = torch.device(options.device)
    table = Table(options.folder / "few.csv", COLUMNS)
    same: Row = environment(device) | {"suite": "few", "direction": "forward", "dtype": "bf16", "causal": "0"}
    for number, case in enumerate(CASES, 1):
        progress("few", number, len(CASES), case.name)
        shape = Shape(case, "forward")
        if device.type != "cuda":
            shape = shape.tiny()
        inputs = shape.case.inputs(device)
        timers = {}
        for name in PROVIDERS if device.type == "cuda" else PROVIDERS[:1]:
            try:
                timers[name] = timer(providers.make(name, shape, inputs), inputs)
            except (providers.RefusedError, ImportError) as error:
                print(f"{case.name}: not {name}: {error}", flush=True)
        times: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(options.rounds):
            for name, measure in timers.items():
                times[name].append(measure())
        sizes = {"head_dim": str(case.head_dim), "seqlen": str(case.seqlen_k), "case": case.name}
        flops = 4 * case.batch * case.heads * case.seqlen_q * case.seqlen_k * case.head_dim
        for name, found in times.items():
            ms = statistics.median(found)
            row = {"provider": name, "ms": f"{ms:.4f}", "tflops": f"{flops / ms / 1e9:.0f}"}
            table.append(same | sizes | row)
            print(f"{case.name} {name}: {ms * 1e3:.1f} us [{min(found) * 1e3:.1f}, {max(found) * 1e3:.1f}]", flush=True)
    table.compact()
