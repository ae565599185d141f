"""What kernels receive and hand on: values that belong together, as NamedTuples. An absent feature is None.

Needs neither Triton nor a GPU. CAPS are compile-time. B segments, H query heads, M query rows, N keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Strided(NamedTuple):
    """A tensor [batch, head, row, col] by its pointer and strides in elements; `cols` is the size of the last
    dimension."""

    ptr: Any
    batch: int
    head: int
    row: int
    col: int
    cols: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Strided:
        """A tensor of up to 4 dimensions, [batch, head, row, col] from the right; stride 0 wherever its size is 1."""
        strides = [0 if n == 1 else s for s, n in zip(tensor.stride(), tensor.shape, strict=True)]
        batch, head, row, col = [0] * (4 - tensor.dim()) + strides
        return cls(tensor, batch, head, row, col, tensor.shape[-1] if tensor.dim() else 1)


class Paging(NamedTuple):
    """Where paged keys lie: `table` int32 [B, pages per segment], its row stride and the number of pages there are,
    both coded as sizes are."""

    table: Any
    row: Any
    pages: Any


class Spans(NamedTuple):
    """Lengths on the device, int32: cumulative starts [B + 1] and used lengths [B]; where keys are paged, their
    pages."""

    cu_q: torch.Tensor | None
    cu_k: torch.Tensor | None
    used_q: torch.Tensor | None
    used_k: torch.Tensor | None
    paging: Paging | None = None


class Sizes(NamedTuple):
    """Segments, query heads, query heads per key head, rows and keys of the tensors as stored."""

    B: Any
    H: Any
    group: Any
    M: Any
    N: Any

    @classmethod
    def coded(cls, *sizes: int) -> Sizes:
        """Sizes for a launch, which kernels read through `tiles.sizes_of`."""
        return cls(*map(coded, sizes))


def coded(number: int) -> int:
    """A number for a launch that must not decide what is compiled.

    Triton compiles anew for an integer that is 1 or a multiple of 16, inside tuples whatever do_not_specialize says
    (seen in 3.6 and 3.7). 2 * number + 3 is neither.
    """
    return 2 * number + 3


class Rules(NamedTuple):
    """What decides which scores exist: the numbers of each band, coded as sizes are, and a dense bool mask."""

    numbers: tuple[tuple[int, ...], ...]
    dense: Strided | None


class Scoring(NamedTuple):
    """What turns products into probabilities: the softmax scale; the factor from products to the first score step's
    input; that from what goes into the softmax to log2 units; dropout's 32-bit threshold, as two coded halves, and
    1 / (1 - p)."""

    scale: float
    first: float
    scale2: float
    threshold_high: int
    threshold_low: int
    inverse_keep: float


class Operands(NamedTuple):
    """The operand of each score step, sinks [H] and dropout's seed [2]."""

    steps: tuple[Any, ...]
    sinks: torch.Tensor | None
    seed: torch.Tensor | None


class RowStats(NamedTuple):
    """What the backward knows of each query row, fp32 [B * H, pitch]: its lse in log2 units (+inf, which makes every
    probability 0, for a row that sees no key and for padding) and delta = rowsum(dO * O) - dLSE. pitch is a multiple of
    128 and at least one more than a tile past the last row, so that loads need no mask and are known to be aligned."""

    lse2: Any
    delta: Any
    pitch: int


class Grads(NamedTuple):
    """Where dK, dV and, fp32 and before the scale, sums of dQ go; None where one is not wanted of this launch."""

    k: Any
    v: Any
    sum_q: Any


class Mode(NamedTuple):
    """Compile-time numbers: tile sizes, the most columns in a piece of a tile as wide as a head, whether head dims fill
    the tiles, whether loops load all that they read at each product, whether bands bound keys on the left, alignment,
    precision of products, whether offsets inside a tile need 64 bits, whether several query heads share a key head, the
    page size, 0 where keys are not paged, whether the value is the key's first columns, and then the tile width of its
    other columns."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_DV: int
    PIECE: int
    EVEN: bool
    AGAIN: bool
    LEFT: bool
    BOTTOM_RIGHT: bool
    PRECISION: str
    WIDE: bool
    GROUPED: bool
    PAGE: int = 0
    SHARED: bool = False
    REST: int = 0


class Steps(NamedTuple):
    """Compile-time functions: of the bands, and of the score steps."""

    KEYS: tuple[Any, ...]
    QUERIES: tuple[Any, ...]
    PREPARE: tuple[Any, ...]
    VALUE: tuple[Any, ...]
    SLOPE: tuple[Any, ...]

    @property
    def cache_key(self) -> str:
        """Triton keys its disk cache on this; without it, on the functions' names alone, and an edited band would run
        stale."""
        return "-".join(str(function.cache_key) for functions in self for function in functions)


# Inside kernels.


class Rows(NamedTuple):
    """The rows of one segment: a Strided or a TMA descriptor, and where the segment starts in it."""

    x: Any
    batch: Any
    head: Any
    start: Any


class PagedRows(NamedTuple):
    """The rows of one segment in pages: a Strided [pages, head, row in the page, col], the segment's page numbers, how
    many pages there are, and the head."""

    x: Any
    table: Any
    pages: Any
    head: Any


class Queries(NamedTuple):
    """What streams past a tile of keys: queries, output gradients and row statistics, and where the segment starts in
    them; and Grads."""

    q: Any
    grad_out: Any
    grads: Any
    stats: Any
    batch_q: Any
    start_q: Any
    start_k: Any


class Place(NamedTuple):
    """Where a tile of query rows lies: its first row in the segment, the segment's batch entry, start and stored rows
    in the query, and its batch entry and start in the keys."""

    row: Any
    batch_q: Any
    start_q: Any
    stored: Any
    batch_k: Any
    start_k: Any


class Tile(NamedTuple):
    """A tile's fixed side: its positions and the first of them, the interval that each sees, the segment's shift, rows
    and keys."""

    at: Any
    first: Any
    lo: Any
    hi: Any
    shift: Any
    M: Any
    N: Any


class Span(NamedTuple):
    """The moving side of the loop: [start, stop) is visited, [full_start, full_stop) needs no mask."""

    start: Any
    full_start: Any
    full_stop: Any
    stop: Any


class Head(NamedTuple):
    """What all tiles of one head of one segment share: two factors of Scoring, the steps' prepared operands, Dropout or
    None, and the dense mask's (pointer, row stride, col stride) or None."""

    first: Any
    scale2: Any
    steps: Any
    dropout: Any
    dense: Any


class Dropout(NamedTuple):
    """Philox key, the counter's segment and head, and the threshold."""

    key: Any
    b: Any
    h: Any
    threshold: Any
