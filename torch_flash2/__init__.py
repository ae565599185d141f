"""Exact attention for PyTorch, as fast as the hardware allows, in Python. Importing this imports neither Triton nor
CUDA."""

from . import flash_attn as flash_attn
from . import flash_attn_interface as flash_attn_interface
from . import masks as masks
from . import transformers as transformers
from ._version import __version__ as __version__
from .attention import attention as attention
from .attention import explain as explain
from .caches import append as append
from .caches import rotate as rotate
from .dispatch import UnsupportedError as UnsupportedError
from .dispatch import force as force
from .frontends import registry as _registry
from .frontends import sdpa as _sdpa
from .frontends.sdpa import disable as disable
from .frontends.sdpa import enable as enable
from .frontends.sdpa import enabled as enabled
from .frontends.sdpa import sac_ops as sac_ops
from .frontends.sdpa import stats as stats
from .masks import Mask as Mask
from .problem import Lengths as Lengths
from .problem import Pages as Pages
from .problem import Rotary as Rotary

_registry.register()
_sdpa.enable_as_the_environment_says()
