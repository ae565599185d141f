"""Timing: everything of a group in the same rounds, so that a moving clock moves all of it alike.

An H200 sits at its power cap in all attention kernels and its clock drifts: times taken one after
the other differ by 8 % (2026-11-20), ratios within a round do not.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from .data import Sample
from .providers import Provider
from .suites import Shape


@dataclasses.dataclass
class Entry:
    """One provider on one shape: `run(i)` calls it on sample i; `times` has ms a call by round."""

    shape: Shape
    label: str
    run: Callable[[int], object]
    context: Callable[[], AbstractContextManager[Any]]
    flops: float
    bytes: int
    peak_mib: float | None = None
    times: list[float] = dataclasses.field(default_factory=list)

    @property
    def ms(self) -> float:
        return statistics.median(self.times)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """The median of per-round ratios and the quartiles around it."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, above: list[float], below: list[float]) -> Ratio:
        ratios = [a / b for a, b in zip(above, below, strict=True)]
        if len(ratios) == 1:
            return cls(ratios[0], ratios[0], ratios[0])
        low, value, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(value, low, high)


def sample_count(sample: Sample, device: torch.device) -> int:
    """How many samples to rotate among so that they pass three times the L2 cache."""
    if device.type != "cuda":
        return 2
    tensors = [sample.grad_out, *sample.inputs.leaves.values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(1, math.ceil(3 * cache / size)), 16)


def entry(shape: Shape, provider: Provider, samples: list[Sample]) -> Entry:
    """A forward without a graph, a backward alone on a graph made here, or both."""

    def forward(i: int) -> torch.Tensor:
        return provider.call(samples[i % len(samples)].inputs)

    def both(i: int) -> object:
        sample = samples[i % len(samples)]
        leaves = list(sample.inputs.leaves.values())
        return torch.autograd.grad(forward(i), leaves, sample.grad_out)

    graphs = []
    if shape.direction == "backward":
        with provider.context():
            for i, sample in enumerate(samples):
                graphs.append((forward(i), list(sample.inputs.leaves.values()), sample.grad_out))

    def backward(i: int) -> object:
        return torch.autograd.grad(*graphs[i % len(graphs)], retain_graph=True)

    run = {"forward": torch.no_grad()(forward), "backward": backward, "both": both}[shape.direction]
    counts = samples[0].flops(shape.direction), samples[0].bytes(shape.direction)
    return Entry(shape, provider.label, run, provider.context, *counts)


def replayed(step: Callable[[], object], device: torch.device) -> Callable[[int], object]:
    """Run a step: replay the CUDA graph of it where there is one."""
    if device.type != "cuda":
        step()
        return lambda i: step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def run(i: int, step: Callable[[], object] = step) -> None:
        # The graph knows addresses alone: the step keeps its tensors alive.
        graph.replay()

    return run


def window(entry: Entry, calls: int, device: torch.device) -> float:
    """Milliseconds a call, over `calls` calls back to back after one that is not counted."""
    with entry.context():
        entry.run(0)
        if device.type != "cuda":
            start = time.perf_counter()
            for i in range(calls):
                entry.run(i)
            return (time.perf_counter() - start) * 1e3 / calls
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for i in range(calls):
            entry.run(i)
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / calls


def interleave(entries: list[Entry], rounds: int, window_ms: float, device: torch.device) -> None:
    """Time all entries: each runs about `window_ms` in each round; another starts each round."""
    calls = {}
    for i, each in enumerate(entries):
        window(each, 1, device)
        calls[i] = max(1, round(window_ms / window(each, 3, device)))
    for number in range(rounds):
        for k in range(len(entries)):
            i = (number + k) % len(entries)
            entries[i].times.append(window(entries[i], calls[i], device))


def peak_mib(entry: Entry, device: torch.device) -> float | None:
    """The most memory one call holds over what was there before it; None where nobody counts it."""
    if device.type != "cuda":
        with entry.context():
            entry.run(0)
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with entry.context():
        entry.run(0)
        torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
