"""Kernels compile for every architecture, and once for all lengths; compile_all.py is the full matrix."""

from __future__ import annotations

import os

import compile_all
import pytest

from torch_flash2.testing import Case

pytest.importorskip("triton")
pytestmark = pytest.mark.compile


def test_sample() -> None:
    outcomes = compile_all.run(list(compile_all.sample()), os.cpu_count() or 1)
    failures = [outcome for outcome in outcomes if outcome.problem]
    assert not failures, "\n".join(map(str, failures))


@pytest.mark.parametrize("direction", compile_all.DIRECTIONS)
@pytest.mark.parametrize("lengths", [None, "packed"])
def test_numbers_compile_nothing_anew(direction: str, lengths: str | None) -> None:
    """Lengths, batch, heads, the size of groups, the window, dropout: none decides what is compiled."""
    found = set()
    for B, H, G, M, N, left, dropout_p in (
        (1, 2, 1, 256, 256, 16, 0.5),
        (2, 6, 2, 255, 1, 1, 0.1),
        (3, 8, 1, 1, 1000, 0, 0.3),
    ):
        documents = (1.0,) * B if lengths else ()
        case = Case(
            "x", B, H, G, M, N, 64, 64, "fp16", f"window({left}, 0)",
            dropout_p=dropout_p, lengths=lengths, documents=documents,
        )  # fmt: skip
        _, kernels = compile_all.compile_case(case, direction, "sm80")
        found.add(tuple(kernel.hash for kernel in kernels))
    assert len(found) == 1
