"""Powers of 2 by multiplications alone, as kernels for Hopper take some of their weights; in the interpreter."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
scores = pytest.importorskip("torch_flash2.kernels.device.scores")

pytestmark = pytest.mark.interpreter


@triton.jit
def powers(out, x, awaited, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, scores.exp2_by_fma(tl.load(x + at), tl.load(awaited + at)))


def powers_of(x: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(x, float("nan"))
    powers[(1,)](out, x, torch.linspace(0, 1e30, len(x)), len(x))
    return out


def test_accuracy() -> None:
    for lowest, highest in ((-1.0, 1.0), (-20.0, 12.0), (-126.0, 127.0)):
        x = torch.linspace(lowest, highest, 1 << 16)
        expected = torch.exp2(x.double())
        assert ((powers_of(x) - expected) / expected).abs().max() < 3.2e-6
    whole = torch.arange(-126, 2, dtype=torch.float32)
    assert torch.equal(powers_of(whole), torch.exp2(whole))


def test_edges() -> None:
    """Masked scores weigh nothing; what `weights.soften` must compute again is large or NaN."""
    infinity = float("inf")
    low = torch.tensor([-127.0, -127.01, -128.0, -1e3, -1e20, -(2.0**126), -3e38, -infinity])
    assert torch.equal(powers_of(low), torch.zeros(8))
    tiny = powers_of(torch.linspace(-127.0, -126.0, 64))
    assert ((tiny >= 0) & (tiny <= 2.0**-126)).all()
    high = torch.tensor([127.0, 127.01, 128.0, 1e3, 1e20, 2.0**126, 3e38, infinity])
    assert (powers_of(high) >= 2.0**127).all()
    assert not (powers_of(torch.full((8,), float("nan"))) <= 4096).any()
