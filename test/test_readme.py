"""The README: its Python runs, its links lead somewhere, and it knows every setting."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch

from benchmarks.suites import SUITES
from torch_flash2 import settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# Packages whose blocks run where they are installed.
OPTIONAL = {"transformers"}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def test_python_runs() -> None:
    torch.manual_seed(0)
    # What other tests compiled would make `enabled` warn.
    torch._dynamo.reset()
    namespace: dict[str, Any] = {}
    blocks = list(BLOCK.finditer(README))
    assert blocks
    for block in blocks:
        imported = set(re.findall(r"^(?:from|import) (\w+)", block[1], re.M))
        if any(importlib.util.find_spec(name) is None for name in imported & OPTIONAL):
            continue
        # Line numbers of a traceback are those of the README.
        source = "\n" * README.count("\n", 0, block.start(1)) + block[1]
        exec(compile(source, str(ROOT / "README.md"), "exec"), namespace)
        assert max(map(len, block[1].splitlines())) <= 120


def test_links() -> None:
    headings = {
        re.sub(r"[^\w -]", "", text).strip().lower().replace(" ", "-")
        for text in re.findall(r"^#+ (.*)$", README, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (ROOT / target).exists(), target


def test_settings_are_listed() -> None:
    listed = set(re.findall(r"^\| `(TORCH_FLASH2\w*)` \|", README, re.M))
    assert listed == set(settings.DEFAULTS)


def test_measured_blocks() -> None:
    names = re.findall(r"<!-- benchmarks:(\S+) -->", README)
    assert names == re.findall(r"<!-- /benchmarks:(\S+) -->", README) and len(names) == len(set(names))
    assert {name.removesuffix("-ratios") for name in names} <= set(SUITES)
