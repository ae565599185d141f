"""Running a suite: check, time, write.

B batch, H query heads, S rows and keys
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import warnings
from pathlib import Path

import torch

from . import check, data, providers, timing
from .providers import Provider, RefusedError
from .report import console
from .results import COLUMNS, RATIO_COLUMNS, Row, Table, environment
from .suites import MODULES, Group, Shape, suite
from .timing import Entry, Ratio


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says of a run. `against` None is each group's own peers."""

    ours: tuple[str, ...] = ("torch_flash2",)
    against: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    device: str = "cuda"
    out: Path | None = None
    dtype: str = "bf16"
    pattern: str = ""
    rounds: int = 8
    window_ms: float = 5.0
    quick: bool = False

    def names(self, group: Group) -> list[str]:
        """The providers of a group."""
        peers = group.peers if self.against is None else self.against
        return [*self.ours, *(name for name in peers if name not in self.without)]

    @property
    def folder(self) -> Path:
        """Where results go: benchmarks/results/<gpu> unless the caller says otherwise."""
        return self.out or Path(__file__).parent / "results" / device_name(self.device)


def device_name(device: str) -> str:
    """The short name of a device: "NVIDIA H200" is h200."""
    if torch.device(device).type != "cuda":
        return torch.device(device).type
    name = torch.cuda.get_device_name(device).lower().removeprefix("nvidia").strip()
    return re.sub(r"[^a-z0-9]+", "-", name)


def say(text: str) -> None:
    """Progress, on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def progress(suite: str, number: int, count: int, what: str) -> None:
    """A bar of what is done, `number` being under way."""
    done = 20 * (number - 1) // count
    say(f"{suite} [{'#' * done}{'.' * (20 - done)}] {number}/{count} {what}")


def reason(error: Exception, caught: list[warnings.WarningMessage]) -> str:
    """Why a provider could not run, on one line; SDPA says it in warnings."""
    text = str(error) or type(error).__name__
    if "No available kernel" in text or "No viable backend" in text:
        said = dict.fromkeys(str(w.message).partition(" (Triggered")[0] for w in caught)
        why = [line for line in said if line and not line.endswith("kernel not used because:")]
        text = "; ".join([text, *why])
    return re.sub(r"\s+", " ", text)[:300]


class Run:
    """One suite on one device: `rows` and `ratios` are what it measured."""

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options
        self.device = torch.device(options.device)
        self.environment = environment(self.device)
        self.table = Table(options.folder / f"{name}.csv", COLUMNS)
        self.ratio_table = Table(options.folder / f"{name}_ratios.csv", RATIO_COLUMNS)
        self.rows: list[Row] = []
        self.ratios: list[Row] = []

    def __call__(self) -> None:
        options = self.options
        groups = suite(
            self.name,
            dtype=options.dtype,
            quick=options.quick,
            pattern=options.pattern,
            tiny=self.device.type != "cuda",
        )
        if not groups:
            say(f"{self.name} has no case that {options.pattern!r} matches")
        for number, group in enumerate(groups, 1):
            names = ", ".join(shape.name for shape in group.shapes)
            progress(self.name, number, len(groups), f"{group.shapes[0].direction}: {names}")
            self.group(group)
        self.table.compact()
        self.ratio_table.compact()
        print(console(self.rows, self.ratios), flush=True)

    def group(self, group: Group) -> None:
        """Check and time every provider on every shape of the group, in the same rounds."""
        entries = []
        for shape in group.shapes:
            entries += self.entries(shape, self.options.names(group))
        timing.interleave(entries, self.options.rounds, self.options.window_ms, self.device)
        for entry in entries:
            self.write(entry, entry.ms)
        self.compare(entries)

    def entries(self, shape: Shape, names: list[str]) -> list[Entry]:
        """The providers that can run the shape and are right on it."""
        samples = self.samples(shape)
        reference = check.Reference(shape, samples[0])
        entries = []
        for name in names:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    provider = providers.make(name, shape, samples[0].inputs)
                    if not self.right(shape, provider, samples[0], reference):
                        continue
                    entry = timing.entry(shape, provider, samples)
                    entry.peak_mib = timing.peak_mib(entry, self.device)
                    entries.append(entry)
                except Exception as error:
                    self.refuse(shape, providers.label(name), reason(error, caught))
                    if self.device.type == "cuda":
                        # Nothing after a fault of the device can be trusted: this raises then.
                        torch.cuda.synchronize(self.device)
        return entries

    def samples(self, shape: Shape) -> list[data.Sample]:
        needs_grad = shape.direction != "forward"
        first = data.make(shape, self.device, 0, needs_grad)
        count = timing.sample_count(first, self.device)
        return [
            first,
            *(data.make(shape, self.device, 10 * i, needs_grad) for i in range(1, count)),
        ]

    def right(self, shape: Shape, provider: Provider, sample: data.Sample, reference: check.Reference) -> bool:
        """Whether the provider's results are within their bounds; notes the errors."""
        errors = reference.errors(check.results(provider, shape, sample))
        for name, error in errors.items():
            self.note(shape, provider.label, kind="error", versus=name, value=f"{error:.3e}")
        ours = provider.label.startswith("torch_flash2")
        complaints = reference.complaints(errors, 1.0 if ours else check.PEER_SLACK)
        if complaints:
            self.refuse(shape, provider.label, "wrong: " + "; ".join(complaints))
        return not complaints

    def compare(self, entries: list[Entry]) -> None:
        """Ratios of the same rounds: each other provider to ours, and each feature to its base."""
        for entry in entries:
            for other in entries:
                ours = entry.label.startswith("torch_flash2") or entry is entries[0]
                if ours and other.shape is entry.shape and other is not entry:
                    ratio = Ratio.of(other.times, entry.times)
                    self.note_ratio(entry, "speed", other.label, ratio)
                if other.label == entry.label and other.shape.name == entry.shape.base:
                    ratio = Ratio.of(entry.times, other.times)
                    self.note_ratio(entry, "cost", other.shape.name, ratio)

    def note_ratio(self, entry: Entry, kind: str, versus: str, ratio: Ratio) -> None:
        numbers = {k: f"{v:.3f}" for k, v in dataclasses.asdict(ratio).items()}
        self.note(entry.shape, entry.label, kind=kind, versus=versus, **numbers)

    def refuse(self, shape: Shape, label: str, why: str) -> None:
        say(f"  {label} on {shape.name} ({shape.direction}): {why}")
        self.note(shape, label, kind="refused", note=why)

    def note(self, shape: Shape, label: str, **fields: str) -> None:
        row = {**self.environment, **self.identity(shape, label), **fields}
        row = {name: row.get(name, "") for name in RATIO_COLUMNS}
        self.ratios.append(row)
        self.ratio_table.append(row)

    def write(self, entry: Entry, ms: float) -> None:
        row = {
            "ms": f"{ms:.4f}",
            "tflops": f"{entry.flops / ms / 1e9:.4g}",
            "gbps": f"{entry.bytes / ms / 1e6:.4g}",
        }
        if entry.peak_mib is not None:
            row["peak_mib"] = f"{entry.peak_mib:.1f}"
        self.append(entry.shape, entry.label, row)

    def append(self, shape: Shape, label: str, fields: Row) -> None:
        row = {**self.environment, **self.identity(shape, label), **fields}
        row = {name: row.get(name, "") for name in COLUMNS}
        self.rows.append(row)
        self.table.append(row)

    def identity(self, shape: Shape, label: str) -> Row:
        return {
            "suite": self.name,
            "case": shape.name,
            "direction": shape.direction,
            "dtype": shape.case.dtype,
            "head_dim": str(shape.case.head_dim),
            "causal": str(int(shape.causal)),
            "seqlen": str(shape.case.seqlen_q),
            "provider": label,
        }


