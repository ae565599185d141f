"""The names of Gluon that differ between Triton 3.6 and 3.9, in one place."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# Renamed in 3.8; 3.9 has the new names only.
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
store_wait = tma.store_wait


@gluon.jit
def stores_landed():
    """Wait until TMA stores are in global memory; Gluon's store_wait says only that their source may be reused."""
    asm: gl.constexpr = "cp.async.bulk.wait_group 0; mov.u32 $0, $1;"
    gl.inline_asm_elementwise(asm, "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)
