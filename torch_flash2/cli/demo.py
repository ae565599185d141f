"""demo: a small byte-level GPT in plain PyTorch, trained twice on real text from one seed.

Once with math attention, written out in PyTorch, and once with this library.

B batch, H heads, M bytes of context, D head dim, C model width (H * D).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import math
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import torch_flash2

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
EVALUATIONS = 10  # of the held out text, in one run
SAMPLED = 400  # bytes


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and how it is trained."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    steps: int
    learning_rate: float


SIZES = {
    "small": Size(4, 128, 4, 128, 8, 700, 3e-3),
    "medium": Size(12, 768, 12, 2048, 8, 300, 1e-3),
    "large": Size(24, 2048, 16, 4096, 1, 100, 3e-4),
}


class Run(NamedTuple):
    """What one training left behind; losses are in nats a byte.

    `losses` has one a step, `held_out` pairs of step and loss; `seconds` are those of the steps.
    """

    name: str
    losses: list[float]
    held_out: list[tuple[int, float]]
    seconds: float
    tokens_per_second: float
    model: GPT

    @property
    def final(self) -> float:
        """The mean training loss of the last twentieth: that of one batch is noisy."""
        last = self.losses[-max(len(self.losses) // 20, 1) :]
        return sum(last) / len(last)


def math_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention as the formula says it, on [B, H, M, D]."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])  # [B, H, M, M]
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ value


def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same by this library."""
    out = torch_flash2.attention(query, key, value, mask="causal")
    assert isinstance(out, Tensor)
    return out


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and added to what came in."""

    def __init__(self, size: Size, attention: Attention) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention = attention
        self.attention_norm = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.attention_out = nn.Linear(size.width, size.width)
        self.mlp_norm = nn.LayerNorm(size.width)
        self.mlp_in = nn.Linear(size.width, 4 * size.width)
        self.mlp_out = nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        B, M, C = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(B, M, 3, self.heads, C // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, M, D]
        mixed = self.attention(query, key, value).transpose(1, 2).reshape(B, M, C)
        x = x + self.attention_out(mixed)
        return x + self.mlp_out(functional.gelu(self.mlp_in(self.mlp_norm(x))))


class GPT(nn.Module):
    """Bytes to the logits of the next byte; the output layer is the embedding itself."""

    def __init__(self, size: Size, attention: Attention) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size, attention) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Layers that add to the residual stream start smaller, the more of them there are.
                depth = math.sqrt(2 * size.layers) if name.endswith("out.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / depth)

    def forward(self, text: Tensor) -> Tensor:
        """Logits [B, M, 256] of the byte after each of text, int64 [B, M]."""
        x = self.bytes(text) + self.positions.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.bytes.weight)


class Progress:
    """A bar on stderr; where that is no terminal, a line for each tenth."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.terminal = sys.stderr.isatty()

    def update(self, done: int, text: str) -> None:
        filled = 24 * done // self.total
        bar = "#" * filled + "." * (24 - filled)
        line = f"{self.title:<12} [{bar}] {done}/{self.total}  {text}"
        if self.terminal:
            print(
                f"\r{line}\x1b[K",
                end="\n" if done == self.total else "",
                file=sys.stderr,
                flush=True,
            )
        elif done == self.total or done * 10 // self.total > (done - 1) * 10 // self.total:
            print(line, file=sys.stderr, flush=True)


