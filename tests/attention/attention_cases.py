"""Inputs of the attention tests: named layouts that together meet every rule, and random ones."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch

from mirasol.kernels.attention.visibility import Rule


class Case(NamedTuple):
    name: str
    n_q: int
    n_k: int
    layout: dict[str, Any]


def edges(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


CASES = [
    Case("chunk_causal", 24, 24, {"q_chunk": 8}),
    Case("short_last_chunk", 29, 29, {"q_chunk": 7}),
    Case("window", 30, 30, {"q_chunk": 5, "window": 2}),
    Case("window_and_sinks", 40, 40, {"q_chunk": 4, "window": 2, "sinks": 3}),
    Case("each_chunk_alone", 24, 24, {"q_chunk": 6, "window": 1}),
    Case("causal", 33, 33, {"q_chunk": 1}),
    Case("sliding_window", 33, 33, {"q_chunk": 1, "window": 9, "sinks": 2}),
    Case("full", 20, 31, {"q_chunk": 20, "k_chunk": 31}),
    Case("last_rows", 12, 40, {"q_chunk": 3, "k_chunk": 10}),
    Case("last_rows_causal", 12, 40, {"q_chunk": 3, "k_chunk": 10, "causal": True}),
    Case("more_queries_than_keys_causal", 21, 9, {"q_chunk": 7, "k_chunk": 3, "causal": True, "window": 1}),
    Case("causal_in_chunk", 26, 26, {"q_chunk": 8, "causal": True, "window": 1, "sinks": 1}),
    Case("decode", 1, 37, {"q_chunk": 1}),
    Case("decode_chunk", 4, 37, {"q_chunk": 8, "window": 2, "sinks": 1}),
    Case("hidden_rows", 18, 6, {"q_chunk": 3}),
    Case("uneven", 30, 30, {"q_chunk": edges(0, 3, 10, 11, 30)}),
    Case("uneven_empty_chunk", 14, 22, {"q_chunk": edges(0, 5, 5, 14), "k_chunk": edges(0, 0, 9, 22), "window": 2}),
    Case("packed", 33, 33, {"q_chunk": 4, "cu_seqlens_q": edges(0, 9, 9, 20, 33), "sinks": 1, "window": 2}),
    Case(
        "packed_decode", 3, 40, {"q_chunk": 1, "cu_seqlens_q": edges(0, 1, 2, 3), "cu_seqlens_k": edges(0, 7, 30, 40)}
    ),
    Case(
        "packed_uneven",
        20,
        26,
        {
            "q_chunk": edges(0, 3, 8, 15, 20),
            "k_chunk": edges(0, 6, 13, 26),
            "cu_seqlens_q": edges(0, 8, 20),
            "cu_seqlens_k": edges(0, 13, 26),
            "causal": True,
        },
    ),
    Case("no_keys", 5, 0, {"q_chunk": 5, "k_chunk": 3}),
    Case("no_queries", 0, 6, {"q_chunk": 2}),
]


def rule_of(case: Case, device: torch.device | str = "cpu") -> Rule:
    """The operators' arguments of a case."""
    given, chunks = case.layout, [case.layout["q_chunk"], case.layout.get("k_chunk")]
    lengths = [0 if isinstance(chunk, torch.Tensor) else chunk for chunk in chunks]
    uneven = [chunk.to(device, copy=True) if isinstance(chunk, torch.Tensor) else None for chunk in chunks]
    if chunks[1] is None:
        lengths[1], uneven[1] = lengths[0], uneven[0]
    cu = [given.get("cu_seqlens_q"), given.get("cu_seqlens_k", given.get("cu_seqlens_q"))]
    cu = [None if t is None else t.to(device) for t in cu]
    return Rule(*lengths, *uneven, *cu, given.get("window"), given.get("sinks", 0), given.get("causal", False))


def random_case(rng: random.Random, most: int = 40) -> Case:
    """Any layout of up to `most` queries and keys."""
    n_q, n_k = rng.randint(1, most), rng.randint(1, most)

    def cut(n: int, inner: int) -> torch.Tensor:
        return edges(0, *sorted(rng.randint(0, n) for _ in range(inner)), n)

    layout: dict[str, Any] = {
        "window": rng.choice([None, 1, 2, 3]),
        "causal": rng.random() < 0.4,
    }
    layout["sinks"] = rng.choice([0, 1, 2]) if layout["window"] else 0
    kind = rng.choice(["even", "uneven", "packed"])
    if kind == "uneven":
        layout |= {"q_chunk": cut(n_q, rng.randint(0, 5)), "k_chunk": cut(n_k, rng.randint(0, 5))}
    else:
        layout |= {"q_chunk": rng.choice([1, 2, 3, 7, 100]), "k_chunk": rng.choice([None, 1, 4, 9])}
    if kind == "packed":
        inner = rng.randint(0, 4)
        layout |= {"cu_seqlens_q": cut(n_q, inner), "cu_seqlens_k": cut(n_k, inner)}
    return Case(kind, n_q, n_k, layout)


def make_inputs(
    case: Case,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 8,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = True,
) -> list[torch.Tensor]:
    """q, k and v of a case."""
    shapes = ((heads, case.n_q), (kv_heads, case.n_k), (kv_heads, case.n_k))
    return [
        torch.randn(batch, h, n, width, dtype=torch.float64).to(dtype).requires_grad_(requires_grad) for h, n in shapes
    ]
