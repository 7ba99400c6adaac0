"""The torch backend and its building blocks against the dense reference: forward, lse and every gradient."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from attention_cases import CASES, Case, edges, make_inputs, random_case, rule_of
from torch.nn.functional import scaled_dot_product_attention

from mirasol.kernels import chunked_attention, merge_attention
from mirasol.kernels.attention import cover, eager, products
from mirasol.kernels.attention.op import empty_like
from mirasol.kernels.attention.visibility import ranges
from tolerance import LONG_SUMS, assert_close, assert_within_budget

NAMES = ("out", "lse", "dq", "dk", "dv")


def token_first(t: torch.Tensor) -> torch.Tensor:
    """The same [B, H, N, D] as [B, N, H, D] in memory, as a model's projections leave it."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


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


def compare(case: Case, inputs: list[torch.Tensor], lse_gradient: bool = True, rtol: float | None = None) -> None:
    ours = results(inputs, case.layout, "torch", lse_gradient)
    exact = results([t.detach().double().requires_grad_() for t in inputs], case.layout, "reference", lse_gradient)
    for name, out, ref in zip(NAMES, ours, exact, strict=True):
        assert_close(f"{case.name} {name}", out, ref, rtol=rtol)


@pytest.fixture
def covered_by(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets how calls cover the pairs, here so that few rows meet every way."""

    def choose(shared_keys: int, price: cover.Price, plain: int | None = None) -> None:
        monkeypatch.setattr(cover, "SHARED_KEYS", shared_keys)
        monkeypatch.setattr(
            eager, "_cover", lambda rule, q, k, _: cover.cover(rule.read(q.shape[2], k.shape[2]), price, plain)
        )

    cover.cover.cache_clear()
    yield choose
    cover.cover.cache_clear()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("width", "threads"), [(1, 1), (2, 1), (3, 2), (5, 1), (8, 2)])
def test_named_layouts_in_float64(case: Case, width: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    compare(case, make_inputs(case, width=width))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_without_a_gradient_of_lse(case: Case) -> None:
    compare(case, make_inputs(case), lse_gradient=False)


@pytest.mark.parametrize("seed", range(40))
def test_random_layouts_in_float64(seed: int, covered_by: Callable[..., None]) -> None:
    rng = random.Random(seed)
    price = cover.Price(*(rng.choice(of) for of in ([0, 50, 1000], [0, 10, 1000], [0, 10], [4, 16, 128], [0, 400])))
    covered_by(rng.choice([1, 3, 16, 128]), price)
    case = random_case(rng)
    inputs = make_inputs(case, heads=rng.choice([2, 4]), batch=rng.choice([1, 2, 9]), requires_grad=False)
    if rng.random() < 0.5:
        inputs = [token_first(t) for t in inputs]
    compare(case, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plain_products(case: Case, covered_by: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on devices without ATen's CPU kernels: scores written out for a bounded number of rows."""
    monkeypatch.setattr(eager, "attend", products._plain)
    monkeypatch.setattr(eager, "attend_backward", products._plain_backward)
    covered_by(16, cover.Price(200, 20, 3), plain=6)
    compare(case, make_inputs(case))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32(case: Case) -> None:
    compare(case, make_inputs(case, dtype=torch.float32, width=16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["chunk_causal", "window_and_sinks", "last_rows_causal", "packed", "hidden_rows"])
def test_low_precision_is_as_good_as_plain_attention(name: str, dtype: torch.dtype) -> None:
    small = next(case for case in CASES if case.name == name)
    inputs = make_inputs(small, dtype=dtype, width=32)
    ours = results(inputs, small.layout, "torch", True)
    exact = results([t.detach().double().requires_grad_() for t in inputs], small.layout, "reference", True)
    plain = results([t.detach().requires_grad_() for t in inputs], small.layout, "reference", True)
    for label, out, low, ref in zip(NAMES, ours, plain, exact, strict=True):
        if label != "lse":
            assert_within_budget(label, out, low, ref)


@pytest.mark.parametrize("order", ["contiguous", "token first"])
@pytest.mark.parametrize(
    "layout",
    [
        {"q_chunk": 500},
        {"q_chunk": 60},
        {"q_chunk": 150, "causal": True, "window": 2},
        {"q_chunk": 1, "window": 40, "sinks": 2},
        {"q_chunk": 20, "window": 3, "sinks": 1},
    ],
    ids=str,
)
def test_lengths_beyond_one_group(layout: dict[str, Any], order: str) -> None:
    """Batches of windows, of all clips at once where strides allow and of one clip else, and their overlaps."""
    case = Case("long", 500, 500, layout)
    inputs = make_inputs(case, batch=3, heads=2, kv_heads=1, requires_grad=False)
    compare(case, [(t if order == "contiguous" else token_first(t)).requires_grad_() for t in inputs], rtol=LONG_SUMS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_results_are_in_memory_as_their_tensors(case: Case) -> None:
    """So that `out.transpose(1, 2).flatten(2)` of a projected q is a view; the fakes promise the same strides."""
    for order in (torch.Tensor.contiguous, token_first):
        inputs = [order(t).requires_grad_() for t in make_inputs(case, requires_grad=False)]
        out, lse, *grads = results(inputs, case.layout, "torch", True)
        assert lse.is_contiguous()
        for name, t, like in zip(("out", "dq", "dk", "dv"), (out, *grads), (inputs[0], *inputs), strict=True):
            expected = empty_like(like.to("meta"))
            assert torch._prims_common.check_significant_strides(t, expected)[0], name


def test_last_dimension_that_is_not_contiguous() -> None:
    q, k, v = torch.randn(3, 2, 2, 8, 24, dtype=torch.float64).transpose(-1, -2)
    expected = chunked_attention(q, k, v, q_chunk=6, backend="reference")
    assert_close("out", chunked_attention(q, k, v, q_chunk=6, backend="torch"), expected)


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
    assert_close("full", chunked_attention(q, k, v, q_chunk=32), full)
    causal = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close("causal", chunked_attention(q, k, v, q_chunk=1), causal)
    assert_close("causal in a chunk", chunked_attention(q, k, v, q_chunk=8, causal=True), causal)
    alone = scaled_dot_product_attention(*(t.unflatten(2, (4, 8)) for t in (q, k, v))).flatten(2, 3)
    assert_close("window=1", chunked_attention(q, k, v, q_chunk=8, window=1), alone)
    scaled = scaled_dot_product_attention(q, k, v, scale=0.3)
    assert_close("scale", chunked_attention(q, k, v, q_chunk=32, scale=0.3), scaled)


def test_tokens_of_a_chunk_may_be_permuted() -> None:
    q, k, v = torch.randn(3, 1, 2, 40, 8, dtype=torch.float64)
    order = torch.cat([c * 10 + torch.randperm(10) for c in range(4)])
    out = chunked_attention(q, k, v, q_chunk=10)
    permuted = chunked_attention(*(t[:, :, order] for t in (q, k, v)), q_chunk=10)
    assert_close("permuted", permuted, out[:, :, order])


def test_last_rows_equal_running_all_and_slicing() -> None:
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 2, 40, 8, dtype=torch.float64))
    sliced = chunked_attention(q, k, v, q_chunk=10).unflatten(2, (4, 10))[:, :, :, -3:].flatten(2, 3)
    last = q.unflatten(2, (4, 10))[:, :, :, -3:].flatten(2, 3)
    pruned = chunked_attention(last, k, v, q_chunk=3, k_chunk=10)
    assert_close("out", pruned, sliced)
    grad = torch.randn_like(pruned)
    for name, ours, ref in zip(
        "qkv", torch.autograd.grad(pruned, (q, k, v), grad), torch.autograd.grad(sliced, (q, k, v), grad), strict=True
    ):
        assert_close(f"d{name}", ours, ref)


@pytest.mark.parametrize("layout", [{"q_chunk": 6}, {"q_chunk": 6, "window": 2, "sinks": 1}, {"q_chunk": 1}])
def test_a_stream_of_steps_equals_the_whole(layout: dict[str, Any]) -> None:
    q, k, v = torch.randn(3, 1, 2, 30, 8, dtype=torch.float64)
    whole = chunked_attention(q, k, v, **layout)
    step = layout["q_chunk"]
    for start in range(0, 30, step):
        stop = start + step
        out = chunked_attention(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], **layout)
        assert_close(f"step at {start}", out, whole[:, :, start:stop])


