"""What is to be done to modules of others, at once or when somebody imports them; and functions of theirs, replaced."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class WhenImported:
    """Calls `then` with a module: now where it is imported already, else, standing in sys.meta_path until then, right
    after it has run."""

    def __init__(self, module: str, then: Callable[[ModuleType], None]):
        self._module, self._then = module, then
        if module in sys.modules:
            then(sys.modules[module])
        else:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, whose loader then also calls."""
        if name != self._module:
            return None
        self.cancel()
        spec = importlib.util.find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                del loader.exec_module
                self._then(module)

            loader.exec_module = exec_module
        return spec

    def cancel(self) -> None:
        """From now on imports are nothing to it."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)


class Replacement:
    """`module`.`path` is `make` of what it was, until `remove`; a module that has no such name is left as it is.

    Modules are not imported for it.
    """

    def __init__(self, module: str, path: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]):
        self._path, self._make = path, make
        self._put_back: Callable[[], None] | None = None
        self._waiting = WhenImported(module, self._replace)

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
        self._waiting.cancel()
        if self._put_back is not None:
            self._put_back()
            self._put_back = None
