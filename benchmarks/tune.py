"""Measuring a kernel's candidate configs: `python -m benchmarks tune`.

Every candidate is compiled first, in processes beside each other that fill Triton's cache on disk;
then all of a case are timed in the same rounds, and the fastest few once more.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
from typing import Any

import torch

import torch_flash2
from torch_flash2 import dispatch

from . import check, data, providers, timing
from .results import environment
from .runner import Options, say
from .suites import Shape, suite
from .timing import Entry

Config = dict[str, Any]
FINALISTS = 6


def as_dict(config: Any) -> Config:
    """A config, a NamedTuple whose values may be NamedTuples again, as plain data."""
    return {name: as_dict(value) if hasattr(value, "_asdict") else value for name, value in config._asdict().items()}


def candidates(kernel: str, shape: Shape, device: str) -> list[Config]:
    """The config that the kernel would choose for a shape, then all that are worth measuring.

    Raises:
        ValueError: the kernel has no configs.
    """
    inputs = data.make(shape, torch.device(device), 0, shape.direction != "forward").inputs
    with torch_flash2.force(kernel):
        explanation = torch_flash2.explain(*inputs.arguments, **inputs.keywords)
    (plan,) = (plan for plan in explanation.plans if plan.problem.direction == shape.direction)
    if plan.config is None:
        raise ValueError(f"kernel {kernel!r} has no configs to tune")
    module = dispatch.kernel(kernel, shape.direction)
    found = [as_dict(plan.config), *map(as_dict, module.candidates(plan.problem))]
    return [config for i, config in enumerate(found) if config not in found[:i]]


def joined(default: Config, ranking: list[Config]) -> Config:
    """The best of each part of a config, parts having been measured beside the other's default.

    `ranking` is fastest first.
    """
    best = dict(default)
    faster = ranking[: ranking.index(default)] if default in ranking else ranking
    for config in reversed(faster):
        changed = {name: value for name, value in config.items() if value != default[name]}
        if all(isinstance(value, dict) for value in changed.values()):
            best |= changed
    return best


def attempt(shape: Shape, name: str, device: str) -> str:
    """Run a forced config once, which compiles it; why it cannot run, or nothing."""
    try:
        sample = data.make(shape, torch.device(device), 0, shape.direction != "forward")
        check.results(providers.make(name, shape, sample.inputs), shape, sample)
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0][:200]
    return ""


def compile_all(work: list[tuple[Shape, str]], device: str, processes: int) -> dict[tuple[str, str], str]:
    """Why each (case, provider) of the work cannot run; those that can are left out."""
    failures: dict[tuple[str, str], str] = {}
    if processes < 2:
        for shape, name in work:
            if why := attempt(shape, name, device):
                failures[shape.name, name] = why
        return failures
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        futures = {pool.submit(attempt, *item, device): item for item in work}
        for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
            shape, name = futures[future]
            why = str(future.exception() or "") or future.result()
            if why:
                failures[shape.name, name] = why
            say(f"compiled {number}/{len(work)} {shape.name} {name} {why}")
    return failures


class Contest:
    """The configs of one kernel on one shape."""

    def __init__(self, shape: Shape, kernel: str, options: Options) -> None:
        self.shape, self.kernel, self.options = shape, kernel, options
        self.device = torch.device(options.device)
        self.sample = data.make(shape, self.device, 0, shape.direction != "forward")
        self.reference = check.Reference(shape, self.sample)

    def entry(self, config: Config) -> Entry | None:
        """The config as a thing to time; None where its results are wrong."""
        name = provider_name(self.kernel, config)
        provider = providers.make(name, self.shape, self.sample.inputs)
        errors = self.reference.errors(check.results(provider, self.shape, self.sample))
        if complaints := self.reference.complaints(errors):
            say(f"  {name} is wrong: {'; '.join(complaints)}")
            return None
        return timing.entry(self.shape, provider, [self.sample])

    def rank(self, configs: list[Config], rounds: int) -> list[tuple[Config, float]]:
        """Configs with their milliseconds, fastest first."""
        entries = [(config, self.entry(config)) for config in configs]
        right = [(config, entry) for config, entry in entries if entry is not None]
        timing.interleave([entry for _, entry in right], rounds, self.options.window_ms, self.device)
        return sorted(((config, entry.ms) for config, entry in right), key=lambda pair: pair[1])

    def run(self, configs: list[Config], default: Config) -> list[tuple[Config, float]]:
        """All configs in two rounds, then the finalists and the default in all of them."""
        ranking = [config for config, _ in self.rank(configs, 2)]
        finalists = ranking[:FINALISTS]
        for config in (default, joined(default, ranking)):
            if config not in finalists and (config in ranking or config not in configs):
                finalists.append(config)
        return self.rank(finalists, self.options.rounds)


def provider_name(kernel: str, config: Config) -> str:
    return f"torch_flash2:{kernel}@{providers.config_text(config)}"


def run(suites: list[str], options: Options, kernel: str, direction: str, processes: int) -> list[dict[str, Any]]:
    """Tune a kernel on the cases of suites: the best printed, the finalists in options.out."""
    tiny = torch.device(options.device).type != "cuda"
    groups = [
        group
        for name in suites
        for group in suite(name, dtype=options.dtype, quick=options.quick, pattern=options.pattern, tiny=tiny)
    ]
    shapes = [s for group in groups for s in group.shapes if s.direction == direction]
    configs = {shape.name: candidates(kernel, shape, options.device) for shape in shapes}
    work = [(s, provider_name(kernel, config)) for s in shapes for config in configs[s.name]]
    failures = compile_all(work, options.device, processes)

    found: list[dict[str, Any]] = []
    lines = []
    for shape in shapes:
        default, *_ = configs[shape.name]
        running = [
            config for config in configs[shape.name] if (shape.name, provider_name(kernel, config)) not in failures
        ]
        say(f"tune {shape.name}: {len(running)} of {len(configs[shape.name])} candidates run")
        ranking = Contest(shape, kernel, options).run(running, default) if running else []
        found.append(
            {
                **environment(torch.device(options.device)),
                "case": dataclasses.asdict(shape.case),
                "direction": direction,
                "kernel": kernel,
                "default": default,
                "ranking": [
                    {
                        "config": config,
                        "ms": round(ms, 4),
                    }
                    for config, ms in ranking
                ],
            }
        )
        assert options.out is not None
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        lines.append(summary(shape, default, ranking))
    print("\n".join(lines), flush=True)
    return found


def summary(shape: Shape, default: Config, ranking: list[tuple[Config, float]]) -> str:
    """The best config and the default's time in a few lines."""
    if not ranking:
        return f"{shape.name:24} no candidate runs"
    best, ms = ranking[0]
    usual = dict((providers.config_text(config), ms) for config, ms in ranking)
    before = usual.get(providers.config_text(default), float("nan"))
    return f"{shape.name:24} {ms:9.4f} ms, default {before:9.4f} ms\n    {providers.config_text(best)}"
