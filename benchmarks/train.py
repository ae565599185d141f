"""Training: steps of transformers' Gemma2, each attn_implementation beside the others, and a GPT: `--suite train`.

gpt.py has the GPT; `--filter gemma2`, `--filter gpt-1.3b` and `--filter gpt-49m` choose one part. Gemma2's shapes are
those of Gemma2-2B (hidden 2304, 8 query heads on 4, head dim 256, softcap 50, window 4096), with fewer layers and a
smaller vocabulary, so that eager's scores fit; weights are random. Loss and gradients are checked before they are
timed. It appends to benchmarks/results/<gpu>/train.csv.
"""

from __future__ import annotations

import copy
import os
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import torch_flash2

from . import gpt
from .gpt import error
from .results import COLUMNS, Row, Table, environment
from .runner import Options, progress, say

IMPLEMENTATIONS = ("torch_flash2", "eager", "sdpa", "flex_attention")


def model_of(layers: int, device: torch.device, tiny: bool) -> Any:
    """A Gemma2 with random weights in bf16."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes: dict[str, int] = dict(hidden_size=2304)
    if tiny:
        sizes = dict(hidden_size=64, intermediate_size=96, head_dim=32, sliding_window=48)
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


def results(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The loss, and the gradient of every parameter."""
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return found


def time_of(step: Callable[[], None], device: torch.device) -> float:
    """Milliseconds of a step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def run(options: Options) -> None:
    """Every part whose name the filter finds."""
    for name, part in {"gemma2": gemma2, "gpt-1.3b": gpt.speed, "gpt-49m": gpt.curves}.items():
        if re.search(options.pattern, name):
            part(options)


def gemma2(options: Options) -> None:
    """All implementations, in the same rounds, once each is within twice eager's own error against fp32."""
    device = torch.device(options.device)
    tiny = device.type != "cuda"
    layers, seqlen = (2, 128) if tiny else (4, 8192)
    peers = IMPLEMENTATIONS[1:] if options.against is None else options.against
    names = [IMPLEMENTATIONS[0], *(re.sub("^flex$", "flex_attention", name) for name in peers)]
    try:
        torch_flash2.transformers.register()
    except ImportError as absent:
        say(f"gemma2 is not measured: {absent}")
        return
    torch.manual_seed(0)
    model = model_of(layers, device, tiny)
    tokens = torch.randint(16384, (1, seqlen), device=device)

    exact = copy.deepcopy(model).float()
    wanted = results(exact, tokens)
    del exact
    allowed = [2 * value + 2**-9 for value in error(results(model, tokens), wanted)]
    peaks: dict[str, float] = {}
    for number, name in enumerate(names, 1):
        progress("train", number, len(names), name)
        try:
            model.set_attn_implementation(name)
            found = error(results(model, tokens), wanted)
        except (RuntimeError, ValueError, ImportError) as refusal:
            # "sdpa" has no softcap, and says so or not.
            say(f"  refused: {str(refusal).splitlines()[0][:100]}")
            model.zero_grad(set_to_none=True)
            continue
        if any(a > b for a, b in zip(found, allowed, strict=True)):
            say(f"  wrong: errors of loss and gradients {found}, allowed are {allowed}")
            continue
        peaks[name] = peak_mib(step_of(model, tokens), device)

    times: dict[str, list[float]] = {name: [] for name in peaks}
    for _ in range(options.rounds):
        for name, taken in times.items():
            model.set_attn_implementation(name)
            taken.append(time_of(step_of(model, tokens), device))
    table = Table(options.folder / "train.csv", COLUMNS)
    ours = statistics.median(times.get(IMPLEMENTATIONS[0], [float("nan")]))
    for name, taken in times.items():
        ms = statistics.median(taken)
        row: Row = environment(device) | {
            "suite": "train", "case": f"gemma2-l{layers}-s{seqlen}", "direction": "both", "dtype": "bf16",
            "head_dim": "256", "causal": "1", "seqlen": str(seqlen), "provider": name, "ms": f"{ms:.3f}",
            "peak_mib": f"{peaks[name]:.1f}",
        }  # fmt: skip
        table.append(row)
        print(f"{name}: {ms:.1f} ms, {ms / ours:.2f}x ours, peak {peaks[name]:.0f} MiB", flush=True)
    table.compact()


def peak_mib(step: Callable[[], None], device: torch.device) -> float:
    """The most memory that a step holds, the model included; 0 where nobody counts it."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) / 2**20