def test_partial_results_merge() -> None:
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 2, 30, 8, dtype=torch.float64))
    whole = chunked_attention(q, k, v, q_chunk=30, return_lse=True)
    parts = [
        chunked_attention(q, k[:, :, keys], v[:, :, keys], q_chunk=30, k_chunk=30, return_lse=True)
        for keys in (slice(0, 11), slice(11, 30))
    ]
    merged = merge_attention(*parts[0], *parts[1])
    for name, ours, ref in zip(("out", "lse"), merged, whole, strict=True):
        assert_close(name, ours, ref)
    grads = [torch.randn_like(t) for t in whole]
    ours_all = torch.autograd.grad(merged, (q, k, v), grads)
    for name, ours, ref in zip("qkv", ours_all, torch.autograd.grad(whole, (q, k, v), grads), strict=True):
        assert_close(f"d{name}", ours, ref, rtol=LONG_SUMS)


def test_merging_with_nothing_changes_nothing() -> None:
    out, lse = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5)
    nothing, never = torch.zeros_like(out), torch.full_like(lse, float("-inf"))
    merged, total = merge_attention(out, lse, nothing, never)
    assert_close("out", merged, out)
    assert_close("lse", total, lse)
    empty, none = merge_attention(nothing, never, nothing, never)
    assert torch.equal(empty, nothing)
    assert torch.equal(none, never)


