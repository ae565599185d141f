"""Few query rows beside many keys, as in chunks of a long prompt or heads shared out among GPUs: `--suite few`.

The time is the GPU's: a CUDA graph of several calls is replayed, since the host would take longer than most of them. A
causal mask only where rows are as many as keys, so that all peers count the same. It appends to
benchmarks/results/<gpu>/few.csv.

B batch, H query heads, G key/value heads, M query rows, N keys, D head dim.
"""

from __future__ import annotations

import torch

from torch_flash2.testing import Case

from . import data, providers
from .results import COLUMNS, Row, Table, environment
from .runner import Options, progress
from .suites import Shape
from .timing import Entry, interleave, replayed

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
    Case("512-h32", 1, 32, 32, 512, 512, 128, 128, layout="bshd"),
    Case("1k-h16-causal", 1, 16, 16, 1024, 1024, 128, 128, mask="causal", layout="bshd"),
    Case("1k-h32-causal", 1, 32, 8, 1024, 1024, 128, 128, mask="causal", layout="bshd"),
    Case("2k-h16-causal", 1, 16, 16, 2048, 2048, 128, 128, mask="causal", layout="bshd"),
    Case("d64-1k-h16-causal", 1, 16, 16, 1024, 1024, 64, 64, mask="causal", layout="bshd"),
)
PROVIDERS = ("torch_flash2", "torch_flash2:triton", "fa3", "cudnn", "fa2")
CALLS = 8


def run(options: Options) -> None:
    """Every case with every provider, in the same rounds."""
    device = torch.device(options.device)
    table = Table(options.folder / "few.csv", COLUMNS)
    same: Row = environment(device) | {"suite": "few", "direction": "forward", "dtype": "bf16"}
    for number, case in enumerate(CASES, 1):
        progress("few", number, len(CASES), case.name)
        shape = Shape(case, "forward")
        if device.type != "cuda":
            shape = shape.tiny()
        sample = data.make(shape, device, 0, False)
        entries = []
        for name in PROVIDERS if device.type == "cuda" else PROVIDERS[:1]:
            try:
                entries.append(entry(shape, providers.make(name, shape, sample.inputs), sample))
            except (providers.RefusedError, ImportError) as error:
                print(f"{case.name}: not {name}: {error}", flush=True)
        interleave(entries, options.rounds, options.window_ms, device)
        causal = {"causal": str(int(case.mask == "causal"))}
        sizes = causal | {"head_dim": str(case.head_dim), "seqlen": str(case.seqlen_k), "case": case.name}
        for each in entries:
            ms, low, high = (time / CALLS for time in (each.ms, min(each.times), max(each.times)))
            row = {"provider": each.label, "ms": f"{ms:.4f}", "tflops": f"{each.flops / each.ms / 1e9:.0f}"}
            table.append(same | sizes | row)
            print(f"{case.name} {each.label}: {ms * 1e3:.1f} us [{low * 1e3:.1f}, {high * 1e3:.1f}]", flush=True)
    table.compact()


def entry(shape: Shape, provider: providers.Provider, sample: data.Sample) -> Entry:
    """CALLS forwards of a provider."""

    def calls() -> None:
        for _ in range(CALLS):
            provider.call(sample.inputs)

    with torch.no_grad(), provider.context():
        step = replayed(calls, sample.inputs.query.device)
    return Entry(shape, provider.label, torch.no_grad()(step), provider.context, CALLS * sample.flops("forward"), 0)
