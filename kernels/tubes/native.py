"""The `native` backend: the compiled modules, found or missed once, and called with pointers, shapes and strides."""

from __future__ import annotations

import functools
import importlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from mirasol.kernels.core.device import on_device

_CODES = {torch.uint8: 0, torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.float64: 4}
_TUBES_A_LAUNCH = 16
_MODULES = {"cpu": "_native", "cuda": "_cuda"}


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    """A compiled module, or None and the reason why it is missing."""
    try:
        return importlib.import_module(f"{__package__}.{name}"), ""
    except ImportError as error:
        report = _build_report().get(
            name, {"why": f"{name} was not built: the package was not installed by its setup.py"}
        )
        return None, report.get("why", f"{name} was built but does not load: {error}")


@functools.cache
def _build_report() -> dict[str, Any]:
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}


def build_info() -> dict[str, dict[str, Any]]:
    """What of the native extension is built, how, and why a part is missing.

    Returns:
        Per module ("cpu": the C++ one, "cuda": the CUDA one) `available` (it loads), and where known `compiler`,
        `flags` (of CUDA with the architectures), `isa` (the CPU's instruction set in use), else `why` it is missing.
    """
    info: dict[str, dict[str, Any]] = {}
    for device, name in _MODULES.items():
        module, why = _load(name)
        info[device] = {**_build_report().get(name, {}), "available": module is not None}
        if module is None:
            info[device]["why"] = why
        elif device == "cpu":
            info[device]["isa"] = module.instruction_sets[0]
    return info


@functools.cache
def tell_missing(device: str) -> None:
    """Say once, on stderr unless logging is set up otherwise, that native code could serve a device and is missing."""
    if device in _MODULES and (why := _load(_MODULES[device])[1]):
        logging.getLogger("mirasol").warning("extract_tubes uses plain PyTorch, which is several times slower: %s", why)


def refusals(tensor: torch.Tensor, dtype: torch.dtype, tubes: Sequence[int]) -> list[str]:
    """One sentence for each reason why native code cannot serve a call on a clip, or on gradients of tokens."""
    device = tensor.device.type
    if device not in _MODULES:
        return [f"there is no native code for tensors on {tensor.device}."]
    module, why = _load(_MODULES[device])
    reasons = [] if module is not None else [f"{why}."]
    if device == "cuda":
        if torch.float64 in (tensor.dtype, dtype):
            reasons.append("the CUDA kernels do not serve float64.")
        if len(tubes) > 9 * _TUBES_A_LAUNCH:
            reasons.append(f"the CUDA kernels serve at most {_TUBES_A_LAUNCH} tubes at once.")
        if max(map(abs, tensor.stride()[1:4])) >= 2**31:
            reasons.append("the CUDA kernels do not serve strides of 2^31 elements along frames, H and W.")
    return reasons


def run(
    function: Literal["extract", "scatter"],
    video: torch.Tensor,
    tubes: Sequence[int],
    scale: Sequence[float],
    shift: Sequence[float],
    tokens: Sequence[torch.Tensor],
) -> None:
    """Fill dense `tokens` from a clip [B, frames, H, W, 3] of any strides, or its dense gradient from them."""
    pointers = [t.data_ptr() for t in tokens]
    call = (
        *(video.data_ptr(), _CODES[video.dtype], video.shape[:4], video.stride()),
        *(tubes, scale, shift, pointers, _CODES[tokens[0].dtype]),
    )
    module, why = _load(_MODULES[video.device.type])
    if module is None:
        raise RuntimeError(why)
    if video.is_cuda:
        with on_device(video):
            getattr(module, function)(call, torch.cuda.current_stream().cuda_stream)
    else:
        getattr(module, function)(call, torch.get_num_threads(), "")
