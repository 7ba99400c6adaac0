"""Random parameters, the golden files' process unit, and the official form that fast paths are compared with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mirasol.kernels.ttm import EraseAddParams, LatentQueryParams, MeanPoolParams, MlpParams, TokenLearnerParams
from tolerance import CANCELLED, assert_close, assert_within_budget

GOLDENS = Path(__file__).parent / "goldens"


def token_learner_params(d, k, *, positions=0, hidden=64, dtype=torch.float64, grad=True) -> TokenLearnerParams:
    shapes = ((d,), (d,), (hidden, d), (hidden,), (k, hidden), (k,))
    tensors = [torch.randn(s, dtype=dtype) * 0.5 / s[-1] ** 0.5 for s in shapes[2:]]
    norm = [1 + 0.2 * torch.randn(d, dtype=dtype), 0.2 * torch.randn(d, dtype=dtype)]
    place = [0.5 * torch.randn(positions, d, dtype=dtype)] if positions else []
    return TokenLearnerParams(*[t.requires_grad_(grad) for t in [*norm, *tensors, *place]])


def latent_query_params(d, k, *, positions=0, heads=2, dtype=torch.float64, grad=True) -> LatentQueryParams:
    weights = [torch.randn(d, d, dtype=dtype) / d**0.5 for _ in range(4)]
    biases = [0.3 * torch.randn(d, dtype=dtype) for _ in range(4)]
    paired = [t for pair in zip(weights, biases, strict=True) for t in pair]
    tensors = [torch.randn(k, d, dtype=dtype), *paired]
    place = 0.5 * torch.randn(positions, d, dtype=dtype) if positions else None
    for t in [*tensors, place]:
        if t is not None:
            t.requires_grad_(grad)
    return LatentQueryParams(*tensors, heads=heads, positions=place)


def erase_add_params(d, r, *, slots=3, hidden=8, official=False, dtype=torch.float64, grad=True) -> EraseAddParams:
    def mlp(inside: int, outside: int) -> MlpParams:
        shapes = ((hidden, inside), (hidden,), (outside, hidden), (outside,))
        return MlpParams(*[(torch.randn(s, dtype=dtype) / s[-1] ** 0.5).requires_grad_(grad) for s in shapes])

    def norm() -> list[torch.Tensor]:
        return [(x + 0.2 * torch.randn(d, dtype=dtype)).requires_grad_(grad) for x in (1, 0)]

    return EraseAddParams(
        *norm(), mlp(d, slots), *norm(), mlp(r, slots), mlp(d, d), *norm(), mlp(r, slots), mlp(d, d), official=official
    )


def summary_params(variant: str, d: int, k: int, positions: int = 0, **kwargs: Any) -> Any:
    if variant == "token_learner":
        return token_learner_params(d, k, positions=positions, **kwargs)
    if variant == "latent_query":
        return latent_query_params(d, k, positions=positions, **kwargs)
    dtype, grad = kwargs.get("dtype", torch.float64), kwargs.get("grad", True)
    return MeanPoolParams(k, torch.randn(positions, d, dtype=dtype).requires_grad_(grad) if positions else None)


def leaves(*values: Any) -> list[torch.Tensor]:
    """All tensors that want a gradient, inside parameters too, in order."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found += [value] if value.requires_grad else []
        elif isinstance(value, tuple | list):
            found += leaves(*value)
    return found


def convert(value: Any, dtype: torch.dtype, device: Any = None) -> Any:
    """A detached copy of tensors, inside parameters too, in another dtype, on another device."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, dtype, copy=True).requires_grad_(value.requires_grad)
    if isinstance(value, tuple):
        cast = [convert(v, dtype, device) for v in value]
        return type(value)(*cast) if hasattr(value, "_fields") else tuple(cast)
    return value


def random(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def with_gradients(outs: Any, wanted: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Results and the gradients of `wanted`, for cotangents that are the same in every call."""
    outs = [outs] if isinstance(outs, torch.Tensor) else list(outs)
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outs]
    return [*outs, *torch.autograd.grad(outs, wanted, seeds)]


