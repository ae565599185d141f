"""The score steps of scores.py on the device, elementwise, for portable and Gluon kernels alike.

Per step: `<step>_prepare(operand, b, h)` loads what a program needs once, `<step>_value(score, operand, m, n, distance,
inside)` is the step, `<step>_slope(output, operand)` its derivative as a function of its output. Softcap, which comes
first, takes its input divided by the cap; where it is the only step, it leaves its output so too. m and n are positions
in the tensors as stored, of shapes that broadcast to the score tile in either orientation; inside says which scores
exist.
"""

import triton
import triton.language as tl

from . import tiles

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """tanh to fp32 accuracy: an odd polynomial near 0, where the quotient cancels."""
    square = x * x
    series = 2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))
    near = x + x * square * (-1.0 / 3.0 + square * series)
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.0625, near, tl.where(x < 0, -far, far))


@triton.jit
def tanh_approx(x):
    """The special function unit's tanh: relative error 2**-11, below what a 16-bit product already has."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def scale_prepare(scale, batch, h, start_m, start_n):
    return scale


@triton.jit
def scale_value(score, scale, m, n, distance, inside):
    # The caller has multiplied by the scale already.
    return score


@triton.jit
def softcap_prepare(softcap, batch, h, start_m, start_n):
    return softcap


@triton.jit
def softcap_value(score, softcap, m, n, distance, inside):
    return softcap * tanh(score)


@triton.jit
def softcap_approx_value(score, softcap, m, n, distance, inside):
    return softcap * tanh_approx(score)


@triton.jit
def softcap_slope(output, softcap):
    ratio = output * (1.0 / softcap)
    return 1.0 - ratio * ratio


@triton.jit
def softcap_only_value(score, softcap, m, n, distance, inside):
    return tanh(score)


@triton.jit
def softcap_only_approx_value(score, softcap, m, n, distance, inside):
    return tanh_approx(score)


@triton.jit
def softcap_only_slope(output, softcap):
    return 1.0 - output * output


@triton.jit
def alibi_prepare(slopes, batch, h, start_m, start_n):
    return tl.load(slopes.ptr + (tl.cast(batch, tl.int64) * slopes.row + h * slopes.col))


@triton.jit
def alibi_value(score, slope, m, n, distance, inside):
    return score - slope * tl.abs(distance).to(tl.float32)


@triton.jit
def bias_prepare(bias, batch, h, start_m, start_n):
    return tiles.dense_at(bias, batch, h, start_m, start_n)


@triton.jit
def bias_value(score, bias, m, n, distance, inside):
    return score + tiles.load_at(bias, m, n, inside).to(tl.float32)


@triton.jit
def unit_slope(output, operand):
    return 1.0


@triton.jit
def prepare(operands, batch, h, start_m, start_n, STEPS: tl.constexpr):
    """What the steps need of one (batch, h), as a tuple; start_m and start_n are where the segment lies in dense
    operands."""
    prepared = ()
    for i in tl.static_range(len(STEPS.PREPARE)):
        prepared = prepared + (STEPS.PREPARE[i](operands[i], batch, h, start_m, start_n),)
    return prepared


@triton.jit
def apply(score, operands, m, n, distance, inside, STEPS: tl.constexpr):
    """Run the steps on a tile of scores."""
    for i in tl.static_range(len(STEPS.VALUE)):
        score = STEPS.VALUE[i](score, operands[i], m, n, distance, inside)
    return score


@triton.jit
def apply_with_slope(score, operands, m, n, distance, inside, STEPS: tl.constexpr):
    """Run the steps on a tile of scores; also the derivative of the result with respect to the first score."""
    slope = 1.0
    for i in tl.static_range(len(STEPS.VALUE)):
        score = STEPS.VALUE[i](score, operands[i], m, n, distance, inside)
        slope = slope * STEPS.SLOPE[i](score, operands[i])
    return score, slope
