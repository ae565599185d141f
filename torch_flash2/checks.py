"""TORCH_FLASH2_CHECK=1: lengths and page numbers are looked at before each call.

Kernels clamp what is out of range, so that nothing outside the tensors is read, and say nothing; this says what is
wrong.
B segments, N keys that a segment has room for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .problem import Call, stored_keys


def check(call: Call) -> None:
    """Look at the data of a call's lengths and pages: a debugging aid that waits for the device.

    While a CUDA graph is captured, nothing can wait: there the same rules become assertions on the device, which end
    the process's use of it when a replay breaks one.

    Raises:
        ValueError: a length or a page number is out of range; the text has the rule, the place and the number.
    """
    capturing = call.query.is_cuda and torch.cuda.is_current_stream_capturing()
    for rule, bad, shown in _rules(call):
        if capturing:
            torch._assert_async(~bad.any(), f"torch_flash2: {rule}")
        elif bool(bad.any()):
            place = bad.nonzero()[0].tolist()
            where = ", ".join(map(str, place))
            raise ValueError(f"{rule}; at [{where}] it is {shown[tuple(place)].item()}")


def _rules(call: Call) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The rules in words, where each is broken, and the numbers to show."""
    rooms = {"q": call.query.shape[2], "k": stored_keys(call)}
    for side, cu, used in (("q", call.cu_q, call.used_q), ("k", call.cu_k, call.used_k)):
        room = rooms[side]
        limit: int | torch.Tensor = room
        if cu is not None:
            outside = (cu < 0) | (cu > room)
            yield f"cu_{side} must lie between 0 and the {room} rows stored", outside, cu
            falls = torch.zeros_like(outside)
            falls[1:] = cu[1:] < cu[:-1]
            yield f"cu_{side} must not decrease", falls, cu
            limit = cu[1:] - cu[:-1]
        if used is not None:
            text = f"the {room} that there is room for" if cu is None else "its document's length"
            yield f"used_{side} must lie between 0 and {text}", (used < 0) | (used > limit), used
    table = call.block_table
    if table is not None and table.numel():
        pages, page_size = call.key.shape[:2]
        used = call.used_k if call.used_k is not None else torch.full_like(table[:, 0], stored_keys(call))
        read = torch.arange(table.shape[1], device=table.device)[None, :] * page_size < used[:, None]
        wild = (table < 0) | (table >= pages)
        yield f"block_table must name pages from 0 to {pages - 1} where keys are used", read & wild, table