def run(call: Callable[..., Any], args: Sequence[Any], dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
    """Results of `call(*args, backend)` in a dtype, and the gradients of all tensors in `args` that want one."""
    given = [convert(a, dtype) for a in args]
    return with_gradients(call(*given, backend), leaves(*given))


def assert_alike(ours: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], rtol: float | None = None) -> None:
    """Each result close at its own magnitude; what cancels (a bias that the softmax forgets) does so in both."""
    nothing = _nothing(ours, expected)
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert a.dtype == b.dtype
        if b.abs().max() < nothing:
            assert a.abs().max() < nothing, f"result {i} {list(b.shape)}"
        else:
            assert_close(f"result {i} {list(b.shape)}", a, b, rtol=rtol)


def assert_within_plain(call: Callable[..., Any], args: Sequence[Any], dtype: torch.dtype, backend: str) -> None:
    """`call(*args, backend)` and all gradients in 16 bits stay within the budget of the reference in the same dtype."""
    low = [convert(a, dtype) for a in args]
    tried = ((dtype, backend), (dtype, "reference"), (torch.float64, "reference"))
    assert_each_within_budget(*(run(call, low, *how) for how in tried))


def assert_each_within_budget(
    ours: Sequence[torch.Tensor], plain: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]
) -> None:
    """Results in 16 bits against the reference in the same dtype and in float64; what cancels does so in ours."""
    nothing = _nothing(ours, exact)
    for i, (a, b, true) in enumerate(zip(ours, plain, exact, strict=True)):
        if true.abs().max() < 1e-9 * nothing:
            assert a.abs().max() < nothing, f"result {i} {list(true.shape)}"
        else:
            assert_within_budget(f"result {i} {list(true.shape)}", a, b, true)


