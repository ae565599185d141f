"""Switching on and off: reference counts, the entry point, other processes, PyTorch's caches and logs."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sdpa_calls
import torch

import torch_flash2
from torch_flash2 import autoload, dispatch
from torch_flash2.frontends import sdpa
from torch_flash2.replacing import Replacement
from torch_flash2.stock import Sdpa

ROOT = Path(__file__).parents[1]
sdp = torch.nn.functional.scaled_dot_product_attention
QUERY = torch.randn(1, 2, 5, 8)


@pytest.fixture(autouse=True)
def off() -> None:
    sdpa_calls.forget_compiled()
    assert sdpa.is_enabled() is None
    torch_flash2.stats(reset=True)


def calls() -> int:
    """How many calls came by since the last time."""
    sdp(QUERY, QUERY, QUERY)
    return sum(torch_flash2.stats(reset=True).values())


def test_reference_counts() -> None:
    assert calls() == 0
    torch_flash2.enable("always", device_type="cpu")
    torch_flash2.enable("strict", device_type="cpu")
    assert calls() == 1 and sdpa.is_enabled() == "strict"
    torch_flash2.disable()
    assert calls() == 1 and sdpa.is_enabled() == "always"
    torch_flash2.disable()
    assert calls() == 0
    torch_flash2.disable()
    with torch_flash2.enabled("always", device_type="cpu"):
        assert calls() == 1
        with pytest.raises(ZeroDivisionError), torch_flash2.enabled("fastest", device_type="cpu"):
            assert sdpa.is_enabled() == "fastest"
            raise ZeroDivisionError
        assert sdpa.is_enabled() == "always"
    assert calls() == 0


def test_blocks_may_end_in_any_order() -> None:
    first, second = (torch_flash2.enabled(policy, device_type="cpu") for policy in ("always", "strict"))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert sdpa.is_enabled() == "strict"
    second.__exit__(None, None, None)
    assert sdpa.is_enabled() is None


def test_it_holds_for_every_thread() -> None:
    found: list[int] = []
    with torch_flash2.enabled("always", device_type="cpu"):
        thread = threading.Thread(target=lambda: found.append(calls()))
        thread.start()
        thread.join()
    assert found == [1]


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"policy must be one of fastest, always, strict; got 'fast'"):
        torch_flash2.enable("fast")
    with pytest.raises(ValueError, match=r"device_type must be 'cuda' or 'cpu', got 'tpu'"):
        torch_flash2.enable(device_type="tpu")
    with torch_flash2.enabled(device_type="cpu"):
        with pytest.raises(RuntimeError, match="enabled for cpu already"):
            torch_flash2.enable(device_type="cuda")
    assert sdpa.is_enabled() is None


def test_fastest_leaves_what_was_not_measured() -> None:
    with torch_flash2.enabled("fastest", device_type="cpu"):
        sdp(QUERY, QUERY, QUERY)
        sdp(QUERY, QUERY, QUERY, torch.zeros(5, 5, requires_grad=True))
        sdp(QUERY, QUERY, QUERY, dropout_p=0.5)
    assert torch_flash2.stats() == {
        "stock, slower: not measured on CPU, and PyTorch would choose FLASH_ATTENTION, which is fast": 1,
        "cpu": 2,
    }


@pytest.mark.filterwarnings("default")
def test_enabling_after_compiling_warns() -> None:
    compiled = torch.compile(lambda query: sdp(query, query, query) + 1, backend="aot_eager", fullgraph=True)
    compiled(QUERY)
    with pytest.warns(UserWarning, match=r"torch\._dynamo\.reset\(\) makes them compile anew"):
        torch_flash2.enable("always", device_type="cpu")
    try:
        torch_flash2.enable("always", device_type="cpu")
        torch_flash2.disable()
        compiled(QUERY)
        assert calls() == 1
        torch._dynamo.reset()
        compiled(QUERY)
        assert "traced: cpu" in torch_flash2.stats()
    finally:
        torch_flash2.disable()


def test_the_key_of_caches_says_what_is_enabled() -> None:
    config: Any = torch.compiler.config
    before = config.cache_key_tag
    tags = set()
    for policy in ("always", "fastest"):
        with torch_flash2.enabled(policy, device_type="cpu"):
            tags.add(config.cache_key_tag)
            assert config.cache_key_tag.startswith(f"{before}:{policy}:")
    assert config.cache_key_tag == before and len(tags) == 2


# In processes of their own, where the package is installed as pip would.


def run(installed: Path, code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process; -W error is for Python, further arguments are the code's."""
    options = list(itertools.takewhile(lambda argument: argument in ("-W", "error"), arguments))
    rest = arguments[len(options) :]
    env = {**os.environ, "PYTHONPATH": f"{installed}:{ROOT}", **environment}
    done = subprocess.run(
        [sys.executable, *options, "-c", code, *rest],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
        cwd=installed,
    )
    assert done.returncode == 0, done.stderr
    return done


