"""torch.nn.functional.scaled_dot_product_attention, taken over in place: every caller, eager or compiled, unchanged.

`enable` overrides aten::scaled_dot_product_attention at a device's key and at its autograd key: the one hook through
which every call passes. A call is judged once per signature (entry) and then either runs on this library's kernels or
goes on to PyTorch's own kernel, untouched. Whichever it is, its backward is the same one's.

B batch, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from .. import autoload, direct, dispatch, hardware, masks, policy, problem, settings, stock
from .._version import __version__
from ..dispatch import UnsupportedError
from ..problem import Call, Problem
from ..stock import Sdpa

logger = logging.getLogger("torch_flash2")
_OP = "aten::scaled_dot_product_attention"
_TRACED = ("FakeTensor", "FunctionalTensor")
_MOST_ENTRIES = 4096
_CAUSAL = masks.causal().template


class Verdict(NamedTuple):
    """Whether to take a call, and why.

    `kind` is "taken"; "slower": PyTorch's choice is the faster, or nobody measured; "unsupported": no kernel here can
    run it; "excluded": the caller asked for something else; "untouched": it is for PyTorch alone to run, or refuse.
    """

    kind: str
    reason: str
    plans: tuple[dispatch.Plan, ...] = ()
    stock: str = ""

    @property
    def taken(self) -> bool:
        return self.kind == "taken"

    @property
    def label(self) -> str:
        """How stats() counts it."""
        if self.taken:
            return " and ".join(dict.fromkeys(plan.kernel for plan in self.plans))
        return f"stock, {self.kind}: {self.reason}"

    def __str__(self) -> str:
        where = f"taken: {self.label}" if self.taken else f"left to PyTorch ({self.kind})"
        return f"{where}; {self.reason}"


# What calls become.


def normal(arguments: Sdpa) -> Sdpa | str:
    """The call with 4 dimensions and as many batch entries everywhere, as views; or why it is PyTorch's alone."""
    query, key, value, mask, dropout_p, is_causal, scale, enable_gqa = arguments
    dims = query.dim()
    if not 2 <= dims <= 4 or key.dim() != dims or value.dim() != dims:
        return f"tensors of {dims}, {key.dim()} and {value.dim()} dimensions"
    if len({(t.dtype, t.device) for t in (query, key, value)}) > 1 or query.dtype not in problem.DTYPES:
        return "query, key and value of " + ", ".join(f"{t.dtype} on {t.device}" for t in (query, key, value))
    if not 0 <= dropout_p < 1:
        return f"dropout_p {dropout_p}"
    if mask is not None:
        if is_causal:
            return "a mask and is_causal at once"
        if mask.dtype not in (torch.bool, torch.float32, query.dtype) or mask.dim() > 4 or mask.device != query.device:
            return f"a mask of {mask.dtype} with {mask.dim()} dimensions on {mask.device}"
    while query.dim() < 4:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)

    B = _common(query.shape[0], key.shape[0], value.shape[0])
    if B is None:
        return f"batches of {query.shape[0]}, {key.shape[0]} and {value.shape[0]}"
    H, G = query.shape[1], key.shape[1]
    if G != value.shape[1] or not (H == G or G == 1 or enable_gqa):
        heads = _common(H, G, value.shape[1])
        if heads is None or enable_gqa:
            return f"{H}, {G} and {value.shape[1]} heads, enable_gqa={enable_gqa}"
        query, key, value = (_expanded(tensor, 1, heads) for tensor in (query, key, value))
    query, key, value = (_expanded(tensor, 0, B) for tensor in (query, key, value))
    return Sdpa(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa)


def _common(*sizes: int) -> int | None:
    """What sizes broadcast to."""
    found = next((size for size in sizes if size != 1), 1)
    return found if all(size in (1, found) for size in sizes) else None


