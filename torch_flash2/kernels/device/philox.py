"""Dropout's Philox on the device: the same bits as scores.keep, whatever the kernel and the tile.

Counter (b, h, m, n // 4), word n % 4; a score is kept iff its word is at least p * 2**32.
"""

import triton
import triton.language as tl

from . import tiles


@triton.jit
def load_key(seed_ptr):
    """The 64-bit Philox key of a call: low words of its seed and offset."""
    low = tl.load(seed_ptr) & 0xFFFFFFFF
    high = tl.load(seed_ptr + 1) & 0xFFFFFFFF
    return low | (high << 32)


@triton.jit
def threshold_of(scoring):
    """Dropout's threshold, uint32, from its coded halves."""
    high = tl.cast(tiles.decoded(scoring.threshold_high), tl.uint32)
    return (high << 16) | tl.cast(tiles.decoded(scoring.threshold_low), tl.uint32)


@triton.jit
def keep_tile(dropout, m, n0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which scores of rows m [BLOCK_M] and keys n0 .. n0 + BLOCK_N are kept; n0 is a multiple of 4."""
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    quad = (n0 // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    w0, w1, w2, w3 = tl.philox(dropout.key, zero + dropout.b, zero + dropout.h, zero + m[:, None], zero + quad)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK_M, BLOCK_N // 4, 2, 2]
    return tl.reshape(words, [BLOCK_M, BLOCK_N]) >= dropout.threshold


@triton.jit
def keep_elements(dropout, m, n):
    """Which scores (m, n) are kept, element by element; m and n broadcast to the tile."""
    zero = m * 0 + n * 0
    w0, w1, w2, w3 = tl.philox(dropout.key, zero + dropout.b, zero + dropout.h, zero + m, zero + n // 4)
    lane = zero + n % 4
    word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return word >= dropout.threshold
