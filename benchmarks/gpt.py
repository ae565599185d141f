"""Training a GPT from nothing with each attention beside the others: part of `--suite train`.

The model is the demo's, plain PyTorch with compiled blocks, in bf16 by autocast; it learns the bytes of Python's own
standard library.

    gpt-1.3b    steps of 2 windows of 8k bytes in interleaved repeats: tokens a second, and the model's operations over
                the rate of a matrix product of the same run (train.csv, train_ratios.csv)
    gpt-49m     the same windows, 300 steps each from the same weights: the losses (loss.csv). "sdpa, nudged" starts
                with weights that differ by one rounding, and shows how far apart equal runs may drift

B windows, H heads, M bytes of a window, D head dim.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torch_flash2.cli import demo

from . import matrix, providers, report
from .results import COLUMNS, LOSS_COLUMNS, RATIO_COLUMNS, Row, Table, environment
from .runner import Options, progress, say
from .timing import Ratio

SIZES = {
    "gpt-1.3b": demo.Size(layers=26, width=2048, heads=16, context=8192, batch=2, steps=17, learning_rate=3e-4),
    "gpt-49m": demo.Size(layers=6, width=768, heads=6, context=8192, batch=2, steps=300, learning_rate=6e-4),
}
OURS, STOCK, NUDGED = "torch_flash2", "sdpa", "sdpa, nudged"
# Of the large model: the first steps, which compile, count for the losses alone.
WARM, REPEATS = 2, 3


def stock(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention as PyTorch selects it."""
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


@functools.cache
def fa3() -> demo.Attention:
    """Causal attention by FlashAttention-3, as an op that torch.compile keeps whole.

    Raises:
        RefusedError: it is not there.
    """
    providers.load_peer("fa3")
    peer = torch.ops.flash_attn_3

    @torch.library.custom_op(
        "torch_flash2_benchmarks::fa3", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)"
    )
    def forward(q: Any, k: Any, v: Any) -> Any:
        out, lse = peer.fwd(q, k, v, is_causal=True, num_splits=1)[:2]
        return out, lse

    @torch.library.custom_op(
        "torch_flash2_benchmarks::fa3_backward",
        mutates_args=(),
        schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor)",
    )
    def backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any) -> Any:
        scale = q.shape[-1] ** -0.5
        return tuple(peer.bwd(grad, q, k, v, out, lse, is_causal=True, softmax_scale=scale)[:3])

    forward.register_fake(
        lambda q, k, v: (torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32))
    )
    backward.register_fake(lambda grad, q, k, v, out, lse: tuple(map(torch.empty_like, (q, k, v))))

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, *output)

    forward.register_autograd(lambda ctx, grad, _: backward(grad, *ctx.saved_tensors), setup_context=save)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = forward(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))[0]
        return out.transpose(1, 2)

    return attention


ATTENTIONS: dict[str, Callable[[], demo.Attention]] = {
    OURS: lambda: demo.flash_attention, STOCK: lambda: stock, "fa3": fa3, NUDGED: lambda: stock
}  # fmt: skip


