"""Recording what a launch of kernels did, to do it again with other tensors of the same sizes, strides, dtypes and
alignment: no problem is posed, no argument bound, nothing specialised a second time.

What a kernel's `launch` does must follow from those alone. A recording holds the compiled kernels, their grids and
their arguments, in which pointers are replaced by where they come from: an input, or a buffer allocated on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...problem import Call, Problem, Saved
from . import launching

Tensors = Sequence[torch.Tensor | None]
# How many fields of a Call, the first, are tensors.
CALL_TENSORS = Call._fields.index("mask")
_VALUE = Call._fields.index("value")
# Operations that compute nothing.
_HARMLESS = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "transpose", "permute", "view", "unbind",
    "select", "slice", "as_strided", "expand", "unsqueeze", "squeeze", "detach", "alias", "split", "split_with_sizes",
}  # fmt: skip


_DESCRIPTORS = (TensorDescriptor, GluonDescriptor)


class _Watch(TorchDispatchMode):
    """Whether anything was computed outside the kernels, and the storages that were allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = False
        self.allocated: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace != "aten" or name not in _HARMLESS:
            self.computed = True
        result = func(*args, **(kwargs or {}))
        if "empty" in name:
            self.allocated.add(result.untyped_storage().data_ptr())
        return result


class _Buffer(NamedTuple):
    """Memory to allocate: a result's, or bytes that only kernels see."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Launch(NamedTuple):
    """One launch: `makers` fill in the places of `template` that hold pointers."""

    run: Any
    function: Any
    metadata: Any
    programs: int
    template: list[Any]
    makers: list[tuple[int, Callable[[list[int], list[Any]], Any]]]


class UnrecordableError(Exception):
    """The launch did something that its tensors' sizes do not determine, or that leaves no trace here."""


