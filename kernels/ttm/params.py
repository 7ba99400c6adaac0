"""Parameters of the Token Turing Machine operators: their type selects the variant.

NamedTuples of tensors, so that they pass through `torch.compile` and `torch.utils._pytree` as they are. All linear maps
are stored as `torch.nn.Linear` stores them, [out, in].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch

from mirasol.kernels.core.checks import expect, expect_bool, expect_int, expect_shape, expect_tensor


class TokenLearnerParams(NamedTuple):
    """TokenLearner v1.1: a LayerNorm and a two-layer MLP give k scores a token; softmax runs over the tokens.

    norm_weight, norm_bias: [d]; w1 [hidden, d], b1 [hidden]; w2 [k, hidden], b2 [k]; positions: [p, d] added to the p
    tokens, in the order memory, inputs, outputs, or None.
    """

    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    w1: torch.Tensor
    b1: torch.Tensor
    w2: torch.Tensor
    b2: torch.Tensor
    positions: torch.Tensor | None = None


class LatentQueryParams(NamedTuple):
    """Multi-head attention of k learned queries over the tokens, with biases, without a norm or a residual.

    queries: [k, d]; wq, wk, wv, wo: [d, d]; bq, bk, bv, bo: [d]; heads: a divisor of d; positions: [p, d] or None.
    """

    queries: torch.Tensor
    wq: torch.Tensor
    bq: torch.Tensor
    wk: torch.Tensor
    bk: torch.Tensor
    wv: torch.Tensor
    bv: torch.Tensor
    wo: torch.Tensor
    bo: torch.Tensor
    heads: int
    positions: torch.Tensor | None = None


class MeanPoolParams(NamedTuple):
    """Means over k windows of neighbouring tokens: window i holds tokens floor(i p / k) to ceil((i + 1) p / k) - 1.

    The windows of `torch.nn.functional.adaptive_avg_pool1d` over the token axis. positions: [p, d] or None.
    """

    k: int
    positions: torch.Tensor | None = None


class MlpParams(NamedTuple):
    """Two linear maps with a tanh GELU between: w1 [hidden, in], b1 [hidden], w2 [out, hidden], b2 [out]."""

    w1: torch.Tensor
    b1: torch.Tensor
    w2: torch.Tensor
    b2: torch.Tensor


class EraseAddParams(NamedTuple):
    """Neural-Turing-Machine write with S slots: each slot selects memory tokens, erases channels and adds to them.

    select_norm_*, erase_norm_*, add_norm_*: [d]; select: d -> S scores of a memory token; erase_tokens, add_tokens:
    r -> S, over the token axis of the outputs; erase_channels, add_channels: d -> d.
    official: reproduce the published code, whose erase gate has no sigmoid and whose add term is mean(1 - w a).
    """

    select_norm_weight: torch.Tensor
    select_norm_bias: torch.Tensor
    select: MlpParams
    erase_norm_weight: torch.Tensor
    erase_norm_bias: torch.Tensor
    erase_tokens: MlpParams
    erase_channels: MlpParams
    add_norm_weight: torch.Tensor
    add_norm_bias: torch.Tensor
    add_tokens: MlpParams
    add_channels: MlpParams
    official: bool = False


SummaryParams: TypeAlias = TokenLearnerParams | LatentQueryParams | MeanPoolParams
WriteParams: TypeAlias = TokenLearnerParams | LatentQueryParams | MeanPoolParams | EraseAddParams

SUMMARIES = (TokenLearnerParams, LatentQueryParams, MeanPoolParams)


def summary_size(params: SummaryParams) -> int:
    """k: how many tokens the summary gives."""
    if isinstance(params, TokenLearnerParams):
        return params.w2.shape[0]
    if isinstance(params, LatentQueryParams):
        return params.queries.shape[0]
    return params.k


def check_summary(name: str, params: SummaryParams, tokens: int, like: torch.Tensor) -> SummaryParams:
    """Check the parameters of a summary of `tokens` tokens of the width, dtype and device of `like` [..., d].

    Returns them with whole numbers as Python's.
    """
    d = like.shape[-1]
    if isinstance(params, TokenLearnerParams):
        _check_norm(name, "norm", params.norm_weight, params.norm_bias, like)
        _check_mlp(name, "", MlpParams(params.w1, params.b1, params.w2, params.b2), d, None, like)
    elif isinstance(params, LatentQueryParams):
        params = _check_latent_query(name, params, like)
    elif isinstance(params, MeanPoolParams):
        params = params._replace(k=expect_int(f"{name}.k", params.k))
    else:
        kinds = ", ".join(kind.__name__ for kind in SUMMARIES)
        raise TypeError(f"{name} must be one of {kinds}, was {type(params).__name__}")
    if params.positions is not None:
        _check(f"{name}.positions", params.positions, "p d", (tokens, d), "[tokens of all sources, d]", like)
    return params


def check_erase_add(name: str, params: EraseAddParams, read_size: int, like: torch.Tensor) -> None:
    """Check the parameters of an erase-add write of `read_size` output tokens; `like` is the memory [B, s, d]."""
    d = like.shape[-1]
    for part, weight, bias in (
        ("select_norm", params.select_norm_weight, params.select_norm_bias),
        ("erase_norm", params.erase_norm_weight, params.erase_norm_bias),
        ("add_norm", params.add_norm_weight, params.add_norm_bias),
    ):
        _check_norm(name, part, weight, bias, like)
    slots = _check_mlp(name, "select", params.select, d, None, like)
    for part, mlp, inside, outside in (
        ("erase_tokens", params.erase_tokens, read_size, slots),
        ("erase_channels", params.erase_channels, d, d),
        ("add_tokens", params.add_tokens, read_size, slots),
        ("add_channels", params.add_channels, d, d),
    ):
        _check_mlp(name, part, mlp, inside, outside, like)
    expect_bool(f"{name}.official", params.official)


def _check(
    name: str, value: torch.Tensor, dims: str, shape: Sequence[int | None], meaning: str, like: torch.Tensor
) -> None:
    """Kind, dtype, device and shape of a tensor that is not empty; None in `shape`: any size."""
    expect_tensor(name, value, dims, like=like)
    expect_shape(name, value, [n if n is not None else value.shape[i] for i, n in enumerate(shape)], meaning)
    expect(value.numel() > 0, name, "not be empty", value)


def _check_norm(name: str, part: str, weight: torch.Tensor, bias: torch.Tensor, like: torch.Tensor) -> None:
    for kind, value in (("weight", weight), ("bias", bias)):
        _check(f"{name}.{part}_{kind}", value, "d", like.shape[-1:], "[d]", like)


def _check_mlp(name: str, part: str, mlp: MlpParams, inside: int, outside: int | None, like: torch.Tensor) -> int:
    """`outside` None: any number of outputs, which is returned."""
    name = f"{name}.{part}" if part else name
    if not isinstance(mlp, MlpParams):
        raise TypeError(f"{name} must be MlpParams, was {type(mlp).__name__}")
    _check(f"{name}.w1", mlp.w1, "hidden in", (None, inside), "[hidden, in]", like)
    hidden = mlp.w1.shape[0]
    _check(f"{name}.b1", mlp.b1, "hidden", (hidden,), "[hidden]", like)
    _check(f"{name}.w2", mlp.w2, "out hidden", (outside, hidden), "[out, hidden]", like)
    outside = mlp.w2.shape[0]
    _check(f"{name}.b2", mlp.b2, "out", (outside,), "[out]", like)
    return outside


def _check_latent_query(name: str, params: LatentQueryParams, like: torch.Tensor) -> LatentQueryParams:
    d = like.shape[-1]
    _check(f"{name}.queries", params.queries, "k d", (None, d), "[k, d]", like)
    for field in ("wq", "wk", "wv", "wo"):
        _check(f"{name}.{field}", getattr(params, field), "d d", (d, d), "[d, d]", like)
    for field in ("bq", "bk", "bv", "bo"):
        _check(f"{name}.{field}", getattr(params, field), "d", (d,), "[d]", like)
    heads = expect_int(f"{name}.heads", params.heads)
    expect(d % heads == 0, f"{name}.heads", f"divide d = {d}", heads)
    return params._replace(heads=heads)
