"""The torch backend and its building blocks against the dense reference: forward, lse and every gradient."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from attention_cases import CASES, Case, make_inputs, random_case
from torch.nn.functional import scaled_dot_product_attention

from mirasol.kernels import chunked_attention, merge_attention
from mirasol.kernels.attention import plan, tiles
from tolerance import assert_close, assert_within_budget


def finite(lse: torch.Tensor) -> torch.Tensor:
    return lse.masked_fill(lse.isinf(), 0.0)


def results(inputs: list[torch.Tensor], layout: dict[str, Any], backend: str, lse_gradient: bool) -> list[torch.Tensor]:
    """out, lse and the gradients of q, k and v for fixed gradients of out and lse."""
    out, lse = chunked_attention(*inputs, **layout, return_lse=True, backend=backend)
    rng = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=rng, dtype=torch.float64).to(out.dtype)).sum()
    if lse_gradient:
        loss = loss + (finite(lse) * torch.randn(lse.shape, generator=rng, dtype=torch.float64).to(lse.dtype)).sum()
    return [out, lse, *torch.autograd.grad(loss, inputs)]


def compare(case: Case, inputs: list[torch.Tensor], lse_gradient: bool = True, rtol: float = 1e-12) -> None:
    ours = results(inputs, case.layout, "torch", lse_gradient)
    exact = results([t.detach().double().requires_grad_() for t in inputs], case.layout, "reference", lse_gradient)
    for name, out, ref in zip(("out", "lse", "dq", "dk", "dv"), ours, exact, strict=True):
        assert_close(f"{case.name} {name}", out, ref, rtol=rtol)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("lse_gradient", [False, True])
def test_named_layouts_in_float64(case: Case, lse_gradient: bool) -> None:
    compare(case, make_inputs(case), lse_gradient)


@pytest.mark.parametrize("seed", range(40))
def test_random_layouts_in_float64(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(plan, "GROUP_ROWS", rng.choice([4, 16, 256]))  # small groups meet every way to cover a block
    monkeypatch.setattr(plan, "SHORT_ROWS", rng.choice([4, 128]))
    plan.plan.cache_clear()
    case = random_case(rng)
    compare(case, make_inputs(case, heads=rng.choice([2, 4]), batch=rng.choice([1, 2])))
    plan.plan.cache_clear()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_without_flash_tiles(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on devices without ATen's CPU kernels: scores written out for a bounded number of rows."""
    monkeypatch.setattr(tiles, "_flash", tiles._plain)
    monkeypatch.setattr(tiles, "_flash_backward", tiles._plain_backward)
    monkeypatch.setattr("mirasol.kernels.attention.eager._most_rows", lambda device: 6)
    compare(case, make_inputs(case))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32(case: Case) -> None:
    compare(case, make_inputs(case, dtype=torch.float32, width=16), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["chunk_causal", "window_and_sinks", "last_rows_causal", "packed", "hidden_rows"])
