"""Score steps: what is done to a score between the product of query and key and the softmax, and dropout after it.

A score starts as scale * (query . key). Steps then run in the fixed order of STEPS. Each has a value and a slope: the
derivative of its output with respect to its input, as a function of its output. Device twins of the same names stand in
kernels/device/scores.py; the definitions here are the oracle's and the CPU's own.

B batch, H query heads, M query rows, N keys, m and n positions local to a segment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Step:
    """A score step: `value(score, operand, distance)` and, unless it is 1, `slope(output, operand)`."""

    name: str
    value: Callable[[torch.Tensor, Any, torch.Tensor], torch.Tensor]
    slope: Callable[[torch.Tensor, Any], torch.Tensor] | None = None


def _softcap_value(score: torch.Tensor, softcap: float, distance: torch.Tensor) -> torch.Tensor:
    return softcap * torch.tanh(score / softcap)


def _softcap_slope(output: torch.Tensor, softcap: float) -> torch.Tensor:
    return 1 - (output / softcap) ** 2


def _alibi_value(score: torch.Tensor, slopes: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    return score - slopes * distance.abs()


def _bias_value(score: torch.Tensor, bias: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    return score + bias


# In the order in which they run. softcap's operand is the cap, ALiBi's the slopes [B or 1, H, 1, 1], bias's the bias.
STEPS: dict[str, Step] = {
    "softcap": Step("softcap", _softcap_value, _softcap_slope),
    "alibi": Step("alibi", _alibi_value),
    "bias": Step("bias", _bias_value),
}

_M0, _M1, _W0, _W1, _LOW = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def philox(key: torch.Tensor, counter: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Philox-4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words.

    Args:
        key: int64 [2], two 32-bit words.
        counter: four int64 tensors that broadcast, 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key[0] & _LOW, key[1] & _LOW
    for _ in range(10):
        high0, low0 = _multiply(c0, _M0)
        high1, low1 = _multiply(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def _multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a 32 x 32-bit product; the halves of b keep every sum below 2**63."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    total = low + ((high & 0xFFFF) << 16)
    return ((high >> 16) + (total >> 32)) & _LOW, total & _LOW


def keep_threshold(dropout_p: float) -> int:
    """A Philox word keeps its score iff it is at least this."""
    return min(int(dropout_p * 2**32), 2**32 - 1)


def dropout_key(seed: torch.Tensor) -> torch.Tensor:
    """The two key words of a call's `seed`, an int64 [2] tensor of seed and offset (both drawn per call)."""
    return seed & _LOW


def keep(
    seed: torch.Tensor, b: torch.Tensor, h: torch.Tensor, m: torch.Tensor, n: torch.Tensor, dropout_p: float
) -> torch.Tensor:
    """Which scores dropout keeps: a bool tensor of the shape that b, h, m, n broadcast to.

    Counter (b, h, m, n // 4), word n % 4; b, h, m, n are int64 tensors, m and n local to the segment.
    """
    b, h, m, n = torch.broadcast_tensors(b, h, m, n)
    words = torch.stack(philox(dropout_key(seed), (b, h, m, n // 4)))
    word = words.gather(0, (n % 4)[None])[0]
    return word >= keep_threshold(dropout_p)