class Trainee:
    """A model, its optimizer and what it has lost so far."""

    def __init__(self, model: demo.GPT, size: demo.Size, attention: demo.Attention, device: torch.device) -> None:
        self.model, self.size, self.device = model, size, device
        self.losses: list[Tensor] = []
        for block in model.blocks:
            assert isinstance(block, demo.Block)
            block.attention = attention
            # One block's graph serves all: compiling takes seconds.
            block.compile(dynamic=False, backend="inductor" if device.type == "cuda" else "aot_eager")
        self.optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def gradients(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        """The loss, and the gradient of every parameter."""
        loss = demo.loss_of(self.model, inputs, targets)
        return [loss.detach(), *torch.autograd.grad(loss, list(self.model.parameters()))]

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """One step of training."""
        for group in self.optimizer.param_groups:
            group["lr"] = demo.learning_rate(len(self.losses), self.size.steps, self.size.learning_rate)
        loss = demo.loss_of(self.model, inputs, targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.detach())


def error(found: list[Tensor], wanted: list[Tensor]) -> tuple[float, float]:
    """Of the loss, and the norm of all gradients' errors over that of the gradients."""
    pairs = list(zip(found[1:], wanted[1:], strict=True))
    off = sum(float((a.float() - b).square().sum()) for a, b in pairs)
    whole = sum(float(b.square().sum()) for _, b in pairs)
    return float((found[0] - wanted[0]).abs() / wanted[0].abs()), (off / whole) ** 0.5


def operations(size: demo.Size) -> float:
    """Of a step of the model: three times its forward's products, of attention those of visible pairs."""
    tokens, pairs = size.batch * size.context, size.batch * size.context * (size.context + 1) / 2
    linear = 2.0 * tokens * size.width * (12 * size.width * size.layers + 256)
    return 3.0 * (linear + 4.0 * pairs * size.width * size.layers)


def of_options(options: Options, name: str) -> tuple[torch.device, demo.Size, list[str]]:
    """The device, the size, tiny on a CPU, and the attentions to compare, ours first."""
    device, size = torch.device(options.device), SIZES[name]
    if device.type != "cuda":
        size = demo.Size(2, 32, 2, 32, 2, 6, 1e-3)
    peers = (STOCK, "fa3") if options.against is None else options.against
    for peer in set(peers) - set(ATTENTIONS):
        say(f"  {peer} is not measured in a GPT's training")
    return device, size, [OURS, *(peer for peer in peers if peer in ATTENTIONS and peer not in options.without)]


def started(names: list[str], size: demo.Size, device: torch.device) -> dict[str, Trainee]:
    """The attentions whose gradients are within twice stock's own error against fp32, each ready to train.

    Raises:
        RuntimeError: there is none.
    """
    torch.manual_seed(0)
    with device:
        first = demo.GPT(size, stock)
    inputs, targets = next(demo.batches(demo.read_text(None, size.context + 1), size, 1, 1, device))
    logits = first(inputs)
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    wanted = [loss.detach(), *torch.autograd.grad(loss, list(first.parameters()))]
    del logits, loss
    found: dict[str, Trainee] = {}
    plain = demo.loss_of(first, inputs, targets)
    plain_error = error([plain.detach(), *torch.autograd.grad(plain, list(first.parameters()))], wanted)
    del plain
    for number, name in enumerate(names, 1):
        progress("train", number, len(names), name)
        try:
            trainee = Trainee(copy.deepcopy(first), size, ATTENTIONS[name](), device)
            off = error(trainee.gradients(inputs, targets), wanted)
        except (RuntimeError, providers.RefusedError) as refusal:
            say(f"  refused: {str(refusal).splitlines()[0][:200]}")
            continue
        allowed = [2 * value + 2**-9 for value in plain_error]
        if any(not a <= b for a, b in zip(off, allowed, strict=True)):
            say(f"  wrong: errors of loss and gradients {off}, allowed are {allowed}")
            continue
        found[name] = trainee
    if not found:
        raise RuntimeError("no attention was right: the lines above say why")
    return found


def speed(options: Options) -> None:
    """Tokens a second of the large model, with the losses of those steps."""
    name = "gpt-1.3b"
    device, size, names = of_options(options, name)
    trainees = started(names, size, device)
    text = demo.read_text(None, size.context + 1)
    steps, peaks = (size.steps - WARM) // REPEATS, {}
    for label, trainee in trainees.items():
        peaks[label] = 0.0
        before = _allocated(device)
        for batch in demo.batches(text, size, WARM, 2, device):
            trainee.step(*batch)
        if device.type == "cuda":
            peaks[label] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    times: dict[str, list[float]] = {label: [] for label in trainees}
    rates, order = [], list(trainees)
    for repeat in range(REPEATS):
        side = matrix.SIZE if device.type == "cuda" else 64
        rates.append(2e-9 * side**3 / float(matrix.measure(device, "bf16", side, 8)["ms"]))
        order = order[1:] + order[:1]
        for label in order:
            batches = list(demo.batches(text, size, steps, 3 + repeat, device))
            matrix.finish(device)
            start = time.perf_counter()
            for batch in batches:
                trainees[label].step(*batch)
            matrix.finish(device)
            times[label].append((time.perf_counter() - start) * 1e3 / steps)

    rate, tokens = statistics.median(rates), size.batch * size.context
    table = Table(options.folder / "train.csv", COLUMNS)
    ratios = Table(options.folder / "train_ratios.csv", RATIO_COLUMNS)
    case = f"{name}-b{size.batch}-s{size.context}"
    same: Row = environment(device) | {
        "suite": "train", "case": case, "direction": "both", "dtype": "bf16",
        "head_dim": str(size.width // size.heads), "causal": "1", "seqlen": str(size.context),
    }  # fmt: skip
    table.append(same | {"provider": "matmul", "tflops": f"{rate:.4g}"})
    for label, taken in times.items():
        ms = statistics.median(taken)
        tflops = operations(size) / ms / 1e9
        losses = [float(loss) for loss in trainees[label].losses]
        table.append(
            same | {"provider": label, "ms": f"{ms:.3f}", "tflops": f"{tflops:.4g}", "peak_mib": f"{peaks[label]:.1f}"}
        )
        shown = " ".join(f"{tokens / each * 1e3:,.0f}" for each in taken)
        print(
            f"{case} {label}: {shown} tokens/s, {tflops:.0f} TFLOP/s, MFU {tflops / rate:.3f} of {rate:.0f}", flush=True
        )
        print(f"  loss after {len(losses)} steps {losses[-1]:.4f}, peak of a step {peaks[label]:.0f} MiB", flush=True)
        if label != OURS and OURS in times:
            ratio = {k: f"{v:.3f}" for k, v in dataclasses.asdict(Ratio.of(taken, times[OURS])).items()}
            row = same | {"provider": OURS, "kind": "speed", "versus": label} | ratio
            ratios.append({column: row.get(column, "") for column in RATIO_COLUMNS})
            print(f"  torch_flash2 is {ratio['value']} [{ratio['low']}, {ratio['high']}] times as fast", flush=True)
    table.compact()
    ratios.compact()


def _allocated(device: torch.device) -> int:
    """Bytes that are held before a step, from which its peak counts."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def curves(options: Options) -> None:
    """The losses of the smaller model, whole runs from the same weights on the same windows."""
    name = "gpt-49m"
    device, size, names = of_options(options, name)
    trainees = started([*names, *([NUDGED] if STOCK in names else [])], size, device)
    text = demo.read_text(None, size.context + 1)
    table = Table(options.folder / "loss.csv", LOSS_COLUMNS)
    same = environment(device) | {"case": f"{name}-b{size.batch}-s{size.context}"}
    rows = []
    for number, (label, trainee) in enumerate(trainees.items(), 1):
        progress("loss", number, len(trainees), f"{size.steps} steps, {label}")
        if label == NUDGED:
            with torch.no_grad():
                for parameter in trainee.model.parameters():
                    parameter.mul_(1 + 2**-23)
        for batch in demo.batches(text, size, size.steps, 1, device):
            trainee.step(*batch)
        for step, loss in enumerate(trainee.losses, 1):
            rows.append(same | {"step": str(step), "provider": label, "loss": f"{float(loss):.5f}"})
    table.replace(rows)
    print(report.loss_table(rows), flush=True)
