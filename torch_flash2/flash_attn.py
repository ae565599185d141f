"""flash-attn 2's functions: frontends/flash_attn has them."""

from .frontends.flash_attn import flash_attn_combine as flash_attn_combine
from .frontends.flash_attn import flash_attn_func as flash_attn_func
from .frontends.flash_attn import flash_attn_kvpacked_func as flash_attn_kvpacked_func
from .frontends.flash_attn import flash_attn_qkvpacked_func as flash_attn_qkvpacked_func
from .frontends.flash_attn import flash_attn_varlen_func as flash_attn_varlen_func
from .frontends.flash_attn import flash_attn_varlen_kvpacked_func as flash_attn_varlen_kvpacked_func
from .frontends.flash_attn import flash_attn_varlen_qkvpacked_func as flash_attn_varlen_qkvpacked_func
from .frontends.flash_attn import flash_attn_with_kvcache as flash_attn_with_kvcache
from .frontends.flash_attn import install as install
