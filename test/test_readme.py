"""The README: its Python runs, its links lead somewhere, and it knows every setting."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.__main__
import torch_flash2.__main__
from benchmarks import report
from benchmarks.suites import MODULES, SUITES
from torch_flash2 import settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# Packages whose blocks run where they are installed.
OPTIONAL = {"transformers"}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
SHELL = re.compile(r"^```bash\n(.*?)^```$", re.M | re.S)


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


def commands() -> list[list[str]]:
    """The words of every line of the shell blocks, here and in the benchmarks' README."""
    texts = [README, (ROOT / "benchmarks/README.md").read_text()]
    blocks = [block.replace("\\\n", " ") for text in texts for block in SHELL.findall(text)]
    lines = [line for block in blocks for line in block.splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Those that are quick run; of the others, targets exist and arguments are understood."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert arguments[0] in targets
        (options,) = [word.removeprefix("ARGS=") for word in arguments[1:]] or [""]
        assert arguments[0] == "bench" or not options
        words = ["python", "-m", "benchmarks", *shlex.split(options)] if options else []
    elif program == "pip":
        assert arguments == ["install", "."] and (ROOT / "setup.py").exists()
        words = []
    if not words:
        return
    assert Path(words[0]).name == "python" and words[1] == "-m"
    module, arguments = words[2], words[3:]
    if module == "pytest":
        assert arguments[:2] == ["test", "-m"] and f'"{arguments[2]}:' in (ROOT / "pyproject.toml").read_text()
    elif module == "torch_flash2":
        assert torch_flash2.__main__.main(arguments) in (0, 1) and capsys.readouterr().out
    else:
        assert module == "benchmarks"
        arguments = arguments if arguments[0] in ("tune", "report") else ["run", *arguments]
        parsed = benchmarks.__main__.parser().parse_args(arguments)
        assert set(getattr(parsed, "suite", None) or ()) <= {*SUITES, *MODULES}


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
    assert {name.removesuffix("-ratios") for name in names} <= {*SUITES, *MODULES}


def test_tables_and_charts_are_of_the_csvs() -> None:
    """What `python -m benchmarks report benchmarks/results/h200 --readme README.md` writes is what is there."""
    folder = ROOT / "benchmarks/results/h200"
    texts, drawings = report.sections(folder)
    assert report.fill(README, texts) == README
    shown = re.findall(r"\((benchmarks/results/h200/\S+\.svg)\)", README)
    assert shown and {Path(path).name for path in shown} <= set(drawings)
    for name, drawing in drawings.items():
        assert (folder / name).read_text() == drawing, name
