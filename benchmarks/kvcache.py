"""Decoding steps through flash_attn_with_kvcache, append and rotary included: `python -m benchmarks.kvcache`.

Llama-3.1-8B's attention (32 query heads on 8, head dim 128), 64 sequences of mixed lengths up to 16k tokens, one new
token each; caches of whole rows, and of pages of 64 and 256. Rates are GB/s of keys and values that are read, beside
that of a copy within the device. It appends to benchmarks/results/<gpu>/kvcache.csv.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from torch_flash2 import UnsupportedError
from torch_flash2.flash_attn import flash_attn_with_kvcache

from .results import COLUMNS, Row, Table, environment
from .runner import device_name

H, G, D = 32, 8, 128


def step_of(B: int, longest: int, page: int | None, device: torch.device) -> tuple[Callable[[], object], int]:
    """One step, and the bytes of keys and values that it reads."""
    generator = torch.Generator().manual_seed(0)
    taken = torch.randint(longest // 16, longest - 1, (B,), generator=generator, dtype=torch.int32)
    rows, size = (B, longest) if page is None else (B * longest // page, page)
    keys, values = (torch.randn(rows, size, G, D, device=device, dtype=torch.bfloat16) for _ in range(2))
    q, k, v = (torch.randn(B, 1, heads, D, device=device, dtype=torch.bfloat16) for heads in (H, G, G))
    angle = torch.outer(torch.arange(longest), 500000.0 ** -torch.linspace(0, 1, D // 2))
    cos, sin = (table.to(device, torch.bfloat16) for table in (angle.cos(), angle.sin()))
    order = torch.randperm(rows, generator=generator).reshape(B, -1).to(device, torch.int32)
    lengths, table = taken.to(device), None if page is None else order

    def step() -> object:
        return flash_attn_with_kvcache(
            q, keys, values, k, v, cos, sin, lengths, block_table=table, causal=True, rotary_interleaved=False
        )

    return step, int((taken + 1).sum()) * 2 * G * D * 2


def time(step: Callable[[], object], rounds: int) -> float:
    """Median milliseconds of a step, over windows of 20."""
    times = []
    for _ in range(rounds):
        step()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(20):
            step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 20)
    return statistics.median(times)


def copy_of(rounds: int, device: torch.device) -> tuple[float, int]:
    """Milliseconds of a copy of 2 GiB, and the bytes that it reads and writes."""
    source = torch.randn(2**30, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return time(lambda: target.copy_(source), rounds), 2 * source.numel() * source.element_size()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kvcache", description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--longest", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/<gpu>")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    table = Table((arguments.out or Path(__file__).parent / "results" / device_name("cuda")) / "kvcache.csv", COLUMNS)

    same: Row = environment(device) | {"suite": "kvcache", "direction": "forward", "dtype": "bf16"}

    def write(case: str, provider: str, ms: float, size: int) -> float:
        rate = size / ms / 1e6
        table.append(same | {"case": case, "provider": provider, "ms": f"{ms:.4f}", "gbps": f"{rate:.0f}"})
        return rate

    ms, size = copy_of(arguments.rounds, device)
    copy = write("copy", "copy", ms, size)
    print(f"copy: {copy:.0f} GB/s")
    for page in (None, 64, 256):
        name = f"llama-b{arguments.batch}-" + ("rows" if page is None else f"page{page}")
        try:
            step, size = step_of(arguments.batch, arguments.longest, page, device)
            ms = time(step, arguments.rounds)
        except UnsupportedError as error:
            print(f"{name}: {str(error).splitlines()[0]}")
            continue
        rate = write(name, "torch_flash2", ms, size)
        print(f"{name}: {ms:.3f} ms, {rate:.0f} GB/s, {rate / copy:.2f} of copy", flush=True)
    table.compact()


if __name__ == "__main__":
    main()
