"""A fixed sample of the kernels compiles for every architecture within its limits; compile_all.py is the rest."""

from __future__ import annotations

import os

import compile_all
import pytest

pytestmark = pytest.mark.compile


def test_sample() -> None:
    pytest.importorskip("triton")
    outcomes = compile_all.run(list(compile_all.sample()), os.cpu_count() or 1)
    failures = [outcome for outcome in outcomes if outcome.problem]
    assert not failures, "\n".join(map(str, failures))
