"""The Hopper forward with keys split among programs: when it does that, what ptxas made of it, its results on a GPU."""

from __future__ import annotations

import compile_all
import pytest
import torch
from test_hopper import hold_leaks, hold_main_loop, hold_to_math, hopper

from torch_flash2 import testing
from torch_flash2.testing import Case

pytest.importorskip("triton")

CASES = (
    Case("causal", 1, 4, 1, 300, 3000, 128, 128, mask="causal @ bottom-right"),
    Case("square", 1, 4, 4, 1500, 1500, 128, 128, mask="causal"),
    Case("sinks", 1, 2, 2, 200, 2500, 64, 64, "fp16", sinks=True),
    Case("nothing-seen", 1, 2, 1, 1300, 1200, 64, 64, mask="causal @ bottom-right", sinks=True),
    Case("softcap", 1, 4, 2, 513, 4000, 256, 256, mask="window(-, 7) @ bottom-right", softcap=20.0),
    Case("alibi", 1, 2, 2, 400, 2000, 128, 128, mask="causal @ bottom-right", alibi=1),
    Case("dropout", 2, 2, 1, 150, 2100, 64, 64, dropout_p=0.2, layout="bshd"),
    Case("lengths", 3, 4, 1, 200, 4000, 128, 128, mask="causal @ bottom-right", lengths="padded",
         documents=(1.0, 0.4, 0.0), documents_k=(0.3, 1.0, 0.001)),
    Case("growing", 1, 2, 2, 256, 3000, 128, 128, tags=("growing",)),
    Case("latent-prefill", 1, 2, 2, 260, 3000, 192, 128, mask="causal @ bottom-right"),
    Case("few-rows", 1, 8, 2, 40, 6000, 128, 128, mask="causal @ bottom-right"),
    Case("wide", 1, 2, 1, 130, 5000, 256, 256, "fp16"),
)  # fmt: skip


def splits(case: Case) -> int:
    from torch_flash2.kernels.hopper import forward

    posed = compile_all.posed(case, "forward", "sm90")[0]
    return forward.key_splits(posed, forward.config(posed))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_are_split(case: Case) -> None:
    assert splits(case) > 1


@pytest.mark.parametrize(
    "case",
    [
        Case("busy", 4, 32, 8, 512, 8192, 128, 128),
        Case("nearly", 1, 8, 8, 2048, 8192, 128, 128),
        Case("few-keys", 1, 4, 4, 300, 400, 128, 128),
        Case("window", 1, 4, 4, 300, 9000, 128, 128, mask="window(3000, 0)"),
        Case("packed", 2, 2, 2, 600, 6000, 128, 128, lengths="packed", documents=(0.5, 0.5)),
        Case("odd-columns", 1, 2, 2, 300, 4000, 96, 80),
    ],
    ids=lambda case: case.name,
)
def test_what_is_not_split(case: Case) -> None:
    assert splits(case) == 1


def test_a_given_number_of_splits_is_for_few_rows() -> None:
    """Its results may depend on nothing but it and a segment's own length."""
    from torch_flash2.kernels.hopper import forward

    posed, call = compile_all.posed(CASES[0], "forward", "sm90")
    config = forward.config(posed)
    assert forward._count(posed, config, call) > 1 == forward._count(posed, config, call._replace(num_splits=4))


def test_few_tiles_with_few_keys_are_refused() -> None:
    expecttest = pytest.importorskip("expecttest")
    from torch_flash2.kernels.hopper import forward

    few = compile_all.posed(Case("few", 1, 4, 4, 300, 400, 128, 128), "forward", "sm90")[0]
    expecttest.assert_expected_inline(
        "; ".join(forward.rather_not(few)),
        """its tiles of 128 query rows would keep less than half of the GPU busy, and its keys are too few to split""",
    )
    assert not list(forward.rather_not(compile_all.posed(CASES[0], "forward", "sm90")[0]))


@pytest.mark.compile
@pytest.mark.parametrize(
    ("width", "feature", "seqlen"),
    [
        ((64, 64), "full", 4096), ((128, 128), "causal", 4096), ((256, 256), "softcap", 4096),
        # Rows of the table for tasks of few keys.
        ((64, 64), "full", 512), ((128, 128), "causal", 512),
    ],
)  # fmt: skip
def test_main_loop(width: tuple[int, int], feature: str, seqlen: int) -> None:
    hold_main_loop(width, feature, seqlen, splits=3)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_math(case: Case) -> None:
    hold_to_math(case)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("name", ["causal", "lengths", "softcap"])
def test_launches_are_equal(name: str) -> None:
    """Also those that repeat the second one as it was recorded."""
    (case,) = (case for case in CASES if case.name == name)
    hold_launches_equal(case)


def hold_launches_equal(case: Case) -> None:
    """Four launches, of which the last two repeat the second, give the same bits."""
    inputs = case.inputs("cuda")
    with torch.no_grad():
        first, *others = (testing.run_attention(inputs) for _ in range(4))
    # Rows of padding may hold anything.
    padded = case.lengths is not None
    for other in others:
        for a, b in zip(first, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=padded)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(("mask", "dim"), [("causal @ bottom-right", 64), ("causal", 128), ("window(-, 50)", 256)])
def test_nothing_leaks_from_behind_a_mask(mask: str, dim: int) -> None:
    """NaN and infinite keys and values, in one split, reach the rows that see them and no others."""
    hold_leaks(mask, (1, 2, 1200, dim), 1500, 1000)
