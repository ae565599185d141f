"""On a GPU: the named cases at full size, random crosses of features, and what only a GPU can show.

B batch, H query heads, M query rows, N keys, D head dim.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import multiprocessing
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import compile_all
import pytest
import torch
from test_triton import FACTORS, allowed, case_of, check_leak

import torch_flash2
from torch_flash2 import Lengths, attention, scores, testing
from torch_flash2.testing import CASES, Case, check

pytestmark = pytest.mark.gpu

DTYPES = ("fp16", "bf16", "fp32")
SIZES = {
    "sizes": ((640, 640), (333, 700), (700, 333), (1, 900), (128, 128)),
    "dims": ((64, 64), (128, 128), (40, 72), (192, 128), (256, 256)),
    "heads": ((4, 4), (4, 1), (6, 2)),
    "dtype": DTYPES,
    "mask": (
        "full",
        "causal",
        "causal @ bottom-right",
        "window(70, 5)",
        "window(-, 3)",
        "window(90, -) @ bottom-right",
        "causal & chunk(130)",
        "prefix(170)",
    ),
}


def cross(seed: int) -> Case:
    """A random cross of all features."""
    rng, row = random.Random(seed), {}
    factors = {**FACTORS, **SIZES}
    for name, values in factors.items():
        row[name] = rng.choice([x for x in values if allowed({**row, name: x})])
    return case_of(row, f"cross{seed}")


CROSSES = [cross(seed) for seed in range(12)]
WIDTHS = [
    Case(f"{dtype}-{D}", 1, 4, 2, 1000, 1000, D, D, dtype, "causal") for dtype in DTYPES for D in (64, 128, 256, 512)
]
NAMED = [case for case in CASES.values() if "large" not in case.tags]
LARGE = [case for case in CASES.values() if "large" in case.tags]


def _compile(case: Case, direction: str, arch: str) -> None:
    # A case that does not compile fails in its own test.
    with contextlib.suppress(Exception):
        compile_all.compile_case(case, direction, arch)


@pytest.fixture(scope="module", autouse=True)
def compiled(request: pytest.FixtureRequest) -> None:
    """Compile the kernels of all selected cases at once, into Triton's cache on disk."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Each worker has all cases before it, and runs some.
        return
    items = [item for item in request.session.items if item.path == request.path]
    cases = {item.callspec.params.get("case") for item in items if hasattr(item, "callspec")}
    major, minor = torch.cuda.get_device_capability()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for case in filter(None, cases):
            for direction in ("forward", "backward"):
                pool.submit(_compile, case, direction, f"sm{major}{minor}")


@pytest.fixture(autouse=True)
def forced() -> Iterator[None]:
    """Every call runs on the portable kernels; memory is given back after each test."""
    with torch_flash2.force("triton"):
        yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("case", NAMED, ids=lambda case: case.name)
def test_named(case: Case) -> None:
    check(case, device="cuda")


@pytest.mark.parametrize("case", WIDTHS, ids=lambda case: case.name)
def test_widths(case: Case) -> None:
    check(case, device="cuda")


