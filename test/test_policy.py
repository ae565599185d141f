"""Which calls are worth taking: classes, the measured table and how it is made."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.sdpa
from torch_flash2 import hardware, policy
from torch_flash2.masks import causal
from torch_flash2.policy import CallClass
from torch_flash2.problem import Problem

SHIFTED = causal(align="bottom-right")
H200 = dataclasses.replace(hardware.simulated("sm90"), name="NVIDIA H200")


def posed(**options: Any) -> Problem:
    fields = dict(direction="forward", hardware=H200, dtype=torch.bfloat16, batch=1, heads=8, heads_kv=8)
    fields.update(seqlen_q=512, seqlen_k=512, head_dim=128, head_dim_v=128)
    return Problem(**{**fields, **options})


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """policy.json elsewhere, to be written."""
    path = tmp_path / "policy.json"
    monkeypatch.setattr(policy, "POLICY", path)
    policy.table.cache_clear()
    yield path
    policy.table.cache_clear()


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({}, CallClass("inference", 16, 128, "full", "short", False, False)),
        ({"mask": causal(), "needs_grad": True}, CallClass("training", 16, 128, "causal", "short", False, False)),
        ({"dense": True, "seqlen_k": 1025}, CallClass("inference", 16, 128, "mask", "long", False, False)),
        ({"steps": ("bias",), "dropout": True}, CallClass("inference", 16, 128, "bias", "short", False, True)),
        ({"mask": SHIFTED}, CallClass("inference", 16, 128, "causal", "short", False, False)),
        ({"mask": SHIFTED, "seqlen_q": 9}, CallClass("inference", 16, 128, "lower-right", "few", False, False)),
        ({"seqlen_q": 1, "heads_kv": 2}, CallClass("inference", 16, 128, "full", "few", True, False)),
        ({"head_dim": 192, "dtype": torch.float32}, CallClass("inference", 32, 256, "full", "short", False, False)),
        ({"head_dim_v": 600}, CallClass("inference", 16, 600, "full", "short", False, False)),
    ],
)  # fmt: skip
def test_classes(options: dict[str, Any], wanted: CallClass) -> None:
    assert policy.class_of(posed(**options)) == wanted


def row(found: CallClass, ours_ms: float, stock_ms: float, **more: Any) -> dict[str, Any]:
    shared = dict(gpu="NVIDIA H200", stock="CUDNN_ATTENTION", torch="2.11.0", date="2026-11-21")
    return {**shared, "class": found._asdict(), "ours_ms": ours_ms, "stock_ms": stock_ms, **more}


def test_what_was_measured_decides(table: Path) -> None:
    full = policy.class_of(posed())
    table.write_text(json.dumps([row(full, 1.0, 1.5), row(full._replace(kind="causal"), 1.0, 0.9)]))
    taken, reason = policy.faster(posed(), "CUDNN_ATTENTION")
    assert taken and "CUDNN_ATTENTION takes 1.50 times as long as ours (inference, 16 bits, D<=128, full" in reason
    assert "NVIDIA H200, torch 2.11.0, 2026-11-21" in reason
    assert not policy.faster(posed(mask=causal()), "CUDNN_ATTENTION")[0]
    # The same without shared heads stands for them; another choice of PyTorch's, or another GPU, was not measured.
    assert policy.faster(posed(heads_kv=2), "CUDNN_ATTENTION")[0]
    taken, reason = policy.faster(posed(), "FLASH_ATTENTION")
    assert not taken and reason.startswith("not measured on NVIDIA H200")
    for dims in ({"head_dim": 72, "head_dim_v": 72}, {"head_dim_v": 64}):
        assert policy.faster(posed(**dims), "CUDNN_ATTENTION")[1].startswith("not measured")
    other = dataclasses.replace(H200, name="NVIDIA A100")
    assert not policy.faster(posed(hardware=other), "CUDNN_ATTENTION")[0]
    for slow in ("MATH", "EFFICIENT_ATTENTION"):
        assert policy.faster(posed(hardware=other), slow)[0]


def test_the_table_in_the_repository() -> None:
    policy.table.cache_clear()
    for (gpu, found), measured in policy.table().items():
        assert gpu and found.kind in ("full", "causal", "lower-right", "mask", "bias") and measured.gain > 0
        assert found.rows in ("few", "short", "long") and found.pass_ in ("inference", "training")


def test_writing_the_table(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.sdpa, "RESULTS", tmp_path)
    folder = tmp_path / "h200"
    folder.mkdir()
    found = CallClass("training", 16, 64, "causal", "short", False, False)

    def measured(M: int, ours_ms: float, stock_ms: float) -> dict[str, Any]:
        sizes = dict(zip(benchmarks.sdpa.SIZES, (1, 8, 8, M, M, 64), strict=True))
        shared = dict(date="2026-11-21", device="NVIDIA H200", torch="2.11.0", stock="CUDNN_ATTENTION")
        return {**shared, **found._asdict(), **sizes, "ours_ms": ours_ms, "stock_ms": stock_ms}

    with (folder / "sdpa.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, benchmarks.sdpa.COLUMNS, restval="")
        writer.writeheader()
        # The second size gains least; its older row counts no more.
        writer.writerows([measured(128, 1.0, 2.0), measured(512, 1.0, 0.5), measured(512, 1.0, 1.5)])
    benchmarks.sdpa.write()
    ((gpu, written),) = policy.table()
    assert (gpu, written) == ("NVIDIA H200", found) and policy.table()[gpu, written].gain == 1.5


def test_parts() -> None:
    assert benchmarks.sdpa.part("2/3") == (2, 3)
    for wrong in ("0/3", "4/3", "2", "a/b", "1/0"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be such as 2/3"):
            benchmarks.sdpa.part(wrong)


def test_every_point_is_of_its_class() -> None:
    for point in benchmarks.sdpa.points():
        found = point.found
        options = dict(seqlen_q=point.M, seqlen_k=point.N, heads=point.H, heads_kv=point.G)
        options.update(
            head_dim=point.D, head_dim_v=point.D, dropout=found.dropout, needs_grad=found.pass_ == "training"
        )
        options["dtype"] = torch.bfloat16 if found.bits == 16 else torch.float32
        options.update(
            {
                "causal": {"mask": causal()},
                "lower-right": {"mask": SHIFTED},
                "mask": {"dense": True},
                "bias": {"steps": ("bias",)},
            }.get(found.kind, {})
        )
        assert policy.class_of(posed(**options)) == found
