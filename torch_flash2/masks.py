"""Masks: which keys a query row may see, as an intersection of bands.

A band gives, for a query row, the half-open interval of keys that it sees, and for a key the interval of query rows
that see it. Positions are local to a segment (a batch entry, or one packed document). A Mask is an intersection (`&`)
of bands with one alignment; it holds no tensors, and its text is its identity: `parse(str(mask)) == mask`.

    masks.causal() & masks.window(left=128, right=0)
    masks.parse("causal & window(128, 0)")
    masks.causal(align="bottom-right")          # "causal @ bottom-right"

M query rows of the segment, N keys of the segment, m a query row, n a key,
shift 0 (top-left) or N - M (bottom-right): row m stands at key position m + shift.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

ALIGNMENTS = ("top-left", "bottom-right")
# Stands for an unlimited side where a number must be: positions stay below 2**29, so that sums and coded numbers fit
# int32.
FAR = 1 << 29

Int = Any  # int, torch.SymInt or an integer tensor: bands are elementwise


@dataclasses.dataclass(frozen=True)
class Band:
    """One interval of keys per query row. A subclass is a mask feature.

    `name` is also the name of its two device functions, `<name>_keys` and `<name>_queries`, in kernels/device/bands.py.
    Fields are integers, or None for an unlimited side. Neither end of the interval may move left from one row to the
    next: the keys of a range of rows are then those between its first row's lo and its last row's hi.
    """

    name: ClassVar[str]

    @property
    def numbers(self) -> tuple[int, ...]:
        """What the device functions receive."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(FAR if value is None else value for value in values)

    @property
    def bounds_left(self) -> bool:
        """Whether some row's interval may start after key 0."""
        return True

    def keys(self, m: Int, M: Int, N: Int, shift: Int) -> tuple[Int, Int]:
        """The interval [lo, hi) of keys that row m sees, before clipping to [0, N)."""
        raise NotImplementedError

    def queries(self, n: Int, M: Int, N: Int, shift: Int) -> tuple[Int, Int]:
        """The interval [lo, hi) of rows that see key n, before clipping to [0, M)."""
        raise NotImplementedError

    @property
    def template(self) -> str:
        """The text with `#` for every number."""
        return self._written(lambda value: "#")

    def __str__(self) -> str:
        return self._written(str)

    def _written(self, number: Callable[[Int], str]) -> str:
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        shown = ", ".join("-" if value is None else number(value) for value in values)
        return f"{self.name}({shown})" if values else self.name


@dataclasses.dataclass(frozen=True)
class Causal(Band):
    """Row m sees the keys up to its own position."""

    name: ClassVar[str] = "causal"

    @property
    def bounds_left(self) -> bool:
        return False

    def keys(self, m: Int, M: Int, N: Int, shift: Int) -> tuple[Int, Int]:
        return m * 0, m + shift + 1

    def queries(self, n: Int, M: Int, N: Int, shift: Int) -> tuple[Int, Int]:
        return n - shift, n * 0 + M


@dataclasses.dataclass(frozen=True)
class Window(Band):
    """Row m sees the keys from `left` before its position to `right` after it, inclusive; None is unlimited."""

    left: int | None
    right: int | None
    name: ClassVar[str] = "window"

    @property
    def bounds_left(self) -> bool:
        return self.left is not None

    def keys(self, m: Int, M: Int, N: Int, shift: Int) -> tuple[Int, Int]:
        left, right = self.numbers
        return m + shift - left, m + shift + right + 1

    def queries(self, n: Int, M: Int, N: Int, shift: Int) -> tuple[Int, Int]:
        left, right = self.numbers
        return n - shift - right, n - shift + left + 1


@dataclasses.dataclass(frozen=True)
class Chunk(Band):
    """Positions are cut into chunks of `size`; a row sees the keys of its own chunk."""

    size: int
    name: ClassVar[str] = "chunk"

    def keys(self, m: Int, M: Int, N: Int, shift: Int) -> tuple[Int, Int]:
        start = (m + shift) // self.size * self.size
        return start, start + self.size

    def queries(self, n: Int, M: Int, N: Int, shift: Int) -> tuple[Int, Int]:
        start = n // self.size * self.size - shift
        return start, start + self.size