@pytest.mark.parametrize("case", CROSSES, ids=lambda case: case.name)
def test_crosses(case: Case) -> None:
    print(case)
    check(case, device="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_large(case: Case) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 130 * 2**30:
        pytest.skip("needs 130 GiB of GPU memory")
    # One worker at a time, once the others have given back theirs.
    with open(Path(tempfile.gettempdir()) / "torch_flash2-test-large", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        deadline = time.monotonic() + 120
        while torch.cuda.mem_get_info()[0] < 120 * 2**30 and time.monotonic() < deadline:
            time.sleep(0.5)
        check(case, device="cuda")
        torch.cuda.empty_cache()


# One call with many features, for what follows.


def make(seed: int = 0, **options: Any) -> tuple[list[torch.Tensor], Callable[..., torch.Tensor]]:
    """Leaves query, key, value, and a call of attention on them."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = options.pop("shape", (2, 4, 512, 64))
    leaves = [torch.randn(shape, generator=generator, device="cuda", dtype=torch.float16) for _ in range(3)]
    options.setdefault("mask", "causal")

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **more: Any) -> Any:
        return attention(query, key, value, **{**options, **more})

    return [leaf.requires_grad_() for leaf in leaves], call


def train(leaves: list[torch.Tensor], call: Callable[..., torch.Tensor], **more: Any) -> list[torch.Tensor]:
    """Output and gradients of a call."""
    out = call(*leaves, **more)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256), (512, 512)])
def test_no_leak(dims: tuple[int, int], where: str) -> None:
    sizes = dict(head_dim=dims[0], head_dim_v=dims[1], heads=8, heads_kv=4, seqlen_q=400, seqlen_k=400)
    check_leak(dict(mask="causal", dtype="bf16", **sizes), torch.nan, where, device="cuda")


def test_same_bits_fifty_times() -> None:
    options = dict(mask="window(200, 0)", dropout_p=0.1, softcap=20.0)
    options["bias"] = torch.randn(4, 512, 512, device="cuda", dtype=torch.float16)
    leaves, call = make(**options)
    leaves.append(options["bias"].requires_grad_())

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> Any:
        torch.manual_seed(0)
        return call(query, key, value, bias=bias)

    first = train(leaves, run)
    assert all(same(train(leaves, run), first) for _ in range(49))


def test_dropout_is_scores_keep() -> None:
    # With the identity as values, out[m, n] is the probability of key n, 0 where it was dropped.
    B, H, M, N = 2, 3, 200, 128
    query, key = (torch.randn(B, H, n, 64, device="cuda", dtype=torch.float16) for n in (M, N))
    value = torch.eye(N, device="cuda", dtype=torch.float16).expand(B, H, N, N)
    seed = testing.dropout_seed(7, query.device)
    places = (torch.arange(n, device="cuda") for n in (B, H, M, N))
    kept = scores.keep(seed, *torch.meshgrid(*places, indexing="ij"), 0.4)
    for config in ({}, {"BLOCK_M": 32, "BLOCK_N": 32}, {"BLOCK_M": 64, "BLOCK_N": 16}):
        torch.manual_seed(7)
        with torch_flash2.force("triton", config):
            out = attention(query, key, value, scale=0.01, dropout_p=0.4)
        assert torch.equal(out != 0, kept), config


def test_other_stream() -> None:
    leaves, call = make()
    wanted = train(leaves, call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The inputs are written on this stream, late: a launch on another one would miss them.
        late = [torch.zeros_like(leaf) for leaf in leaves]
        torch.cuda._sleep(10_000_000)
        for target, leaf in zip(late, leaves, strict=True):
            target.copy_(leaf.detach())
        found = train([target.requires_grad_() for target in late], call)
    stream.synchronize()
    assert same(found, wanted)


def test_other_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    leaves, call = make()
    wanted = train(leaves, call)
    moved = [leaf.detach().to("cuda:1").requires_grad_() for leaf in leaves]
    found = train(moved, call)
    assert all(tensor.device.index == 1 for tensor in found)
    assert same([tensor.to("cuda:0") for tensor in found], wanted)
    assert torch.cuda.current_device() == 0


def test_no_host_sync() -> None:
    cu = torch.tensor([0, 200, 200, 512], dtype=torch.int32, device="cuda")
    sinks = torch.randn(4, device="cuda")
    packed = dict(shape=(1, 4, 512, 64), lengths=Lengths(cu_q=cu, cu_k=cu), sinks=sinks, dropout_p=0.1)
    padded = dict(lengths=Lengths(used_k=cu[1:3].contiguous()), mask="causal @ bottom-right")
    for options in (packed, padded):
        leaves, call = make(**options)
        train(leaves, call)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            train(leaves, call)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph() -> None:
    """Replays see other lengths and draw another dropout mask."""
    cu = torch.tensor([0, 100, 512], dtype=torch.int32, device="cuda")
    leaves, call = make(shape=(1, 4, 512, 64), lengths=Lengths(cu_q=cu, cu_k=cu))
    # The identity as values shows which probabilities were dropped.
    value = torch.eye(512, 64, device="cuda", dtype=torch.float16).expand(1, 4, 512, 64)

    def step() -> list[torch.Tensor]:
        return [*train(leaves, call), call(leaves[0], leaves[1], value, dropout_p=0.5).detach()]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    masks = []
    for edges in ([0, 100, 512], [0, 100, 512], [0, 300, 400]):
        cu.copy_(torch.tensor(edges, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        assert same(captured[:-1], train(leaves, call))
        masks.append(captured[-1] != 0)
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str) -> None:
    leaves, call = make()

    def model(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return call(query * 2, key, value).sin()

    wanted = train(leaves, model)
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        out = run(*leaves)
        gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
        for found, expected in zip([out, *gradients], wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=5e-3)


def test_autocast() -> None:
    leaves, call = make()
    single = [leaf.detach().float().requires_grad_() for leaf in leaves]
    with torch.autocast("cuda", torch.float16):
        found = train(single, call)
    assert found[0].dtype == torch.float16 and found[1].dtype == torch.float32
    assert same([tensor.half() for tensor in found], train(leaves, call))


def test_checkpoint_keeps_dropout() -> None:
    from torch.utils.checkpoint import checkpoint

    leaves, call = make(dropout_p=0.3)
    torch.manual_seed(3)
    wanted = train(leaves, call)
    torch.manual_seed(3)
    found = train(leaves, lambda *inputs: checkpoint(call, *inputs, use_reentrant=False))
    assert same(found, wanted)


def test_memory_is_linear() -> None:
    """128k tokens, 32 heads, D 128: forward and backward take a few tensors of the inputs' size."""
    leaves, call = make(shape=(1, 32, 128 * 1024, 128))
    torch.cuda.reset_peak_memory_stats()
    train(leaves, call)
    peak = torch.cuda.max_memory_allocated() / 2**30
    tensor = leaves[0].numel() * leaves[0].element_size() / 2**30
    print(f"128k tokens, H 32, D 128, fp16: peak {peak:.1f} GiB; one tensor is {tensor:.1f} GiB")
    # query, key, value, out, its gradient and three gradients; a little more for statistics.
    assert peak < 8.5 * tensor + 0.5
