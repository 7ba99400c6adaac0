"""Token Turing Machine operators, the specification: sources are concatenated and every formula is written out.

Source: Token Turing Machines, arXiv 2211.09119, section 3, in the form of the authors' released code: LayerNorm with
epsilon 1e-6, tanh GELU, softmax over the tokens, values that are not normalised.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from mirasol.kernels.ttm.params import (
    EraseAddParams,
    LatentQueryParams,
    MeanPoolParams,
    MlpParams,
    SummaryParams,
    TokenLearnerParams,
    WriteParams,
)

NORM_EPS = 1e-6

Process = Callable[[torch.Tensor], torch.Tensor]


def mlp(x: torch.Tensor, params: MlpParams) -> torch.Tensor:
    """W2 gelu_tanh(W1 x + b1) + b2 over the last dimension."""
    return F.linear(F.gelu(F.linear(x, params.w1, params.b1), approximate="tanh"), params.w2, params.b2)


def token_learner_weights(v: torch.Tensor, params: TokenLearnerParams) -> torch.Tensor:
    """How much of each token goes to each summary token: v [B, p, d] -> [B, p, k], columns sum to 1 over the tokens."""
    normed = F.layer_norm(v, v.shape[-1:], params.norm_weight, params.norm_bias, NORM_EPS)
    return mlp(normed, MlpParams(params.w1, params.b1, params.w2, params.b2)).softmax(dim=1)


def token_learner(v: torch.Tensor, params: TokenLearnerParams) -> torch.Tensor:
    """TokenLearner v1.1: v [B, p, d] -> [B, k, d]."""
    return torch.einsum("bpk,bpd->bkd", token_learner_weights(v, params), v)


def latent_query(v: torch.Tensor, params: LatentQueryParams) -> torch.Tensor:
    """Attention of learned queries: v [B, p, d] -> [B, k, d]."""
    heads = params.heads
    q = F.linear(params.queries, params.wq, params.bq).unflatten(-1, (heads, -1))  # [k, H, D]
    k = F.linear(v, params.wk, params.bk).unflatten(-1, (heads, -1))  # [B, p, H, D]
    values = F.linear(v, params.wv, params.bv).unflatten(-1, (heads, -1))  # [B, p, H, D]
    weights = (torch.einsum("khd,bphd->bhkp", q, k) * q.shape[-1] ** -0.5).softmax(dim=-1)
    pooled = torch.einsum("bhkp,bphd->bkhd", weights, values)
    return F.linear(pooled.flatten(-2), params.wo, params.bo)


def mean_pool(v: torch.Tensor, params: MeanPoolParams) -> torch.Tensor:
    """Means over k windows of neighbouring tokens: v [B, p, d] -> [B, k, d]."""
    p, k = v.shape[1], params.k
    return torch.stack([v[:, i * p // k : -(-(i + 1) * p // k)].mean(dim=1) for i in range(k)], dim=1)


def summary(sources: list[torch.Tensor], params: SummaryParams) -> torch.Tensor:
    """Summarise the concatenated sources, each [B, p_i, d], into [B, k, d]; positions are added to the tokens first."""
    v = torch.cat(sources, dim=1)
    if params.positions is not None:
        v = v + params.positions
    if isinstance(params, TokenLearnerParams):
        return token_learner(v, params)
    if isinstance(params, LatentQueryParams):
        return latent_query(v, params)
    return mean_pool(v, params)


def erase_add(memory: torch.Tensor, outputs: torch.Tensor, params: EraseAddParams) -> torch.Tensor:
    """memory [B, s, d] * prod_i (1 - w_i e_i) + sum_i w_i a_i over the S slots i, w_i [s], e_i and a_i [d].

    Source: Neural Turing Machines, arXiv 1410.5401, equations 3 and 4, with the networks of the authors' code for w, e
    and a. With `params.official` e has no sigmoid and the add term is mean_i(1 - w_i a_i).
    """
    norm_memory = F.layer_norm(memory, memory.shape[-1:], params.select_norm_weight, params.select_norm_bias, NORM_EPS)
    w = mlp(norm_memory, params.select).softmax(dim=1).transpose(1, 2)  # [B, S, s]
    norm_erase = F.layer_norm(outputs, outputs.shape[-1:], params.erase_norm_weight, params.erase_norm_bias, NORM_EPS)
    e = mlp(mlp(norm_erase.transpose(1, 2), params.erase_tokens).transpose(1, 2), params.erase_channels)  # [B, S, d]
    norm_add = F.layer_norm(outputs, outputs.shape[-1:], params.add_norm_weight, params.add_norm_bias, NORM_EPS)
    a = mlp(mlp(norm_add.transpose(1, 2), params.add_tokens).transpose(1, 2), params.add_channels)  # [B, S, d]
    e = e if params.official else e.sigmoid()
    kept = memory * (1 - w[..., None] * e[:, :, None]).prod(dim=1)
    added = w[..., None] * a[:, :, None]
    return kept + ((1 - added).mean(dim=1) if params.official else added.sum(dim=1))


def ttm_read(memory: torch.Tensor, inputs: torch.Tensor, params: SummaryParams) -> torch.Tensor:
    """Z = S_r([memory | inputs])."""
    return summary([memory, inputs], params)


def ttm_write(memory: torch.Tensor, outputs: torch.Tensor, inputs: torch.Tensor, params: WriteParams) -> torch.Tensor:
    """M' = S_s([memory | inputs | outputs]), or the erase-add update of the memory by the outputs."""
    if isinstance(params, EraseAddParams):
        return erase_add(memory, outputs, params)
    return summary([memory, inputs, outputs], params)


def ttm_scan(
    memory: torch.Tensor,
    inputs: torch.Tensor,
    read_params: SummaryParams,
    process: Process,
    write_params: WriteParams,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read, process and write for one chunk after another.

    Args:
        memory: [B, s, d]; inputs: [B, T, n, d].
    Returns:
        outputs [B, T, r, d] and the memory after every chunk [B, T, s, d].
    """
    outputs, memories = [], []
    for chunk in inputs.unbind(1):
        out = process(ttm_read(memory, chunk, read_params))
        memory = ttm_write(memory, out, chunk, write_params)
        outputs.append(out)
        memories.append(memory)
    return torch.stack(outputs, dim=1), torch.stack(memories, dim=1)
