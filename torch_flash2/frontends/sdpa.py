"""torch.nn.functional.scaled_dot_product_attention, taken over in place: every caller, eager or compiled, unchanged.

`enable` overrides aten::scaled_dot_product_attention at a device's key and at its autograd key: the one hook through
which calls pass. A call is judged once per signature (entry) and then either runs on this library's kernels or goes on
to PyTorch's own kernel, untouched. Whichever it is, its backward is the same one's. The two kinds of calls that PyTorch
leads elsewhere are met there: those with a lower-right CausalBias are judged like the others, jagged tensors counted.

B batch, H query heads, G key/value heads, M query rows, N keys, D head dim of query and key, Dv head dim of value.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import autoload, direct, dispatch, judging, policy, settings, stock
from .._version import __version__
from ..judging import Verdict
from ..replacing import Replacement
from ..stock import Sdpa

logger = logging.getLogger("torch_flash2")
_OP = "aten::scaled_dot_product_attention"
_TRACED = ("FakeTensor", "FunctionalTensor")
_MOST_ENTRIES = 4096


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
            found = judging.normal(arguments)
            assert isinstance(found, Sdpa)
            same = zip(found[:3], arguments[:3], strict=True)
            self.normal = all(new is old for new, old in same)
            self.squeeze = 4 - arguments.query.dim()
            seed = torch.zeros(2, dtype=torch.int64, device=found.query.device) if found.dropout_p > 0 else None
            self.route = direct.Route(judging.op_call(found, seed))

    def attend(self, arguments: Sdpa, needs_grad: bool) -> torch.Tensor:
        if not self.normal:
            found = judging.normal(arguments)
            assert isinstance(found, Sdpa)
            arguments = found
        tensors = judging.op_tensors(arguments, judging.draw_seed(arguments))
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
    query, key, value, mask, dropout_p, is_causal, scale, enable_gqa, lower_right = arguments
    backends = torch._C
    return (
        query.shape, query.stride(), query.dtype, query.device,
        key.shape, key.stride(), key.dtype, key.device,
        value.shape, value.stride(), value.dtype, value.device,
        query.data_ptr() % 16, key.data_ptr() % 16, value.data_ptr() % 16, key.data_ptr() == value.data_ptr(),
        mask if mask is None else (*direct.signature((mask,)), needs_grad and mask.requires_grad),
        dropout_p, is_causal, scale, enable_gqa, lower_right, needs_grad,
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


def _pass_on(arguments: Sdpa, reason: str) -> None:
    verdict = Verdict("untouched", reason)
    _counter(verdict.label)[0] += 1
    _log(arguments, verdict)


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
            _pass_on(arguments, reason)
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
        verdict = judging.judge(arguments, needs_grad, rule)
        _log(arguments, verdict)
        entry = _Entry(arguments, verdict)
        if len(_entries) >= _MOST_ENTRIES:
            _entries.clear()
            _left.clear()
        _entries[signature] = entry
        if verdict.kind in ("slower", "excluded") and not arguments.lower_right:
            _left[_likeness(*arguments[:6], needs_grad)] = entry.counter
    entry.counter[0] += 1
    return entry.attend(arguments, needs_grad) if entry.taken else None


def _trace(arguments: Sdpa, needs_grad: bool) -> torch.Tensor | None:
    """The output of a traced call."""
    rule = is_enabled()
    if rule is None:
        return None
    verdict = judging.judge(arguments, needs_grad, rule)
    if type(arguments.query).__name__ == "FakeTensor":
        _log(arguments, verdict)
        _counter(f"traced: {verdict.label}")[0] += 1
    if not verdict.taken:
        return None
    found = judging.normal(arguments)
    assert isinstance(found, Sdpa)
    out: torch.Tensor = torch.ops.torch_flash2.forward(*judging.op_call(found, judging.draw_seed(found)))[0]
    for _ in range(4 - arguments.query.dim()):
        out = out.squeeze(0)
    return out


# What PyTorch leads elsewhere.

_dispatch: Callable[..., torch.Tensor]


def _causal_bias(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """In place of CausalBias._dispatch, which gives lower-right masks to a backend before anyone else sees the call."""
    global _dispatch
    _dispatch = original

    @functools.wraps(original)
    def dispatching(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        rows, keys = attn_mask.seq_len_q, attn_mask.seq_len_kv
        ours = (
            attn_mask.variant.name == "LOWER_RIGHT"
            and not is_causal
            and rows != keys
            and query.device.type == _installed_for
            and query.shape[-2] == rows
            and key.shape[-2] == keys
        )
        if not ours:
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if torch.compiler.is_dynamo_compiling():
            found: torch.Tensor = torch.ops.torch_flash2.causal_lower_right(
                query, key, value, dropout_p, scale, enable_gqa
            )
            return found
        return _lower_right(query, key, value, attn_mask, dropout_p, scale, enable_gqa)

    return dispatching


def _lower_right(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: Any,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    arguments = Sdpa(query, key, value, None, dropout_p, True, scale, enable_gqa, lower_right=True)
    device = query.device.type
    autocast = torch.is_autocast_enabled(device)
    if autocast and query.dtype != torch.get_autocast_dtype(device):
        # PyTorch casts some of these calls and not others.
        _pass_on(arguments, "autocast of other dtypes beside a lower-right CausalBias")
        found = None
    else:
        needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments.tensors)
        with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
            found = _run(arguments, needs_grad)
    if found is not None:
        return found
    # Where PyTorch makes a tensor of the mask, the call comes by once more and is judged with that.
    return _dispatch(query, key, value, bias, dropout_p, False, scale, enable_gqa)


class _Bias:
    """What PyTorch reads of a lower-right CausalBias; a tensor subclass cannot be made while tracing."""

    def __init__(self, rows: int, keys: int):
        from torch.nn.attention.bias import CausalVariant

        self.variant, self.seq_len_q, self.seq_len_kv = CausalVariant.LOWER_RIGHT, rows, keys

    def _materialize(self, device: torch.device) -> torch.Tensor:
        rows, keys = self.seq_len_q, self.seq_len_kv
        return torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows)


def _lower_right_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    bias = _Bias(query.shape[-2], key.shape[-2])
    return _lower_right(query, key, value, bias, dropout_p, scale, enable_gqa)


# Dynamo puts it in its graph as it does aten's op; what it becomes is found when the graph is lowered.
_ops = torch.library.Library("torch_flash2", "FRAGMENT")
_ops.define(
    "causal_lower_right(Tensor query, Tensor key, Tensor value, float dropout_p, float? scale, bool enable_gqa) "
    "-> Tensor"
)
_ops.impl("causal_lower_right", _lower_right_op, "CompositeImplicitAutograd")


def _counting(reason: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, counted as left to PyTorch."""
    counter = _counter(Verdict("untouched", reason).label)

    @functools.wraps(original)
    def counted(*arguments: Any, **keywords: Any) -> Any:
        if not torch.compiler.is_compiling():
            counter[0] += 1
        return original(*arguments, **keywords)

    return counted


