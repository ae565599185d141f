"""What is measured: shapes, grouped by what is timed in the same rounds, and what each counts.

B batch, H query heads, G kv heads, M query rows, N keys, D head dim of query and key,
Dv head dim of value
"""

from __future__ import annotations

import dataclasses
import random
import re
from typing import Any

import torch

from torch_flash2 import masks
from torch_flash2.testing import CASES, Case

DIRECTIONS = ("forward", "backward")
SUITES = (*DIRECTIONS, "deterministic", "features", "models", "memory", "decode")
# Suites that are modules of their own, each with `run(options)`.
MODULES = ("matrix", "train", "kvcache", "few", "context_parallel")
GRID_SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
GRID_HEAD_DIMS = (64, 128, 256)
_TERM = re.compile(r"full|causal|window\((-|\d+), (-|\d+)\)")


def span(mask: str) -> tuple[int | None, int | None]:
    """How many keys to the left and right of its own position a row sees; None is unlimited.

    Raises:
        ValueError: the mask is not an intersection of causal and windows.
    """
    left: list[int] = []
    right: list[int] = []
    for term in mask.split(" & "):
        match = _TERM.fullmatch(term)
        if match is None:
            raise ValueError(f"peers know full, causal, window and their '&', not {term!r}")
        sides = ("-", "0") if term == "causal" else match.groups(default="-")
        for limits, side in zip((left, right), sides, strict=True):
            if side != "-":
                limits.append(int(side))
    return min(left, default=None), min(right, default=None)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A case in one direction: "forward", "backward" (timed alone) or "both".

    `deterministic` turns on PyTorch's deterministic mode. `base` names the shape of the same group
    whose time this one's is given as a multiple of. Of the decode suite: `page` rows in a page, 0 for a
    dense cache; `latent`: the value is the key's first columns; `layers` of attention in one call.
    """

    case: Case
    direction: str
    deterministic: bool = False
    base: str = ""
    page: int = 0
    latent: bool = False
    layers: int = 1

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def causal(self) -> bool:
        """Whether row 0 of a square sees no key but its own."""
        _, hi = masks.parse(self.case.mask).keys(torch.tensor(0), 2, 2)
        return int(hi) == 1

    @property
    def packed(self) -> bool:
        return self.case.lengths == "packed"

    def tiny(self) -> Shape:
        """The same kind of call, small enough for a dry run on a CPU."""
        case = self.case.scaled(64, 2, 4)
        dims = {name: max(getattr(case, name) // 8, 8) for name in ("head_dim", "head_dim_v")}
        return dataclasses.replace(self, case=dataclasses.replace(case, **dims))


@dataclasses.dataclass(frozen=True)
class Group:
    """Shapes timed in the same rounds, and their peers unless the caller names others."""

    shapes: tuple[Shape, ...]
    peers: tuple[str, ...]


def _case(name: str, sizes: tuple[int, int, int, int, int], **fields: Any) -> Case:
    """A Case of `sizes` B, H, G, S, D with M = N = S, Dv = D, on views of [B, S, H, D] memory."""
    batch, heads, heads_kv, seqlen, head_dim = sizes
    case = Case(name, batch, heads, heads_kv, seqlen, seqlen, head_dim, head_dim, layout="bshd")
    return dataclasses.replace(case, **fields)


def _grid(direction: str, dtype: str, quick: bool) -> list[Group]:
    groups = []
    for head_dim in GRID_HEAD_DIMS:
        for mask in ("full", "causal"):
            for seqlen in (1024, 8192) if quick else GRID_SEQLENS:
                heads = 2048 // head_dim
                sizes = (16384 // seqlen, heads, heads, seqlen, head_dim)
                case = _case(f"d{head_dim}-{mask}-s{seqlen}", sizes, mask=mask, dtype=dtype)
                groups.append(Group((Shape(case, direction),), ("fa2", "cudnn")))
    return groups


def _deterministic(dtype: str, quick: bool) -> list[Group]:
    """The backward's grid in PyTorch's deterministic mode, each case beside itself without."""
    groups = []
    for (shape,) in (group.shapes for group in _grid("backward", dtype, quick)):
        case = dataclasses.replace(shape.case, name=f"deterministic-{shape.name}")
        groups.append(Group((shape, Shape(case, "backward", True, shape.name)), ("fa3",)))
    return groups


def _features(direction: str) -> list[Group]:
    """Each feature beside what it is added to, and beside the peers that have it."""

    def shape(
        name: str,
        sizes: tuple[int, int, int, int, int],
        mask: str = "full",
        base: str = "",
        deterministic: bool = False,
        **fields: Any,
    ) -> Shape:
        return Shape(_case(name, sizes, mask=mask, **fields), direction, deterministic, base)

    long, llama, gemma = (1, 32, 8, 16384, 128), (1, 32, 8, 8192, 128), (1, 8, 4, 8192, 256)
    t5, gpt2, bert = (16, 16, 16, 512, 64), (12, 12, 12, 1024, 64), (32, 16, 16, 512, 64)
    window = "causal & window(4096, 0)"
    packed: dict[str, Any] = dict(batch=8, lengths="packed", documents=(1 / 8,) * 8)
    shares = tuple(1 - b / 62 for b in range(32))
    padded: dict[str, Any] = dict(lengths="padded_k", documents=(1.0,) * 32, documents_k=shares)
    mha, deepseek, wide = (4, 16, 16, 4096, 128), (1, 128, 128, 4096, 192), (1, 8, 1, 4096, 512)
    plans: list[tuple[str, list[Shape]]] = [
        (
            "flex fa3",
            [
                shape("causal-16k", long, "causal"),
                shape("window4096-16k", long, window, "causal-16k"),
                shape("documents8-16k", long, "causal", "causal-16k", **packed),
            ],
        ),
        (
            "flex fa3 fa3fwd",
            [
                shape("causal-8k-d256", gemma, "causal"),
                shape("softcap-8k-d256", gemma, "causal", "causal-8k-d256", softcap=50.0),
                shape("window4096-8k-d256", gemma, window),
                shape("gemma2-8k-d256", gemma, window, "window4096-8k-d256", softcap=50.0),
            ],
        ),
        (
            "flex fa3 fa3fwd",
            [
                shape("causal-8k-d128", llama, "causal"),
                shape("softcap-8k-d128", llama, "causal", "causal-8k-d128", softcap=50.0),
                shape("alibi-8k-d128", llama, "causal", "causal-8k-d128", alibi=1),
                shape("sinks-8k-d128", llama, "causal", "causal-8k-d128", sinks=True),
            ],
        ),
        ("sdpa", [shape("d512-gqa8-4k", wide, "causal")]),
        ("efficient math", [shape("fp32-4k-d64", (2, 16, 16, 4096, 64), "causal", dtype="fp32")]),
        ("sdpa flex", [shape("plain-t5", t5), shape("bias-t5", t5, base="plain-t5", bias="HMN")]),
        (
            "sdpa fa2",
            [
                shape("causal-gpt2", gpt2, "causal"),
                shape("dropout-gpt2", gpt2, "causal", "causal-gpt2", dropout_p=0.1),
            ],
        ),
        ("sdpa flex fa3", [shape("padding-bert", bert, **padded)]),
        ("sdpa fa2", [shape("vit-s197", (256, 12, 12, 197, 64))]),
        ("sdpa", [shape("dit-d72", (256, 16, 16, 256, 72))]),
        ("sdpa", [shape("deepseek-192-128-4k", deepseek, "causal", head_dim_v=128)]),
        (
            "sdpa fa2 fa3",
            [
                shape("causal-4k-d128", mha, "causal"),
                shape("deterministic-4k-d128", mha, "causal", "causal-4k-d128", True),
                shape("growing-4k-d128", mha, "causal", "causal-4k-d128", tags=("growing",)),
            ],
        ),
    ]
    return [Group(tuple(shapes), tuple(peers.split())) for peers, shapes in plans]


def _models() -> list[Group]:
    """Attention of well-known models: at full length beside the fastest peers, then as the tests have it."""
    peers = ("fa3", "fa3fwd", "fa4", "cudnn", "flex")
    window: dict[str, Any] = dict(mask="causal & window(4096, 0)")
    packed: dict[str, Any] = dict(mask="causal", batch=8, lengths="packed", documents=(1 / 8,) * 8)
    llama, deepseek = (1, 32, 8, 8192, 128), (1, 128, 128, 4096, 192)
    long, gemma = (1, 32, 8, 16384, 128), (1, 8, 4, 8192, 256)
    cases = [
        _case("llama3.1-8b-8k", llama, mask="causal"),
        _case("llama3.1-8b-8k", llama, mask="causal", dtype="fp16"),
        _case("deepseek-v3-4k", deepseek, mask="causal", head_dim_v=128),
        _case("window4096-16k", long, **window),
        _case("documents8-16k", long, **packed),
        _case("gemma2-8k", gemma, softcap=50.0, **window),
    ]
    shapes = [Shape(case, direction) for direction in DIRECTIONS for case in cases]
    shapes.insert(2, Shape(_case("llama3.1-8b-32k", (1, 32, 8, 32768, 128), mask="causal"), "forward"))
    tested = [case for case in CASES.values() if "model" in case.tags]
    return [
        *(Group((shape,), peers) for shape in shapes),
        *(Group((Shape(case, direction),), ("sdpa",)) for direction in DIRECTIONS for case in tested),
    ]


def _memory(quick: bool) -> list[Group]:
    """Peak memory over the length, each length a group of its own: one is allocated at a time."""
    groups = []
    for power in range(12, 15 if quick else 18):
        case = _case(f"s{2**power}", (1, 32, 32, 2**power, 128), mask="causal")
        groups.append(Group((Shape(case, "both"),), ("math",)))
    return groups


def _decode() -> list[Group]:
    """One new token against caches, then what varies: lengths, pages, a window, MLA, a stack of layers."""
    peers = ("sdpa", "cudnn", "fa3")

    def shape(
        name: str, sizes: tuple[int, int, int, int, int], more: dict[str, Any] | None = None, **kind: Any
    ) -> Shape:
        B, H, G, N, D = sizes
        fields: dict[str, Any] = {"mask": "full", "layout": "bshd", **(more or {})}
        fields.setdefault("head_dim_v", D)
        return Shape(Case(name, B, H, G, 1, N, head_dim=D, **fields), "forward", **kind)

    large, rng = (64, 32, 8, 16384, 128), random.Random(0)
    shares = tuple(rng.randint(1, 16384) / 16384 for _ in range(64))
    mixed: dict[str, Any] = dict(lengths="padded_k", documents=(1.0,) * 64, documents_k=shares)
    window = dict(mask="window(1023, 0) @ bottom-right")
    alone = [
        shape("b8-32k-d128", (8, 32, 8, 32768, 128)),
        shape("b1-128k-d128", (1, 32, 8, 131072, 128)),
        shape("b128-mqa-8k-d128", (128, 8, 1, 8192, 128)),
        shape("b16-8k-d64", (16, 64, 8, 8192, 64)),
    ]
    pages = [
        shape("b64-16k-d128", large),
        shape("mixed", large, mixed),
        *(shape(f"mixed-page{size}", large, mixed, page=size) for size in (16, 64, 256)),
        shape("window1024-page64", large, window, page=64),
    ]
    latent = shape("mla-page64", (64, 128, 1, 8192, 576), dict(head_dim_v=512), page=64, latent=True)
    stacks = [shape(f"llama-stack-b{B}", (B, 32, 8, N, 128), layers=32) for B, N in ((1, 16384), (64, 4096))]
    return [Group(tuple(pages), peers), *(Group((each,), peers) for each in (*alone, latent, *stacks))]


def suite(name: str, *, dtype: str = "bf16", quick: bool = False, pattern: str = "", tiny: bool = False) -> list[Group]:
    """The groups of a suite.

    Args:
        dtype: of the grids.
        quick: fewer lengths.
        pattern: a regular expression; a group none of whose names it finds is left out.
        tiny: shrink every shape for a dry run.

    Raises:
        ValueError: no suite has that name.
    """
    if name in DIRECTIONS:
        groups = _grid(name, dtype, quick)
    elif name == "deterministic":
        groups = _deterministic(dtype, quick)
    elif name == "features":
        groups = [group for direction in DIRECTIONS for group in _features(direction)]
    elif name == "models":
        groups = _models()
    elif name == "memory":
        groups = _memory(quick)
    elif name == "decode":
        groups = _decode()
    else:
        raise ValueError(f"the suites are {', '.join(SUITES + MODULES)}, got {name!r}")
    groups = [g for g in groups if any(re.search(pattern, shape.name) for shape in g.shapes)]
    if tiny:
        return [Group(tuple(shape.tiny() for shape in g.shapes), g.peers) for g in groups]
    return groups
