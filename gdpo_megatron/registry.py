"""One table type for all that users may add: rewards, advantage estimators, engines, families.

An entry is found by name (built in, or registered by an installed package through an entry point)
or by `./file.py:function`, relative to the config that names it. A name is registered once; a
wrong name is answered with the nearest right one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Generic, TypeVar

from gdpo_megatron.errors import InputError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Named entries of one kind.

    Args:
        kind: what the entries are, for messages ("reward").
        entry_point_group: packages add entries under this group; loaded at the first look-up.
    """

    def __init__(self, kind: str, entry_point_group: str | None = None):
        self.kind = kind
        self._entry_point_group = entry_point_group
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> None:
        """Register `entry`; registering a name twice raises ValueError."""
        if name in self._entries:
            raise ValueError(f"{self.kind} '{name}' is already registered")
        self._entries[name] = entry

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers what it decorates under `name`."""

        def decorate(entry: T) -> T:
            self.add(name, entry)
            return entry

        return decorate

    def names(self) -> list[str]:
        """All registered names, entry points included, sorted."""
        self._load_entry_points()
        return sorted(self._entries)

    def get(self, spec: str, base_dir: Path | None = None) -> T:
        """Find an entry.

        Args:
            spec: a registered name, or `path/to/file.py:attribute`.
            base_dir: folder that a relative path starts from; default the working directory.

        Raises:
            InputError: no such name, file or attribute; the message offers the nearest name.
        """
        if ".py:" in spec:
            return self._from_file(spec, base_dir or Path.cwd())
        if spec not in self._entries:
            self._load_entry_points()
        if spec not in self._entries:
            raise InputError(f"no {self.kind} named '{spec}'; {did_you_mean(spec, self.names())}")
        return self._entries[spec]

    def _from_file(self, spec: str, base_dir: Path) -> T:
        file_name, attribute = spec.rsplit(":", 1)
        path = (base_dir / file_name).resolve()
        if not path.is_file():
            raise InputError(f"{self.kind} '{spec}': no file {path}")
        # One module per file, so that two entries of one file share its state.
        module_name = f"_gdpo_user_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
        module = sys.modules.get(module_name)
        if module is None:
            module_spec = importlib.util.spec_from_file_location(module_name, path)
            assert module_spec is not None and module_spec.loader is not None
            module = importlib.util.module_from_spec(module_spec)
            sys.modules[module_name] = module
            try:
                module_spec.loader.exec_module(module)
            except Exception as error:
                del sys.modules[module_name]
                raise InputError(
                    f"{self.kind} '{spec}': {path} fails on import: {error!r}"
                ) from error
        if not hasattr(module, attribute):
            public = [name for name in vars(module) if not name.startswith("_")]
            raise InputError(
                f"{self.kind} '{spec}': {path} has no '{attribute}'; "
                f"{did_you_mean(attribute, public)}"
            )
        return getattr(module, attribute)

    def _load_entry_points(self) -> None:
        group, self._entry_point_group = self._entry_point_group, None
        for entry_point in entry_points(group=group) if group else ():
            self.add(entry_point.name, entry_point.load())
