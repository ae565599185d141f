"""DDP and FSDP2 around a model whose attention was taken over, and DTensors: two processes, gloo, nothing special.

B batch, S sequence length, C width.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo"
)
ROOT = Path(__file__).parents[1]

WORKER = """
import os, sys
import torch, torch.distributed as dist
import torch_flash2
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))

def model():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())

inputs = torch.randn(2, 3, 10, 32, generator=torch.Generator().manual_seed(1))
plain = model()
sum(plain(part).square().mean() / 2 for part in inputs).backward()
wanted = [p.grad for p in plain.parameters()]

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch_flash2.enable("strict", device_type="cpu")

def check(wrapped):
    torch_flash2.stats(reset=True)
    wrapped(inputs[rank]).square().mean().backward()
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in wrapped.parameters()]
    for found, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(found, want)
    assert torch_flash2.stats() == {"cpu": 2}, torch_flash2.stats()

check(nn.parallel.DistributedDataParallel(model()))
dist.barrier()

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

mesh = init_device_mesh("cpu", (2,))
sharded = model()
for block in sharded:
    fully_shard(block, mesh=mesh)
check(fully_shard(sharded, mesh=mesh))
del sharded
dist.barrier()

# PyTorch has no rule for its flash kernel on the CPU: its math it is.
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

def results():
    generator = torch.Generator().manual_seed(2)
    whole = [torch.randn(2, 4, 10, 8, generator=generator) for _ in range(3)]
    leaves = [distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in whole]
    with sdpa_kernel(SDPBackend.MATH):
        out = nn.functional.scaled_dot_product_attention(*leaves)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]

torch_flash2.stats(reset=True)
found = results()
assert torch_flash2.stats() == {"stock, untouched: a tensor subclass, DTensor": 1}, torch_flash2.stats()
torch_flash2.disable()
for one, other in zip(found, results(), strict=True):
    assert isinstance(one, DTensor) and one.placements == other.placements == (Shard(0),)
    assert torch.equal(one.to_local(), other.to_local())
dist.barrier()
dist.destroy_process_group()
# Threads of gloo in torch 2.11 may abort the process while Python ends it.
sys.stdout.flush()
os._exit(0)
"""


def test_two_processes(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store")],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    printed = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(printed)
