"""The bands of masks.py on the device, elementwise, for portable and Gluon kernels alike.

Per band two functions: `<band>_keys(m, M, N, shift, numbers)` gives the interval [lo, hi) of keys that query row m
sees,
`<band>_queries(n, M, N, shift, numbers)` the interval of rows that see key n. Both are clipped to the segment by the
caller.

M query rows, N keys of the segment; m, n positions in it; row m stands at key position m + shift.
"""

import triton
import triton.language as tl

from ..bundles import Span
from . import tiles


@triton.jit
def causal_keys(m, M, N, shift, numbers):
    return m * 0, m + shift + 1


@triton.jit
def causal_queries(n, M, N, shift, numbers):
    return n - shift, n * 0 + M


@triton.jit
def window_keys(m, M, N, shift, numbers):
    return m + shift - numbers[0], m + shift + numbers[1] + 1


@triton.jit
def window_queries(n, M, N, shift, numbers):
    return n - shift - numbers[1], n - shift + numbers[0] + 1


@triton.jit
def chunk_keys(m, M, N, shift, numbers):
    # Rows before position 0 see nothing; integer division truncates, so they are kept out of it.
    position = m + shift
    start = tl.maximum(position, 0) // numbers[0] * numbers[0]
    return start, tl.where(position < 0, start, start + numbers[0])


@triton.jit
def chunk_queries(n, M, N, shift, numbers):
    start = n // numbers[0] * numbers[0]
    return tl.maximum(start, 0) - shift, start + numbers[0] - shift


@triton.jit
def prefix_keys(m, M, N, shift, numbers):
    return m * 0, tl.maximum(m + shift + 1, numbers[0])


@triton.jit
def prefix_queries(n, M, N, shift, numbers):
    return tl.where(n < numbers[0], 0, n - shift), n * 0 + M


@triton.jit
def intersect(x, limit, M, N, shift, numbers, BANDS: tl.constexpr):
    """The interval [lo, hi) within [0, limit) that all of BANDS (keys or queries functions) leave to position x.

    numbers are coded as `Sizes.coded` codes sizes.
    """
    lo = x * 0
    hi = x * 0 + limit
    for i in tl.static_range(len(BANDS)):
        decoded = ()
        for j in tl.static_range(len(numbers[i])):
            decoded = decoded + (tiles.decoded(numbers[i][j]),)
        band_lo, band_hi = BANDS[i](x, M, N, shift, decoded)
        lo = tl.maximum(lo, band_lo)
        hi = tl.minimum(hi, band_hi)
    return lo, hi


@triton.jit
def tile_span(lo, hi, limit, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Which tiles of BLOCK positions a tile of intervals [lo, hi) touches, and which of them lie inside every interval.

    All but stop are multiples of BLOCK. Empty intervals touch nothing. MASKED: no tile is free of masking.
    """
    some = lo < hi
    stop = tl.max(tl.where(some, hi, 0), 0)
    start = tl.minimum(tl.min(tl.where(some, lo, limit), 0), stop) // BLOCK * BLOCK
    last = tl.cdiv(stop, BLOCK) * BLOCK
    full_start = tl.cdiv(tl.max(lo, 0), BLOCK) * BLOCK
    full_stop = tl.maximum(tl.min(hi, 0), 0) // BLOCK * BLOCK
    if MASKED:
        full_stop = full_start
    some_full = full_start < full_stop
    full_start = tl.where(some_full, full_start, last)
    full_stop = tl.where(some_full, full_stop, last)
    return Span(start, full_start, full_stop, stop)


@triton.jit
def masked_tiles(span, BLOCK: tl.constexpr):
    """How many of a span's tiles need a mask."""
    return (span.full_start - span.start) // BLOCK + tl.cdiv(span.stop - span.full_stop, BLOCK)


@triton.jit
def masked_tile(span, i, BLOCK: tl.constexpr):
    """Where the i-th tile that needs a mask starts: first those before the full tiles, then those after."""
    position = span.start + i * BLOCK
    return tl.where(position < span.full_start, position, position + (span.full_stop - span.full_start))