def _expanded(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    if tensor.shape[dim] == size:
        return tensor
    return tensor.expand(*(size if i == dim else -1 for i in range(4)))


def _tensors(arguments: Sdpa, seed: torch.Tensor | None) -> direct.Tensors:
    """The tensors of the op's call, for normal arguments."""
    mask = arguments.attn_mask
    boolean = mask is not None and mask.dtype == torch.bool
    nothing = (None, None, None, None, None)
    return (
        arguments.query, arguments.key, arguments.value,
        mask if boolean else None, None if boolean else mask, None, None, seed, *nothing,
    )  # fmt: skip


def _call(arguments: Sdpa, seed: torch.Tensor | None) -> Call:
    """The op's call, for normal arguments."""
    rest: tuple[Any, ...] = (
        _CAUSAL if arguments.is_causal else "full",
        [],
        arguments.query.shape[3] ** -0.5 if arguments.scale is None else float(arguments.scale),
        None,
        float(arguments.dropout_p),
        *(None, None, None),
        torch.are_deterministic_algorithms_enabled(),
        dispatch.forced(),
    )
    return Call(*_tensors(arguments, seed), *rest)


def _seed(arguments: Sdpa) -> torch.Tensor | None:
    if arguments.dropout_p == 0:
        return None
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=arguments.query.device)


# Judging a call.


def judge(arguments: Sdpa, needs_grad: bool, rule: str) -> Verdict:
    """Whether to take a call by a policy. Traced calls are judged by the sizes that they were traced with.

    Raises:
        UnsupportedError: the policy is "strict", and no kernel can run the call.
    """
    if not torch._C._get_flash_sdp_enabled():
        return Verdict("excluded", "sdpa_kernel or torch.backends.cuda has switched flash attention off")
    if 0 in (arguments.query.shape[-1], arguments.value.shape[-1]):
        return Verdict("untouched", "a head dim of 0")
    found = normal(arguments)
    if isinstance(found, str):
        return Verdict("untouched", found)
    mask_grad = needs_grad and found.attn_mask is not None and found.attn_mask.requires_grad
    try:
        posed = _pose(found, needs_grad, mask_grad)
    except (TypeError, ValueError) as error:
        return Verdict("untouched", str(error))
    try:
        plans = [dispatch.select(posed, dispatch.forced())]
        if needs_grad:
            plans.append(dispatch.select(dataclasses.replace(posed, direction="backward"), dispatch.forced()))
        # A plan is shared by problems that no kernel tells apart: this one's sizes go back in.
        plans = [
            dataclasses.replace(plan, problem=dataclasses.replace(posed, direction=plan.problem.direction))
            for plan in plans
        ]
    except UnsupportedError as error:
        if rule == "strict":
            raise
        # Its first line names the call's sizes, which would make a count of its own for each.
        return Verdict("unsupported", " ".join(line.strip() for line in str(error).splitlines()[1:]))
    if rule != "fastest":
        return Verdict("taken", f"policy {rule}", tuple(plans))
    if not _default_backends():
        return Verdict("taken", "sdpa_kernel or torch.backends.cuda names flash attention", tuple(plans))
    other = stock.choice(arguments)
    taken, reason = policy.faster(posed, other)
    return Verdict("taken" if taken else "slower", reason, tuple(plans), other)


def _default_backends() -> bool:
    """Whether PyTorch is free to choose, as it was when its choice was measured."""
    backends = torch._C
    return bool(
        backends._get_mem_efficient_sdp_enabled()
        and backends._get_math_sdp_enabled()
        and backends._get_cudnn_sdp_enabled()
    )


def _pose(arguments: Sdpa, needs_grad: bool, mask_grad: bool) -> Problem:
    device = arguments.query.device
    seed = torch.empty(2, dtype=torch.int64, device="meta") if arguments.dropout_p > 0 else None
    if direct.plain(arguments.tensors):
        seed = None if seed is None else torch.empty_like(seed, device=device)
        return problem.of(_call(arguments, seed), needs_grad=needs_grad, bias_grad=mask_grad)
    with stock.outside_tracing():
        query, key, value, *mask = map(stock.on_meta, arguments.tensors)
        seed = None if seed is None else torch.empty(2, dtype=torch.int64, device="meta")
        scale = None if arguments.scale is None else 1.0
        like = arguments._replace(query=query, key=key, value=value, attn_mask=mask[0] if mask else None, scale=scale)
        found = problem.of(_call(like, seed), needs_grad=needs_grad, bias_grad=mask_grad)
    fp32 = found.dtype == torch.float32
    precision = settings.matmul_precision(device.type) if fp32 else found.precision
    return dataclasses.replace(found, hardware=hardware.of(device), precision=precision)


