"""Functions in modules of others, replaced: at once, or when the module is imported."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Replacement:
    """`module`.`path` is `make` of what it was, until `remove`. A module that has no such name is left as it is.

    Modules that are not imported yet are not imported for it: this stands in sys.meta_path until somebody does.
    """

    def __init__(self, module: str, path: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]):
        self._module, self._path, self._make = module, path, make
        self._put_back: Callable[[], None] | None = None
        loaded = sys.modules.get(module)
        if loaded is None:
            sys.meta_path.insert(0, self)
        else:
            self._replace(loaded)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, whose loader then also replaces."""
        if name != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                del loader.exec_module
                self._replace(module)

            loader.exec_module = exec_module
        return spec

    def _replace(self, module: ModuleType) -> None:
        owner: Any = module
        *owners, name = self._path.split(".")
        for part in owners:
            owner = getattr(owner, part, None)
        kept = vars(owner).get(name) if owner is not None else None
        if kept is None:
            return
        made: Any = self._make(getattr(owner, name))
        made = staticmethod(made) if isinstance(kept, staticmethod) else made
        setattr(owner, name, made)

        def put_back() -> None:
            # Unless somebody has replaced it again since.
            if vars(owner).get(name) is made:
                setattr(owner, name, kept)

        self._put_back = put_back

    def remove(self) -> None:
        """Put back what was there."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if self._put_back is not None:
            self._put_back()
            self._put_back = None
