"""Unmodified models of transformers under TORCH_FLASH2 alone: logits and gradients, and which calls were taken.

They run in bf16, by PyTorch's attention and by this library's; both are held to the same model in fp32.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_flash2
from torch_flash2 import dispatch

pytest.importorskip("transformers", reason="transformers is not installed")

import sdpa_models
from sdpa_models import DEVICE, FAMILIES

pytestmark = pytest.mark.filterwarnings("default")
SCRIPT = Path(sdpa_models.__file__)
Results = dict[str, dict[str, tuple[Any, dict[str, int]]]]


@pytest.fixture(scope="module")
def results(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """By policy and family, what the script found under the variable alone."""
    if torch.backends.cuda.is_built() and DEVICE == "cpu":
        pytest.skip("the variable means CUDA calls in this build of PyTorch")

    def script(policy: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(policy)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [installed, *sys.path])), "TORCH_FLASH2": policy}
        done = subprocess.run(
            [sys.executable, SCRIPT, folder], env=env, cwd=folder, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return {path.name: torch.load(path) for path in folder.iterdir()}

    with concurrent.futures.ThreadPoolExecutor() as pool:
        policies = ("1", "always")
        return dict(zip(policies, pool.map(script, policies), strict=True))


@functools.cache
def by_pytorch(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch_flash2.stats(reset=True)
    found = sdpa_models.run(name, dtype)
    assert not torch_flash2.stats()
    return found


@pytest.mark.parametrize("policy", ["1", "always"])
@pytest.mark.parametrize("name", FAMILIES)
def test_models(results: Results, name: str, policy: str) -> None:
    found, counted = results[policy][name]
    if "skipped" in found:
        pytest.skip(f"this release of transformers has no sdpa for it: {found['skipped']}")
    print(name, counted)
    # Nothing but measurement keeps a call from being taken.
    for label in counted:
        assert label.split(" and ")[0] in dispatch.KERNELS or policy == "1" and label.startswith("stock, slower"), label
    assert sum(counted.values()) == sum(results["always"][name][1].values()) >= FAMILIES[name].calls
    exact, stock = by_pytorch(name, torch.float32), by_pytorch(name, torch.bfloat16)
    assert set(found) == set(stock) == set(exact)
    for tensor, want in exact.items():
        error, other = ((result[tensor] - want).norm().item() for result in (found, stock))
        scale = want.norm().item()
        assert error <= 2 * other + 1e-3 * scale, f"{tensor}: {error:.3e}, PyTorch's {other:.3e}, of {scale:.3e}"


def test_the_script_names_nothing_of_ours() -> None:
    imported = [line for line in SCRIPT.read_text().splitlines() if "import" in line.split()]
    assert imported and not [line for line in imported if "torch_flash2" in line]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_generation_and_compiled_models(name: str) -> None:
    model = sdpa_models.build(name).eval()
    inputs = sdpa_models.inputs(name)
    with torch.no_grad():
        wanted = model(**inputs).logits
        with torch_flash2.enabled("always", device_type=DEVICE):
            found = torch.compile(model, backend="aot_eager")(**inputs).logits
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
            if name == "llama":
                made = model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False)
    if name == "llama":
        assert torch.equal(made, model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False))