# Switching it on and off.

_lock = threading.RLock()
_policies: list[str] = []
_library: torch.library.Library | None = None
_salt = ""


def enable(policy: str = "fastest", *, device_type: str | None = None) -> None:
    """From now on scaled_dot_product_attention may run on this library's kernels, in the whole process.

    Every `enable` is undone by one `disable`; the policy of the last one counts. Nothing else of PyTorch changes but
    where torch.nn.attention.bias leads its lower-right masks.
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
_replacements: list[Replacement] = []


def _install(device_type: str) -> None:
    global _library, _installed_for
    device = device_type.upper()
    judged = (device, f"Autograd{device}")
    counted = {
        "FuncTorchVmapMode": "a functorch transform",
        f"NestedTensor{device}": "nested tensors",
        "AutogradNestedTensor": "nested tensors",
    }
    # All before the first override: one at a device's key changes what stands at its autograd key.
    kernels = {key: torch.library.get_kernel(_OP, key) for key in (*judged, *counted)}
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # That kernels are overridden is what the caller asked for.
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for key, kernel in kernels.items():
            if key in counted:
                override = _counting(counted[key], kernel.call_boxed)
            else:
                override = _overriding(kernel, autograd=key.startswith("Autograd"))
            library.impl("scaled_dot_product_attention", override, key, with_keyset=True)
    _library, _installed_for = library, device_type
    jagged = functools.partial(_counting, "nested tensors")
    _replacements.extend(
        [
            Replacement("torch.nn.attention.bias", "CausalBias._dispatch", _causal_bias),
            Replacement("torch.nested._internal.ops", "jagged_scaled_dot_product_attention", jagged),
        ]
    )


def _remove(index: int) -> None:
    global _library
    if index >= 0:
        del _policies[index]
    if not _policies and _library is not None:
        _library._destroy()
        _library = None
        while _replacements:
            _replacements.pop().remove()
    _changed()


def _changed() -> None:
    """What depends on the policy: the verdicts, what PyTorch's Python dispatcher remembers of the op from traces, and
    the keys of PyTorch's caches on disk."""
    _entries.clear()
    _left.clear()
    getattr(torch.ops.aten.scaled_dot_product_attention.default, "_dispatch_cache", {}).clear()
    _salt_caches()


def _salt_caches() -> None:
    """Graphs with and without this library's ops, or with those of another version, are not interchangeable, and the
    keys of PyTorch's caches on disk do not see the difference."""
    global _salt
    config: Any = torch.compiler.config
    tag = config.cache_key_tag.replace(_salt, "")
    _salt = f";torch_flash2={__version__}:{_schemas()}"
    if _policies:
        _salt += f":{_policies[-1]}:{policy.fingerprint()}"
    config.cache_key_tag = tag + _salt


@functools.cache
def _schemas() -> str:
    """Tells one set of the ops that graphs hold from another."""
    names = ("forward", "backward", "append", "rotate", "causal_lower_right")
    found = "".join(str(getattr(torch.ops.torch_flash2, name).default._schema) for name in names)
    return hashlib.sha256(found.encode()).hexdigest()[:8]


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


_salt_caches()