def read_text(path: Path | None, least: int) -> Tensor:
    """The bytes to learn, uint8: a file, or the sources of Python's own standard library.

    Raises:
        ValueError: there are fewer than `least` bytes.
    """
    sources = [path] if path else sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(source.read_bytes() for source in sources)
    if len(text) < least:
        where = path or "the standard library's sources"
        raise ValueError(
            f"the text must have at least {least} bytes, got {len(text)} from {where}; --text FILE names another"
        )
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batches(text: Tensor, size: Size, count: int, seed: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Random windows of the text and the same moved on by one byte, int64 [B, M]."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(text) - size.context, (size.batch, 1), generator=generator)
        windows = text[starts + torch.arange(size.context + 1)].long().to(device)
        yield windows[:, :-1], windows[:, 1:]


def precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bf16 products on a GPU, fp32 on a CPU."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def loss_of(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """The mean loss in nats a byte."""
    with precision(inputs.device):
        logits = model(inputs)
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def evaluate(model: GPT, text: Tensor, size: Size, device: torch.device) -> float:
    """The loss on fixed windows of the held out text."""
    losses = [loss_of(model, *batch).item() for batch in batches(text, size, 4, 0, device)]
    return sum(losses) / len(losses)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A linear warm-up over a tenth of the steps, then a cosine down to a tenth of the peak."""
    warm_up = max(steps // 10, 1)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = (step - warm_up) / max(steps - warm_up, 1)
    return peak * (0.55 + 0.45 * math.cos(math.pi * done))


def train(
    name: str,
    attention: Attention,
    text: tuple[Tensor, Tensor],
    size: Size,
    seed: int,
    device: torch.device,
) -> Run:
    """Train a fresh model on text[0]; text[1] is held out."""
    torch.manual_seed(seed)
    model = GPT(size, attention).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    losses: list[float] = []
    held_out: list[tuple[int, float]] = []
    progress = Progress(name, size.steps)
    seconds = first = 0.0
    for step, (inputs, targets) in enumerate(batches(text[0], size, size.steps, seed, device)):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, size.steps, size.learning_rate)
        loss = loss_of(model, inputs, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start
        # The first step compiles kernels: it counts as time, not as speed.
        first = first or seconds
        done = step + 1
        if done % max(size.steps // EVALUATIONS, 1) == 0 or done == size.steps:
            held_out.append((done, evaluate(model, text[1], size, device)))
        rate = (size.batch * size.context * max(step, 1)) / (seconds - first or seconds)
        progress.update(done, f"loss {losses[-1]:.3f}  {rate:,.0f} tokens/s")
    optimizer.zero_grad(set_to_none=True)
    return Run(name, losses, held_out, seconds, rate, model)


@torch.no_grad()
def sample(model: GPT, prompt: str, size: Size, seed: int, device: torch.device) -> str:
    """The prompt and what the model makes of it."""
    generator = torch.Generator(device).manual_seed(seed)
    text = list(prompt.encode())
    while len(text) < SAMPLED:
        seen = text[-size.context :]
        # One shape throughout: no byte sees what comes after it, so the rest may hold anything.
        window = seen + [0] * (size.context - len(seen))
        with precision(device):
            logits = model(torch.tensor([window], device=device))[0, len(seen) - 1]
        probabilities = (logits.float() / 0.9).softmax(0)
        text.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return bytes(text).decode("utf-8", errors="replace")


def save_curves(runs: list[Run], out: Path) -> Path:
    """Draw the loss curves; without matplotlib write them as CSV. Returns the path written."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed (pip install matplotlib draws the curves); writing CSV")
        out = out.with_suffix(".csv")
        with out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", *(run.name for run in runs)])
            losses = zip(*(run.losses for run in runs), strict=True)
            writer.writerows([step, *row] for step, row in enumerate(losses, 1))
        return out
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    styles = (("-", "o", "tab:blue"), ("--", "x", "tab:orange"))
    for run, (line, marker, color) in zip(runs, styles, strict=False):
        label = f"{run.name}: {run.final:.3f} in {run.seconds:.0f} s"
        axes.plot(range(1, len(run.losses) + 1), run.losses, line, color=color, alpha=0.6, label=label)
        label = f"held out: {run.held_out[-1][1]:.3f}"
        checks = [step for step, _ in run.held_out]
        held_out = [loss for _, loss in run.held_out]
        axes.plot(checks, held_out, marker, fillstyle="none", color="black", zorder=3, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per byte)")
    axes.set_title("A GPT trained twice from one seed")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=120)
    return out


def why(size: Size, device: torch.device) -> str:
    """Which kernel runs the model's attention, and why."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (size.batch, size.context, 3, size.heads, size.width // size.heads)
    query, key, value = torch.empty(shape, dtype=dtype, device=device).permute(2, 0, 3, 1, 4)
    return str(torch_flash2.explain(query, key, value, mask="causal", needs_grad=True))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, help="by default small, on a GPU medium")
    parser.add_argument("--steps", type=int, help="training steps of each of the two runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="a file to learn instead of Python's sources")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="where the curves go")


def main(arguments: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = SIZES[arguments.size or ("medium" if device.type == "cuda" else "small")]
    if arguments.steps is not None:
        if arguments.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {arguments.steps}")
        size = dataclasses.replace(size, steps=arguments.steps)
    text = read_text(arguments.text, 40 * (size.context + 1))
    split = len(text) - len(text) // 20
    parts = text[:split], text[split:]
    print(
        f"{size.layers} layers, width {size.width}, {size.heads} heads, context {size.context}, "
        f"batch {size.batch}, {size.steps} steps on {device.type}; "
        f"{len(text):,} bytes of text, the last twentieth held out\n"
    )
    print(f"{why(size, device)}\n", flush=True)
    runs: list[Run] = []
    for name, attention in (("math", math_attention), ("torch_flash2", flash_attention)):
        try:
            runs.append(train(name, attention, parts, size, arguments.seed, device))
        except torch.OutOfMemoryError:
            print(f"{name}: the GPU's memory is not enough for it", flush=True)
    if not runs:
        return 1
    print(f"\n{'':<14}{'train loss':>12}{'held out':>10}{'time':>10}{'tokens/s':>12}")
    for run in runs:
        row = f"{run.name:<14}{run.final:>12.4f}{run.held_out[-1][1]:>10.4f}"
        print(f"{row}{run.seconds:>8.1f} s{run.tokens_per_second:>12,.0f}")
    if len(runs) == 2:
        apart = max(abs(a - b) for a, b in zip(runs[0].losses, runs[1].losses, strict=True))
        print(f"the two training losses are at most {apart:.1e} apart")
    print(f"curves: {save_curves(runs, arguments.out)}\n")
    print(f"a sample of {runs[-1].name}:")
    print(sample(runs[-1].model, "def __init__(self", size, arguments.seed, device))
    return 0