CALL = """
query = torch.randn(1, 2, 5, 8, device=DEVICE)
torch.nn.functional.scaled_dot_product_attention(query, query, query)
"""
TAKEN = """
counted = sys.modules["torch_flash2"].stats()
assert sum(counted.values()) == 1 and set(counted) <= KERNELS, counted
"""
# What the variable takes over.
DEVICE = "cuda" if torch.backends.cuda.is_built() else "cpu"
PRESET = f"DEVICE, KERNELS = {DEVICE!r}, {set(dispatch.KERNELS)}\n"
needs_device = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="the variable means CUDA calls in this build"
)


@needs_device
@pytest.mark.parametrize("imports", ["import torch", "import torch_flash2, torch"])
def test_the_variable_alone_enables(installed: Path, imports: str) -> None:
    run(installed, f"import sys\n{imports}\n{PRESET}{CALL}{TAKEN}", "-W", "error", TORCH_FLASH2="always")


def test_without_the_variable_nothing_is_loaded(installed: Path) -> None:
    run(
        installed,
        "import sys, time, torch\n"
        "assert 'torch_flash2_autoload' in sys.modules and 'torch_flash2' not in sys.modules\n"
        "del sys.modules['torch_flash2_autoload']\n"
        "costs = []\n"
        "for _ in range(5):\n"
        "    start = time.perf_counter()\n"
        "    import torch_flash2_autoload\n"
        "    torch_flash2_autoload.autoload()\n"
        "    costs.append(time.perf_counter() - start)\n"
        "    del sys.modules['torch_flash2_autoload']\n"
        "assert min(costs) < 1e-3, costs\n"
        "import torch_flash2\n"
        "assert torch_flash2.frontends.sdpa.is_enabled() is None\n",
        "-W", "error",
        TORCH_FLASH2="off",
    )  # fmt: skip


@needs_device
def test_without_triton(installed: Path) -> None:
    """On the CPU it takes calls all the same; on a GPU no kernel is left, and it says so."""
    code = f"import sys\nsys.modules['triton'] = None\nimport torch\n{PRESET}{CALL}"
    if DEVICE == "cpu":
        run(installed, code + TAKEN, TORCH_FLASH2="strict")
    else:
        counted = "(label,) = sys.modules['torch_flash2'].stats()\n"
        refused = f"\n{counted}assert 'unsupported' in label and 'not installed' in label, label\n"
        run(installed, code + refused, TORCH_FLASH2="always")


def test_it_never_raises(installed: Path) -> None:
    code = "import sys, torch\nprint(torch.__version__)\n"
    done = run(installed, code, "-W", "error", TORCH_FLASH2="banana")
    assert "TORCH_FLASH2 must be one of fastest, always, strict" in done.stderr
    hidden = "import sys\nsys.modules['torch_flash2'] = None\n" + code
    done = run(installed, hidden, TORCH_FLASH2="1")
    assert "could not be enabled: ModuleNotFoundError" in done.stderr


