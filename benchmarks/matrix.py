"""The rate of PyTorch's own matrix product, the level that attention is held against: `--suite matrix`.

Windows of a few milliseconds have pauses between them: the suites, which alternate between providers, do not load the
GPU steadily either. It appends to benchmarks/results/<gpu>/matrix.csv, from which the charts take their dashed line.
"""

from __future__ import annotations

import statistics
import time

import torch

from .results import COLUMNS, Row, Table, environment
from .runner import Options

SIZE = 8192
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def measure(device: torch.device, dtype: str, size: int, rounds: int) -> Row:
    """A row for the product of two random [size, size] matrices: the median of `rounds` windows of 4 products."""
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    calls = 4
    times = []
    for _ in range(rounds):
        torch.mm(a, b)
        finish(device)
        start = time.perf_counter()
        for _ in range(calls):
            torch.mm(a, b)
        finish(device)
        times.append((time.perf_counter() - start) * 1e3 / calls)
        time.sleep(0.01)
    ms = statistics.median(times)
    measured = {"ms": f"{ms:.4f}", "tflops": f"{2 * size**3 / ms / 1e9:.1f}"}
    names = {"suite": "matrix", "case": f"gemm-{size}", "direction": "forward", "dtype": dtype, "provider": "matmul"}
    return environment(device) | names | measured


def finish(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(options: Options) -> None:
    """The rate of the options' dtype; windows by the dozen, since each is short."""
    device = torch.device(options.device)
    row = measure(device, options.dtype, SIZE if device.type == "cuda" else 64, 5 * options.rounds)
    table = Table(options.folder / "matrix.csv", COLUMNS)
    table.append(row)
    table.compact()
    print(f"matrix product, {options.dtype}: {row['tflops']} TFLOP/s", flush=True)
