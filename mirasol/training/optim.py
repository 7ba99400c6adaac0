"""Which parts of a model learn, and how fast."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mirasol.kernels.core.checks import expect, refuse


def freeze(model: nn.Module, parts: Iterable[str]) -> None:
    """Let the parameters of `parts`, by the start of their names ("video_vit", "text_decoder.blocks.0"), not learn.

    Raises:
        ValueError: a part that the model lacks, or nothing left that learns.
    """
    parts = tuple(parts)
    _expect_parts(model, "freeze", parts)
    for part in parts:
        for parameter in parameters_of(model, part):
            parameter.requires_grad_(False)
    expect(any(p.requires_grad for p in model.parameters()), "freeze", "leave a part that learns", parts)


def parameters_of(model: nn.Module, part: str) -> list[nn.Parameter]:
    """The parameters below the start of a name."""
    return [parameter for name, parameter in model.named_parameters() if _belongs(name, part)]


def parameter_groups(
    model: nn.Module, lr: float, lr_of: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's groups: one for each learning rate, with decay (matrices) and without (biases, norms, scalars).

    Args:
        lr: highest learning rate of every parameter that no part of `lr_of` holds.
        lr_of: highest learning rate by part; of several parts that hold a parameter, the longest name decides.
    Returns:
        Groups of the parameters that learn, each with its `peak_lr`, from which `set_rates` makes `lr`.
    Raises:
        ValueError: a part that the model lacks.
    """
    _expect_parts(model, "lr_of", lr_of)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = max((part for part in lr_of if _belongs(name, part)), key=len, default=None)
            rate = lr if part is None else lr_of[part]
            groups.setdefault((rate, weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [
        {"params": params, "lr": rate, "peak_lr": rate, "weight_decay": decay}
        for (rate, decay), params in groups.items()
    ]


def make_optimizer(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`.

    Its state is there for all parameters before the first step, all zeros, as AdamW itself begins: a checkpoint then
    holds the same names whatever has learned so far.
    """
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    set_rates(optimizer, 0.0)
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for state in optimizer.state.values():
        state["step"].zero_()
    return optimizer


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the highest learning rate in step 0 .. steps - 1: a straight rise, then a cosine down to nearly 0.

    Args:
        warmup: share of the steps in which it rises.
    """
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group `share` of its highest learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak_lr"]


def _belongs(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def _expect_parts(model: nn.Module, option: str, parts: Iterable[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for part in parts:
        if not any(_belongs(name, part) for name in names):
            known = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            refuse(option, f"name parts of the model ({known}, or parts of these)", part)
