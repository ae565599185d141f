"""PyTorch's context_parallel on all GPUs against one: `--suite context_parallel`.

Causal attention of 64k tokens, 32 query heads on 8, head dim 128, bf16: forward and backward of one process, and of one
process a GPU with the sequence balanced among them, keys going round by all-to-all or gathered; the same with PyTorch's
own kernels. Results are checked before they are timed. It appends to benchmarks/results/<gpu>/context_parallel.csv.

H query heads, G key/value heads, S rows and keys of the whole sequence, D head dim.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import torch_flash2
from torch_flash2.frontends import context_parallel as frontend

from .results import COLUMNS, Row, Table, environment
from .runner import Options, say

ROTATIONS = ("alltoall", "allgather")
Tensors = list[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Size:
    """What is attended to."""

    S: int = 65536
    H: int = 32
    G: int = 8
    D: int = 128

    @property
    def flops(self) -> float:
        """Of a causal forward and backward."""
        return 3.5 * 4 * self.H * self.D * self.S * (self.S + 1) / 2


def inputs_of(size: Size, device: torch.device) -> Tensors:
    """query, key, value and the gradient that arrives, each [1, heads, S, D], the same in every process."""
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for heads in (size.H, size.G, size.G, size.H):
        tensor = torch.randn(1, heads, size.S, size.D, device=device, dtype=torch.bfloat16, generator=generator)
        dist.broadcast(tensor, 0)
        made.append(tensor)
    return made


def step(tensors: Tensors, attend: Callable[..., torch.Tensor]) -> Tensors:
    """Output, and gradients of query, key and value."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch_flash2.attention(query, key, value, "causal")
    return out