@pytest.mark.parametrize("layout", [{"q_chunk": 64}, {"q_chunk": 16, "window": 60}, {"q_chunk": 1, "window": 900}])
def test_memory_is_linear_in_the_tokens(layout: dict[str, Any]) -> None:
    """No tensor has more elements than a few times the inputs, or the mask of a group, whatever the chunks."""
    n, width = 2048, 4
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
            largest = max([largest, *(t.numel() for t in tensors)])
            return out

    q, k, v = torch.randn(3, 1, 1, n, width)
    rule = rule_of(Case("long", n, n, layout))
    with Watch():
        out, lse = eager.forward(q, k, v, rule, 0.3)
        eager.backward(out, None, q, k, v, out, lse, rule, 0.3)
    assert largest <= max(cover.MOST_COPIES * n * width, 128 * (cover.SHARED_KEYS + 2 * 128))


@pytest.mark.parametrize(
    ("n", "rule", "most"),
    [
        (750, {"q_chunk": 16, "window": 5}, 4),
        (7168, {"q_chunk": 448, "window": 2}, 3),
        (4096, {"q_chunk": 1, "window": 80, "sinks": 3}, 6),
        (4096, {"q_chunk": 64, "window": 1, "causal": True}, 1),
        (512, {"q_chunk": 32}, 4),
        (300, {"q_chunk": 300, "causal": True}, 1),
    ],
)
def test_few_calls_cover_many_chunks(n: int, rule: dict[str, Any], most: int) -> None:
    """Each call makes threads wait for each other."""
    chunks = rule_of(Case("many", n, n, rule)).read(n, n)
    for prices in (eager.FORWARD, eager.BACKWARD):
        assert len(cover.cover(chunks, prices[4]).calls) <= most


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_of_a_call_are_bounded_where_scores_are_written_out(case: Case) -> None:
    calls = cover.cover(rule_of(case).read(case.n_q, case.n_k), cover.Price(200, 20, 3, 6), 6).calls
    assert all(call.rows * call.times <= 6 for call in calls)


def image_spans(n: int) -> torch.Tensor:
    """Text tokens, each a chunk, with an image of 256 tokens after every hundred."""
    found, image = [0], 0
    while found[-1] < n:
        image += 1
        found.append(min(found[-1] + (1 if image % 101 else 256), n))
    return edges(*found)


@pytest.mark.parametrize(
    ("n", "layout"),
    [
        (1500, {"q_chunk": 1, "window": 80}),
        (1500, {"q_chunk": 1, "window": 80, "sinks": 3}),
        (2048, {"q_chunk": image_spans(2048)}),
        (2048, {"q_chunk": image_spans(2048), "window": 64, "sinks": 4}),
    ],
    ids=["tokens", "tokens_sinks", "images", "images_sinks"],
)
def test_a_cover_is_quickly_made_and_kept(n: int, layout: dict[str, Any]) -> None:
    """Time grows with the chunks, not with their square; a second call makes nothing anew."""
    chunks = rule_of(Case("many", n, n, layout)).read(n, n)
    made: list[float] = []
    for _ in range(3):
        for cache in (ranges, cover.cover, cover.additive_mask):
            cache.cache_clear()
        start = time.perf_counter()
        for prices in (eager.FORWARD, eager.BACKWARD):
            for call in cover.cover(chunks, prices[4]).calls:
                if call.seen is not None:
                    cover.additive_mask(call.seen, call.keys, torch.float32, torch.device("cpu"))
        made.append(time.perf_counter() - start)
    assert min(made) < 0.1
    q = torch.randn(1, 1, n, 4)
    rule = rule_of(Case("many", n, n, layout))
    misses = None
    for _ in range(2):
        out, lse = eager.forward(q, q, q, rule, 0.5)
        eager.backward(out, None, q, q, q, out, lse, rule, 0.5)
        misses, before = (cover.cover.cache_info().misses, cover.additive_mask.cache_info().misses), misses
    assert misses == before
