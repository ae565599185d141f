"""Where taking over scaled_dot_product_attention pays: PyTorch's choice and ours on one call of every class.

    python -m benchmarks.sdpa                    # on a GPU: measures, and appends to results/<gpu>/sdpa.csv
    python -m benchmarks.sdpa --part 2/3         # the second third of it
    python -m benchmarks.sdpa --write            # anywhere: makes torch_flash2/policy.json of all such files

Of a class that was measured at several sizes, the size with the least gain decides.
B batch, H query heads, G key/value heads, M query rows, N keys, D head dim.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right

import torch_flash2
from torch_flash2 import policy, stock
from torch_flash2.stock import Sdpa

from .results import Table, environment

RESULTS = Path(__file__).parent / "results"
CLASS = tuple(policy.CallClass._fields)
SIZES = ("B", "H", "G", "M", "N", "D")
COLUMNS = ("date", "commit", "device", "driver", "torch", "triton", *CLASS, *SIZES, "ours_ms", "stock_ms", "stock")
ROUNDS, WINDOW_MS, WORKERS = 5, 6.0, 12
sdp = torch.nn.functional.scaled_dot_product_attention


@dataclasses.dataclass(frozen=True)
class Point:
    """One call to measure."""

    found: policy.CallClass
    B: int
    H: int
    G: int
    M: int
    N: int
    D: int

    def arguments(self) -> Sdpa:
        """Its tensors, which need gradients iff its class trains."""
        train = self.found.pass_ == "training"
        dtype = torch.bfloat16 if self.found.bits == 16 else torch.float32
        shapes = ((self.B, self.M, self.H), (self.B, self.N, self.G), (self.B, self.N, self.G))
        query, key, value = (
            torch.randn(*shape, self.D, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_(train)
            for shape in shapes
        )
        mask = None
        if self.found.kind == "mask":
            # Padding, as encoders and batched decoders pass it.
            used = torch.linspace(self.N // 2, self.N, self.B, device="cuda")
            mask = (torch.arange(self.N, device="cuda") < used[:, None])[:, None, None, :]
            mask = mask.expand(self.B, 1, self.M, self.N).contiguous()
        elif self.found.kind == "bias":
            mask = torch.randn(1, self.H, self.M, self.N, device="cuda", dtype=dtype)
        lower_right, p = self.found.kind == "lower-right", 0.1 if self.found.dropout else 0.0
        causal = lower_right or self.found.kind == "causal"
        return Sdpa(query, key, value, mask, p, causal, None, self.H != self.G, lower_right)


def points() -> Iterator[Point]:
    """Everything that the policy tells apart, as far as models make use of it."""
    lengths = {"short": ((16, 128), (4, 512)), "long": ((2, 2048), (1, 8192))}
    for bits, width in ((16, 64), (16, 128), (16, 256), (16, 512), (32, 64), (32, 128)):
        heads = 8 if width > 128 else 16
        for kind in ("full", "causal", "lower-right", "mask", "bias"):
            for grouped, dropout in ((False, False), (True, False), (False, True)):
                if kind == "bias" and grouped or dropout and (kind == "lower-right" or width > 128 or bits == 32):
                    continue
                for rows, sizes in lengths.items():
                    for batch, length in sizes:
                        if length == 8192 and (bits == 32 or kind in ("mask", "bias") or width == 512):
                            continue
                        for pass_ in ("inference", "training"):
                            if dropout and pass_ == "inference":
                                continue
                            found = policy.CallClass(pass_, bits, width, kind, rows, grouped, dropout)
                            G = heads // 4 if grouped else heads
                            # The later chunks of a long text.
                            M = length // 2 if kind == "lower-right" else length
                            yield Point(found, batch, heads, G, M, length, width)
        for kind, grouped in (("full", True), ("full", False), ("mask", True), ("lower-right", True)):
            found = policy.CallClass("inference", bits, width, kind, "few", grouped, False)
            M = 4 if kind == "lower-right" else 1
            for batch, length in ((1, 1024), (8, 8192)):
                yield Point(found, batch, heads, heads // 4 if grouped else heads, M, length, width)


def runner(point: Point) -> Callable[[], Any]:
    """A call that runs the point once, forward or forward and backward."""
    arguments = point.arguments()
    keywords = arguments._asdict()
    if keywords.pop("lower_right"):
        keywords.update(attn_mask=causal_lower_right(point.M, point.N), is_causal=False)
    if point.found.pass_ == "inference":
        return torch.no_grad()(lambda: sdp(**keywords))
    leaves = arguments[:3]
    grad = torch.randn_like(leaves[0])
    return lambda: torch.autograd.grad(sdp(**keywords), leaves, grad)


def window(run: Callable[[], Any], calls: int) -> float:
    """Milliseconds a call."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / calls


