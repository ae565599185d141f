"""Settings: every environment variable of the library, and PyTorch's precision of fp32 products.

Variables are read once, at first use: set them before the first call.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch

TRUE = ("1", "true", "on", "yes")
FALSE = ("", "0", "false", "off", "no")
# Which calls of scaled_dot_product_attention to take; frontends.sdpa.enable explains them.
POLICIES = ("fastest", "always", "strict")


class Variable(NamedTuple):
    """One environment variable: its name, its value where it is not set, and what it does."""

    name: str
    default: str
    meaning: str


VARIABLES = (
    Variable(
        "TORCH_FLASH2",
        "0",
        "1, fastest, always or strict: scaled_dot_product_attention runs here, from import torch on",
    ),
    Variable("TORCH_FLASH2_CHECK", "0", "1: kernels check lengths and page numbers on the device"),
    Variable("TORCH_FLASH2_KERNEL", "", "a kernel's name: every call runs on it, for debugging"),
)
DEFAULTS = {variable.name: variable.default for variable in VARIABLES}


@functools.cache
def value(name: str) -> str:
    """The text of a variable of the table, or its default."""
    return os.environ.get(name, DEFAULTS[name]).strip()


def policy() -> str | None:
    """The policy by which TORCH_FLASH2 asks to take over scaled_dot_product_attention; None where it does not.

    Raises:
        ValueError: it names no policy.
    """
    text = value("TORCH_FLASH2").lower()
    if text not in (*TRUE, *FALSE, *POLICIES):
        raise ValueError(f"TORCH_FLASH2 must be one of {', '.join((*POLICIES, *TRUE, *FALSE[1:]))}; got {text!r}")
    if text in FALSE:
        return None
    return text if text in POLICIES else POLICIES[0]


def checks() -> bool:
    """Whether TORCH_FLASH2_CHECK asks for checks on the device."""
    return _flag("TORCH_FLASH2_CHECK")


def forced_kernel() -> str | None:
    """The kernel that TORCH_FLASH2_KERNEL names, if any."""
    return value("TORCH_FLASH2_KERNEL") or None


def _flag(name: str) -> bool:
    text = value(name).lower()
    if text not in TRUE + FALSE:
        allowed = "1, true, on, yes, 0, false, off, no"
        raise ValueError(f"{name} must be one of {allowed}; got {text!r}")
    return text in TRUE


def matmul_precision(device_type: str = "cuda") -> str:
    """How products of fp32 inputs are to be computed, from PyTorch's two APIs.

    Returns:
        "ieee" off CUDA. On CUDA what Triton calls "bf16x6", whose products are as exact as fp32's: three 16-bit parts
        of each number, six products of them. Less only where it was asked for: "bf16x3", two parts, of 16 bits
        together, by `torch.set_float32_matmul_precision("high")`, which PyTorch describes so; "tf32" by
        `torch.set_float32_matmul_precision("medium")` or by
        `torch.backends.cuda.matmul.fp32_precision = "tf32"`.
    """
    if device_type != "cuda":
        return "ieee"
    # Both APIs write this one; where it says tf32, only the older tells "high" from "medium".
    if torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "bf16x6"
    try:
        return "bf16x3" if torch.get_float32_matmul_precision() == "high" else "tf32"
    except RuntimeError:
        # It raises where the newer API alone was used.
        return "tf32"
