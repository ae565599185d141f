"""Standing in for packages that are not installed."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

from . import padding, rotary, v2, v3

# The release whose interface v2.py has.
UPSTREAM = "2.8.3"
# Private names that upstream's tests import.
_ASKED = ("_get_block_size_n",)


def install() -> list[str]:
    """Let `import flash_attn` and `import flash_attn_interface` find this library where the real ones are absent.

    Provides flash_attn, its flash_attn_interface, bert_padding and layers.rotary, and FlashAttention-3's
    flash_attn_interface, for this process; says on stderr what it did.

    Returns:
        The names of the packages that this library now stands in for.
    """
    stood_in = []
    for name, modules in (
        (
            "flash_attn",
            {
                "": v2,
                ".flash_attn_interface": v2,
                ".bert_padding": padding,
                ".layers": rotary,
                ".layers.rotary": rotary,
            },
        ),
        ("flash_attn_interface", {"": v3}),
    ):
        present = sys.modules.get(name)
        if present is None and importlib.util.find_spec(name) is not None:
            print(f"torch_flash2: {name} is installed and stays what it is", file=sys.stderr)
            continue
        if present is not None and getattr(present, "__torch_flash2__", False) is False:
            print(f"torch_flash2: {name} is imported already and stays what it is", file=sys.stderr)
            continue
        if present is None:
            for suffix, source in modules.items():
                sys.modules[name + suffix] = _stand_in(name + suffix, source)
            for suffix in filter(None, modules):
                outer, _, inner = (name + suffix).rpartition(".")
                setattr(sys.modules[outer], inner, sys.modules[name + suffix])
            print(f"torch_flash2: `import {name}` now finds torch_flash2.{name}", file=sys.stderr)
        stood_in.append(name)
    return stood_in


def _stand_in(name: str, source: types.ModuleType) -> types.ModuleType:
    module = types.ModuleType(name, source.__doc__)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=source.__file__)
    names = [key for key, value in vars(source).items() if getattr(value, "__module__", None) == source.__name__]
    module.__dict__.update({key: getattr(source, key) for key in names if not key.startswith("_") or key in _ASKED})
    module.__dict__.update(__version__=UPSTREAM, __torch_flash2__=True)
    if name in ("flash_attn", "flash_attn.layers"):
        module.__path__ = []
    return module