class Recording:
    """A launch to be done again. Calls take the tensors that it was recorded with, in their order."""

    def __init__(
        self,
        inputs: Tensors,
        result: tuple[Any, ...],
        launches: list[tuple[Any, int, tuple[Any, ...]]],
        allocated: set[int],
        value_in_key: bool = False,
    ):
        self._allocated = allocated
        self._device = next(tensor.device for tensor in inputs if tensor is not None)
        self._index = self._device.index
        self._inputs = list(inputs)
        # A value that is part of the key is so in every call alike.
        inside = _VALUE if value_in_key else None
        self._owners = [tensor for i, tensor in enumerate(inputs) if tensor is not None and i != inside]
        if len(set(map(id, self._owners))) < len(self._owners):
            # One tensor in two places, where calls to come may have two.
            raise UnrecordableError
        self._used: list[int] = []
        self._buffers: list[_Buffer] = []
        self._storages: dict[int, int] = {}
        self._make = type(result)._make if hasattr(type(result), "_make") else tuple
        self._results = [None if tensor is None else self._add_result(tensor) for tensor in result]
        self._launches = [self._launch(*launch) for launch in launches]
        del self._inputs, self._owners, self._storages, self._allocated

    def _add_result(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        if storage.data_ptr() in self._storages or extent * tensor.element_size() != storage.nbytes():
            raise UnrecordableError
        return self._add_buffer(storage, _Buffer(tuple(tensor.shape), tensor.stride(), tensor.dtype))

    def _add_buffer(self, storage: torch.UntypedStorage, buffer: _Buffer) -> int:
        self._storages[storage.data_ptr()] = len(self._buffers)
        self._buffers.append(buffer)
        return len(self._buffers) - 1

    def _pointer(self, tensor: torch.Tensor) -> tuple[bool, int, int]:
        """Whether a tensor is an input, which input or buffer, and how many bytes into it."""
        for i, known in enumerate(self._inputs):
            if known is tensor:
                if i not in self._used:
                    self._used.append(i)
                return True, self._used.index(i), 0
        storage = tensor.untyped_storage()
        owners = [known for known in self._owners if known.untyped_storage()._cdata == storage._cdata]
        if len(owners) == 1:
            # A view, as of pages with heads first.
            _, index, _ = self._pointer(owners[0])
            return True, index, tensor.data_ptr() - owners[0].data_ptr()
        if owners:
            # Inputs may lie otherwise to each other in calls to come.
            raise UnrecordableError
        index = self._storages.get(storage.data_ptr())
        if index is None:
            if storage.data_ptr() not in self._allocated:
                # What it holds is older than the launch.
                raise UnrecordableError
            index = self._add_buffer(storage, _Buffer((storage.nbytes(),), (1,), torch.uint8))
        return False, index, tensor.data_ptr() - storage.data_ptr()

    def _launch(self, compiled: Any, programs: int, arguments: tuple[Any, ...]) -> _Launch:
        if not hasattr(compiled, "packed_metadata"):
            raise UnrecordableError
        template, makers = list(arguments), []
        for place, argument in enumerate(arguments):
            maker = self._maker(argument)
            if maker is not None:
                # A tensor of the recorded call would live as long as the recording.
                template[place] = None
                makers.append((place, maker))
        return _Launch(compiled.run, compiled.function, compiled.packed_metadata, programs, template, makers)

    def _maker(self, value: Any) -> Callable[[list[int], list[Any]], Any] | None:
        """What makes an argument anew from pointers and tensors, inputs first; None for one that stays."""
        kept = launching.kept_for(value) if isinstance(value, torch.Tensor) else None
        if kept is not None:
            size, device = kept, self._device
            return lambda pointers, tensors: launching.keep_zeros(device, size).data_ptr()
        if isinstance(value, torch.Tensor):
            is_input, index, offset = self._pointer(value)
            if is_input:
                return lambda pointers, tensors: pointers[index] + offset
            return lambda pointers, tensors: pointers[index - len(self._buffers)] + offset
        if isinstance(value, _DESCRIPTORS):
            is_input, index, offset = self._pointer(value.base)
            if offset:
                raise UnrecordableError
            kind, fields = type(value), dict(value.__dict__)
            fields.pop("base")
            place = index if is_input else ~index

            def describe(pointers: list[int], tensors: list[Any]) -> Any:
                made = object.__new__(kind)
                made.__dict__.update(fields)
                made.base = tensors[place] if place >= 0 else tensors[~place - len(self._buffers)]
                return made

            return describe
        if isinstance(value, tuple):
            makers = [self._maker(item) for item in value]
            if not any(makers):
                return None
            if makers[0] is not None and not any(makers[1:]):
                first, rest = makers[0], tuple(value[1:])
                return lambda pointers, tensors: (first(pointers, tensors), *rest)
            pairs = [(item if maker is None else None, maker) for item, maker in zip(value, makers, strict=True)]
            return lambda pointers, tensors: tuple(
                item if maker is None else maker(pointers, tensors) for item, maker in pairs
            )
        if not (value is None or isinstance(value, (int, float, str)) or hasattr(value, "cache_key")):
            # It might hold a tensor.
            raise UnrecordableError
        return None

    def usable(self) -> bool:
        """Whether nobody watches launches: hooks of Triton's and handlers of `instead` need the long way."""
        runtime = triton.knobs.runtime
        return not (
            runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls or launching.handler() is not None
        )

    def __call__(self, inputs: Tensors) -> Any:
        """Do it again with these tensors: fresh results."""
        tensors: list[Any] = [inputs[i] for i in self._used]
        device = self._device
        made = [torch.empty_strided(b.size, b.stride, dtype=b.dtype, device=device) for b in self._buffers]
        tensors += made
        pointers = [tensor.data_ptr() for tensor in tensors]
        if device.type == "cuda" and self._index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._run(pointers, tensors)
        else:
            self._run(pointers, tensors)
        return self._make(None if i is None else made[i] for i in self._results)

    def _run(self, pointers: list[int], tensors: list[Any]) -> None:
        stream = torch._C._cuda_getCurrentRawStream(self._index) if self._device.type == "cuda" else 0
        for run, function, metadata, programs, template, makers in self._launches:
            arguments = template.copy()
            for place, maker in makers:
                arguments[place] = maker(pointers, tensors)
            run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments)


def inputs_of(call: Call, saved: Saved | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors that a launch is recorded with."""
    tensors = call[:CALL_TENSORS]
    return tensors if saved is None else (*tensors, saved.out, saved.lse, saved.grad_out, saved.grad_lse)


def record(
    launch: Callable[..., Any], problem: Problem, config: Any, call: Call, saved: Saved | None = None
) -> tuple[Any, Recording | None]:
    """Launch, and record it: the result and, unless something speaks against it, its Recording."""
    launches: list[tuple[Any, int, tuple[Any, ...]]] = []

    def handler(kernel: Any, grid: tuple[int], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if grid[0] > 0:
            compiled = launching.run(kernel, grid[0], call.query.device, arguments, options)
            launches.append((compiled, grid[0], arguments))

    extra = () if saved is None else (saved,)
    with launching.instead(handler), _Watch() as watch:
        result: tuple[Any, ...] = launch(problem, config, call, *extra)
    if watch.computed or not launches:
        return result, None
    try:
        inputs = inputs_of(call, saved)
        return result, Recording(inputs, result, launches, watch.allocated, problem.value_in_key)
    except UnrecordableError:
        return result, None
