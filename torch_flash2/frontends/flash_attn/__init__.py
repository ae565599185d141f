"""flash-attn's functions on this library: v2.py has those of flash-attn 2.8, v3.py FlashAttention-3's."""

from .install import install as install
from .v2 import flash_attn_func as flash_attn_func
from .v2 import flash_attn_kvpacked_func as flash_attn_kvpacked_func
from .v2 import flash_attn_qkvpacked_func as flash_attn_qkvpacked_func
from .v2 import flash_attn_varlen_func as flash_attn_varlen_func
from .v2 import flash_attn_varlen_kvpacked_func as flash_attn_varlen_kvpacked_func
from .v2 import flash_attn_varlen_qkvpacked_func as flash_attn_varlen_qkvpacked_func
from .v2 import flash_attn_with_kvcache as flash_attn_with_kvcache
from .v3 import flash_attn_combine as flash_attn_combine
