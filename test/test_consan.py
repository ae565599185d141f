"""Races in shared memory, looked for by Gluon's concurrency sanitizer; see consan.py."""

from __future__ import annotations

import importlib

import consan
import pytest
import torch
import triton

SECONDS = 900


def needs_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("Hopper kernels")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("ConSan of Triton before 3.9 makes programs that are too large for ptxas")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", consan.CALLS)
def test_no_race(name: str) -> None:
    needs_hopper()
    status, said = consan.in_process(name, None, SECONDS)
    assert status == 0, said


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("edit", consan.EDITS)
def test_what_is_left_out_is_reported(edit: str) -> None:
    needs_hopper()
    status, said = consan.in_process(consan.EDITS[edit].call, edit, SECONDS)
    assert status != 0 and "Assertion" in said, said


@pytest.mark.parametrize("change", [*consan.EDITS.values(), *consan.FENCES], ids=lambda change: change.line)
def test_edits_find_their_line(change: consan.Edit) -> None:
    kernel = getattr(importlib.import_module(f"torch_flash2.kernels.hopper.{change.module}"), change.function)
    assert kernel.src.count(change.line) == 1 and change.call in ("", *consan.CALLS)
