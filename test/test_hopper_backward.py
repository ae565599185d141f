"""The Hopper backward: what ptxas made of it, with no GPU here, and its results on one."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import compile_all
import hypothesis
import machine_code
import pytest
import torch
from hypothesis import strategies as st
from test_hopper import CASES, FEATURES, FEW, WIDTHS, count, hopper, instructions, main_loops

import torch_flash2
from torch_flash2 import dispatch, masks, testing
from torch_flash2.testing import Case

pytest.importorskip("triton")

from torch_flash2.kernels.hopper import backward  # noqa: E402
from torch_flash2.kernels.triton.statistics import launch_stats  # noqa: E402


def compiled(
    width: tuple[int, int], feature: str, atomics: bool, seqlen: int = 4096, **fused: Any
) -> tuple[Any, dict[str, Any]]:
    """The configuration and the Gluon kernels, by name, of a backward."""
    from torch_flash2.kernels.triton import offline

    changes = dict(FEATURES[feature])
    segments = len(changes.get("documents", (1,)))
    case = Case("x", segments, 4, 2, seqlen, seqlen, *width, "bf16", **changes)
    posed, call = compile_all.posed(case, "backward", "sm90")
    config = {"atomics": atomics, "fused": fused} if fused else {"atomics": atomics}
    plan = dispatch.select(posed, dispatch.encode_force("hopper", config))
    kernels = offline.compile_call(plan.module, plan.problem, plan.config, call)
    for kernel in kernels:
        assert posed.hardware.shared_memory >= kernel.metadata.shared
        machine_code.check(kernel)
    return plan.config, {kernel.metadata.name: kernel for kernel in kernels}


def steps(head_dim: int, width: int) -> int:
    """Depth of a product over a head dim in steps of 16, as many as its tiles' columns make."""
    return -(-head_dim // width) * width // 16


@pytest.mark.compile
@pytest.mark.parametrize(
    ("width", "feature", "atomics"),
    [
        *((width, "causal", False) for width in WIDTHS),
        ((64, 64), "causal", True),
        ((64, 64), "full", True),
        ((64, 64), "scores", True),
        ((128, 128), "causal", True),
        ((128, 128), "window", True),
        ((128, 128), "window", False),
        ((64, 64), "scores", False),
        ((128, 128), "packed", False),
        ((192, 128), "scores", False),
        ((64, 64), "dropout", False),
        ((128, 128), "dropout", True),
    ],
)  # fmt: skip
def test_main_loops(width: tuple[int, int], feature: str, atomics: bool) -> None:
    config, kernels = compiled(width, feature, atomics)
    if not atomics:
        chosen = config.queries
        # S and dP over the head dims, dQ over the keys for each tile of columns.
        products = steps(width[0], chosen.WIDTH_D) + steps(width[1], chosen.WIDTH_V)
        products += -(-width[0] // chosen.WIDTH_D) * chosen.BLOCK // 16
        loops = main_loops(kernels["backward_queries"], products, chosen.BLOCK // 2)
        assert len(loops) == chosen.GROUPS, f"each warpgroup has one loop of {products} tensor core instructions"
        _few_spills(loops)
    loops = _keys_loops(width, config.fused if atomics else config.keys, kernels["backward_keys"], atomics)
    if atomics and feature not in ("scores", "dropout") and not config.fused.CARRIED:
        _no_late_loads(loops, config.fused)


@pytest.mark.compile
@pytest.mark.parametrize(("head_dim", "seqlen"), [(64, 256), (64, 1024), (128, 256)])
def test_main_loops_where_programs_claim_tasks(head_dim: int, seqlen: int) -> None:
    config, kernels = compiled((head_dim, head_dim), "causal", True, seqlen)
    assert config.fused.TASKS == 2
    loops = _keys_loops((head_dim, head_dim), config.fused, kernels["backward_keys"], True)
    _no_late_loads(loops, config.fused)


@pytest.mark.compile
@pytest.mark.parametrize(("feature", "carried"), [("causal", True), ("full", True), ("packed", False)])
def test_tma_adds_to_sums(feature: str, carried: bool) -> None:
    """Where it does, warpgroups of dK and dV add nothing themselves, and none of them waits for what they stored."""
    config, kernels = compiled((128, 128), feature, True)
    assert config.fused.CARRIED == carried
    found, _ = instructions(kernels["backward_keys"])
    loops = _keys_loops((128, 128), config.fused, kernels["backward_keys"], True)
    assert (count(found, "UTMAREDG") > 0) == carried
    assert [count(loop, "RED") for loop in loops] == [0 if carried else 16] * 2
    # One for each body: that of dS.
    assert not carried or [count(loop, "FENCE.VIEW.ASYNC") for loop in loops] == [2, 2]


@pytest.mark.compile
@pytest.mark.parametrize("feature", ["causal", "full"])
def test_main_loops_of_ordered_additions(feature: str) -> None:
    """Neither the warpgroups of dK and dV nor that of dQ wait for global memory; two warps beside them do."""
    config, kernels = compiled((64, 64), feature, True, ORDERED=True, TASKS=2)
    kernel = kernels["backward_keys"]
    _no_late_loads(_keys_loops((64, 64), config.fused, kernel, True), config.fused)
    (sums,) = main_loops(kernel, config.fused.GROUPS * 64 // 16, 0)
    assert count(sums, "RED") == 8 and count(sums, "MEMBAR.ALL.GPU") == count(sums, "LDG") == 0
    found, _ = instructions(kernel)
    assert count(found, "LDG.E.STRONG.GPU") == 1 and count(found, "MEMBAR.ALL.GPU") > 0


def _no_late_loads(loops: list[list[str]], chosen: Any) -> None:
    """Loads from local memory would wait behind the additions to dQ's sums. Triton 3.7 leaves up to 3 between the
    products of S of the next tile."""
    assert all(count(loop, "LDL") <= (3 if chosen.AHEAD else 0) for loop in loops)


def _keys_loops(width: tuple[int, int], chosen: Any, kernel: Any, atomics: bool) -> list[list[str]]:
    """The main loops of dK's and dV's kernel."""
    rows = chosen.BLOCK // 16
    of_values = steps(width[0], chosen.WIDTH_D) + -(-width[1] // chosen.WIDTH_V) * rows
    of_scores = steps(width[1], chosen.WIDTH_V) + -(-width[0] // chosen.WIDTH_D) * rows
    if chosen.SHARED:
        values, of_keys = main_loops(kernel, of_values, chosen.BLOCK // 2), main_loops(kernel, of_scores, 0)
        assert len(values) == len(of_keys) == 1
        loops = values + of_keys
        # What is kept in registers does not come from shared memory: four steps of 16 for each 64 columns.
        assert _both_shared(values[0]) == steps(width[0], chosen.WIDTH_D) - 4 * chosen.KEPT
        assert _both_shared(of_keys[0]) == steps(width[1], chosen.WIDTH_V) - 4 * chosen.KEPT_V
    else:
        # dQ's columns of a warpgroup over the keys of all, or all columns in a loop of its own.
        sums = chosen.GROUPS * 64 // 16 if atomics else 0
        if chosen.APART:
            assert len(main_loops(kernel, sums, 0)) == 1
            sums = 0
        # Two bodies, with and without a mask.
        loops = main_loops(kernel, 2 * (of_values + of_scores + sums), chosen.BLOCK)
        assert len(loops) == chosen.GROUPS
    _few_spills(loops)
    return loops


def _both_shared(loop: list[str]) -> int:
    """How many tensor core instructions have both operands in shared memory."""
    return sum(re.search(r"HGMMA\S* R\d+, gdesc", instruction) is not None for instruction in loop)


def _few_spills(loops: list[list[str]]) -> None:
    for loop in loops:
        assert count(loop, "STL") <= FEW and count(loop, "LDL") <= FEW, "registers spill in the main loop"


@pytest.mark.compile
def test_numbers_compile_nothing_anew() -> None:
    """Lengths, batch, heads, the size of groups, the window: none decides what is compiled."""
    found = set()
    for B, H, G, M, N, left in ((1, 4, 2, 256, 1000, 16), (2, 6, 2, 255, 513, 1), (3, 8, 1, 65, 600, 0)):
        case = Case("x", B, H, G, M, N, 64, 64, "fp16", f"window({left}, 0)")
        _, kernels = compile_all.compile_case(case, "backward", "sm90", "hopper")
        found.add(tuple(kernel.hash for kernel in kernels))
    assert len(found) == 1


@pytest.mark.parametrize(("head_dim", "fused"), [(64, True), (96, True), (128, True), (192, False), (256, False)])
def test_atomics_whose_order_varies_run_where_deterministic_algorithms_are_off(head_dim: int, fused: bool) -> None:
    posed, _ = compile_all.posed(Case("x", 8, 8, 8, 4096, 4096, head_dim, head_dim, "bf16"), "backward", "sm90")
    same_bits = dataclasses.replace(posed, deterministic=True)
    assert dispatch.select(posed, "hopper").config.atomics == fused
    found = dispatch.select(same_bits, "hopper").config
    assert found.atomics == (head_dim == 64)
    assert found.fused is None or found.fused.ORDERED == found.atomics
    varies = {"atomics": True, "fused": {"ORDERED": False}} if fused else {"atomics": True}
    with pytest.raises(dispatch.UnsupportedError, match="atomics add in an order that varies"):
        dispatch.select(same_bits, dispatch.encode_force("hopper", varies))


def test_few_tiles_do_not_pay_for_an_order() -> None:
    def ordered(batch: int, heads_kv: int, seqlen: int, mask: str) -> bool:
        case = Case("x", batch, 32, heads_kv, seqlen, seqlen, 64, 64, "bf16", mask)
        posed, _ = compile_all.posed(case, "backward", "sm90")
        config = dispatch.select(dataclasses.replace(posed, deterministic=True), "hopper").config
        assert config.fused.ORDERED == config.atomics
        return bool(config.atomics)

    assert ordered(1, 32, 16384, "causal") and ordered(32, 32, 512, "causal") and ordered(1, 8, 8192, "full")
    assert not ordered(1, 8, 8192, "causal") and not ordered(1, 2, 65536, "full")


def test_additions_that_no_kernel_makes() -> None:
    def sums(**fused: Any) -> dict[str, Any]:
        return {"atomics": True, "fused": fused}

    for head_dim, config, reason in (
        (128, sums(ORDERED=True), "a warpgroup of its own makes them and programs claim tasks"),
        (128, {"keys": {"ORDERED": True}}, "additions have an order in the kernel with atomics alone"),
        (128, {"keys": {"CARRIED": True}}, "TMA adds in the kernel with atomics alone"),
        (128, sums(TASKS=2), "TMA adds where S of the next tile is issued early"),
        (64, sums(CARRIED=True, AHEAD=True, TASKS=1), "not for a third warpgroup"),
    ):
        posed, _ = compile_all.posed(Case("x", 8, 8, 8, 4096, 4096, head_dim, head_dim, "bf16"), "backward", "sm90")
        with pytest.raises(dispatch.UnsupportedError, match=reason):
            dispatch.select(posed, dispatch.encode_force("hopper", config))


def test_tma_adds_where_shared_memory_has_room() -> None:
    """With one task a program, without score steps, dropout and lengths, and where TMA can count the sums."""

    def carried(seqlen: int, mask: str = "causal", **features: Any) -> bool:
        case = Case("x", features.pop("B", 2), 8, 8, seqlen, seqlen, 128, 128, "bf16", mask, **features)
        posed, _ = compile_all.posed(case, "backward", "sm90")
        return bool(dispatch.select(posed, "hopper").config.fused.CARRIED)

    assert carried(4096) and carried(2048, "full") and carried(1024, "window(256, 0)") and not carried(1024)
    assert not carried(4096, softcap=30.0) and not carried(4096, dropout_p=0.1)
    assert not carried(4096, documents=(1.0, 0.5), lengths="packed")
    assert carried(1 << 20, B=1) and not carried(1 << 20)
    # What TMA cannot count keeps the buffers of additions from registers, of which ptxas does not bear three.
    case = Case("x", 2, 8, 8, 1 << 20, 1 << 20, 128, 128, "bf16", "window(256, 0)")
    config = dispatch.select(compile_all.posed(case, "backward", "sm90")[0], "hopper").config.fused
    assert not config.CARRIED and config.STAGES == 4
    posed, _ = compile_all.posed(case, "backward", "sm90")
    with pytest.raises(dispatch.UnsupportedError, match="fewer than 2\\^31 numbers"):
        dispatch.select(posed, dispatch.encode_force("hopper", {"atomics": True, "fused": {"CARRIED": True}}))


@pytest.mark.parametrize(("D", "Dv"), [(192, 128), (256, 256)])
def test_score_steps_leave_fewer_registers(D: int, Dv: int) -> None:
    """Tiles are as short with score steps as their arithmetic needs, and less stays in registers."""

    def chosen(**features: Any) -> Any:
        case = Case("x", 1, 2, 2, 4096, 4096, D, Dv, "bf16", "causal", **features)
        posed, _ = compile_all.posed(case, "backward", "sm90")
        return dispatch.select(posed, "hopper").config

    plain, capped = chosen(), chosen(softcap=30.0)
    assert chosen(alibi=1) == chosen(dropout_p=0.1) == capped
    assert plain.keys.SHARED and capped.keys.BLOCK == 64
    assert (capped.keys.BLOCK, capped.keys.KEPT) < (plain.keys.BLOCK, plain.keys.KEPT)
    assert not capped.queries.AHEAD


def test_few_keys_do_not_pay_for_sums() -> None:
    def atomics(head_dim: int, seqlen: int, **features: Any) -> bool:
        case = Case("x", 32, 2, 2, seqlen, seqlen, head_dim, head_dim, "bf16", "causal", **features)
        posed, _ = compile_all.posed(case, "backward", "sm90")
        return bool(dispatch.select(posed, "hopper").config.atomics)

    assert atomics(64, 256) and atomics(64, 512, softcap=30.0) and atomics(64, 4096, alibi=1)
    assert atomics(128, 512) and atomics(128, 4096, softcap=30.0)
    assert not atomics(128, 256) and not atomics(128, 4096, alibi=1)


BAND = st.one_of(
    st.just("causal"),
    st.builds("window({}, {})".format, st.integers(0, 700), st.integers(0, 700)),
    st.builds("chunk({})".format, st.integers(1, 700)),
    st.builds("prefix({})".format, st.integers(1, 700)),
)


@hypothesis.given(
    bands=st.lists(BAND, min_size=1, max_size=2), seqlen_q=st.integers(1, 1500), seqlen_k=st.integers(1, 1500),
    bottom_right=st.booleans(),
)  # fmt: skip
def test_a_tile_of_keys_waits_for_the_next_one_alone(
    bands: list[str], seqlen_q: int, seqlen_k: int, bottom_right: bool
) -> None:
    """Where additions to dQ have one order, from the last keys to the first: of a head's tiles of keys those that visit
    a tile of rows lie side by side, the first to add to it waits for none, and each other one for its neighbour, as
    backward_pipeline.added_before says."""
    mask = masks.parse(" & ".join(bands) + (" @ bottom-right" if bottom_right else ""))
    starts, visits = [], []
    for first in range(0, seqlen_k, 128):
        lo, hi = mask.queries(torch.arange(first, min(first + 128, seqlen_k)), seqlen_q, seqlen_k)
        seen = lo < hi
        start = int(lo[seen].min()) // 64 * 64 if seen.any() else 0
        visits.append(set(range(start, int(hi[seen].max()), 64)) if seen.any() else set())
        starts.append(start)
    for tile, rows in enumerate(visits):
        following = visits[tile + 1] if tile + 1 < len(visits) else set()
        for row in rows:
            waits = bool(following) and row >= starts[tile + 1]
            assert waits == any(row in later for later in visits[tile + 1 :])
            assert waits == (row in following)


@pytest.fixture(params=[name for name, sums in compile_all.SUMS.items() if not sums.plain])
def force(request: pytest.FixtureRequest) -> Any:
    """The Hopper kernels, with or without atomics, in one order or not."""
    case = request.node.callspec.params.get("case")
    wide = request.node.callspec.params.get("head_dim", 0) if case is None else max(case.head_dim, case.head_dim_v)
    sums = compile_all.SUMS[request.param]
    if not sums.takes(wide):
        pytest.skip(f"{request.param} is for head dims up to {sums.widest}")
    with torch_flash2.force("hopper", sums.config):
        yield


MORE = [
    Case("d96", 2, 4, 4, 500, 500, 96, 96, "bf16", "causal"),
    Case("one-group", 2, 8, 1, 70, 2000, 128, 128, "bf16"),
    Case("prefix", 1, 4, 2, 700, 700, 64, 64, "bf16", "prefix(130)"),
    Case("packed-used", 3, 4, 2, 500, 500, 64, 64, "bf16", "causal @ bottom-right", lengths="packed_used",
         documents=(1.0, 0.3, 0.6)),
]  # fmt: skip


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda case: case.name)
def test_against_math(case: Case, force: None) -> None:
    testing.check(case, device="cuda")


def gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, **keywords: Any) -> Any:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(torch_flash2.attention(*leaves, **keywords), leaves, grad)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", ["causal", "window(100, 50)"])
def test_nothing_leaks_from_behind_a_mask(mask: str, head_dim: int, force: None) -> None:
    leaks(mask, head_dim)


def leaks(mask: str, head_dim: int) -> None:
    """NaN keys and values reach dQ of the rows that see them and of no others."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, 4, n, head_dim, device="cuda", dtype=torch.bfloat16) for n in (500, 600, 600, 500))
    clean, _, _ = gradients(q, k, v, grad, mask=mask)
    k[:, :, 200] = float("nan")
    v[:, :, 201] = float("nan")
    dq, _, _ = gradients(q, k, v, grad, mask=mask)
    visible = torch_flash2.masks.parse(mask).visible(
        torch.arange(500, device="cuda")[:, None], torch.arange(600, device="cuda")[None], 500, 600
    )
    touched = visible[:, 200:202].any(-1)
    assert dq[:, :, touched].isnan().all()
    torch.testing.assert_close(dq[:, :, ~touched], clean[:, :, ~touched], atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_other_documents_and_padding_do_not_reach_a_gradient(head_dim: int, force: None) -> None:
    """Rows after the last document and padding hold NaN: gradients of documents are what they are without."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(1, 4, 700, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    cu = torch.tensor([0, 130, 130, 500, 650], dtype=torch.int32, device="cuda")
    lengths = torch_flash2.Lengths(cu_q=cu, cu_k=cu)
    clean = gradients(q, k, v, grad, mask="causal", lengths=lengths)
    for tensor in (q, k, v, grad):
        tensor[:, :, 650:] = float("nan")
    dirty = gradients(q, k, v, grad, mask="causal", lengths=lengths)
    for before, after in zip(clean, dirty, strict=True):
        torch.testing.assert_close(after, before, atol=1e-2, rtol=1e-2)
        assert (after[:, :, 650:] == 0).all()


# Where rows are as few as in most of these, programs would claim tasks.
CARRIED = compile_all.SUMS["hopper-carried"].config


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(
    "case",
    [
        Case("causal", 2, 4, 4, 500, 500, 128, 128, "bf16", "causal"),
        Case("long", 1, 2, 2, 4100, 4100, 128, 128, "bf16", "causal"),
        Case("full", 2, 4, 4, 333, 700, 128, 128, "fp16"),
        Case("group", 1, 8, 2, 700, 901, 128, 128, "bf16", "causal @ bottom-right"),
        Case("one-group", 2, 8, 1, 70, 2000, 128, 128, "bf16", "causal @ bottom-right"),
        Case("window", 2, 6, 3, 900, 900, 128, 128, "bf16", "causal & window(200, 0)"),
        Case("both-sides", 1, 4, 4, 800, 650, 128, 128, "fp16", "window(90, 130)"),
        Case("unseen", 1, 4, 4, 900, 300, 128, 128, "bf16", "window(40, 0)"),
        Case("prefix", 1, 4, 2, 700, 700, 128, 128, "bf16", "prefix(130)"),
        Case("chunk", 1, 4, 2, 700, 700, 96, 96, "bf16", "causal & chunk(150)"),
        Case("sinks", 1, 4, 2, 600, 600, 128, 128, "bf16", "causal", sinks=True),
    ],
    ids=lambda case: case.name,
)
def test_tma_adds_what_math_adds(case: Case) -> None:
    with torch_flash2.force("hopper", CARRIED):
        testing.check(case, device="cuda")


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("mask", ["causal", "window(100, 50)"])
def test_nothing_leaks_where_tma_adds(mask: str) -> None:
    with torch_flash2.force("hopper", CARRIED):
        leaks(mask, 128)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_programs_claim_tasks(head_dim: int, mask: str) -> None:
    """Far more tasks than programs: dK and dV have the bits that they have with a program for each task."""
    q, k, v, grad = (torch.randn(16, 16, 440, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    found = []
    for tasks in (1, 2):
        with torch_flash2.force("hopper", {"atomics": True, "fused": {"STAGES": 2, "TASKS": tasks}}):
            found.append(gradients(q, k, v, grad, mask=mask))
    assert torch.equal(found[0][1], found[1][1]) and torch.equal(found[0][2], found[1][2])
    torch.testing.assert_close(found[1][0], found[0][0], atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", ["full", "causal & window(700, 0)"])
def test_gradients_are_bit_equal(head_dim: int, mask: str) -> None:
    """Over more tiles than the GPU has multiprocessors: at head dim 64 that is the kernel with ordered additions."""
    q, k, v, grad = (torch.randn(8, 16, 1024, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch_flash2.force("hopper"):
            first = gradients(q, k, v, grad, mask=mask)
            for _ in range(50):
                assert all(map(torch.equal, first, gradients(q, k, v, grad, mask=mask)))
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.interpreter
def test_marked_tiles_of_dq_are_computed_again() -> None:
    """Those, no others, by programs that have more tiles each than they look at together."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, 4, 176, 32, dtype=torch.float16) for _ in range(4))
    posed, call = compile_all.posed(Case("x", 2, 4, 4, 176, 176, 32, 32, "fp16", "causal"), "backward", "sm90")
    one = dataclasses.replace(posed.hardware, multiprocessors=1)
    posed, call = dataclasses.replace(posed, hardware=one), call._replace(query=q, key=k, value=v)
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    hidden = torch.ones(176, 176, dtype=torch.bool).triu(1)
    scores = (leaves[0] @ leaves[1].mT * 32**-0.5).masked_fill(hidden, -torch.inf)
    out = scores.softmax(-1) @ leaves[2]
    (expected,) = torch.autograd.grad(out, leaves[0], grad.float())
    stats = launch_stats(call, out.detach().half(), scores.detach().logsumexp(-1), grad, None)
    flags = (torch.rand(2 * 4 * 11) < 0.2).int()
    marked = flags.view(2, 4, 11).flip(2).bool().repeat_interleave(16, 2)
    found = torch.full_like(q, 7.0)
    backward._repair_queries(posed, call, grad, stats, found, flags, 16)
    assert not flags.any()
    assert (found[~marked] == 7.0).all()
    torch.testing.assert_close(found[marked].float(), expected[marked], atol=2e-2, rtol=2e-2)
