"""What all tests share: skips by machine and process, and the profiles of hypothesis."""

from __future__ import annotations

import ast
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Graphs that Inductor cached on disk may come from other versions of this library.
_cache = tempfile.TemporaryDirectory(prefix="torch_flash2-inductor-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _cache.name

ROOT = Path(__file__).parents[1]


def share_gpus(worker: int, count: int) -> None:
    """Let each worker of pytest-xdist begin its count of GPUs at another one; all of them stay visible."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(number) for number in range(count)]
    first = worker % len(gpus)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first:] + gpus[:first])


# Asked before CUDA starts, torch counts GPUs through NVML: a process reads the variable once, when it starts CUDA.
if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.device_count() > 1:
    share_gpus(int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")), torch.cuda.device_count())

settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("dev", deadline=None, max_examples=100)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


def spread(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """The tests in an order in which each of so many workers, which share them out in runs of equal length, begins with
    a slow one."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    order = [item for item in items if not item.get_closest_marker("slow")]
    for number, item in enumerate(slow):
        order.insert(number % workers * len(items) // workers, item)
    return order


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine or this process cannot run; slow tests first."""
    items[:] = spread(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    skips = {}
    if not torch.cuda.is_available():
        skips["gpu"] = "needs a GPU: torch.cuda.is_available() is False"
    if interpreted:
        skips["compile"] = "compiles kernels: TRITON_INTERPRET must not be set"
    else:
        skips["interpreter"] = "needs a process of its own: TRITON_INTERPRET=1 pytest -m interpreter"
    for item in items:
        for marker, reason in skips.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def released(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give a test's GPU memory back: other workers' tests need it."""
    yield
    if request.node.get_closest_marker("gpu") and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what setup.py installs beside the package itself: the autoload module and its entry point."""
    keywords = next(
        node.keywords
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    )
    declared = {word.arg: word.value for word in keywords}
    (points,) = ast.literal_eval(declared["entry_points"])["torch.backends"]
    (source,) = ast.literal_eval(declared["package_dir"]).values()
    folder = tmp_path_factory.mktemp("site")
    package = folder / points.partition("=")[2].partition(":")[0].strip()
    package.mkdir()
    (package / "__init__.py").write_text((ROOT / source / "__init__.py").read_text())
    info = folder / "torch_flash2-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_flash2\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[torch.backends]\n{points}\n")
    return folder