# Counting and logging.

_counters: dict[str, list[int]] = {}
_logged: set[Any] = set()


def _counter(label: str) -> list[int]:
    return _counters.setdefault(label, [0])


def stats(reset: bool = False) -> dict[str, int]:
    """How often each kernel, or each reason to leave a call to PyTorch, was met since the process began or since the
    last reset.

    A compiled function counts when it is traced ("traced: ..."), not when it runs.
    """
    found = {label: counter[0] for label, counter in _counters.items() if counter[0]}
    if reset:
        for counter in _counters.values():
            counter[0] = 0
    return found


def _log(arguments: Sdpa, verdict: Verdict) -> None:
    """One line for each new class of calls."""
    if not logger.isEnabledFor(logging.INFO):
        return
    posed = verdict.plans[0].problem if verdict.plans else None
    seen = (posed.key if posed is not None else None, verdict.kind, verdict.reason if posed is None else "")
    if seen in _logged:
        return
    _logged.add(seen)
    query, key, value = (tuple(map(stock.hint, t.shape)) for t in arguments[:3])
    what = posed.describe() if posed is not None else f"{query}, {key}, {value} of {arguments.query.dtype}"
    logger.info("scaled_dot_product_attention, %s: %s", what, str(verdict).replace("\n", " "))


# The override.


class _Entry:
    """What calls of one signature share."""

    __slots__ = ("counter", "normal", "route", "squeeze", "taken")

    def __init__(self, arguments: Sdpa, verdict: Verdict):
        self.taken = verdict.taken
        self.counter = _counter(verdict.label)
        if self.taken:
            found = normal(arguments)
            assert isinstance(found, Sdpa)
            same = zip(found[:3], arguments[:3], strict=True)
            self.normal = all(new is old for new, old in same)
            self.squeeze = 4 - arguments.query.dim()
            seed = torch.zeros(2, dtype=torch.int64, device=found.query.device) if found.dropout_p > 0 else None
            self.route = direct.Route(_call(found, seed))

    def attend(self, arguments: Sdpa, needs_grad: bool) -> torch.Tensor:
        if not self.normal:
            found = normal(arguments)
            assert isinstance(found, Sdpa)
            arguments = found
        tensors = _tensors(arguments, _seed(arguments))
        if not direct.unwatched():
            out = self.route.through_op(tensors)[0]
        elif needs_grad:
            out = self.route.attend(tensors)[0]
        else:
            out = self.route.forward(tensors)[0]
        for _ in range(self.squeeze):
            out = out.squeeze(0)
        return out


_entries: dict[Any, _Entry] = {}
# Calls that go on to PyTorch because it is the faster, or because the caller excluded this library: the short way out.
# It is safe to send a call there by mistake, so that a likeness suffices.
_left: dict[Any, list[int]] = {}
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _likeness(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout_p: float,
    is_causal: bool, needs_grad: bool,
) -> tuple[Any, ...]:  # fmt: skip
    return (
        query.shape, key.shape, value.shape, query.dtype,
        mask if mask is None else (mask.dtype, mask.requires_grad), dropout_p, is_causal, needs_grad,
        torch._C._get_flash_sdp_enabled(), torch._C._get_cudnn_sdp_enabled(),
    )  # fmt: skip


def _signature(arguments: Sdpa, needs_grad: bool) -> tuple[Any, ...]:
    """What a verdict and a route depend on."""
    query, key, value, mask, dropout_p, is_causal, scale, enable_gqa = arguments
    backends = torch._C
    return (
        query.shape, query.stride(), query.dtype, query.device,
        key.shape, key.stride(), key.dtype, key.device,
        value.shape, value.stride(), value.dtype, value.device,
        query.data_ptr() % 16, key.data_ptr() % 16, value.data_ptr() % 16, key.data_ptr() == value.data_ptr(),
        mask if mask is None else (*direct.signature((mask,)), needs_grad and mask.requires_grad),
        dropout_p, is_causal, scale, enable_gqa, needs_grad,
        backends._get_flash_sdp_enabled(), backends._get_cudnn_sdp_enabled(),
        backends._get_mem_efficient_sdp_enabled(), backends._get_math_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(), dispatch.forced(),
        settings.matmul_precision(query.device.type) if query.dtype == torch.float32 else None,
    )  # fmt: skip


