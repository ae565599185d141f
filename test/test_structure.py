"""The shape of the code: sizes of files and functions, and the one direction of imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from torch_flash2 import dispatch
from torch_flash2.kernels.hopper import generate

ROOT = Path(__file__).parents[1]
FILES = sorted(path for top in ("torch_flash2", "benchmarks", "test") for path in ROOT.glob(f"{top}/**/*.py"))
PACKAGE = [path for path in FILES if path.is_relative_to(ROOT / "torch_flash2")]
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 600, 120, 16
# Scalar functions have a parameter for each element that a thread holds.
GENERATED = ROOT / "torch_flash2/kernels/hopper/lanes.py"
# Functions whose parameters are fixed elsewhere: flash-attn's.
FIXED = {
    "v2.py": ("flash_attn_with_kvcache",),
    "v3.py": ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"),
}

# From the top down. A module imports from lower layers, and of its own layer from its own folder.
LAYERS = (
    ("__main__", "oracle", "testing", "flash_attn", "flash_attn_interface", "transformers"),
    ("cli", "frontends"),
    ("",),  # torch_flash2 itself: what is public
    ("attention", "caches"),
    ("judging",),
    ("direct", "policy", "stock"),
    ("ops",),
    ("dispatch", "flops", "checks"),
    ("kernels",),
    # What launches of Triton and of Gluon kernels share.
    (
        "kernels.triton.launching",
        "kernels.triton.recording",
        "kernels.triton.tables",
        "kernels.triton.common",
        "kernels.triton.splitting",
        "kernels.triton.statistics",
        "kernels.triton.query_gradient",
    ),  # fmt: skip
    ("kernels.device",),
    ("kernels.bundles",),
    ("problem",),
    ("masks", "scores"),
    ("_version", "autoload", "hardware", "replacing", "settings"),
)
# The package gathers what is public, and what tests share stands beside it: no rule for these.
FREE = ("", "oracle", "testing")
KERNELS = {module for modules in dispatch.KERNELS.values() for module in modules.values()}


def name_of(path: Path) -> str:
    """A file's dotted module name inside torch_flash2, "" for the package itself."""
    parts = path.relative_to(ROOT / "torch_flash2").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in PACKAGE}


def layer(module: str) -> int:
    """The index of the most specific entry of LAYERS that covers a module."""
    covers = {
        entry: index
        for index, entries in enumerate(LAYERS)
        for entry in entries
        if module == entry or entry and module.startswith(f"{entry}.")
    }
    assert covers, f"torch_flash2/{module.replace('.', '/')}: test_structure.LAYERS must name its layer"
    return covers[max(covers, key=len)]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every import of torch_flash2's own modules, those inside functions too."""
    package = list(path.relative_to(ROOT / "torch_flash2").parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name.split(".") for alias in node.names]
            found = [parts[1:] for parts in found if parts[0] == "torch_flash2"]
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + base
            elif base[0] == "torch_flash2":
                base = base[1:]
            else:
                continue
            # A name may be a module of its own, or something inside one.
            found = [[*base, alias.name] if ".".join([*base, alias.name]) in MODULES else base for alias in node.names]
        else:
            continue
        for parts in found:
            yield node.lineno, ".".join(parts)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def fail_with(problems: list[str]) -> None:
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def test_files_are_short() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in FILES}
    fail_with(
        [
            f"{path.relative_to(ROOT)}: {count} lines, a file has at most {MAX_FILE}"
            for path, count in lines.items()
            if count > MAX_FILE
        ]
    )


def test_functions_are_short() -> None:
    problems = []
    for path in FILES:
        for function in functions(path) if path != GENERATED else ():
            assert function.end_lineno is not None
            where = f"{path.relative_to(ROOT)}:{function.lineno}: {function.name}"
            lines = function.end_lineno - function.lineno + 1
            if lines > MAX_FUNCTION:
                problems.append(f"{where} has {lines} lines, a function has at most {MAX_FUNCTION}")
            given = function.args
            named = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
            count = named + (given.vararg is not None) + (given.kwarg is not None)
            if count > MAX_PARAMETERS and function.name not in FIXED.get(path.name, ()):
                problems.append(f"{where} has {count} parameters, a function has at most {MAX_PARAMETERS}")
    fail_with(problems)


def test_imports_go_one_way() -> None:
    problems = []
    for path in PACKAGE:
        module = name_of(path)
        if module in FREE:
            continue
        for line, target in imports(path):
            same_folder = module.rpartition(".")[0] == target.rpartition(".")[0] != "" or target.startswith(
                f"{module}."
            )
            below = layer(target) > layer(module)
            if not below and not (layer(target) == layer(module) and same_folder):
                problems.append(
                    f"{path.relative_to(ROOT)}:{line}: {module} imports "
                    f"{target or 'torch_flash2'}, which is not below it in test_structure.LAYERS"
                )
            if module in KERNELS and target in KERNELS:
                problems.append(
                    f"{path.relative_to(ROOT)}:{line}: kernel {module} imports kernel {target}; "
                    "kernels never import one another, dispatch composes them"
                )
            # A front-end is a file or a folder.
            own, other = module.split(".")[:2], target.split(".")[:2]
            if own[0] == other[0] == "frontends" and own != other:
                problems.append(
                    f"{path.relative_to(ROOT)}:{line}: front-end {module} imports front-end "
                    f"{target}; front-ends never import one another"
                )
    fail_with(problems)


def run(code: str) -> None:
    """Run code in a fresh process, warnings being errors."""
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_import_is_light() -> None:
    run(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import torch_flash2\n"
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert 'triton' not in loaded, 'import torch_flash2 imports triton'\n"
        "assert not torch.cuda.is_initialized(), 'import torch_flash2 initialises CUDA'\n"
    )


def test_works_without_triton() -> None:
    run(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, torch_flash2\n"
        "q = torch.randn(1, 2, 5, 8, requires_grad=True)\n"
        "torch_flash2.attention(q, q, q, mask='causal').sum().backward()\n"
        "assert q.grad.isfinite().all()\n"
    )


def test_generated_file_is_current() -> None:
    assert GENERATED.read_text() == generate.source()
