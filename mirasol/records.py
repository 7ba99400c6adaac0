"""Results that read by attribute, like a mapping or like a tuple, and that every tree of PyTorch can go through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, ClassVar, TypeVar

import torch

_Kind = TypeVar("_Kind", bound=type)


class Record:
    """Base of dataclasses whose fields may be None: `r.loss`, `r["loss"]`, `dict(r)`, and `r[0]` in order.

    What is None is no key. `_in_order` names the fields that numbers and slices reach, all by default.
    """

    _in_order: ClassVar[tuple[str, ...]] = ()

    def keys(self) -> list[str]:
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]  # type: ignore[arg-type]

    def values(self) -> list[Any]:
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        return list(zip(self.keys(), self.values(), strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __getitem__(self, which: str | int | slice) -> Any:
        """
        Raises:
            KeyError: no such field, or None.
            IndexError: no such number.
        """
        if isinstance(which, str):
            if which not in self:
                raise KeyError(which)
            return getattr(self, which)
        names = [name for name in self._in_order or self.keys() if name in self]
        return tuple(getattr(self, name) for name in names)[which]


def record(kind: _Kind) -> _Kind:
    """Make a dataclass known to PyTorch's trees, by which `torch.export` and `torch.compile` take results apart."""
    torch.export.register_dataclass(kind, serialized_type_name=f"mirasol.{kind.__name__}")
    return kind
