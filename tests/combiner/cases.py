"""Inputs of `combiner_project` and one way to run them: output and every gradient."""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional as F

from devices import DEVICE
from mirasol.kernels import combiner_project, last_m

BACKENDS = ("torch", "triton")
NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias")
NORM_CASES = (
    # norm, norm_weight, norm_bias, bias
    ("layer", True, True, True),
    ("layer", False, False, True),
    ("layer", False, True, False),
    ("rms", True, False, True),
    ("rms", False, False, False),
    (None, False, False, True),
)
EDGES = [0, 5, 8, 19, 24]
EVEN_CASE = {"T": 3, "n": 7, "m": 2, "d": 20, "d_out": 17}
UNEVEN_CASE = {"edges": EDGES, "m": 3, "d": 20, "d_out": 17}


@dataclasses.dataclass
class Case:
    """One call: tensors, settings and the gradient that comes back."""

    x: torch.Tensor
    m: int
    parameters: dict[str, torch.Tensor]
    norm: str | None
    grad: torch.Tensor
    boundaries: torch.Tensor | None = None
    eps: float = 1e-6

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"x": self.x, **self.parameters}

    def call(self, backend: str, **replaced: torch.Tensor) -> torch.Tensor:
        """`backend` is one of the operator's, or "plain": what a user writes without us."""
        tensors = self.tensors() | replaced
        settings = {"m": self.m, "eps": self.eps, "norm": self.norm, "boundaries": self.boundaries}
        if backend != "plain":
            return combiner_project(**tensors, **settings, backend=backend)
        rows = last_m(tensors["x"], self.m, self.boundaries)
        width, weight = rows.shape[-1:], tensors.get("norm_weight")
        if self.norm == "layer":
            rows = F.layer_norm(rows, width, weight, tensors.get("norm_bias"), self.eps)
        elif self.norm == "rms":
            rows = F.rms_norm(rows, width, weight, self.eps)
        return F.linear(rows, tensors["weight"], tensors.get("bias"))

    def to(self, dtype: torch.dtype) -> Case:
        parameters = {name: value.to(dtype) for name, value in self.parameters.items()}
        return dataclasses.replace(self, x=self.x.to(dtype), parameters=parameters, grad=self.grad.to(dtype))


def make_case(
    B: int,
    T: int = 1,
    n: int = 1,
    m: int = 1,
    d: int = 8,
    d_out: int = 8,
    *,
    edges: list[int] | None = None,
    norm_case: tuple[str | None, bool, bool, bool] = NORM_CASES[0],
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Random inputs on DEVICE with a mean that is not zero; uneven chunks where `edges` are given."""
    norm, with_norm_weight, with_norm_bias, with_bias = norm_case
    boundaries = None
    shape: tuple[int, ...] = (B, T, n, d)
    if edges is not None:
        boundaries = torch.tensor(edges, dtype=torch.int32, device=DEVICE)
        T, shape = len(edges) - 1, (B, edges[-1], d)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=dtype, device=DEVICE)

    parameters = {"weight": normal(d_out, d) / d**0.5}
    if with_bias:
        parameters["bias"] = normal(d_out)
    if with_norm_weight:
        parameters["norm_weight"] = 1 + normal(d) / 4
    if with_norm_bias:
        parameters["norm_bias"] = normal(d)
    return Case(0.5 + normal(*shape), m, parameters, norm, normal(B, T, m, d_out), boundaries)


def run(case: Case, backend: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and the gradients of every tensor, by name."""
    tensors = {name: value.detach().requires_grad_() for name, value in case.tensors().items()}
    out = case.call(backend, **tensors)
    grads = torch.autograd.grad(out, list(tensors.values()), case.grad)
    return out.detach(), dict(zip(tensors, grads, strict=True))
