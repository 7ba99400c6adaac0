"""Argument checks. Every refusal names the argument, what it must be and what it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value: Any) -> str:
    """How an argument is shown in an error: shape, dtype and device of a tensor, else its repr."""
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    return repr(value)


def expect(condition: bool, name: str, must: str, value: Any) -> None:
    """Raise ValueError unless `condition`: "`name` must `must`, was `value`"."""
    if not condition:
        raise ValueError(f"{name} must {must}, was {describe(value)}")


def expect_tensor(
    name: str,
    value: Any,
    dims: str | Sequence[str],
    *,
    dtypes: Sequence[torch.dtype] = FLOATS,
    like: torch.Tensor | None = None,
) -> None:
    """Check kind, number of dimensions, dtype and (with `like`) that dtype and device agree with another tensor.

    Args:
        dims: names of the dimensions ("B H N D"), or several alternatives.
    Raises:
        TypeError: not a tensor, or a dtype that is not served.
        ValueError: wrong number of dimensions, or dtype or device differ from `like`.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, was {type(value).__name__}")
    layouts = [dims] if isinstance(dims, str) else list(dims)
    if value.ndim not in {len(layout.split()) for layout in layouts}:
        shapes = " or ".join(f"[{', '.join(layout.split())}]" for layout in layouts)
        raise ValueError(f"{name} must be {shapes}, was {describe(value)}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be of dtype {names}, was {describe(value)}")
    if like is not None:
        if value.dtype != like.dtype:
            raise ValueError(f"{name} must be {like.dtype} like the other tensors, was {describe(value)}")
        if value.device != like.device:
            raise ValueError(f"{name} must be on {like.device} like the other tensors, was {describe(value)}")


def expect_number(name: str, value: Any) -> None:
    """Check a plain int or float."""
    if not isinstance(value, int | float | torch.SymInt | torch.SymFloat) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, was {describe(value)}")


def expect_shape(name: str, value: torch.Tensor, shape: Sequence[int], meaning: str) -> None:
    """Check an exact shape; `meaning` names it in symbols, for example "[d_out, d]"."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must be {meaning} = {list(shape)}, was {describe(value)}")


def expect_int(name: str, value: Any, *, minimum: int = 1) -> None:
    """Check a plain int (not a bool) of at least `minimum`."""
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, was {describe(value)}")
    expect(value >= minimum, name, f"be at least {minimum}", value)