class MemoryRun(Run):
    """Peak memory of a forward and a backward, over the sequence length.

    Where PyTorch's math does not fit, its row is an estimate: provider "math:estimate", no time.
    """

    def group(self, group: Group) -> None:
        (shape,) = group.shapes
        sample = data.make(shape, self.device, 0, True)
        estimate = math_bytes(shape) / 2**20
        for name in self.options.names(group):
            if name == "math" and not self.fits(estimate):
                say(f"  math on {shape.name} would take {estimate:.0f} MiB: not run")
                self.estimate(shape, estimate)
                continue
            with warnings.catch_warnings(record=True) as caught:
                try:
                    provider = providers.make(name, shape, sample.inputs)
                    entry = timing.entry(shape, provider, [sample])
                    entry.peak_mib = timing.peak_mib(entry, self.device)
                    self.write(entry, timing.window(entry, 1, self.device))
                except (RuntimeError, RefusedError) as error:
                    self.refuse(shape, providers.label(name), reason(error, caught))
                    if name == "math":
                        self.estimate(shape, estimate)

    def estimate(self, shape: Shape, mib: float) -> None:
        self.append(shape, "math:estimate", {"peak_mib": f"{mib:.1f}"})

    def fits(self, mib: float) -> bool:
        if self.device.type != "cuda":
            return True
        torch.cuda.empty_cache()
        return mib * 2**20 < 0.9 * torch.cuda.mem_get_info(self.device)[0]


def math_bytes(shape: Shape) -> int:
    """What math holds at its peak, in softmax's backward: P, dP and dS, [B, H, S, S] in fp32."""
    case = shape.case
    return 3 * 4 * case.batch * case.heads * case.seqlen_q * case.seqlen_k


def run(suites: list[str], options: Options) -> None:
    """Run suites one after the other.

    Raises:
        ValueError: a suite or provider has no such name.
    """
    # An attn_implementation of the train suite is no provider.
    if not set(suites) <= set(MODULES):
        for provider in (*options.ours, *(options.against or ())):
            providers.label(provider)
    for name in suites:
        if name in MODULES:
            importlib.import_module(f".{name}", __package__).run(options)
        else:
            _kind(name)(name, options)()


def _kind(name: str) -> type[Run]:
    if name == "decode":
        from .decode import DecodeRun

        return DecodeRun
    return MemoryRun if name == "memory" else Run
