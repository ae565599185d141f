"""explain: which kernels a call described in words runs on, and why; no GPU is needed.

B batch entries or packed documents, H query heads, G key/value heads, M query rows, N keys,
D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch

from .. import dispatch, hardware, masks, problem, settings
from ..hardware import Hardware
from ..problem import Call, Problem

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
LENGTHS = ("cu_q", "cu_k", "used_q", "used_k")
EXAMPLE = 'example: --shape 2,32,8,4096,4096,128 --mask "causal & window(128, 0)" --arch sm90'


def _sizes(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if not all(size.strip().isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(f"must be sizes such as 1,32,4096, got {text!r}")
    return tuple(map(int, sizes))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.epilog = EXAMPLE
    add(
        "--shape",
        type=_sizes,
        required=True,
        metavar="B,H,G,M,N,D",
        help="batch, query heads, key heads, query rows, keys, head dim; with cu_q or cu_k "
        "B counts documents, and M or N is the total of their rows or keys",
    )
    add("--head-dim-v", type=int, metavar="DV", help="head dim of value, where it is not D")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--mask", default="full", help='the text of a mask, "causal & window(128, 0)"')
    add("--dense", type=_sizes, metavar="SHAPE", help="a bool mask tensor of this shape as well")
    add("--bias", type=_sizes, metavar="SHAPE", help="an additive bias of this shape")
    add("--bias-grad", action="store_true", help="the bias needs a gradient")
    add("--softcap", type=float)
    add("--alibi", action="store_true", help="ALiBi slopes")
    add("--sinks", action="store_true", help="attention sinks")
    add("--dropout", type=float, default=0.0, metavar="P")
    add("--lengths", metavar="NAMES", help=f"tensors of lengths, some of {','.join(LENGTHS)}")
    add("--no-grad", action="store_true", help="forward alone")
    add("--arch", help="sm80, sm90 ... or cpu; by default this machine's")


def main(arguments: argparse.Namespace) -> int:
    call = describe(arguments)
    device = _hardware(arguments.arch)
    fp32 = call.query.dtype == torch.float32
    posed = dataclasses.replace(
        problem.of(call, needs_grad=not arguments.no_grad, bias_grad=arguments.bias_grad),
        hardware=device,
        precision=settings.matmul_precision(device.type) if fp32 else "ieee",
    )
    print(_plan(posed))
    if posed.needs_grad:
        print(_plan(dataclasses.replace(posed, direction="backward")))
    return 0


def _plan(posed: Problem) -> dispatch.Plan:
    # A plan is shared by problems that no kernel tells apart: this one's numbers go back in.
    return dataclasses.replace(dispatch.select(posed, dispatch.forced()), problem=posed)


def _hardware(arch: str | None) -> Hardware:
    if arch is None:
        return hardware.of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return hardware.CPU if arch == "cpu" else hardware.simulated(arch)


def describe(arguments: argparse.Namespace) -> Call:
    """The call in words as a call on tensors that have no data.

    Raises:
        ValueError: the words name no call.
    """
    if len(arguments.shape) != 6:
        raise ValueError(f"--shape must be B,H,G,M,N,D, got {','.join(map(str, arguments.shape))}")
    B, H, G, M, N, D = arguments.shape
    lengths = arguments.lengths.split(",") if arguments.lengths else []
    if unknown := set(lengths) - set(LENGTHS):
        raise ValueError(f"--lengths must name some of {', '.join(LENGTHS)}, got {min(unknown)!r}")
    dtype = DTYPES[arguments.dtype]
    mask = masks.parse(arguments.mask)

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch_q, batch_k = (1 if cu in lengths else B for cu in ("cu_q", "cu_k"))
    spans = {
        name: tensor(B + name.startswith("cu"), dtype=torch.int32) if name in lengths else None for name in LENGTHS
    }
    return Call(
        query=tensor(batch_q, H, M, D),
        key=tensor(batch_k, G, N, D),
        value=tensor(batch_k, G, N, arguments.head_dim_v or D),
        dense=tensor(*arguments.dense, dtype=torch.bool) if arguments.dense else None,
        bias=tensor(*arguments.bias) if arguments.bias else None,
        alibi=tensor(H, dtype=torch.float32) if arguments.alibi else None,
        sinks=tensor(H) if arguments.sinks else None,
        seed=tensor(2, dtype=torch.int64) if arguments.dropout else None,
        **spans,
        block_table=None,
        mask=mask.template,
        mask_numbers=mask.numbers,
        scale=1.0,
        softcap=arguments.softcap,
        dropout_p=arguments.dropout,
        page_size=None,
        max_q=None,
        max_k=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        force=dispatch.forced(),
        num_splits=None,
    )