def test_complaints_are_warnings() -> None:
    with pytest.warns(UserWarning, match="could not be enabled: ValueError: why"):
        autoload.complain(ValueError("why"))


MODEL = """
import sys, torch
from torch import nn

device = "cuda" if torch.cuda.is_available() else "cpu"

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.both, self.out = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        query = self.query(x).unflatten(2, (4, 8)).transpose(1, 2)
        key, value = self.both(x).unflatten(2, (2, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))

torch.manual_seed(0)
encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
model = nn.ModuleList([encoder, Block()])
inputs = torch.randn(2, 12, 32).to(device)
padding = torch.arange(12, device=device).expand(2, 12) >= torch.tensor([[12], [7]], device=device)

def run(dtype):
    model.to(device, dtype).zero_grad()
    out = model[1](model[0](inputs.to(dtype), src_key_padding_mask=padding))
    (out * torch.linspace(-1, 1, 32, dtype=dtype, device=device)).sum().backward()
    return [out.detach().cpu(), *(p.grad.cpu() for p in model.parameters())]

found = {dtype: run(dtype) for dtype in (torch.bfloat16, torch.float64)}
package = sys.modules.get("torch_flash2")
torch.save((found, package and package.stats()), sys.argv[1])
"""


@needs_device
def test_a_model_under_the_variable_alone(installed: Path, tmp_path: Path) -> None:
    """An encoder with padding and a causal block with grouped heads, in scripts that name nothing of ours."""
    found, counted = {}, {}
    for policy in ("off", "1", "always"):
        run(installed, MODEL, str(tmp_path / policy), TORCH_FLASH2=policy)
        found[policy], counted[policy] = torch.load(tmp_path / policy, weights_only=True)
    assert counted["off"] is None
    # On a GPU nobody takes fp64.
    taken = [n for label, n in counted["always"].items() if label.split(" and ")[0] in dispatch.KERNELS]
    assert sum(taken) == (4 if DEVICE == "cpu" else 2), counted["always"]
    assert sum(counted["1"].values()) == sum(counted["always"].values()) == 4, counted
    exact, plain = found["off"][torch.float64], found["off"][torch.bfloat16]
    for policy, (index, want) in itertools.product(("1", "always"), enumerate(exact)):
        other = (plain[index].double() - want).norm().item()
        scale = want.norm().item()
        for dtype, allowed in ((torch.bfloat16, 2 * other + 1e-3 * scale), (torch.float64, 1e-6 * (scale + 1))):
            assert (found[policy][dtype][index].double() - want).norm().item() <= allowed, (policy, index, dtype)


@needs_device
def test_inductors_workers(installed: Path) -> None:
    run(
        installed,
        "import torch\n"
        "from torch._inductor.compile_worker.subproc_pool import SubprocPool\n"
        "from torch_flash2.frontends.sdpa import is_enabled\n"
        "if __name__ == '__main__':\n"
        "    pool = SubprocPool(1)\n"
        "    assert pool.submit(is_enabled).result(timeout=120) == 'always'\n"
        "    pool.shutdown()\n",
        TORCH_FLASH2="always",
    )


def test_processes_with_and_without_share_no_graphs(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from torch._dynamo.utils import counters\n"
        "if len(sys.argv) > 1:\n"
        "    import torch_flash2\n"
        "    torch_flash2.enable(device_type='cpu', policy=sys.argv[1])\n"
        "sdp = torch.nn.functional.scaled_dot_product_attention\n"
        "run = torch.compile(lambda query: sdp(query, query, query, is_causal=True), fullgraph=True)\n"
        "query = torch.randn(1, 2, 5, 8, requires_grad=True)\n"
        "run(query).sum().backward()\n"
        "assert query.grad.isfinite().all()\n"
        "hits = counters['aot_autograd']['autograd_cache_hit']\n"
        "package = sys.modules.get('torch_flash2')\n"
        "print(hits, package is not None and any('traced' in label for label in package.stats()))\n"
    )

    def printed(*policy: str) -> list[str]:
        return run(installed, code, *policy, TORCHINDUCTOR_CACHE_DIR=str(tmp_path), TORCH_FLASH2="").stdout.split()

    assert printed("always") == ["0", "True"]
    with ThreadPoolExecutor() as pool:
        without, again = pool.submit(printed), pool.submit(printed, "always")
        assert without.result() == ["0", "False"]
        assert again.result() == ["1", "True"]


