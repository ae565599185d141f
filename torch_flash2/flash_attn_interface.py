"""FlashAttention-3's functions: frontends/flash_attn/v3.py has them."""

from .frontends.flash_attn.v3 import flash_attn_combine as flash_attn_combine
from .frontends.flash_attn.v3 import flash_attn_func as flash_attn_func
from .frontends.flash_attn.v3 import flash_attn_qkvpacked_func as flash_attn_qkvpacked_func
from .frontends.flash_attn.v3 import flash_attn_varlen_func as flash_attn_varlen_func
from .frontends.flash_attn.v3 import flash_attn_with_kvcache as flash_attn_with_kvcache
from .frontends.flash_attn.v3 import get_scheduler_metadata as get_scheduler_metadata
