"""Exact attention for PyTorch, as fast as the hardware allows, in Python. Importing this imports neither Triton nor
CUDA."""

from . import flash_attn as flash_attn
from . import flash_attn_interface as flash_attn_interface
from . import masks as masks
from . import transformers as transformers
from ._version import __version__ as __version__
from .attention import attention as attention
from .attention import explain as explain
from .dispatch import UnsupportedError as UnsupportedError
from .dispatch import force as force
from .masks import Mask as Mask
from .problem import Lengths as Lengths
from .problem import Pages as Pages
