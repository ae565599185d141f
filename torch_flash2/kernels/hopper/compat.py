"""The names of Gluon that differ between Triton 3.6 and 3.9, and what has none, in one place."""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

# Renamed in 3.8, and in 3.9 `reinterpret` lost its underscore; 3.9 has the new names only.
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
store_wait = tma.store_wait

_reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
# Whether a view may reach past its tile, over the one that follows; 3.9 forbids it.
WIDENING = hasattr(gl.shared_memory_descriptor, "_reinterpret")


@builtin
def view(tile, shape, layout, _semantic=None):
    """A tile of shared memory in another shape and layout."""
    return _reinterpret(tile, tile.dtype, shape, layout, _semantic=_semantic)


@builtin
def add(to, at, tile, _semantic=None):
    """Add a tile in shared memory to a tensor behind a TMA descriptor, atomically; Gluon has no name for it."""
    at = _semantic._convert_to_ir_values(at, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, to.handle, at, tile.handle)


@gluon.jit
def stores_landed():
    """Wait until TMA stores are in global memory; Gluon's store_wait says only that their source may be reused."""
    asm: gl.constexpr = "cp.async.bulk.wait_group 0; mov.u32 $0, $1;"
    gl.inline_asm_elementwise(asm, "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)