@dataclasses.dataclass(frozen=True)
class Prefix(Band):
    """Prefix-LM: the first `length` keys are seen by every row, later ones causally."""

    length: int
    name: ClassVar[str] = "prefix"

    @property
    def bounds_left(self) -> bool:
        return False

    def keys(self, m: Int, M: Int, N: Int, shift: Int) -> tuple[Int, Int]:
        return m * 0, _maximum(m + shift + 1, self.length)

    def queries(self, n: Int, M: Int, N: Int, shift: Int) -> tuple[Int, Int]:
        # A key of the prefix is seen from row 0 on; the product is 0 there and keeps tensors tensors.
        return (n - shift) * (n >= self.length), n * 0 + M


BANDS: dict[str, type[Band]] = {band.name: band for band in (Causal, Window, Chunk, Prefix)}


@dataclasses.dataclass(frozen=True)
class Mask:
    """An intersection of bands with one alignment; the empty intersection lets every row see every key.

    `align` is "top-left" (row 0 stands at key 0), "bottom-right" (the last row stands at the last key) or None, which
    means top-left where nothing asks for more.
    """

    bands: tuple[Band, ...] = ()
    align: str | None = None

    def __post_init__(self) -> None:
        if self.align is not None and self.align not in ALIGNMENTS:
            raise ValueError(f"align must be one of {ALIGNMENTS} or None, got {self.align!r}")

    def __and__(self, other: Any) -> Any:
        if isinstance(other, torch.Tensor):
            return DenseMask(self, _as_dense(other))
        if isinstance(other, DenseMask):
            return DenseMask(self & other.mask, other.dense)
        if not isinstance(other, Mask):
            return NotImplemented
        aligned = {align for align in (self.align, other.align) if align is not None}
        if len(aligned) > 1:
            raise ValueError(f"one mask has one alignment, got {self.align!r} & {other.align!r}")
        bands = self.bands + tuple(band for band in other.bands if band not in self.bands)
        return Mask(bands, next(iter(aligned), None))

    __rand__ = __and__

    def __str__(self) -> str:
        return self._written([str(band) for band in self.bands])

    @property
    def template(self) -> str:
        """The text with `#` for every number: what a kernel is specialised on. Numbers may be symbolic, so they are not
        written."""
        return self._written([band.template for band in self.bands])

    def _written(self, bands: list[str]) -> str:
        text = " & ".join(bands) or "full"
        return f"{text} @ {self.align}" if self.align is not None else text

    @property
    def numbers(self) -> list[int]:
        """The numbers that `template` leaves out, in order."""
        values = (getattr(band, f.name) for band in self.bands for f in dataclasses.fields(band))
        return [value for value in values if value is not None]

    @property
    def bounds_left(self) -> bool:
        return any(band.bounds_left for band in self.bands)

    def shift(self, M: Int, N: Int) -> Int:
        """The key position at which row 0 stands."""
        return N - M if self.align == "bottom-right" else 0

    def keys(self, m: Int, M: Int, N: Int) -> tuple[Int, Int]:
        """The interval [lo, hi) of keys that row m sees, within [0, N); empty where hi <= lo."""
        lo, hi = m * 0, m * 0 + N
        for band in self.bands:
            band_lo, band_hi = band.keys(m, M, N, self.shift(M, N))
            lo, hi = _maximum(lo, band_lo), _minimum(hi, band_hi)
        return lo, hi

    def queries(self, n: Int, M: Int, N: Int) -> tuple[Int, Int]:
        """The interval [lo, hi) of rows that see key n, within [0, M); empty where hi <= lo."""
        lo, hi = n * 0, n * 0 + M
        for band in self.bands:
            band_lo, band_hi = band.queries(n, M, N, self.shift(M, N))
            lo, hi = _maximum(lo, band_lo), _minimum(hi, band_hi)
        return lo, hi

    def visible(self, m: torch.Tensor, n: torch.Tensor, M: Int, N: Int) -> torch.Tensor:
        """Whether row m sees key n; m and n are integer tensors that broadcast."""
        lo, hi = self.keys(m, M, N)
        return (n >= lo) & (n < hi)


@dataclasses.dataclass(frozen=True, eq=False)
class DenseMask:
    """A Mask intersected with a bool tensor (True: attend) that broadcasts to [B, H, M, N]."""

    mask: Mask
    dense: torch.Tensor

    def __and__(self, other: Any) -> DenseMask:
        if isinstance(other, torch.Tensor):
            return DenseMask(self.mask, self.dense & _as_dense(other))
        if isinstance(other, DenseMask):
            return DenseMask(self.mask & other.mask, self.dense & other.dense)
        if isinstance(other, Mask):
            return DenseMask(self.mask & other, self.dense)
        return NotImplemented

    __rand__ = __and__