@needs_device
def test_torch_logs(installed: Path) -> None:
    calls = CALL * 2 + CALL.replace("8,", "16,") + CALL.replace("query)", "query, is_causal=True)")
    code = f"import torch\n{PRESET}{calls}"
    done = run(installed, code, TORCH_LOGS="torch_flash2", TORCH_FLASH2="always")
    lines = [line for line in done.stderr.splitlines() if "scaled_dot_product_attention" in line]
    assert len(lines) == 3, done.stderr
    assert "B=1 H=2, M=5 N=5 D=8, mask full, value in key: taken: " in lines[0]
    assert "mask causal" in lines[2]
    assert not run(installed, code, TORCH_FLASH2="always").stderr


# What PyTorch leads elsewhere is replaced in modules that may be imported later, or never.


def test_modules_are_not_imported_to_be_replaced(installed: Path) -> None:
    run(
        installed,
        "import sys, torch, torch_flash2\n"
        "before = set(sys.modules), list(sys.meta_path)\n"
        "names = 'torch.nn.attention.bias', 'torch.nested._internal.ops', 'torch._dynamo'\n"
        "torch_flash2.enable('always', device_type='cpu')\n"
        "assert not [name for name in names if name in sys.modules]\n"
        "torch_flash2.disable()\n"
        "assert sys.meta_path == before[1]\n"
        "torch_flash2.enable('always', device_type='cpu')\n"
        "from torch.nn.attention.bias import causal_lower_right\n"
        "assert len(sys.meta_path) == len(before[1]) + 1\n"
        "query = torch.randn(1, 2, 5, 8)\n"
        "torch.nn.functional.scaled_dot_product_attention(query[:, :, :3], query, query, causal_lower_right(3, 5))\n"
        "assert torch_flash2.stats(reset=True) == {'cpu': 1}, torch_flash2.stats()\n"
        "torch_flash2.disable()\n"
        "torch.nn.functional.scaled_dot_product_attention(query[:, :, :3], query, query, causal_lower_right(3, 5))\n"
        "assert not torch_flash2.stats() and sys.meta_path == before[1]\n",
    )


def test_replacements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "replaced_here.py").write_text("class A:\n    @staticmethod\n    def f(): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)

    def twice(original: Any) -> Any:
        return lambda: 2 * original()

    later = Replacement("replaced_here", "A.f", twice)
    import replaced_here  # type: ignore[import-not-found]

    assert replaced_here.A.f() == replaced_here.A().f() == 2 and "exec_module" not in vars(replaced_here.__loader__)
    at_once = Replacement("replaced_here", "A.f", twice)
    assert replaced_here.A.f() == 4
    # What somebody has replaced since is not ours to put back.
    later.remove()
    assert replaced_here.A.f() == 4
    at_once.remove()
    absent = [Replacement("replaced_here", path, twice) for path in ("A.g", "B.f", "g")]
    assert not hasattr(replaced_here, "g")
    for replacement in absent:
        replacement.remove()
    monkeypatch.delitem(sys.modules, "replaced_here")


def test_caches_know_this_library_from_its_import_on(installed: Path) -> None:
    run(
        installed,
        "import torch\n"
        "before = torch.compiler.config.cache_key_tag\n"
        "import torch_flash2\n"
        "tag = torch.compiler.config.cache_key_tag\n"
        "assert tag.startswith(f'{before};torch_flash2={torch_flash2.__version__}:'), tag\n",
    )


def test_a_call_that_meets_a_disable_is_pytorchs() -> None:
    assert sdpa._run(Sdpa(QUERY, QUERY, QUERY), False) is None
