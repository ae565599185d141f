"""The command line, and the settings that it shows."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_flash2
from torch_flash2 import settings
from torch_flash2.__main__ import main
from torch_flash2.cli import demo

ROOT = Path(__file__).parents[1]
HAS_TRITON = importlib.util.find_spec("triton") is not None


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a fresh process that finds this checkout."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_doctor() -> None:
    result = python("-m", "torch_flash2", "doctor", TORCH_FLASH2_CHECK="1")
    assert result.returncode == 0, result.stderr
    assert torch.__version__ in result.stdout
    assert re.search(r"^  reference +available$", result.stdout, re.M)
    assert re.search(r"^  TORCH_FLASH2_CHECK +1 ", result.stdout, re.M)


def test_doctor_says_how_to_get_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\nfrom torch_flash2.__main__ import main; sys.exit(main(['doctor']))"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert "Triton is not installed: " in result.stdout


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_explain_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "explain --shape 2,32,8,4096,4096,192 --head-dim-v 128 --dtype bf16 --arch sm90 "
        "--softcap 50 --alibi --sinks --bias 1,32,4096,4096 --dropout 0.1 "
        "--lengths used_q,used_k --mask"
    )
    mask = "causal & window(128, 0) @ bottom-right"
    assert main([*words.split(), mask]) == 0
    forward, backward = re.split(r"^(?=backward)", capsys.readouterr().out, flags=re.M)
    for text, direction in ((forward, "forward"), (backward, "backward")):
        assert f"{direction} on simulated sm90" in text
        assert f"B=2 H=32/8, M=4096 N=4096 D=192/128, mask {mask}, softcap, alibi, bias" in text
        assert "runs on triton" in text


def test_explain_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    words = "explain --shape 8,4,4,512,512,64 --dtype fp32 --arch cpu --lengths cu_q,cu_k --no-grad"
    assert main(words.split()) == 0
    text = capsys.readouterr().out
    assert "lengths cu_q, cu_k" in text
    assert "not triton: it needs a CUDA GPU" in text or not HAS_TRITON
    assert "backward" not in text


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--shape 2,8,8,64,64,64 --mask casual", "'casual' is no band"),
        ("--shape 2,8,8,64,64,64 --arch sm91", "unknown architecture 'sm91'; known are sm80"),
        ("--shape 2,8,8,64", "--shape must be B,H,G,M,N,D, got 2,8,8,64"),
        ("--shape 2,8,3,64,64,64", "query heads must be a multiple of key heads, got 8 and 3"),
        ("--shape 2,8,8,64,64,64 --lengths cu", "--lengths must name some of cu_q, cu_k"),
    ],
)
def test_explain_rejects(words: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *words.split()]) == 2
    assert error in capsys.readouterr().err


def test_demo(tmp_path: Path) -> None:
    command = "-m torch_flash2 demo --size small --steps 3 --out curves.png"
    result = python(*command.split(), cwd=tmp_path, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert "torch_flash2 [########################] 3/3" in result.stderr
    assert "runs on" in result.stdout
    rows = re.findall(r"^(?:math|torch_flash2) +(\d\.\d+) +(\d\.\d+)", result.stdout, re.M)
    assert len(rows) == 2
    for math_loss, flash_loss in zip(*rows, strict=True):
        assert abs(float(math_loss) - float(flash_loss)) < 0.05
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_demo_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    model = demo.GPT(demo.Size(1, 8, 1, 4, 1, 2, 1e-3), demo.math_attention)
    run = demo.Run("math", [2.5, 2.25], [(2, 2.5)], 1.0, 1.0, model)
    path = demo.save_curves([run], tmp_path / "curves.png")
    assert path.name == "curves.csv"
    assert path.read_text().split() == ["step,math", "1,2.5", "2,2.25"]


def test_demo_wants_enough_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    assert main(["demo", "--text", str(text), "--size", "small"]) == 2
    assert "the text must have at least 5160 bytes, got 9" in capsys.readouterr().err


def test_bench_forwards_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "__main__.py").write_text("import sys; print(sys.argv[1:])")
    code = (
        f"import sys, torch_flash2; torch_flash2.__file__ = {str(tmp_path / 'p' / 'm.py')!r}\n"
        "from torch_flash2.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    result = python("-c", code, "bench", "forward", "--help", "--dtype=bf16", cwd=tmp_path)
    assert result.stdout.strip() == "['forward', '--help', '--dtype=bf16']", result.stderr


def test_bench_needs_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch_flash2, "__file__", str(tmp_path / "torch_flash2" / "__init__.py"))
    assert main(["bench"]) == 2
    assert "the benchmarks are part of a checkout" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("doctor --colour", "unrecognized arguments: --colour"),
        ("explain --shape 2,8,x", "must be sizes such as 1,32,4096, got '2,8,x'"),
        ("demo --size huge", "invalid choice: 'huge'"),
    ],
)
def test_usage(words: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    assert error in capsys.readouterr().err


NEW = "torch.backends.cuda.matmul.fp32_precision"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", "bf16x6"),
        ("torch.set_float32_matmul_precision('highest')", "bf16x6"),
        ("torch.set_float32_matmul_precision('high')", "bf16x3"),
        ("torch.set_float32_matmul_precision('medium')", "tf32"),
        (f"{NEW} = 'ieee'", "bf16x6"),
        (f"{NEW} = 'tf32'", "tf32"),
        ("torch.backends.fp32_precision = 'tf32'", "tf32"),
        (f"torch.set_float32_matmul_precision('medium'); {NEW} = 'ieee'", "bf16x6"),
        (f"{NEW} = 'tf32'; torch.set_float32_matmul_precision('highest')", "bf16x6"),
        ("torch.backends.mkldnn.matmul.fp32_precision = 'bf16'", "bf16x6"),
    ],
)
def test_matmul_precision(code: str, expected: str) -> None:
    # Setting the older API may warn; reading must not.
    lines = (
        "import runpy, warnings, torch",
        f"settings = runpy.run_path({str(settings.__file__)!r})",
        code,
        "warnings.simplefilter('error')",
        "print(settings['matmul_precision']())",
    )
    result = python("-c", "\n".join(lines))
    assert result.stdout.strip() == expected, result.stderr


def test_matmul_precision_of_a_cpu() -> None:
    assert settings.matmul_precision("cpu") == "ieee"


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings.value.cache_clear()
    monkeypatch.setenv("TORCH_FLASH2", "Yes")
    monkeypatch.setenv("TORCH_FLASH2_CHECK", "maybe")
    monkeypatch.setenv("TORCH_FLASH2_KERNEL", "reference")
    try:
        assert settings.policy() == "fastest"
        assert settings.forced_kernel() == "reference"
        with pytest.raises(ValueError, match="TORCH_FLASH2_CHECK must be one of .*got 'maybe'"):
            settings.checks()
    finally:
        settings.value.cache_clear()