def measure(point: Point) -> dict[str, str]:
    """The point's row: both in the same rounds, since the GPU's clock moves."""
    run = runner(point)
    calls = max(1, round(WINDOW_MS / window(run, 3)))
    times: dict[str, list[float]] = {"ours": [], "stock": []}
    for _ in range(ROUNDS):
        times["stock"].append(window(run, calls))
        with torch_flash2.enabled("always"):
            times["ours"].append(window(run, calls))
    return {
        **{name: str(value) for name, value in zip(CLASS, point.found, strict=True)},
        **{name: str(getattr(point, name)) for name in SIZES},
        **{f"{name}_ms": f"{statistics.median(found):.5f}" for name, found in times.items()},
        "stock": stock.choice(point.arguments()),
    }


def compile_share(chosen: list[Point]) -> None:
    """Compile one worker's share of the kernels into Triton's cache."""
    with torch_flash2.enabled("always"):
        for point in chosen:
            runner(point)()
            torch.cuda.empty_cache()


def write() -> None:
    """policy.json from every sdpa.csv: of each class its newest run, and of that the size with the least gain."""
    newest: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for path in sorted(RESULTS.glob("*/sdpa.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                key = (row["device"], *(row[name] for name in CLASS))
                rows = newest.setdefault(key, [])
                sizes = [row[name] for name in SIZES]
                rows[:] = [other for other in rows if [other[name] for name in SIZES] != sizes] + [row]
    found = []
    for (device, *_), rows in newest.items():
        row = min(rows, key=lambda row: float(row["stock_ms"]) / float(row["ours_ms"]))
        named: dict[str, Any] = {name: row[name] for name in CLASS}
        named.update({name: int(row[name]) for name in ("bits", "width")})
        named.update({name: row[name] == "True" for name in ("grouped", "dropout")})
        found.append(
            {
                "gpu": device, "class": named, "stock": row["stock"],
                "ours_ms": float(row["ours_ms"]), "stock_ms": float(row["stock_ms"]),
                "size": ",".join(f"{name}{row[name]}" for name in SIZES),
                "torch": row["torch"], "triton": row["triton"], "commit": row["commit"], "date": row["date"],
            }
        )  # fmt: skip
    lines = ",\n".join(json.dumps(row) for row in found)
    policy.POLICY.write_text(f"[\n{lines}\n]\n" if found else "[]\n")


def part(text: str) -> tuple[int, int]:
    """I/N, which of how many parts."""
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"must be such as 2/3, got {text!r}")
    return int(number), int(parts)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sdpa", description=__doc__)
    parser.add_argument("--write", action="store_true", help="make policy.json of what was measured")
    parser.add_argument("--part", type=part, default=(1, 1), metavar="I/N", help="measure just this part")
    parser.add_argument("--out", type=Path, help="the CSV file to append to")
    arguments = parser.parse_args()
    if not arguments.write:
        device = torch.device("cuda")
        number, parts = arguments.part
        every = list(points())
        chosen = every[len(every) * (number - 1) // parts : len(every) * number // parts]
        context = multiprocessing.get_context("spawn")
        with context.Pool(WORKERS) as pool:
            pool.map(compile_share, [chosen[worker::WORKERS] for worker in range(WORKERS)], chunksize=1)
        shared = environment(device)
        folder = shared["device"].split()[-1].lower()
        table = Table(arguments.out or RESULTS / folder / "sdpa.csv", COLUMNS)
        for point in chosen:
            row = measure(point)
            table.append({**shared, **row})
            torch.cuda.empty_cache()
    write()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
