"""Argument checks. Every refusal names the argument, what it must be and what it was."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value: Any) -> str:
    """How an argument is shown in an error: shape, dtype and device of a tensor, else its repr."""
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    return repr(value)


def refuse(name: str, must: str, value: Any, error: type[Exception] = ValueError) -> NoReturn:
    """Raise "`name` must `must`, was `value`"."""
    raise error(f"{name} must {must}, was {describe(value)}")


def expect(condition: bool, name: str, must: str, value: Any) -> None:
    """Raise ValueError unless `condition`: "`name` must `must`, was `value`"."""
    if not condition:
        refuse(name, must, value)


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
    layouts = (dims,) if isinstance(dims, str) else dims
    if value.ndim not in [layout.count(" ") + 1 for layout in layouts]:
        shapes = " or ".join(f"[{', '.join(layout.split())}]" for layout in layouts)
        refuse(name, f"be {shapes}", value)
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        refuse(name, f"be of dtype {names}", value, TypeError)
    if like is not None:
        if value.dtype != like.dtype:
            refuse(name, f"be {like.dtype} like the other tensors", value)
        if value.device != like.device:
            refuse(name, f"be on {like.device} like the other tensors", value)


def expect_shape(name: str, value: torch.Tensor, shape: Sequence[int], meaning: str) -> None:
    """Check an exact shape; `meaning` names it in symbols, for example "[d_out, d]"."""
    if tuple(value.shape) != tuple(shape):
        refuse(name, f"be {meaning} = {list(shape)}", value)


def expect_int(name: str, value: Any, *, minimum: int = 1) -> int:
    """Check an integer (of Python, of numpy, or symbolic; not a bool) of at least `minimum`; return it as Python's."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            refuse(name, "be an int", value, TypeError)
        value = int(value)
    if value < minimum:
        refuse(name, f"be at least {minimum}", value)
    return value


def expect_number(name: str, value: Any) -> float:
    """Check a finite number (of Python or numpy, not a bool); return it as Python's float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real | torch.SymInt | torch.SymFloat):
        refuse(name, "be a number", value, TypeError)
    found = float(value)
    if not -math.inf < found < math.inf:
        refuse(name, "be finite", value)
    return found


def expect_bool(name: str, value: Any) -> None:
    """Check a bool: whatever else is true or false hides a mistake."""
    if not isinstance(value, bool):
        refuse(name, "be True or False", value, TypeError)
