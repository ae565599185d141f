"""The short way from a call to its kernels: the same results as the op's, and recordings that do what a launch did.

B batch, H query heads, M query rows, N keys, D head dim.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import torch_flash2
from torch_flash2 import attention, direct, dispatch, hardware, masks, problem
from torch_flash2.problem import Call, Saved


def call_of(D: int = 64, mask: str = "causal", dtype: torch.dtype = torch.float16, M: int = 96, **fixed: Any) -> Call:
    """A call on the CPU; a new one of the same signature each time."""
    bands = masks.parse(mask)
    query, key, value = (torch.randn(2, heads, rows, D).to(dtype) for heads, rows in ((4, M), (2, 96), (2, 96)))
    if "block_table" in fixed:
        # Twelve pages of 16 rows, of which each segment has six.
        key, value = (torch.randn(12, 16, 2, D).to(dtype) for _ in range(2))
    fields: dict[str, Any] = dict.fromkeys(Call._fields)
    fields.update(query=query, key=key, value=value, mask=bands.template, mask_numbers=bands.numbers)
    fields.update(scale=0.1, dropout_p=0.0, deterministic=False, **fixed)
    return Call(**fields)


class Modes(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_same_as_the_op() -> None:
    inputs = [torch.randn(2, 4, 33, 16, requires_grad=True) for _ in range(3)]
    bias, sinks = torch.randn(33, 33, requires_grad=True), torch.randn(4, requires_grad=True)
    for extra in ({}, {"dropout_p": 0.3}, {"bias": bias, "sinks": sinks}):
        leaves = [*inputs, *(tensor for tensor in extra.values() if isinstance(tensor, torch.Tensor))]
        found = []
        for mode in (False, True, False):
            torch.manual_seed(0)
            with Modes() if mode else mock.patch.object(direct, "MOST_ROUTES", 1):
                out, lse = attention(*inputs, "causal & window(9, 0)", return_lse=True, **extra)
            found.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)])
        for results in zip(*found, strict=True):
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_only_unwatched_calls_go_direct() -> None:
    inputs = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    with mock.patch.object(direct.Route, "forward", side_effect=AssertionError("direct")):
        with pytest.raises(AssertionError, match="direct"):
            attention(*inputs)
        with Modes() as mode:
            attention(*inputs)
        assert mode.names.count("forward") == 1
        assert torch.vmap(lambda q: attention(q, *inputs[1:]))(torch.stack([inputs[0]] * 2)).shape[0] == 2
        with torch.autocast("cpu", torch.bfloat16):
            assert attention(*inputs).dtype == torch.bfloat16


def test_signatures_tell_apart_what_matters() -> None:
    tensor = torch.randn(64, 64)
    others = [tensor.t(), tensor[:32], tensor.double(), tensor.flatten(), torch.empty(64 * 65)[1:4097].view(64, 64)]
    signatures = {direct.signature((other,)) for other in (tensor, *others)}
    assert len(signatures) == 6 and direct.signature((tensor + 1,)) == direct.signature((tensor,))


def test_a_route_follows_the_settings_of_the_call() -> None:
    query = torch.randn(1, 2, 5, 8)
    attention(query, query, query)
    with torch_flash2.force("reference"), Modes():
        wanted = attention(query, query, query)
    reference = dispatch.kernel("reference", "forward")
    with torch_flash2.force("reference"), mock.patch.object(reference, "launch", wraps=reference.launch) as launch:
        assert torch.equal(attention(query, query, query), wanted)
    assert launch.call_count == 1


# Recordings, with a compiled kernel that writes down what it is given.


class Compiled:
    """Stands for what Triton compiled."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, log: list[Any], kernel: Any):
        self.log, self.kernel = log, kernel

    def run(self, *arguments: Any) -> None:
        programs, one, also_one, _, function, metadata, *hooks = arguments[:9]
        assert (one, also_one, function, metadata, hooks) == (1, 1, "function", "metadata", [None] * 3)
        self.log.append((self.kernel, programs, arguments[9:]))


@pytest.fixture
def log() -> Iterator[list[Any]]:
    """Every launch: kernel, programs, arguments."""
    pytest.importorskip("triton")
    from torch_flash2.kernels.triton import launching

    found: list[Any] = []

    def run(kernel: Any, programs: int, device: Any, arguments: Any, options: Any) -> Any:
        found.append((kernel, programs, arguments))
        return Compiled(found, kernel)

    with mock.patch.object(launching, "_run", run):
        yield found


def plain(value: Any, names: dict[int, str]) -> Any:
    """An argument with its pointers by what they point to."""
    if isinstance(value, torch.Tensor):
        return names.get(value.data_ptr(), "buffer")
    if type(value).__name__ == "TensorDescriptor":
        return [plain(value.base, names), value.shape, value.strides, value.block_shape, value.padding]
    if isinstance(value, tuple):
        return [plain(item, names) for item in value]
    if isinstance(value, int) and value > 2**24 and value != 2 * masks.FAR + 3:
        return names.get(value, "buffer")
    return value