def _untouched(arguments: Sdpa) -> str | None:
    """Why PyTorch must see a call as it is, whatever its sizes."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a functorch transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode AD"
    for tensor in arguments.tensors:
        name = type(tensor).__name__
        if not direct.plain((tensor,)) and name not in _TRACED:
            return f"a tensor subclass, {name}"
    if torch.compiler.is_exporting():
        return "torch.export"
    return None


def _overriding(kernel: Any, autograd: bool) -> Callable[..., torch.Tensor]:
    """The override at one dispatch key, where `kernel` is PyTorch's own."""
    stock: Callable[..., torch.Tensor] = kernel.call_boxed

    def scaled_dot_product_attention(
        keyset: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        needs_grad = (
            autograd
            and torch.is_grad_enabled()
            and (
                query.requires_grad
                or key.requires_grad
                or value.requires_grad
                or (attn_mask is not None and attn_mask.requires_grad)
            )
        )
        if type(query) in _PLAIN:
            counter = _left.get(_likeness(query, key, value, attn_mask, dropout_p, is_causal, needs_grad))
            if counter is not None:
                counter[0] += 1
                if attn_mask is None and dropout_p == 0 and scale is None and not enable_gqa:
                    return stock(keyset, query, key, value, None, 0.0, is_causal)
                return stock(
                    keyset, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
                )
        arguments = Sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        found = _run(arguments, needs_grad)
        if found is not None:
            return found
        return stock(keyset, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    return scaled_dot_product_attention


def _run(arguments: Sdpa, needs_grad: bool) -> torch.Tensor | None:
    """The output, or None where the call is for PyTorch."""
    if not direct.plain(arguments.tensors) or not direct.unwatched():
        reason = _untouched(arguments)
        if reason is not None:
            _counter(Verdict("untouched", reason).label)[0] += 1
            _log(arguments, Verdict("untouched", reason))
            return None
        if not direct.plain(arguments.tensors):
            return _trace(arguments, needs_grad)
    signature = _signature(arguments, needs_grad)
    entry = _entries.get(signature)
    if entry is None:
        rule = is_enabled()
        if rule is None:
            # Another thread has just disabled it.
            return None
        verdict = judge(arguments, needs_grad, rule)
        _log(arguments, verdict)
        entry = _Entry(arguments, verdict)
        if len(_entries) >= _MOST_ENTRIES:
            _entries.clear()
            _left.clear()
        _entries[signature] = entry
        if verdict.kind in ("slower", "excluded"):
            _left[_likeness(*arguments[:6], needs_grad)] = entry.counter
    entry.counter[0] += 1
    return entry.attend(arguments, needs_grad) if entry.taken else None


def _trace(arguments: Sdpa, needs_grad: bool) -> torch.Tensor | None:
    """The output of a traced call."""
    rule = is_enabled()
    if rule is None:
        return None
    verdict = judge(arguments, needs_grad, rule)
    if type(arguments.query).__name__ == "FakeTensor":
        _log(arguments, verdict)
        _counter(f"traced: {verdict.label}")[0] += 1
    if not verdict.taken:
        return None
    found = normal(arguments)
    assert isinstance(found, Sdpa)
    out: torch.Tensor = torch.ops.torch_flash2.forward(*_call(found, _seed(found)))[0]
    for _ in range(4 - arguments.query.dim()):
        out = out.squeeze(0)
    return out


# Switching it on and off.

_lock = threading.RLock()
_policies: list[str] = []
_library: torch.library.Library | None = None
_salt: str | None = None


def enable(policy: str = "fastest", *, device_type: str | None = None) -> None:
    """From now on scaled_dot_product_attention may run on this library's kernels, in the whole process.

    Every `enable` is undone by one `disable`; the policy of the last one counts. Nothing else of PyTorch changes.
    Functions that were compiled before keep what they were compiled with until `torch._dynamo.reset()`; a warning says
    so.

    Args:
        policy: "fastest" takes the calls that are measured to be faster here than by PyTorch's choice and, where
            nothing was measured, those that PyTorch would run on its slow backends; "always" takes every call that
            some kernel can run; "strict" does too, and raises UnsupportedError for those that none can run.
        device_type: whose calls, "cuda" or "cpu"; by default "cuda", or "cpu" where PyTorch was built without CUDA.

    Raises:
        ValueError: an argument is not one of those.
        RuntimeError: it is enabled already, for another device type.
    """
    if policy not in settings.POLICIES:
        raise ValueError(f"policy must be one of {', '.join(settings.POLICIES)}; got {policy!r}")
    wanted = device_type or ("cuda" if torch.backends.cuda.is_built() else "cpu")
    if wanted not in ("cuda", "cpu"):
        raise ValueError(f"device_type must be 'cuda' or 'cpu', got {device_type!r}")
    with _lock:
        if _policies and wanted != _installed_for:
            raise RuntimeError(f"torch_flash2 is enabled for {_installed_for} already; disable it first")
        before = is_enabled()
        if before != policy and _compiled_before():
            warnings.warn(
                "functions that torch.compile has compiled already keep the attention that they were compiled with; "
                "torch._dynamo.reset() makes them compile anew",
                stacklevel=2,
            )
        if before is None:
            _install(wanted)
        _policies.append(policy)
        _changed()


def disable() -> None:
    """Undo the last `enable`; after as many as there were, scaled_dot_product_attention is PyTorch's own again."""
    with _lock:
        if _policies:
            _remove(len(_policies) - 1)


@contextlib.contextmanager
def enabled(policy: str = "fastest", *, device_type: str | None = None) -> Iterator[None]:
    """`enable` for a block. It holds for the whole process, not just for this thread."""
    enable(policy, device_type=device_type)
    index = len(_policies) - 1
    try:
        yield
    finally:
        with _lock:
            _remove(min(index, len(_policies) - 1))


def is_enabled() -> str | None:
    """The policy that counts now, None where scaled_dot_product_attention is PyTorch's own."""
    return _policies[-1] if _policies else None


def enable_as_the_environment_says() -> None:
    """`enable` with the policy that TORCH_FLASH2 names, if it is set. Never raises."""
    try:
        chosen = settings.policy()
        if chosen is not None:
            enable(chosen)
    except Exception as error:
        autoload.complain(error)


_installed_for = ""


def _install(device_type: str) -> None:
    global _library, _installed_for
    keys = (device_type.upper(), f"Autograd{device_type.upper()}")
    # Both before the first override: one at a device's key changes what stands at its autograd key.
    kernels = [torch.library.get_kernel(_OP, key) for key in keys]
    library = torch.library.Library("aten", "IMPL")
    for key, kernel in zip(keys, kernels, strict=True):
        override = _overriding(kernel, autograd=key.startswith("Autograd"))
        library.impl("scaled_dot_product_attention", override, key, with_keyset=True)
    _library, _installed_for = library, device_type


def _remove(index: int) -> None:
    global _library
    if index >= 0:
        del _policies[index]
    if not _policies and _library is not None:
        _library._destroy()
        _library = None
    _changed()


def _changed() -> None:
    """What depends on the policy: the verdicts, what PyTorch's Python dispatcher remembers of the op from traces, and
    the keys of PyTorch's caches on disk."""
    global _salt
    _entries.clear()
    _left.clear()
    getattr(torch.ops.aten.scaled_dot_product_attention.default, "_dispatch_cache", {}).clear()
    config: Any = torch.compiler.config
    tag = config.cache_key_tag
    if _salt is not None:
        tag = tag.replace(_salt, "")
    # Graphs with and without this library's ops are not interchangeable, and PyTorch's keys do not see the difference.
    _salt = f";torch_flash2={__version__}:{_policies[-1]}:{policy.fingerprint()}" if _policies else None
    config.cache_key_tag = tag + (_salt or "")


def _compiled_before() -> bool:
    convert = sys.modules.get("torch._dynamo.convert_frame")
    return convert is not None and bool(convert.output_codes.seen)


def sac_ops() -> list[Any]:
    """The attention ops to save under selective activation checkpointing, this library's and PyTorch's own:
    `create_selective_checkpoint_contexts(sac_ops())` recomputes everything but attention."""
    names = (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
    return [torch.ops.torch_flash2.forward.default, *(getattr(torch.ops.aten, name).default for name in names)]
