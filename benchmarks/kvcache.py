"""Decoding steps through flash_attn_with_kvcache, append and rotary included: `--suite kvcache`.

Llama-3.1-8B's attention (32 query heads on 8, head dim 128), 64 sequences of mixed lengths up to 16k tokens, one new
token each; caches of whole rows, and of pages of 64 and 256. Rates are GB/s of keys and values that are read, beside
that of a copy within the device. A step's result is checked before it is timed. It appends to
benchmarks/results/<gpu>/kvcache.csv.

B sequences, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import torch

from torch_flash2.flash_attn import flash_attn_with_kvcache

from .results import COLUMNS, Row, Table, environment
from .runner import Options, progress

H, G, D = 32, 8, 128


class Caches(NamedTuple):
    """Keys and values [B, longest, G, D], or [pages, page size, G, D] and a block table; `taken` positions are full."""

    keys: torch.Tensor
    values: torch.Tensor
    taken: torch.Tensor
    table: torch.Tensor | None

    @property
    def bytes(self) -> int:
        """Of keys and values that a step reads, the new ones too."""
        return int((self.taken + 1).sum()) * 2 * G * D * self.keys.element_size()

    def rows(self, b: int) -> list[torch.Tensor]:
        """Keys and values of a sequence, the new ones last: each [rows, G, D]."""
        count = int(self.taken[b]) + 1
        entries = slice(b, b + 1) if self.table is None else self.table[b].long()
        return [cache[entries].flatten(0, 1)[:count] for cache in (self.keys, self.values)]


def caches_of(B: int, longest: int, page: int | None, device: torch.device) -> Caches:
    generator = torch.Generator().manual_seed(0)
    taken = torch.randint(longest // 16, longest - 1, (B,), generator=generator, dtype=torch.int32)
    rows, size = (B, longest) if page is None else (B * longest // page, page)
    keys, values = (torch.randn(rows, size, G, D, device=device, dtype=torch.bfloat16) for _ in range(2))
    order = torch.randperm(rows, generator=generator).reshape(B, -1).to(device, torch.int32)
    return Caches(keys, values, taken.to(device), None if page is None else order)


class Step:
    """One new token of each sequence: its key, rotated, and value are written, and its query is answered."""

    def __init__(self, caches: Caches, longest: int) -> None:
        B, device = len(caches.taken), caches.keys.device
        self.caches = caches
        self.q, self.k, self.v = (torch.randn(B, 1, n, D, device=device, dtype=torch.bfloat16) for n in (H, G, G))
        angle = torch.outer(torch.arange(longest), 500000.0 ** -torch.linspace(0, 1, D // 2))
        self.cos, self.sin = (table.to(device, torch.bfloat16) for table in (angle.cos(), angle.sin()))

    def __call__(self) -> torch.Tensor:
        keys, values, taken, table = self.caches
        out: torch.Tensor = flash_attn_with_kvcache(
            self.q, keys, values, self.k, self.v, self.cos, self.sin, taken, block_table=table, causal=True,
            rotary_interleaved=False,
        )  # fmt: skip
        return out

    def check(self, sequences: range) -> None:
        """
        Raises:
            RuntimeError: the output or the new key of one of these sequences is wrong.
        """
        found = self()
        for b in sequences:
            keys, values = (rows.float() for rows in self.caches.rows(b))
            cos, sin = (table[int(self.caches.taken[b])].float() for table in (self.cos, self.sin))
            query, key = (
                torch.cat([first * cos - second * sin, first * sin + second * cos], 1)
                for first, second in (rows[b, 0].float().chunk(2, 1) for rows in (self.q, self.k))
            )
            keys[-1], values[-1] = key, self.v[b, 0].float()
            scores = torch.einsum("ghd,ngd->ghn", query.unflatten(0, (G, H // G)), keys) * D**-0.5
            wanted = torch.einsum("ghn,ngd->ghd", scores.softmax(2), values).flatten(0, 1)
            off = float((found[b, 0].float() - wanted).abs().max() / wanted.abs().max())
            # Query, new key and output are rounded to bf16.
            if not off <= 2**-6 or not torch.allclose(self.caches.rows(b)[0][-1].float(), key, atol=0.05, rtol=0.01):
                raise RuntimeError(f"sequence {b} is wrong: relative error {off:.1e}")


def time(step: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Median milliseconds of a step, over windows of 20."""
    times = []
    for _ in range(rounds):
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = perf_counter()
        for _ in range(20):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((perf_counter() - start) * 1e3 / 20)
    return statistics.median(times)


def copy_of(rounds: int, device: torch.device) -> tuple[float, int]:
    """Milliseconds of a copy, of 2 GiB on a GPU, and the bytes that it reads and writes."""
    source = torch.randn(2**30 if device.type == "cuda" else 2**16, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return time(lambda: target.copy_(source), rounds, device), 2 * source.numel() * source.element_size()


def run(options: Options) -> None:
    """A copy, then every kind of cache."""
    device = torch.device(options.device)
    B, longest = (64, 16384) if device.type == "cuda" else (3, 512)
    table = Table(options.folder / "kvcache.csv", COLUMNS)
    same: Row = environment(device) | {"suite": "kvcache", "direction": "forward", "dtype": "bf16"}

    def write(case: str, provider: str, ms: float, size: int) -> float:
        rate = size / ms / 1e6
        table.append(same | {"case": case, "provider": provider, "ms": f"{ms:.4f}", "gbps": f"{rate:.0f}"})
        return rate

    ms, size = copy_of(options.rounds, device)
    copy = write("copy", "copy", ms, size)
    print(f"copy: {copy:.0f} GB/s")
    for number, page in enumerate((None, 64, 256), 1):
        name = f"llama-b{B}-" + ("rows" if page is None else f"page{page}")
        progress("kvcache", number, 3, name)
        step = Step(caches_of(B, longest, page, device), longest)
        step.check(range(3))
        ms = time(step, options.rounds, device)
        rate = write(name, "torch_flash2", ms, step.caches.bytes)
        print(f"{name}: {ms:.3f} ms, {rate:.0f} GB/s, {rate / copy:.2f} of copy", flush=True)
    table.compact()