def full() -> Mask:
    """Every row sees every key."""
    return Mask()


def causal(*, align: str | None = None) -> Mask:
    """Row m sees the keys up to its own position."""
    return Mask((Causal(),), align)


def window(left: int | None = None, right: int | None = None, *, align: str | None = None) -> Mask:
    """Row m sees keys m - left .. m + right, inclusive, as in flash-attn; None leaves that side unlimited.

    Raises:
        ValueError: a side is negative.
    """
    for side, value in (("left", left), ("right", right)):
        _check_count(f"window's {side}", value, least=0, optional=True)
    return Mask((Window(left, right),), align)


def chunk(size: int, *, align: str | None = None) -> Mask:
    """Row m sees the keys of its own chunk of `size` positions."""
    _check_count("chunk's size", size, least=1)
    return Mask((Chunk(size),), align)


def prefix(length: int, *, align: str | None = None) -> Mask:
    """Prefix-LM: the first `length` keys are seen by every row, later ones causally."""
    _check_count("prefix's length", length, least=0)
    return Mask((Prefix(length),), align)


def dense(tensor: torch.Tensor) -> DenseMask:
    """Any bool tensor (True: attend) that broadcasts to [B, H, M, N]."""
    return DenseMask(Mask(), _as_dense(tensor))


_TERM = re.compile(r"([a-z]+)\s*(?:\(([^()]*)\))?")


# Texts of most calls: taking one apart costs as much as the rest of a call's arguments.
_USUAL = {"full": Mask(), "causal": Mask((Causal(),))}


def parse(text: str, numbers: Sequence[int] | None = None) -> Mask:
    """The Mask that `text` names, for example "causal & window(128, 0) @ bottom-right".

    `-` in a window is an unlimited side. Where `numbers` is given, each `#` takes the next of them.

    Raises:
        ValueError: the text is not a mask.
    """
    if text in _USUAL:
        return _USUAL[text]
    values = iter(numbers or ())
    terms, _, align = (part.strip() for part in text.partition("@"))
    mask = Mask((), align or None)
    for term in [] if terms == "full" else terms.split("&"):
        match = _TERM.fullmatch(term.strip())
        if match is None or match[1] not in BANDS:
            raise ValueError(f"{term.strip()!r} is no band; known are {', '.join(BANDS)} (in mask {text!r})")
        try:
            mask = mask & _MAKERS[match[1]](*_arguments(match[2], values, text))
        except TypeError as error:
            raise ValueError(f"{term.strip()!r}: {error} (in mask {text!r})") from None
    return mask


def _arguments(listed: str | None, values: Any, text: str) -> list[int | None]:
    words = [word.strip() for word in (listed or "").split(",") if word.strip()]
    parsed: list[int | None] = []
    for word in words:
        if word == "#":
            number = next(values, None)
            if number is None:
                raise ValueError(f"'#' stands for a number that was not given (in mask {text!r})")
            parsed.append(number)
        elif word == "-":
            parsed.append(None)
        else:
            try:
                parsed.append(int(word))
            except ValueError:
                raise ValueError(f"{word!r} is no number, '-' or '#' (in mask {text!r})") from None
    return parsed


_MAKERS: dict[str, Any] = {"causal": causal, "window": window, "chunk": chunk, "prefix": prefix}


def _check_count(what: str, value: Any, least: int, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{what} must be an int{' or None' if optional else ''}, got {value!r}")
    if value < least:
        hint = " (None is unlimited)" if optional else ""
        raise ValueError(f"{what} must be at least {least}{hint}, got {value}")
    if value > FAR:
        raise ValueError(f"{what} must be at most 2**29, got {value}")


def _as_dense(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype != torch.bool:
        raise TypeError(f"a mask tensor must be bool (True: attend), got {tensor.dtype}; pass a float tensor as bias=")
    return tensor


def _maximum(a: Int, b: Int) -> Int:
    if isinstance(a, torch.Tensor):
        return a.clamp(min=b) if not isinstance(b, torch.Tensor) else torch.maximum(a, b)
    return max(a, b)


def _minimum(a: Int, b: Int) -> Int:
    if isinstance(a, torch.Tensor):
        return a.clamp(max=b) if not isinstance(b, torch.Tensor) else torch.minimum(a, b)
    return min(a, b)
