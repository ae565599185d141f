"""`TORCH_FLASH2=1 python any_script.py`: what PyTorch's torch.backends entry point runs at the end of `import torch`.

It is installed as a package of its own, torch_flash2_autoload, so that where the variable is not set nothing else of
this library is loaded.
"""

import importlib
import os


def autoload() -> None:
    """Enable torch_flash2 if TORCH_FLASH2 asks for it. Never raises."""
    if os.environ.get("TORCH_FLASH2", "").strip().lower() in ("", "0", "false", "off", "no"):
        return
    try:
        # Its import ends with `enable`; where it is what imports torch just now, it goes on after this.
        importlib.import_module("torch_flash2")
    except Exception as error:
        complain(error)


def complain(error: Exception) -> None:
    """Say why nothing was enabled, even where warnings are errors."""
    import sys
    import warnings

    text = f"TORCH_FLASH2 is set, but torch_flash2 could not be enabled: {type(error).__name__}: {error}"
    try:
        warnings.warn(text, stacklevel=2)
    except UserWarning:
        print(text, file=sys.stderr)