def _nothing(ours: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    return CANCELLED * torch.finfo(ours[0].dtype).eps * max(e.abs().max().item() for e in expected)


class Golden:
    """One golden file: its arrays as float64 tensors, parameters as leaves, and the process unit that made it."""

    def __init__(self, name: str) -> None:
        self.arrays = np.load(GOLDENS / f"ttm_{name}.npz")
        self.config = json.loads(str(self.arrays["config"]))
        self.params = {
            key.removeprefix("param/unit/"): self.tensor(key).requires_grad_()
            for key in self.arrays.files
            if key.startswith("param/")
        }

    def tensor(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key]).double()

    def gradients(self) -> dict[str, torch.Tensor]:
        return {key: self.tensor(f"grad/unit/{key}") for key in self.params}

    def initial_memory(self) -> torch.Tensor:
        c = self.config
        return torch.zeros(c["batch"], c["memory_size"], c["dim"], dtype=torch.float64)

    def read_params(self) -> Any:
        return self._summary(0, "read_pos_embed")

    def write_params(self) -> Any:
        if self.config["memory_mode"] == "TL-AddErase":
            return self._erase_add()
        return self._summary(1, "write_pos_embed")

    def process(self, z: torch.Tensor) -> torch.Tensor:
        """The Vision-Transformer encoder of the official code: positions, pre-norm blocks, a last norm."""
        x = z + self.params["Encoder_0/posembed_input/pos_embedding"]
        for layer in range(self.config["layers"]):
            block = f"Encoder_0/encoderblock_{layer}"
            normed = self._norm(x, f"{block}/LayerNorm_0")
            x = x + self._attention(normed, f"{block}/MultiHeadDotProductAttention_0")
            normed = self._norm(x, f"{block}/LayerNorm_1")
            x = x + self._dense(
                F.gelu(self._dense(normed, f"{block}/MlpBlock_0/Dense_0"), approximate="tanh"),
                f"{block}/MlpBlock_0/Dense_1",
            )
        return self._norm(x, "Encoder_0/encoder_norm")

    def _dense(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.params[f"{name}/kernel"] + self.params[f"{name}/bias"]

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.params[f"{name}/scale"], self.params[f"{name}/bias"], 1e-6)

    def _attention(self, x: torch.Tensor, name: str) -> torch.Tensor:
        def project(which: str) -> torch.Tensor:
            kernel, bias = self.params[f"{name}/{which}/kernel"], self.params[f"{name}/{which}/bias"]
            return torch.einsum("bpc,chd->bhpd", x, kernel) + bias[:, None]

        q, k, v = project("query"), project("key"), project("value")
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return (
            torch.einsum("bhpd,hdc->bpc", weights @ v, self.params[f"{name}/out/kernel"])
            + self.params[f"{name}/out/bias"]
        )

    def _summary(self, index: int, positions: str) -> Any:
        place = self.params.get(f"{positions}/pos_embedding")
        place = None if place is None else place[0]
        if self.config["memory_mode"] == "TL-MHA":
            return self._latent_query(f"TokenLearnerMHA_{index}", place)
        name = f"TokenLearnerModuleV11_{index}"
        return TokenLearnerParams(*self._norm_params(f"{name}/LayerNorm_0"), *self._mlp(f"{name}/token_masking"), place)

    def _latent_query(self, name: str, positions: torch.Tensor | None) -> LatentQueryParams:
        p = self.params
        projections = []
        for which in ("query", "key", "value"):
            projections += [p[f"{name}/attn/{which}/kernel"].flatten(1).t(), p[f"{name}/attn/{which}/bias"].flatten()]
        projections += [p[f"{name}/attn/out/kernel"].flatten(0, 1).t(), p[f"{name}/attn/out/bias"]]
        heads = p[f"{name}/attn/query/bias"].shape[0]
        return LatentQueryParams(p[f"{name}/tokens"][0], *projections, heads=heads, positions=positions)

    def _erase_add(self) -> EraseAddParams:
        name = "TokenAddEraseWrite_0"
        norms = [self._norm_params(f"{name}/LayerNorm_{i}") for i in range(3)]
        mlps = [self._mlp(f"{name}/MlpBlock_{i}") for i in range(5)]
        return EraseAddParams(
            *norms[0], mlps[0], *norms[1], mlps[1], mlps[2], *norms[2], mlps[3], mlps[4], official=True
        )

    def _norm_params(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.params[f"{name}/scale"], self.params[f"{name}/bias"]

    def _mlp(self, name: str) -> MlpParams:
        first, second = f"{name}/Dense_0", f"{name}/Dense_1"
        p = self.params
        return MlpParams(p[f"{first}/kernel"].t(), p[f"{first}/bias"], p[f"{second}/kernel"].t(), p[f"{second}/bias"])


def eager_official(
    memory: torch.Tensor,
    inputs: torch.Tensor,
    read: TokenLearnerParams,
    process: Callable[[torch.Tensor], torch.Tensor],
    write: TokenLearnerParams,
) -> tuple[torch.Tensor, torch.Tensor]:
    """TokenLearner scan in ordinary eager PyTorch, written as the official code is: what users have today."""

    def learn(v: torch.Tensor, p: TokenLearnerParams) -> torch.Tensor:
        v = v if p.positions is None else v + p.positions
        s = F.layer_norm(v, v.shape[-1:], p.norm_weight, p.norm_bias, 1e-6)
        s = F.linear(F.gelu(F.linear(s, p.w1, p.b1), approximate="tanh"), p.w2, p.b2)
        return s.transpose(1, 2).softmax(dim=-1) @ v

    outputs = []
    for chunk in inputs.unbind(1):
        out = process(learn(torch.cat([memory, chunk], dim=1), read))
        memory = learn(torch.cat([memory, chunk, out], dim=1), write)
        outputs.append(out)
    return torch.stack(outputs, dim=1), memory
