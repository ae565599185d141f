"""Launching the portable kernels: on a GPU, in Triton's interpreter, or compiled only, for a GPU that is not here.

B batch, H query heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import functools
import logging
import math
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import problem as problem_module
from ... import scores as score_steps
from ...problem import Call, Problem
from ..bundles import Mode, Operands, Paging, Rules, Scoring, Sizes, Spans, Steps, Strided, coded
from ..device import bands as device_bands
from ..device import scores as device_scores
from .tables import Config, block_dim

INTERPRETED = triton.knobs.runtime.interpret

logger = logging.getLogger("torch_flash2")

# Called instead of a launch with (kernel, grid, arguments, options): compile-only tests and tuning set it.
_instead: contextvars.ContextVar[Callable[..., Any] | None] = contextvars.ContextVar(
    "torch_flash2_launch", default=None
)


@contextlib.contextmanager
def instead(handler: Callable[..., Any]) -> Iterator[None]:
    """Hand launches in this block to `handler(kernel, grid, arguments, options)`."""
    token = _instead.set(handler)
    try:
        yield
    finally:
        _instead.reset(token)


def handler() -> Callable[..., Any] | None:
    """What launches are handed to here, if anything."""
    return _instead.get()


def launch(kernel: Any, programs: int, device: torch.device, arguments: tuple[Any, ...], **options: Any) -> None:
    """Launch programs of a kernel on a device, which need not be the current one; nothing where there are none."""
    handle = _instead.get()
    if handle is not None:
        handle(kernel, (programs,), arguments, options)
    elif programs > 0:
        run(kernel, programs, device, arguments, options)


def run(kernel: Any, programs: int, device: torch.device, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Launch, whatever `instead` says; returns Triton's compiled kernel."""
    try:
        return _run(kernel, programs, device, arguments, options)
    except OSError as error:
        _move_cache(error)
        return _run(kernel, programs, device, arguments, options)


