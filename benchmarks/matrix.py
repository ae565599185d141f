"""The rate of PyTorch's own matrix product, the level that attention is held against: `python -m benchmarks.matrix`.

Windows of a few milliseconds have pauses between them: the suites, which alternate between providers, do not load the
GPU steadily either. It appends to benchmarks/results/<gpu>/matrix.csv, from which the charts take their dashed line.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from .results import COLUMNS, Row, Table, environment
from .runner import device_name

SIZE = 8192
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def measure(device: torch.device, dtype: str, size: int, rounds: int) -> Row:
    """A row for the product of two random [size, size] matrices: the median of `rounds` windows of 4 products."""
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    calls = 4
    times = []
    for _ in range(rounds):
        torch.mm(a, b)
        _finish(device)
        start = time.perf_counter()
        for _ in range(calls):
            torch.mm(a, b)
        _finish(device)
        times.append((time.perf_counter() - start) * 1e3 / calls)
        time.sleep(0.01)
    ms = statistics.median(times)
    measured = {"ms": f"{ms:.4f}", "tflops": f"{2 * size**3 / ms / 1e9:.1f}"}
    names = {"suite": "matrix", "case": f"gemm-{size}", "direction": "forward", "dtype": dtype, "provider": "matmul"}
    return environment(device) | names | measured


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix", description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/<gpu>")
    arguments = parser.parse_args()
    folder = arguments.out or Path(__file__).parent / "results" / device_name("cuda")
    table = Table(folder / "matrix.csv", COLUMNS)
    row = measure(torch.device("cuda"), arguments.dtype, SIZE, arguments.rounds)
    table.append(row)
    table.compact()
    print(",".join(row.get(name, "") for name in COLUMNS))


if __name__ == "__main__":
    main()
