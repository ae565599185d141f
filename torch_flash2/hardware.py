"""What a kernel must know of the device it runs on, as a value that can also describe a GPU that is not here."""

from __future__ import annotations

import dataclasses
import functools
import os

import torch

# Shared memory that one block may have, in bytes, by compute capability (CUDA C++ Programming Guide, technical
# specifications).
SHARED_MEMORY = {
    (8, 0): 166912,
    (8, 6): 101376,
    (8, 7): 166912,
    (8, 9): 101376,
    (9, 0): 232448,
    (10, 0): 232448,
    (10, 3): 232448,
    (11, 0): 232448,
    (12, 0): 101376,
    (12, 1): 101376,
}
# Multiprocessors of the usual card of that capability, where none is here to ask: A100, A40, L40S, H100, B200, RTX
# 5090.
MULTIPROCESSORS = {(8, 0): 108, (8, 6): 84, (8, 9): 142, (9, 0): 132, (10, 0): 148, (12, 0): 170}


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of device.

    `capability` is CUDA's compute capability, (0, 0) for the CPU; `shared_memory` the bytes one block may have.
    """

    type: str
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    multiprocessors: int = 1
    shared_memory: int = 0

    def __str__(self) -> str:
        return (
            f"{self.name} (sm{self.capability[0]}{self.capability[1]})"
            if self.type == "cuda"
            else self.name or self.type
        )


CPU = Hardware("cpu", "CPU")


def simulated(arch: str) -> Hardware:
    """The usual card of an architecture, for example "sm90".

    Raises:
        ValueError: the architecture is not known.
    """
    digits = arch.removeprefix("sm").removeprefix("_").rstrip("af")
    capability = (int(digits[:-1]), int(digits[-1])) if digits.isdigit() and len(digits) > 1 else (0, 0)
    if capability not in SHARED_MEMORY:
        known = ", ".join(f"sm{major}{minor}" for major, minor in SHARED_MEMORY)
        raise ValueError(f"unknown architecture {arch!r}; known are {known}")
    return Hardware(
        "cuda", f"simulated {arch}", capability, MULTIPROCESSORS.get(capability, 64), SHARED_MEMORY[capability]
    )


@functools.cache
def of(device: torch.device) -> Hardware:
    """The hardware behind a torch device.

    TRITON_OVERRIDE_ARCH, Triton's own variable, also decides here: then tables and limits are those of the code that
    runs.
    """
    if device.type != "cuda":
        return CPU if device.type == "cpu" else Hardware(device.type, device.type)
    properties = torch.cuda.get_device_properties(device)
    override = os.environ.get("TRITON_OVERRIDE_ARCH")
    capability = simulated(override).capability if override else (properties.major, properties.minor)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or SHARED_MEMORY.get(capability, 101376)
    limit = min(shared, SHARED_MEMORY.get(capability, shared))
    return Hardware("cuda", properties.name, capability, properties.multi_processor_count, limit)