def _run(kernel: Any, programs: int, device: torch.device, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return kernel[(programs,)](*arguments, **options)
    return kernel[(programs,)](*arguments, **options)


@functools.cache
def _temporary_cache() -> str:
    return tempfile.mkdtemp(prefix="torch_flash2-triton-")


def _move_cache(error: OSError) -> None:
    """Give Triton a cache directory of this process where its own cannot be written; anything else is raised again."""
    if triton.knobs.cache.dir == _temporary_cache():
        raise error
    warnings.warn(
        f"Triton's cache directory {triton.knobs.cache.dir} cannot be used ({error}); compiling into "
        f"{_temporary_cache()}, for this process only. Set TRITON_CACHE_DIR to a directory that can be written.",
        stacklevel=2,
    )
    triton.knobs.cache.dir = _temporary_cache()


_kept: dict[tuple[torch.device, int], torch.Tensor] = {}
# How many of those kept this thread's launches have asked for since it called `keep_zeros`.
_asked = threading.local()
# int32 zeros for launches that CUDA graphs hold: each takes its own and keeps it, since graphs may be replayed side by
# side. This many at a time, at most so often; who needs more than LARGEST is a long launch, to which a fill is nothing.
RESERVE = 1 << 17
MOST_RESERVES = 32
LARGEST = 2048
_reserved: dict[torch.device, torch.Tensor] = {}
# All of them, for good: a graph knows addresses alone.
_reserves: collections.defaultdict[torch.device, list[torch.Tensor]] = collections.defaultdict(list)
_reserving = threading.Lock()


def _place(device: torch.device) -> tuple[torch.device, int] | None:
    """Where zeros of the current stream are kept; None where none are."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return device, torch._C._cuda_getCurrentRawStream(device.index)


def zeros(device: torch.device, size: int) -> torch.Tensor:
    """At least `size` int32 zeros for a kernel that leaves them as zeros: those kept for the current stream, whose
    launches follow one another; under capture reserved ones, or fresh ones."""
    return _zeros_of(_place(device), device, size)


def _zeros_of(place: tuple[torch.device, int] | None, device: torch.device, size: int) -> torch.Tensor:
    if place is None:
        found = _take(device, size)
    else:
        found = _kept.get(place)
        _asked.most = max(getattr(_asked, "most", 0), size)
    if found is None or found.numel() < size:
        found = torch.zeros(size, dtype=torch.int32, device=device)
    return found


def keep_zeros(device: torch.device, size: int) -> torch.Tensor:
    """As `zeros`; fresh ones are kept for the calls to come, and some reserved for CUDA graphs. Only eager calls may:
    compiled ones allocate from a pool that is a CUDA graph's own. Under capture nothing is kept."""
    place = _place(device)
    _asked.most = 0
    found = _zeros_of(place, device, size)
    if place is not None:
        _kept[place] = found
        _reserve(device)
    return found


def _reserve(device: torch.device) -> None:
    """See that there are zeros for launches under capture, where none could be made but by a launch of the graph's: a
    fill takes about 1 us of every replay (H200, 2026-11-22)."""
    left = _reserved.get(device)
    if (left is not None and left.numel() >= RESERVE // 2) or len(_reserves[device]) >= MOST_RESERVES:
        return
    fresh = torch.zeros(RESERVE, dtype=torch.int32, device=device)
    # A graph may be replayed on another stream.
    torch.cuda.current_stream(device).synchronize()
    with _reserving:
        _reserves[device].append(fresh)
        _reserved[device] = fresh


def _take(device: torch.device, size: int) -> torch.Tensor | None:
    """Reserved zeros that nobody else gets; None where there are not so many."""
    with _reserving:
        left = _reserved.get(device)
        if left is None or size > min(LARGEST, left.numel()):
            return None
        # Multiples of 128 bytes, so that kernels may count on 16.
        _reserved[device] = left[-(-size // 32) * 32 :]
        return left[:size]


def kept_for(tensor: torch.Tensor) -> int | None:
    """Of a tensor that keeps zeros, how many this thread's launches have asked for since it called `keep_zeros`; None
    for others."""
    return _asked.most if any(tensor is known for known in _kept.values()) else None


def say_compiled(*, src: Any, times: Any, cache_hit: bool, **rest: Any) -> None:
    """Triton's compilation listener: log each kernel of this library that is compiled, with the seconds it took."""
    if not cache_hit and src.fn.fn.__module__.startswith("torch_flash2."):
        logger.info(
            "compiled %s for the first call of its class in %.1f s; Triton keeps it in %s",
            src.fn.fn.__name__, times.total / 1e6, triton.knobs.cache.dir,
        )  # fmt: skip


# Another listener, set before or after this, is left alone.
if triton.knobs.compilation.listener is None:
    triton.knobs.compilation.listener = say_compiled


def why_not(problem: Problem) -> Iterator[str]:
    """What no Triton kernel of this folder can run."""
    hardware = problem.hardware
    if hardware.type == "cuda":
        if torch.version.hip:
            yield "it is not tested on AMD GPUs"
        if hardware.capability < (8, 0):
            yield f"it needs compute capability 8.0, the GPU has {hardware.capability[0]}.{hardware.capability[1]}"
        if INTERPRETED and not hardware.name.startswith("simulated"):
            yield "TRITON_INTERPRET is set, and the tensors are on the GPU"
    elif hardware.type != "cpu":
        yield f"it runs on CUDA GPUs, the tensors are on {hardware.type}"
    elif not INTERPRETED:
        yield "it needs a CUDA GPU, the tensors are on the CPU"
    if problem.dtype == torch.float64:
        yield "it has no float64"
    if max(problem.head_dim, problem.head_dim_v) > 512:
        yield f"it has head dims up to 512, got {problem.head_dim} and {problem.head_dim_v}"
    if problem.batch * problem.heads * (max(problem.seqlen_q, problem.seqlen_k) // 16 + 1) >= 2**31:
        yield "the call has more tiles than a grid has programs"


def outputs(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty out and lse of a call."""
    query = call.query
    out = torch.empty_strided(*problem_module.output_like(call), dtype=query.dtype, device=query.device)
    return out, torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)


def load(config: Config, tensor: torch.Tensor, rows: int, cols: int) -> Any:
    """How tiles of `rows` rows of a tensor are loaded: by TMA descriptor where the strides allow it, else by
    pointer."""
    if not config.tma or not problem_module.tma_ready(tensor):
        return Strided.of(tensor)
    return TensorDescriptor(tensor, list(tensor.shape), tma_strides(tensor), [1, 1, rows, cols])


def tma_strides(tensor: torch.Tensor) -> list[int]:
    """The strides of a [B, H, S, D] tensor that is ready for TMA."""
    # A dimension of size 1 may have any stride in PyTorch; TMA wants a multiple of 16 bytes even there.
    sizes = zip(tensor.stride()[:3], tensor.shape[:3], strict=True)
    return [*(s if n != 1 else 16 * tensor.shape[3] for s, n in sizes), 1]


def widths(problem: Problem) -> tuple[int, int]:
    """Columns of tiles of D and of Dv.

    Equal where both are at most 64: beside 64 columns, 32 or 16 give wrong results and accesses out of bounds with
    Triton 3.6 on an H200 (D 40 and 24, Dv 24 and 16, 2026-11-21), though the same kernel is right in the interpreter.
    """
    width, width_v = block_dim(problem.head_dim), block_dim(problem.head_dim_v)
    return max(width, min(width_v, 64)), max(width_v, min(width, 64))


def _piece(problem: Problem, config: Config, rows: int) -> int:
    """The most columns of an accumulator of so many rows.

    Where products are mma instructions of single warps (not Hopper's of warp groups, nor Blackwell's), Triton gives
    each warp rows of its own only if no tile is wider than it is high. Else warps share rows, and probabilities go
    through shared memory.
    """
    grouped = problem.hardware.capability[0] in (9, 10, 11)
    if grouped or not rows:
        return 512
    if config.piece:
        return config.piece
    return rows if rows >= 16 * config.num_warps else 128


def _again(problem: Problem) -> bool:
    """Whether loops load all that they read at each product.

    Products of fp32 keep each operand twice in shared memory, its high and its low bits; where memory is short, no tile
    as wide as the largest heads can stay there.
    """
    wide = max(problem.head_dim, problem.head_dim_v) > 256 and problem.dtype == torch.float32
    return wide and problem.hardware.shared_memory < 200 * 1024


def mode(problem: Problem, config: Config, rows: int = 0) -> Mode:
    """The compile-time numbers of a launch whose accumulators have so many rows; 0: it has none as wide as a head."""
    piece = _piece(problem, config, rows)
    width, width_v = (
        block if block <= piece else triton.cdiv(dim, piece) * piece
        for dim, block in zip((problem.head_dim, problem.head_dim_v), widths(problem), strict=True)
    )
    return Mode(
        config.BLOCK_M,
        config.BLOCK_N,
        width,
        width_v,
        piece,
        (problem.head_dim, problem.head_dim_v) == (width, width_v),
        _again(problem),
        problem.mask.bounds_left,
        problem.mask.align == "bottom-right",
        problem.precision if problem.dtype == torch.float32 else "ieee",
        problem.wide,
        problem.group > 1,
        problem.page_size or 0,
    )


def steps(problem: Problem) -> Steps:
    """The compile-time functions of a launch."""
    names = [band.name for band in problem.mask.bands]
    run = _run_steps(problem)
    forms = ["softcap_only" if run == ("softcap",) else name for name in run]
    approximate = problem.dtype != torch.float32 and not INTERPRETED
    values = [f"{form}_approx_value" if approximate and "softcap" in form else f"{form}_value" for form in forms]
    slopes = [
        f"{form}_slope" if name in score_steps.STEPS and score_steps.STEPS[name].slope else "unit_slope"
        for name, form in zip(run, forms, strict=True)
    ]
    return Steps(
        tuple(getattr(device_bands, f"{name}_keys") for name in names),
        tuple(getattr(device_bands, f"{name}_queries") for name in names),
        tuple(getattr(device_scores, f"{name}_prepare") for name in run),
        tuple(getattr(device_scores, value) for value in values),
        tuple(getattr(device_scores, slope) for slope in slopes),
    )


def _run_steps(problem: Problem) -> tuple[str, ...]:
    """The score steps to run. A scale that is not positive cannot be moved behind the maximum: an empty step applies it
    first."""
    return problem.steps if problem.positive_scale or problem.steps else ("scale",)


def _scoring(problem: Problem, call: Call) -> Scoring:
    threshold = score_steps.keep_threshold(call.dropout_p)
    run, cap = _run_steps(problem), call.softcap or 1.0
    first, last = (call.scale / cap, cap if run == ("softcap",) else 1.0) if run else (1.0, call.scale)
    inverse_keep = 1.0 / (1.0 - call.dropout_p)
    return Scoring(
        call.scale, first, last * math.log2(math.e), coded(threshold >> 16), coded(threshold & 0xFFFF), inverse_keep
    )


def programs(cu: torch.Tensor | None, batch: int, heads: int, length: int, block: int) -> int:
    """The size of the grid of a kernel that owns tiles of `block` rows; tiles.locate is its other half."""
    if cu is None:
        return batch * heads * triton.cdiv(length, block)
    return heads * (length // block + batch + 1) if length else 0


def bundle(problem: Problem, call: Call) -> tuple[Spans, Sizes, Rules, Scoring, Operands]:
    """The run-time arguments that every kernel takes."""
    operands: dict[str, Any] = {
        "scale": call.scale,
        "softcap": call.softcap,
        "alibi": None if call.alibi is None else Strided.of(call.alibi),
        "bias": None if call.bias is None else Strided.of(call.bias),
    }
    paging = None
    if call.block_table is not None:
        paging = Paging(call.block_table, coded(call.block_table.stride(0)), coded(call.key.shape[0]))
    return (
        Spans(call.cu_q, call.cu_k, call.used_q, call.used_k, paging),
        Sizes.coded(problem.batch, problem.heads, problem.group, call.query.shape[2], problem_module.stored_keys(call)),
        Rules(
            tuple(tuple(map(coded, band.numbers)) for band in problem.mask.bands),
            None if call.dense is None else Strided.of(call.dense),
        ),
        _scoring(problem, call),
        Operands(
            tuple(operands[name] for name in _run_steps(problem)), call.sinks, call.seed if call.dropout_p > 0 else None
        ),
    )