def posed(call: Call, direction: str, arch: str, kernel: str = "triton") -> tuple[Any, problem.Problem, Any]:
    found = problem.of(call, direction, needs_grad=direction == "backward", bias_grad=call.bias is not None)
    found = dataclasses.replace(found, hardware=hardware.simulated(arch))
    module = dispatch.kernel(kernel, direction)
    assert not list(module.why_not(found))
    return module, found, module.config(found)


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"mask": "window(9, 0) @ bottom-right", "D": 128},
    "wide": {"D": 256},
    "fp32": {"dtype": torch.float32, "D": 40},
    "bias": {"bias": torch.randn(4, 96, 96).half()},
    "dense": {"dense": torch.rand(96, 96) > 0.5},
    "packed": {"used_k": torch.tensor([96, 40], dtype=torch.int32), "mask": "causal @ top-left"},
}
DECODING: dict[str, dict[str, Any]] = {
    "decode": {"M": 1, "D": 128, "num_splits": 1},
    "splits": {
        "M": 2,
        "num_splits": 3,
        "used_k": torch.tensor([96, 40], dtype=torch.int32),
        "mask": "window(9, 0) @ bottom-right",
    },
    "pages": {
        "M": 2,
        "num_splits": 3,
        "page_size": 16,
        "block_table": torch.randperm(12).int().reshape(2, 6),
        "used_k": torch.tensor([96, 40], dtype=torch.int32),
        "mask": "window(9, 0) @ bottom-right",
    },
}


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize("name", [*CALLS, *DECODING])
def test_recordings_do_what_launches_did(name: str, arch: str, log: list[Any]) -> None:
    first, second = (call_of(**{**CALLS, **DECODING}[name]) for _ in range(2))
    chosen, directions = ("decode", ["forward"]) if name in DECODING else ("triton", ["forward", "backward"])
    for direction in directions:
        saved: list[Any] = [[], []]
        if direction == "backward":
            wanted = (True, True, True, first.bias is not None, False)
            for index, call in enumerate((first, second)):
                out = torch.empty_like(call.query)
                saved[index] = [Saved(out, torch.randn(2, 4, 96), torch.randn_like(out), None, wanted)]
        module, found, config = posed(first, direction, arch, chosen)
        _, recording = module.record(found, config, first, *saved[0])
        log.clear()
        results = module.launch(found, config, second, *saved[1])
        direct_log = log.copy()
        log.clear()
        assert recording is not None and recording.usable()
        inputs = (*second[: direct.TENSORS], *(saved[1][0][:4] if saved[1] else ()))
        again = recording(inputs)
        assert type(again) is type(results) and len(log) == len(direct_log) > 0
        names = {t.data_ptr(): f"input {i}" for i, t in enumerate(inputs) if t is not None}
        for one, other in zip(results, again, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        mine, theirs = (
            {**names, **{t.data_ptr(): f"result {i}" for i, t in enumerate(made) if t is not None}}
            for made in (again, results)
        )
        for (kernel, programs, arguments), (kernel2, programs2, arguments2) in zip(log, direct_log, strict=True):
            assert kernel is kernel2 and programs == programs2
            assert plain(arguments, mine) == plain(arguments2, theirs)


def test_the_second_call_is_recorded() -> None:
    done: list[str] = []
    module = mock.Mock()
    module.launch.side_effect = lambda *arguments: done.append("launch")
    recording = mock.Mock(side_effect=lambda tensors: done.append("again"))
    module.record.side_effect = lambda *arguments: (done.append("record"), recording)
    run = direct._Run(mock.Mock(), mock.Mock(module=module))
    for _ in range(4):
        run((), call_of)
    assert done == ["launch", "record", "again", "again"]


def test_buffers_keep_their_distances(log: list[Any]) -> None:
    call = call_of()
    out = torch.empty_like(call.query)
    saved = Saved(out, torch.randn(2, 4, 96), torch.randn_like(out), None, (True, True, True, False, False))
    module, found, config = posed(call, "backward", "sm80")
    _, recording = module.record(found, config, call, saved)
    log.clear()
    recording((*call[: direct.TENSORS], *saved[:4]))
    stats = {tuple(arguments[4][:2]) for kernel, _, arguments in log if kernel.fn.__name__ == "backward_keys"}
    ((lse2, delta),) = stats
    assert delta - lse2 == 2 * 4 * 256 * 4


def test_what_is_computed_outside_kernels_is_not_recorded(log: list[Any]) -> None:
    call = call_of(sinks=torch.randn(4))
    out = torch.empty_like(call.query)
    saved = Saved(out, torch.randn(2, 4, 96), torch.randn_like(out), None, (True, True, True, False, True))
    module, found, config = posed(call, "backward", "sm80")
    gradients, recording = module.record(found, config, call, saved)
    assert recording is None and gradients.sinks is not None
    empty = call_of()._replace(query=torch.empty(2, 4, 0, 64, dtype=torch.float16))
    module, found, config = posed(empty, "forward", "sm80")
    assert module.record(found, config, empty)[1] is None


def test_recordings_stand_back_for_hooks(log: list[Any]) -> None:
    import triton

    from torch_flash2.kernels.triton import launching

    call = call_of()
    module, found, config = posed(call, "forward", "sm80")
    _, recording = module.record(found, config, call)
    with launching.instead(lambda *arguments: None):
        assert not recording.usable()
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(print)
    try:
        assert not recording.usable()
    finally:
        hooks.remove(print)
    assert recording.usable()


def test_recordings_keep_no_tensors(log: list[Any]) -> None:
    for direction in ("forward", "backward"):
        call = call_of(bias=torch.randn(4, 96, 96).half(), dense=torch.rand(96, 96) > 0.5)
        saved: list[Saved] = []
        if direction == "backward":
            out = torch.empty_like(call.query)
            saved = [Saved(out, torch.randn(2, 4, 96), torch.randn_like(out), None, (True, True, True, True, False))]
            del out
        module, found, config = posed(call, direction, "sm90")
        results, recording = module.record(found, config, call, *saved)
        alive = [weakref.ref(t) for t in (*call, *results, *(saved[0] if saved else ())) if isinstance(t, torch.Tensor)]
        assert recording is not None and len(alive) >= 7
        del call, results, saved
        log.clear()
        gc.collect()
        assert not [reference for reference in alive if reference() is not None]


@pytest.mark.parametrize("argument", [torch.zeros(8), object()])
def test_what_is_older_than_the_launch_is_not_recorded(argument: Any, log: list[Any]) -> None:
    from torch_flash2.kernels.triton import forward, launching, recording

    call = call_of()
    _, found, config = posed(call, "forward", "sm80")

    def launch(problem: Any, config: Any, call: Call) -> Any:
        results = launching.outputs(call)
        launching.launch(forward.attention_forward, 1, call.query.device, (call.query, argument, *results))
        return results

    assert recording.record(launch, found, config, call)[1] is None


def test_views_of_inputs_are_recorded_where_they_have_one_owner(log: list[Any]) -> None:
    from torch_flash2.kernels.triton import forward, launching, recording

    call = call_of()
    _, found, config = posed(call, "forward", "sm80")

    def launch(problem: Any, config: Any, call: Call) -> Any:
        results = launching.outputs(call)
        launching.launch(forward.attention_forward, 1, call.query.device, (call.key[:, 1:], *results))
        return results

    log.clear()
    _, recorded = recording.record(launch, found, config, call)
    assert recorded is not None
    again = call_of()
    recorded(again[: direct.TENSORS])
    assert log[-1][2][0] == again.key[:, 1:].data_ptr() != again.key.data_ptr()
    # Keys and values in one tensor: which of them is it, should they be apart in the next call?
    together = call_of()
    pair = torch.stack([together.key, together.value])
    assert recording.record(launch, found, config, together._replace(key=pair[0], value=pair[1]))[1] is None
    # A value that is part of the key is so in every call of the route.
    latent = together._replace(value=together.key[..., :32])
    assert recording.record(launch, found, config, latent)[1] is None
    latent_problem = dataclasses.replace(found, value_in_key=True)
    assert recording.record(launch, latent_problem, config, latent)[1] is not None


@pytest.mark.parametrize("latent", [False, True])
def test_one_tensor_in_two_places_is_not_taken_for_either(latent: bool, log: list[Any]) -> None:
    """What is recorded with keys that are the queries too is not done again with others as if they were."""
    first, second = call_of(), call_of()
    first = first._replace(query=first.key)
    second = second._replace(query=torch.randn_like(second.key))
    if latent:
        first, second = first._replace(value=first.key), second._replace(value=second.key)
    module, found, config = posed(first, "forward", "sm80")
    assert found.value_in_key == latent
    _, recording = module.record(found, config, first)
    if recording is None:
        return
    log.clear()
    recording(second[: direct.TENSORS])
    _, _, arguments = log[-1]
    assert [argument[0] for argument in arguments[:3]] == [tensor.data_ptr() for tensor in second[:3]]


def test_kernels_that_write_all_are_spared_the_fill(log: list[Any]) -> None:
    """Where deterministic algorithms are on, PyTorch fills new memory; not what these kernels write anyway."""
    switch = torch.utils.deterministic
    seen = []

    def plan(kernel: str, packed: bool) -> dispatch.Plan:
        found = problem.of(call_of())
        lengths = ("cu_q", "cu_k") if packed else ()
        return dispatch.Plan(dataclasses.replace(found, lengths=lengths), kernel, None)

    torch.use_deterministic_algorithms(True)
    try:
        for kernel, packed in (("hopper", False), ("triton", False), ("triton", True), ("cpu", False)):
            with contextlib.suppress(KeyError), dispatch.unfilled(plan(kernel, packed)):
                seen.append(switch.fill_uninitialized_memory)
                raise KeyError
            assert switch.fill_uninitialized_memory
        switch.fill_uninitialized_memory = False
        with dispatch.unfilled(plan("hopper", False)):
            pass
        assert not switch.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        switch.fill_uninitialized_memory = True
    with dispatch.unfilled(plan("hopper", False)):
        seen.append(switch.fill_uninitialized_memory)
    assert seen == [False, False, True, True, True]


def test_threads_ask_for_zeros_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recorded launch needs is not what another thread's asks for meanwhile."""
    launching = pytest.importorskip("torch_flash2.kernels.triton.launching")
    device = torch.device("cpu")
    monkeypatch.setattr(launching, "_place", lambda device: (device, 0))
    monkeypatch.setattr(launching, "_reserve", lambda device: None)
    monkeypatch.setattr(launching, "_kept", {})
    kept = launching.keep_zeros(device, 100)
    assert launching.zeros(device, 70) is kept
    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert pool.submit(launching.keep_zeros, device, 5).result() is kept
    assert launching.kept_for(kept) == 100
    launching.keep_zeros(device, 5)
    assert launching.kept_for(kept) == 5
    assert launching.kept_for(torch.zeros(3)) is None


def test_zeros_of_graphs_are_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    launching = pytest.importorskip("torch_flash2.kernels.triton.launching")
    device = torch.device("cpu")
    monkeypatch.setitem(launching._reserved, device, torch.zeros(200, dtype=torch.int32))
    first, second = (launching._take(device, size) for size in (5, 40))
    assert (first.numel(), second.numel()) == (5, 40)
    assert second.data_ptr() - first.data_ptr() == 128
    assert launching._take(device, 105) is None
    assert launching._take(device, 104) is not None
    assert launching._take(device, 1) is None
    monkeypatch.setitem(launching._reserved, device, torch.zeros(1 << 17, dtype=torch.int32))
    assert launching._take(device, launching.LARGEST + 1) is None


def test_zeros_of_graphs_outlive_their_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph does not keep them alive."""
    launching = pytest.importorskip("torch_flash2.kernels.triton.launching")
    device = torch.device("cpu")
    monkeypatch.setattr(launching, "RESERVE", 256)
    monkeypatch.setattr(launching, "MOST_RESERVES", 2)
    monkeypatch.setattr(launching, "_reserved", {})
    monkeypatch.setattr(launching, "_reserves", collections.defaultdict(list))
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock())
    taken: list[int] = []
    for _ in range(2):
        launching._reserve(device)
        taken.append(launching._take(device, 200).data_ptr())
    launching._reserve(device)
    assert launching._take(device, 200) is None
    gc.collect()
    assert [reserve.data_ptr() for reserve in launching._reserves[device]] == taken


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
def test_graphs_side_by_side() -> None:
    """Two graphs that were captured on one stream, with calls whose kernels count tasks and note NaN, are replayed on
    two: each has its own zeros, leaves them as zeros, and has them when those reserved after them are others."""
    from torch_flash2.kernels.triton import launching

    sizes = [(1, 8, 700, 700, "causal"), (1, 2, 600, 3000, "causal @ bottom-right"), (2, 24, 900, 900, None)]
    calls = [
        (*(torch.randn(B, H, n, 64, device="cuda", dtype=torch.bfloat16) for n in (M, N, N)), mask)
        for B, H, M, N, mask in sizes
    ]
    device = calls[0][0].device
    wanted = [attention(*call) for call in calls]
    for call in calls:
        attention(*call)
    start = launching.RESERVE - launching._reserved[device].numel()
    graphs, found = [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found.append([attention(*call) for call in calls])
        graphs.append(graph)
    stop = launching.RESERVE - launching._reserved[device].numel()
    assert stop - start >= 6 * 32
    number = len(launching._reserves[device])
    launching._reserved[device] = launching._reserved[device][:0]
    for call in calls:
        attention(*call)
    assert len(launching._reserves[device]) == number + 1
    # Memory that nobody holds is used again.
    others = [torch.full((launching.RESERVE,), 7, dtype=torch.int32, device="cuda") for _ in range(64)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(30):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for outs in found:
        for out, want in zip(outs, wanted, strict=True):
            torch.testing.assert_close(out, want, rtol=0, atol=0)
    assert not launching._reserves[device][number - 1][start:stop].any()
    assert all(bool((other == 7).all()) for other in others)
