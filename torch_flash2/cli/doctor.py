"""doctor: what this machine has, which kernels run on it, and what is missing and how to get it."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

import torch_flash2

from .. import dispatch, hardware, masks, settings
from ..problem import Problem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def main(arguments: argparse.Namespace) -> int:
    _section("versions", _versions())
    _section("devices", _devices())
    _section("kernels", _kernels())
    _section("Triton", _triton())
    _section("settings", _settings())
    return 0


def _section(title: str, rows: Iterator[tuple[str, str]]) -> None:
    print(title)
    for name, text in rows:
        first, *more = text.splitlines() or [""]
        print(f"  {name:<20} {first}")
        for line in more:
            print(f"  {'':<20} {line}")
    print()


def _versions() -> Iterator[tuple[str, str]]:
    yield "torch_flash2", f"{torch_flash2.__version__} in {Path(__file__).parents[1]}"
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", torch.__version__
    yield "triton", _version("triton") or "not installed"
    yield "CUDA", torch.version.cuda or "none: this torch is built without it"
    # Asking for cuDNN's version loads it; a torch without CUDA has none.
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    yield "cuDNN", str(cudnn or "none")
    yield "driver", _driver()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: nvidia-smi does not run ({type(error).__name__})"
    return answer.stdout.strip().partition("\n")[0]


def _devices() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        yield f"cuda:{index}", f"{hardware.of(torch.device('cuda', index))}, {memory:.0f} GiB"


def _kernels() -> Iterator[tuple[str, str]]:
    for name in dispatch.KERNELS:
        lines = []
        if name not in ("cpu", "reference"):
            lines = [f"{what}: {remedy}" for what, remedy in _missing()]
        # Only the kernel knows what else it asks of a machine; a plain call brings that out.
        lines = lines or [*dict.fromkeys(_reasons(name))]
        yield name, "\n".join(["not here", *lines] if lines else ["available"])


def _reasons(kernel: str) -> Iterator[str]:
    on_gpu = torch.cuda.is_available() and kernel != "cpu"
    device = hardware.of(torch.device("cuda" if on_gpu else "cpu"))
    dtype = torch.bfloat16 if on_gpu else torch.float32
    for direction in ("forward", "backward"):
        problem = Problem(
            direction=direction,
            hardware=device,
            dtype=dtype,
            batch=2,
            heads=8,
            heads_kv=8,
            seqlen_q=1024,
            seqlen_k=1024,
            head_dim=128,
            head_dim_v=128,
            mask=masks.causal(),
            needs_grad=True,
        )
        yield from dispatch.why_not(kernel, problem)


def _missing() -> Iterator[tuple[str, str]]:
    """What Triton kernels need that is not here, and how to get it."""
    if importlib.util.find_spec("triton") is None:
        if sys.platform == "linux":
            yield (
                "Triton is not installed",
                "pip install 'triton>=3.6'; CUDA builds of torch bring it",
            )
        else:
            yield "Triton is not installed", "it runs on Linux"
    if torch.version.cuda is None:
        yield "this torch is built without CUDA", "install a CUDA build, see pytorch.org"
    elif not torch.cuda.is_available():
        yield (
            "torch sees no GPU",
            "look at nvidia-smi, CUDA_VISIBLE_DEVICES and the driver's version",
        )
    elif (compiler := _compiler()) is None:
        yield "no C compiler", "Triton builds its launcher with it: apt install gcc, or set CC"
    elif not _python_header().is_file():
        yield (
            f"no {_python_header()}",
            f"{compiler} needs it for Triton's launcher: apt install python3-dev",
        )


def _compiler() -> str | None:
    """The C compiler that Triton would take."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def _python_header() -> Path:
    return Path(sysconfig.get_paths()["include"]) / "Python.h"


def _triton() -> Iterator[tuple[str, str]]:
    yield "C compiler", _compiler() or "none"
    yield "Python.h", "found" if _python_header().is_file() else f"not at {_python_header()}"
    home = Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~"))
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    # The cache is made at first use: until then its nearest parent decides.
    folder = next(path for path in (cache, *cache.parents) if path.exists())
    state = "writable" if os.access(folder, os.W_OK | os.X_OK) else "not writable: set TRITON_CACHE_DIR"
    yield "cache", f"{cache}, {state}"


def _settings() -> Iterator[tuple[str, str]]:
    for variable in settings.VARIABLES:
        yield variable.name, f"{settings.value(variable.name) or 'not set':<10} {variable.meaning}"
    yield "fp32 products", f"{settings.matmul_precision()} on CUDA"