def test_low_precision_is_as_good_as_plain_attention(name: str, dtype: torch.dtype) -> None:
    small = next(case for case in CASES if case.name == name)
    inputs = make_inputs(small, dtype=dtype, width=32)
    ours = results(inputs, small.layout, "torch", True)
    exact = results([t.detach().double().requires_grad_() for t in inputs], small.layout, "reference", True)
    plain = results([t.detach().requires_grad_() for t in inputs], small.layout, "reference", True)
    for label, out, low, ref in zip(("out", "lse", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        if label != "lse":
            assert_within_budget(label, out, low, ref)


@pytest.mark.parametrize("layout", [{"q_chunk": 1}, {"q_chunk": 500}, {"q_chunk": 60}, {"q_chunk": 20, "window": 3}])
def test_lengths_beyond_one_group(layout: dict[str, Any]) -> None:
    case = Case("long", 500, 500, layout)
    compare(case, make_inputs(case, batch=1, heads=2, kv_heads=1))


def test_strided_views_need_no_copy() -> None:
    qkv = torch.randn(2, 24, 3, 4, 8, dtype=torch.float64)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = chunked_attention(q, k, v, q_chunk=8, backend="torch")
    assert out.is_contiguous()
    expected = chunked_attention(*(t.contiguous() for t in (q, k, v)), q_chunk=8, backend="reference")
    assert_close("out", out, expected, rtol=1e-12)


def test_last_dimension_that_is_not_contiguous() -> None:
    q, k, v = torch.randn(3, 2, 2, 8, 24, dtype=torch.float64).transpose(-1, -2)
    expected = chunked_attention(q, k, v, q_chunk=6, backend="reference")
    assert_close("out", chunked_attention(q, k, v, q_chunk=6, backend="torch"), expected, rtol=1e-12)


def test_the_future_never_changes_the_past() -> None:
    case = Case("future", 96, 96, {"q_chunk": 16})
    q, k, v = make_inputs(case, dtype=torch.float32, requires_grad=False)
    before = chunked_attention(q, k, v, q_chunk=16, backend="torch")
    for t in (q, k, v):
        t[:, :, 48:] = 1e4
    after = chunked_attention(q, k, v, q_chunk=16, backend="torch")
    assert torch.equal(before[:, :, :48], after[:, :, :48])
    assert not torch.equal(before[:, :, 48:], after[:, :, 48:])


def test_special_cases_equal_plain_attention() -> None:
    q, k, v = torch.randn(3, 2, 4, 32, 8, dtype=torch.float64)
    full = scaled_dot_product_attention(q, k, v)
    assert_close("full", chunked_attention(q, k, v, q_chunk=32), full, rtol=1e-12)
    causal = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close("causal", chunked_attention(q, k, v, q_chunk=1), causal, rtol=1e-12)
    assert_close("causal in a chunk", chunked_attention(q, k, v, q_chunk=8, causal=True), causal, rtol=1e-12)
    alone = scaled_dot_product_attention(*(t.unflatten(2, (4, 8)) for t in (q, k, v))).flatten(2, 3)
    assert_close("window=1", chunked_attention(q, k, v, q_chunk=8, window=1), alone, rtol=1e-12)
    scaled = scaled_dot_product_attention(q, k, v, scale=0.3)
    assert_close("scale", chunked_attention(q, k, v, q_chunk=32, scale=0.3), scaled, rtol=1e-12)


def test_tokens_of_a_chunk_may_be_permuted() -> None:
    q, k, v = torch.randn(3, 1, 2, 40, 8, dtype=torch.float64)
    order = torch.cat([c * 10 + torch.randperm(10) for c in range(4)])
    out = chunked_attention(q, k, v, q_chunk=10)
    permuted = chunked_attention(*(t[:, :, order] for t in (q, k, v)), q_chunk=10)
    assert_close("permuted", permuted, out[:, :, order], rtol=1e-12)


def test_last_rows_equal_running_all_and_slicing() -> None:
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 2, 40, 8, dtype=torch.float64))
    sliced = chunked_attention(q, k, v, q_chunk=10).unflatten(2, (4, 10))[:, :, :, -3:].flatten(2, 3)
    last = q.unflatten(2, (4, 10))[:, :, :, -3:].flatten(2, 3)
    pruned = chunked_attention(last, k, v, q_chunk=3, k_chunk=10)
    assert_close("out", pruned, sliced, rtol=1e-12)
    grad = torch.randn_like(pruned)
    for name, ours, ref in zip(
        "qkv", torch.autograd.grad(pruned, (q, k, v), grad), torch.autograd.grad(sliced, (q, k, v), grad), strict=True
    ):
        assert_close(f"d{name}", ours, ref, rtol=1e-12)


@pytest.mark.parametrize("layout", [{"q_chunk": 6}, {"q_chunk": 6, "window": 2, "sinks": 1}, {"q_chunk": 1}])
def test_a_stream_of_steps_equals_the_whole(layout: dict[str, Any]) -> None:
    q, k, v = torch.randn(3, 1, 2, 30, 8, dtype=torch.float64)
    whole = chunked_attention(q, k, v, **layout)
    step = layout["q_chunk"]
    for start in range(0, 30, step):
        stop = start + step
        out = chunked_attention(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], **layout)
        assert_close(f"step at {start}", out, whole[:, :, start:stop], rtol=1e-12)


def test_partial_results_merge() -> None:
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 2, 30, 8, dtype=torch.float64))
    whole = chunked_attention(q, k, v, q_chunk=30, return_lse=True)
    parts = [
        chunked_attention(q, k[:, :, keys], v[:, :, keys], q_chunk=30, k_chunk=30, return_lse=True)
        for keys in (slice(0, 11), slice(11, 30))
    ]
    merged = merge_attention(*parts[0], *parts[1])
    for name, ours, ref in zip(("out", "lse"), merged, whole, strict=True):
        assert_close(name, ours, ref, rtol=1e-12)
    grads = [torch.randn_like(t) for t in whole]
    ours_all = torch.autograd.grad(merged, (q, k, v), grads)
    for name, ours, ref in zip("qkv", ours_all, torch.autograd.grad(whole, (q, k, v), grads), strict=True):
        assert_close(f"d{name}", ours, ref, rtol=1e-11)


def test_merging_with_nothing_changes_nothing() -> None:
    out, lse = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5)
    nothing, never = torch.zeros_like(out), torch.full_like(lse, float("-inf"))
    merged, total = merge_attention(out, lse, nothing, never)
    assert_close("out", merged, out, rtol=1e-6)
    assert_close("lse", total, lse, rtol=1e-6)
    empty, none = merge_attention(nothing, never, nothing, never)
    assert torch.equal(empty, nothing)
    assert torch.equal(none, never)


def test_memory_is_linear_in_the_tokens() -> None:
    """No tensor of an eager call has more elements than a few times its inputs, however many chunks there are."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    from mirasol.kernels.attention import eager

    q, k, v = torch.randn(3, 1, 1, 4096, 8)
    layout = make_full_layout(4096, 64)
    with Watch():
        out, lse = eager.forward(q, k, v, layout, 0.3)
        eager.backward(out, None, q, k, v, out, lse, layout, 0.3)
    assert largest <= 256 * 512  # a mask of one group; 4096 x 4096 is 128 times that


def make_full_layout(n: int, chunk: int) -> Any:
    from mirasol.kernels.attention.layout import Layout

    return Layout(n_q=n, n_k=n, q_chunk=chunk, k_chunk=chunk)