def stock(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    # context_parallel replaces the function in this place.
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def exact(tensors: Tensors, rows: int) -> Tensors:
    """`step` of the first key head and its query heads in fp32, `rows` rows at a time."""
    group = tensors[0].shape[1] // tensors[1].shape[1]
    query, grad_out = (tensors[i][0, :group].float() for i in (0, 3))
    key, value = (tensors[i][0, :1].float() for i in (1, 2))
    found = [torch.zeros_like(tensor) for tensor in (query, query, key, value)]
    scale = query.shape[2] ** -0.5
    for first in range(0, query.shape[1], rows):
        here, seen = slice(first, first + rows), slice(0, min(first + rows, query.shape[1]))
        q, do, k, v = query[:, here], grad_out[:, here], key[:, seen], value[:, seen]
        scores = (q @ k.mT).mul_(scale)
        scores[:, :, first:] += torch.full_like(scores[0, :, first:], -torch.inf).triu_(1)
        P = scores.softmax(-1)
        found[0][:, here] = P @ v
        found[3][:, seen] += (P.mT @ do).sum(0, keepdim=True)
        dP = do @ v.mT
        dS = P.mul_(dP.sub_((do * found[0][:, here]).sum(-1, keepdim=True)))
        found[1][:, here] = (dS @ k).mul_(scale)
        found[2][:, seen] += (dS.mT @ q).sum(0, keepdim=True).mul_(scale)
    return found


def errors(found: Tensors, wanted: Tensors) -> list[float]:
    """The largest error of each result over its largest value, in the heads that `wanted` has."""
    return [
        float((a[0, : e.shape[0]].float() - e).abs().max() / e.abs().max()) for a, e in zip(found, wanted, strict=True)
    ]


@contextlib.contextmanager
def sharded(mesh: Any, whole: Tensors, rotation: str) -> Iterator[Tensors]:
    """This process's part of every tensor, inside a context_parallel that is balanced for a causal mask."""
    from torch.distributed.tensor.experimental import _attention, context_parallel

    _attention.set_rotate_method(rotation)
    parts = [tensor.clone() for tensor in whole]
    with context_parallel(mesh, buffers=parts, buffer_seq_dims=[2] * len(parts), no_restore_buffers=set(parts)):
        yield parts


def time_of(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Milliseconds a call of the slowest process, after one that is not counted."""
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    spent = torch.tensor((time.perf_counter() - start) * 1e3 / calls, device=device)
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return float(spent)


class Way(NamedTuple):
    """Kernels, and how many processes share the sequence: one, or `world` whose keys go round by a rotation."""

    name: str
    world: int = 1
    rotation: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} x{self.world} {self.rotation}".rstrip()

    @contextlib.contextmanager
    def ready(self, mesh: Any, whole: Tensors) -> Iterator[Callable[[], Tensors]]:
        """A step of this process."""
        if not self.rotation:
            yield lambda: step(whole, ours if self.name == "torch_flash2" else stock)
            return
        frontend.enable() if self.name == "torch_flash2" else frontend.disable()
        with sharded(mesh, whole, self.rotation) as parts:
            yield lambda: step(parts, stock)

    def once(self, mesh: Any, whole: Tensors) -> Tensors:
        """The whole results of a step."""
        with self.ready(mesh, whole) as run:
            return joined(mesh, run()) if self.rotation else run()

    def time(self, mesh: Any, whole: Tensors, rank: int) -> float:
        """Milliseconds of a step; while one process works alone, the others wait with idle GPUs."""
        with self.ready(mesh, whole) as run:
            idle = not self.rotation and rank > 0
            return time_of((lambda: None) if idle else run, 3, whole[0].device)


def work(rank: int, world: int, meet: str, device_type: str, size: Size, rounds: int, folder: Path) -> None:
    """One process: check, then time every way in every round. The first one writes."""
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo", init_method=f"file://{meet}", rank=rank, world_size=world
    )
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    mesh = dist.device_mesh.init_device_mesh(device_type, (world,))
    whole = inputs_of(size, device)
    wanted = exact(whole, 2048)
    allowed = [2 * error + 2**-9 for error in errors(step(whole, stock), wanted)]
    times: dict[str, list[float]] = {}
    alone = [Way("torch_flash2"), Way("sdpa")]
    rings = [[Way(name, world, rotation) for rotation in ROTATIONS] for name in ("torch_flash2", "sdpa")]
    # PyTorch's own rings come last, and have no CPU: what they might break is measured then.
    for ways in [[*alone, *rings[0]], *([rings[1]] if device_type == "cuda" else [])]:
        for way in ways:
            check(way.label, way.once(mesh, whole), wanted, allowed, rank)
        for _ in range(rounds):
            for way in ways:
                times.setdefault(way.label, []).append(way.time(mesh, whole, rank))
        if rank == 0:
            write({label: statistics.median(ms) for label, ms in times.items()}, size, world, device, folder)
    dist.barrier()
    # gloo's threads now and then abort a process that takes itself apart.
    os._exit(0)


def joined(mesh: Any, parts: Tensors) -> Tensors:
    """The whole tensors, in order again."""
    from torch.distributed.tensor.experimental._attention import context_parallel_unshard

    found: Tensors = context_parallel_unshard(mesh, parts, [2] * len(parts))
    return found


def check(label: str, found: Tensors, wanted: Tensors, allowed: list[float], rank: int) -> None:
    """
    Raises:
        RuntimeError: an error is larger than twice that of PyTorch's kernel in one process.
    """
    measured = errors(found, wanted)
    if rank == 0:
        say(f"{label}: errors " + ", ".join(f"{a:.1e} (of {b:.1e})" for a, b in zip(measured, allowed, strict=True)))
    if not all(a <= b for a, b in zip(measured, allowed, strict=True)):
        raise RuntimeError(f"{label} is wrong: errors of out, dQ, dK, dV {measured}, allowed are {allowed}")


def write(medians: dict[str, float], size: Size, world: int, device: torch.device, folder: Path) -> None:
    table = Table(folder / "context_parallel.csv", COLUMNS)
    same: Row = environment(device) | {
        "suite": "context_parallel", "case": f"causal-s{size.S}-h{size.H}-{size.G}-x{world}", "direction": "both",
        "dtype": "bf16", "head_dim": str(size.D), "causal": "1", "seqlen": str(size.S),
    }  # fmt: skip
    for label, ms in medians.items():
        table.append(same | {"provider": label, "ms": f"{ms:.3f}", "tflops": f"{size.flops / ms / 1e9:.4g}"})
        alone = medians[f"{label.partition(' ')[0]} x1"]
        print(f"{label}: {ms:.2f} ms, {size.flops / ms / 1e9:.0f} TF, {alone / ms:.2f}x of one", flush=True)
    table.compact()


def run(options: Options) -> None:
    """All of it, in a process for each GPU, or two on the CPU."""
    device_type = torch.device(options.device).type
    world, size = (torch.cuda.device_count(), Size()) if device_type == "cuda" else (2, Size(256, 4, 2, 32))
    # Multicast over NVLink is not to be had everywhere.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    with tempfile.TemporaryDirectory() as meet:
        arguments = (world, f"{meet}/meet", device_type, size, options.rounds, options.folder)
        torch.multiprocessing.spawn(work, arguments, world)
