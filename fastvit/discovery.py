"""What a layer declares of each op, found in the files of a folder: nothing lists the ops."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Container, Iterator, Mapping
from typing import Any, TypeVar

Declaration = TypeVar("Declaration")


class Declared(Mapping[str, Declaration]):
    """An attribute of every module in the folder of a package that has it, by the module's name.

    The folder is read at each use: a file that is put there is found, and one that is taken away is gone. `among`
    names the only modules to look at, where importing others is not wanted.
    """

    def __init__(self, package: str, attribute: str, among: Container[str] | None = None) -> None:
        self.package, self.attribute, self.among = package, attribute, among

    def _all(self) -> dict[str, Any]:
        path = importlib.import_module(self.package).__path__
        names = sorted(module.name for module in pkgutil.iter_modules(path) if not module.ispkg)
        chosen = [name for name in names if self.among is None or name in self.among]
        modules = {name: importlib.import_module(f"{self.package}.{name}") for name in chosen}
        return {
            name: getattr(module, self.attribute) for name, module in modules.items() if hasattr(module, self.attribute)
        }

    def __getitem__(self, name: str) -> Declaration:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())
