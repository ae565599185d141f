"""What compiled Hopper kernels are read for: barriers that nothing uses, and registers that nothing has set.

Both were found on an H200 with ptxas 12.8 of Triton 3.6, 2026-11-21, by results that were wrong there and right in
every other way of looking at them.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def check(kernel: Any) -> None:
    """Hold a compiled kernel to both."""
    assert unused_barriers(kernel) == [], "a barrier that is not used shares memory with a tile"
    assert unset_registers(kernel) == [], "ptxas left out what sets these registers"


def unused_barriers(kernel: Any) -> list[str]:
    """The barriers of a compiled kernel that are initialised and then neither waited for nor arrived at. Triton gives
    their memory to tiles, and the GPU writes them back there when it resumes a kernel that it had interrupted."""
    text = kernel.asm["ttgir"]
    found = []
    for name in re.findall(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<\d+x1xi64", text):
        handles = {name, *re.findall(rf"(%\w+) = ttg\.memdesc_index {name}\[", text)}
        uses = (line for line in text.splitlines() if handles & set(re.findall(r"%\w+", line)))
        idle = ("local_alloc", "memdesc_index", "init_barrier", "inval_barrier")
        if all(any(word in line for word in idle) for line in uses):
            found.append(name)
    return found


class _Line(NamedTuple):
    """One instruction: its address, text, which uniform registers it writes and reads, whether a predicate guards
    it."""

    address: int
    text: str
    writes: frozenset[str]
    reads: frozenset[str]
    guarded: bool


def unset_registers(kernel: Any) -> list[str]:
    """Uniform registers of a compiled kernel that an instruction reads although on some path to it nothing has written
    them: ptxas leaves out the second of two like computations where neither branch is always taken (the descriptors of
    tiles were then wrong)."""
    return unset_in(listing(kernel))


def listing(kernel: Any) -> str:
    """The SASS of a compiled kernel, as nvdisasm prints it."""
    return _disassembled(kernel.asm["cubin"])


# Tests read a kernel several times in a row.
@functools.lru_cache(maxsize=4)
def _disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_BIN / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout


def unset_in(text: str) -> list[str]:
    """What `unset_registers` finds in a listing."""
    lines, after = _graph(text)
    unset: list[frozenset[str]] = [frozenset() for _ in lines]
    unset[0] = frozenset(register for line in lines for register in line.reads)
    waiting = [0]
    while waiting:
        i = waiting.pop()
        # A guarded write counts: what reads it is guarded, or jumped over, by the same predicate.
        left = unset[i] - lines[i].writes
        for target in after[i]:
            if not left <= unset[target]:
                unset[target] |= left
                waiting.append(target)
    return [
        f"{line.address:05x}: {line.text}  ({register})"
        for line, nobody in zip(lines, unset, strict=True)
        for register in sorted(line.reads & nobody)
        if not line.guarded
    ]


def instructions(listed: str) -> tuple[list[tuple[int, str, list[str]]], dict[str, int]]:
    """Of a listing each instruction's address, text and the labels that it names, and the index of the instruction at
    each label."""
    texts: list[tuple[int, str, list[str]]] = []
    labels: dict[str, int] = {}
    for row in listed.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", row):
            labels[label.group(1)] = len(texts)
        elif code := re.match(r"\s*/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*(;|\(\*)", row):
            texts.append((int(code.group(1), 16), code.group(2), re.findall(r"\.L_x_\d+", row)))
    return texts, labels


def _graph(listed: str) -> tuple[list[_Line], list[list[int]]]:
    """The instructions and, of each, which may come next."""
    texts, labels = instructions(listed)
    after: list[list[int]] = []
    for i, (_, text, targets) in enumerate(texts):
        guarded, operation = re.match(r"(@!?U?P\w+\s+)?(\w+)", text).groups()  # type: ignore[union-attr]
        leaves = operation in ("BRA", "BRX", "EXIT")
        conditional = guarded or re.match(r"(@\S+\s+)?BRA(\.\w+)*\s+!?U?P\w+,", text)
        next_ones = [labels[target] for target in targets] if operation in ("BRA", "BRX") else []
        if (conditional or not leaves) and i + 1 < len(texts):
            next_ones.append(i + 1)
        after.append(next_ones)
    return [_line(address, text) for address, text, _ in texts], after


def _line(address: int, text: str) -> _Line:
    guard, operation, operands = re.match(r"(@!?U?P\w+\s+)?(\S+)\s*(.*)", text).groups()  # type: ignore[union-attr]
    name, *suffixes = operation.split(".")
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", operands)]
    # The first operand is written by the uniform datapath's instructions, and by those that bring values to it; ELECT
    # writes the lane's number behind its predicate.
    others = ("UTMA", "UBLK", "USET", "UCGA")
    writes_first = name in ("R2UR", "S2UR", "REDUX") or (name[0] == "U" and name[:4] not in others)
    writes: set[str] = set()
    reads: set[str] = set()
    for i, part in enumerate(parts):
        pair = (writes_first and "64" in suffixes) or ("WIDE" in suffixes and i in (0, 3))
        first = 0
        if "gdesc[" in part:
            # Descriptors of both operands; of the right one alone where the left one is in registers.
            count, first = 4, 2 if re.match(r"R\d", parts[1]) else 0
        elif name.startswith("UTMA"):
            # Shared memory, of loads a barrier, then a coordinate for each dimension.
            dimensions = [int(x[0]) for x in suffixes if x[1:] == "D"]
            count = (2 if name == "UTMALDG" else 1) + dimensions[0] if i == 0 and dimensions else 2
        elif name == "SYNCS":
            count = 2 if i == 2 and "EXCH" in suffixes else 1
        else:
            count = 2 if pair or "desc[" in part else 1
        found = {f"UR{int(number) + k}" for number in re.findall(r"\bUR(\d+)", part) for k in range(first, count)}
        written = (writes_first and i == 0) or (name == "ELECT" and i == 1)
        (writes if written else reads).update(found)
    return _Line(address, text, frozenset(writes), frozenset(reads), guard is not None)
