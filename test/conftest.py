"""What all tests share: skips by machine and process, and the profiles of hypothesis."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings

# Graphs that Inductor cached on disk may come from other versions of this library.
_cache = tempfile.TemporaryDirectory(prefix="torch_flash2-inductor-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _cache.name

settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("dev", deadline=None, max_examples=100)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine or this process cannot run."""
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
