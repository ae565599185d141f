"""Training steps of transformers' Gemma2, each attn_implementation beside the others: `python -m benchmarks.train`.

The shapes are Gemma2-2B's (hidden 2304, 8 query heads on 4, head dim 256, softcap 50, window 4096), with fewer layers
and a smaller vocabulary, so that eager's scores fit; weights are random. It appends to
benchmarks/results/<gpu>/train.csv.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import torch_flash2

from .results import COLUMNS, Row, Table, environment
from .runner import device_name

IMPLEMENTATIONS = ("torch_flash2", "eager", "sdpa", "flex_attention")


def model_of(layers: int, device: torch.device, tiny: bool) -> Any:
    """A Gemma2 with random weights in bf16."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=96, head_dim=32) if tiny else dict(hidden_size=2304)
    config = Gemma2Config(
        **sizes, vocab_size=16384, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=16384, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    return Gemma2ForCausalLM(config).to(device, torch.bfloat16).train()


def step_of(model: Any, tokens: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of one batch."""

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def time(step: Callable[[], None], rounds: int, device: torch.device) -> tuple[float, float]:
    """Median milliseconds of a step after two that are not counted, and the peak memory of one in MiB."""
    for _ in range(2):
        step()
    torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times), torch.cuda.max_memory_allocated(device) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.split("\n")[0])
    parser.add_argument("--against", default=",".join(IMPLEMENTATIONS[1:]), help="attn_implementations beside ours")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/<gpu>")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    folder = arguments.out or Path(__file__).parent / "results" / device_name("cuda")
    table = Table(folder / "train.csv", COLUMNS)
    torch_flash2.transformers.register()
    torch.manual_seed(0)
    model = model_of(arguments.layers, device, tiny=False)
    tokens = torch.randint(16384, (1, arguments.seqlen), device=device)
    ours = None
    for name in (IMPLEMENTATIONS[0], *filter(None, arguments.against.split(","))):
        try:
            model.set_attn_implementation(name)
            ms, peak = time(step_of(model, tokens), arguments.rounds, device)
        except (RuntimeError, ValueError) as error:
            # "sdpa" refuses softcap; eager may run out of memory.
            print(f"{name}: refused, {str(error).splitlines()[0][:100]}")
            model.zero_grad(set_to_none=True)
            continue
        ours = ours or ms
        row: Row = environment(device) | {
            "suite": "train", "case": f"gemma2-l{arguments.layers}-s{arguments.seqlen}", "direction": "both",
            "dtype": "bf16", "head_dim": "256", "causal": "1", "seqlen": str(arguments.seqlen), "provider": name,
            "ms": f"{ms:.3f}", "peak_mib": f"{peak:.1f}",
        }  # fmt: skip
        table.append(row)
        print(f"{name}: {ms:.1f} ms, {ms / ours:.2f}x ours, peak {peak:.0f} MiB", flush=True)
    table.compact()


if __name__ == "__main__":
    main()
