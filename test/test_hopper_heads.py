"""The Hopper forward where query heads of a group share a tile: when they do, what ptxas made of it, its results on a
GPU."""

from __future__ import annotations

import compile_all
import pytest
from test_hopper import hold_leaks, hold_main_loop, hold_to_math, hopper
from test_hopper_splits import hold_launches_equal

import torch_flash2
from torch_flash2.testing import Case

pytest.importorskip("triton")

# How many heads share a tile, and into how many parts keys are split.
CASES = (
    (4, 16, Case("full", 1, 32, 8, 32, 16384, 128, 128, layout="bshd")),
    (4, 16, Case("causal", 1, 32, 8, 31, 16000, 128, 128, mask="causal @ bottom-right")),
    (2, 16, Case("two", 1, 16, 4, 50, 5000, 128, 128, "fp16", mask="causal @ bottom-right", sinks=True)),
    (8, 8, Case("eight", 2, 16, 2, 14, 4096, 64, 64, mask="causal @ bottom-right", sinks=True)),
    (4, 1, Case("unsplit", 48, 16, 4, 30, 700, 128, 128, mask="causal @ bottom-right", sinks=True)),
    (4, 1, Case("top-left", 48, 8, 2, 25, 300, 64, 64, mask="causal", layout="bshd")),
    (2, 1, Case("window", 70, 8, 4, 64, 900, 96, 96, mask="window(200, 3) @ bottom-right", softcap=20.0)),
    (8, 1, Case("wide", 80, 16, 2, 15, 500, 256, 256, "fp16", mask="causal @ bottom-right")),
    (4, 1, Case("latent-prefill", 40, 16, 4, 29, 600, 192, 128, mask="causal @ bottom-right")),
    (2, 21, Case("softcap", 1, 12, 2, 40, 9000, 256, 256, mask="causal @ bottom-right", softcap=30.0)),
    (4, 7, Case("lengths", 3, 16, 4, 32, 2200, 128, 128, mask="causal @ bottom-right", lengths="padded",
                documents=(1.0, 0.4, 0.0), documents_k=(0.3, 1.0, 0.001))),
    (4, 1, Case("chunk", 40, 8, 2, 32, 500, 128, 128, mask="causal & chunk(100) @ bottom-right")),
)  # fmt: skip


def of(case: Case) -> tuple[int, int]:
    from torch_flash2.kernels.hopper import forward

    posed = compile_all.posed(case, "forward", "sm90")[0]
    assert not list(forward.why_not(posed)) and not list(forward.rather_not(posed))
    config = forward.config(posed)
    return forward.packed(posed, config.GROUPS), forward.key_splits(posed, config)


@pytest.mark.parametrize(("heads", "splits", "case"), CASES, ids=lambda x: getattr(x, "name", x))
def test_heads_share_tiles(heads: int, splits: int, case: Case) -> None:
    assert of(case) == (heads, splits)


@pytest.mark.parametrize(
    "case",
    [
        Case("alone", 64, 8, 8, 64, 2048, 128, 128),
        Case("long", 16, 32, 8, 65, 2048, 128, 128),
        Case("no-fewer", 64, 6, 2, 64, 2048, 128, 128),
        Case("alibi", 64, 32, 8, 32, 2048, 128, 128, mask="causal", alibi=1),
        Case("dropout", 64, 32, 8, 32, 2048, 128, 128, dropout_p=0.1),
        Case("packed", 4, 32, 8, 32, 2048, 128, 128, lengths="packed", documents=(1.0, 0.5, 0.5, 0.5)),
    ],
    ids=lambda case: case.name,
)
def test_heads_that_do_not(case: Case) -> None:
    from torch_flash2.kernels.hopper import forward

    posed = compile_all.posed(case, "forward", "sm90")[0]
    assert forward.packed(posed, 2) == 1


def test_tiles_that_heads_do_not_fill_are_refused() -> None:
    expecttest = pytest.importorskip("expecttest")
    from torch_flash2.kernels.hopper import forward

    posed = compile_all.posed(Case("x", 64, 8, 4, 32, 2048, 128, 128), "forward", "sm90")[0]
    expecttest.assert_expected_inline(
        "; ".join(forward.rather_not(posed)),
        """with 64 query rows or fewer half of its tiles would be empty""",
    )


@pytest.mark.compile
@pytest.mark.parametrize(("width", "feature"), [((64, 64), "full"), ((128, 128), "causal"), ((256, 256), "softcap")])
def test_main_loop(width: tuple[int, int], feature: str) -> None:
    hold_main_loop(width, feature, 4096, heads=2)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("case", [case for *_, case in CASES], ids=lambda case: case.name)
def test_against_math(case: Case) -> None:
    # Calls of up to 16 rows go to the decoding kernel otherwise.
    with torch_flash2.force("hopper"):
        hold_to_math(case)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("name", ["causal", "unsplit"])
def test_launches_are_equal(name: str) -> None:
    (case,) = (case for *_, case in CASES if case.name == name)
    hold_launches_equal(case)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(
    ("mask", "shape", "N", "at"),
    [
        ("causal @ bottom-right", (1, 2, 30, 128), 4000, 3980),
        ("causal @ bottom-right", (60, 3, 40, 64), 300, 280),
        ("window(-, 50)", (40, 2, 33, 256), 500, 60),
    ],
)
def test_nothing_leaks_from_behind_a_mask(mask: str, shape: tuple[int, int, int, int], N: int, at: int) -> None:
    hold_leaks(mask, shape, N, at, group=4)
