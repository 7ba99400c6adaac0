"""The state of a stream in a safetensors file, and what it must be to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mirasol.kernels.core.checks import expect, expect_shape

_KEY = "mirasol_stream"  # of the file's metadata


def check(state: Mapping[str, Tensor], past: Mapping[str, Tensor], *, grows: bool, rows: int) -> None:
    """Whether a state fits a stream, whose past has these tensors.

    Args:
        grows: the stream's rings have no fixed number of slots.
        rows: B.
    Raises:
        ValueError: a tensor that is missing, is too many, or has another shape or dtype, by name.
    """
    own = {name for name in state if not name.startswith("cutter.")}
    odd = sorted(own ^ {*past, "taken"})
    expect(not odd, "state", f"hold {len(past) + 1} tensors of a stream like this one", odd)
    expect_shape("taken", state["taken"], (rows,), "[B]")
    for row in rows_with_cutters(state):
        expect(row < rows, "state", f"hold {rows} rows", f"cutter.{row}")
    for name, tensor in past.items():
        shape = list(tensor.shape)
        if grows and name.endswith((".keys", ".values")) and state[name].ndim == tensor.ndim:
            shape[1] = state[name].shape[1]
        expect(state[name].dtype == tensor.dtype, name, f"be {tensor.dtype}", state[name])
        expect_shape(name, state[name], shape, "that of a stream like this one")


def rows_with_cutters(state: Mapping[str, Tensor]) -> list[int]:
    """Rows of which a part of a chunk is kept."""
    return sorted({int(name.split(".")[1]) for name in state if name.startswith("cutter.")})


def write(path: Path, state: Mapping[str, Tensor], settings: str) -> None:
    """Replace a file in one step."""
    partly = path.with_name(f".{path.name}.partly")
    save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, partly, {_KEY: settings})
    partly.replace(path)


def read(path: Path, settings: str) -> dict[str, Tensor]:
    """What `write` wrote of a stream with these settings, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a broken file, or other settings.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file that Stream.save wrote, was {str(path)!r}")
    try:
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get(_KEY)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:
        raise ValueError(f"path must be a file that Stream.save wrote, was {str(path)!r}: {error}") from error
    expect(found == settings, "path", f"hold a stream of settings {settings}", found)
    return state
