"""The Triton kernels and the host code around them against the dense reference: in the interpreter, or on a GPU."""

from __future__ import annotations

import functools
import gc
import random
import weakref
from typing import Any

import pytest
import torch
from attention_cases import CASES, Case, edges, make_inputs, random_case, rule_of

from devices import DEVICE, EXACT, LOW_PRECISION, ON_GPU, only_on_gpu
from mirasol.kernels import chunked_attention
from mirasol.kernels.attention.triton import host, table
from mirasol.kernels.attention.triton.config import (
    BACKWARD_KV,
    FORWARD,
    KERNELS,
    Config,
    pinned,
    specialized_warps,
)
from mirasol.kernels.attention.triton.forward import attention_fwd_kernel
from mirasol.kernels.core import device
from tolerance import assert_close, assert_within_budget

NAMED = {case.name: case for case in CASES}
NAMES = ("out", "lse", "dq", "dk", "dv")


def run(inputs: list[torch.Tensor], layout: dict[str, Any], backend: str, lse_gradient: bool = True) -> list[Any]:
    """out, lse and the gradients of q, k and v for fixed gradients of out and lse."""
    out, lse = chunked_attention(*inputs, **layout, return_lse=True, backend=backend)
    rng = torch.Generator().manual_seed(1)
    fixed = torch.randn(out.shape, generator=rng, dtype=torch.float64).to(out)
    loss = (out * fixed).sum()
    if lse_gradient:
        loss = loss + (lse.masked_fill(lse.isinf(), 0.0) * fixed[..., 0].to(lse)).sum()
    return [out, lse, *torch.autograd.grad(loss, inputs)]


def inputs_of(case: Case, **changes: Any) -> list[torch.Tensor]:
    """One batch of two heads over one key head unless said otherwise: the interpreter takes 2 ms a program."""
    shape = {"batch": 1, "heads": 2, "kv_heads": 1, "dtype": EXACT} | changes
    return [t.detach().to(DEVICE).requires_grad_() for t in make_inputs(case, **shape)]


def layout_of(case: Case) -> dict[str, Any]:
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in case.layout.items()}


def compare(case: Case, lse_gradient: bool = True, **changes: Any) -> None:
    """In float64 and float32 to the dtype's tolerance, in 16 bits within the budget of plain attention."""
    inputs, layout = inputs_of(case, **changes), layout_of(case)
    ours = run(inputs, layout, "triton", lse_gradient)
    exact = run([t.detach().double().requires_grad_() for t in inputs], layout, "reference", lse_gradient)
    plain = run([t.detach().requires_grad_() for t in inputs], layout, "reference", lse_gradient)
    for name, out, ref, low in zip(NAMES, ours, exact, plain, strict=True):
        if out.dtype.itemsize == 2:
            assert_within_budget(f"{case.name} {name}", out, low, ref)
        else:
            assert_close(f"{case.name} {name}", out, ref)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_named_layouts(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("seed", range(12))
def test_random_layouts(seed: int) -> None:
    rng = random.Random(seed)
    heads, kv_heads = rng.choice([(1, 1), (3, 1), (4, 2)])
    compare(random_case(rng, 60), heads=heads, kv_heads=kv_heads, width=rng.choice([5, 16, 24]))


def problem_of(n_q: int, n_k: int, layout: dict[str, Any]) -> host._Problem:
    q, k = torch.empty(1, 2, n_q, 8), torch.empty(1, 1, n_k, 8)
    return host._Problem(host._key(rule_of(Case("sized", n_q, n_k, layout)), q, k, k))


@pytest.mark.parametrize(
    ("n_q", "n_k", "layout"),
    [
        (64, 64, {"q_chunk": 16}),
        (96, 96, {"q_chunk": 32, "window": 2, "sinks": 1}),
        (32, 96, {"q_chunk": 16, "k_chunk": 48}),
        (64, 64, {"q_chunk": 64}),
    ],
)
def test_aligned_layouts_need_no_mask(n_q: int, n_k: int, layout: dict[str, Any]) -> None:
    assert all(problem_of(n_q, n_k, layout).aligned(kernel, 16, 16) for kernel in KERNELS)
    compare(Case("aligned", n_q, n_k, layout))


@pytest.mark.parametrize(
    ("n", "chunk", "causal", "block_m", "block_n", "forward", "backward_kv"),
    [
        (64, 24, False, 32, 16, False, False),
        (72, 24, False, 32, 8, False, False),
        (72, 24, False, 16, 8, True, True),
        (70, 16, False, 32, 16, False, False),
        (70, 70, False, 32, 16, False, False),
        (70, 70, False, 32, 10, True, False),
        (64, 32, True, 32, 16, False, False),
        (64, 1, False, 32, 16, False, False),
    ],
)
def test_what_is_aligned(
    n: int, chunk: int, causal: bool, block_m: int, block_n: int, forward: bool, backward_kv: bool
) -> None:
    """Two query heads share a key head, so that a chunk has twice as many packed rows."""
    problem = problem_of(n, n, {"q_chunk": chunk, "causal": causal})
    assert problem.aligned(FORWARD, block_m, block_n) == forward
    assert problem.aligned(BACKWARD_KV, block_m, block_n) == backward_kv


@pytest.mark.parametrize("name", ["window_and_sinks", "packed_uneven", "last_rows_causal"])
def test_float32(name: str) -> None:
    compare(NAMED[name], dtype=torch.float32, width=32)


@pytest.mark.parametrize("name", ["window_and_sinks", "packed", "hidden_rows"])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_is_as_good_as_plain_attention(name: str, dtype: torch.dtype) -> None:
    compare(NAMED[name], dtype=dtype, width=32)


@pytest.mark.parametrize("layout", [{"q_chunk": 1}, {"q_chunk": 8, "k_chunk": 40, "window": 3}, {"q_chunk": 3}])
@pytest.mark.parametrize("n_q", [1, 3])
def test_streaming_steps_are_split_over_keys(n_q: int, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def spy(programs: int, key_blocks: int, target: device.Target) -> int:
        counts.append(splits(programs, key_blocks, target))
        return counts[-1]

    splits = host.splits
    monkeypatch.setattr(host, "splits", spy)
    host._plan_forward.cache_clear()
    compare(Case("step", n_q, 150 if not ON_GPU else 20000, layout), heads=4)
    assert max(counts) > 1


@pytest.mark.skipif(ON_GPU, reason="float64 kernels exist in the interpreter only")
@pytest.mark.parametrize("name", ["window_and_sinks", "packed_uneven"])
def test_gradcheck(name: str) -> None:
    case = NAMED[name]
    inputs = inputs_of(case, width=4)

    def attend(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = chunked_attention(*tensors, **case.layout, return_lse=True, backend="triton")
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["window_and_sinks", "hidden_rows", "uneven_empty_chunk", "no_keys", "decode_chunk"])
def test_every_output_is_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is filled with NaN: an element that no program writes shows."""

    def poisoned(make: Any) -> Any:
        def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return filled

    case = NAMED[name]
    inputs, layout = inputs_of(case), layout_of(case)
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    for method in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, method, poisoned(getattr(torch.Tensor, method)))
    results = run(inputs, layout, "triton")
    monkeypatch.undo()
    assert not any(t.isnan().any() for t in results)


def surrounded(t: torch.Tensor) -> torch.Tensor:
    """The same values in the middle of a storage full of NaN, with gaps of NaN between rows and heads."""
    b, h, n, d = t.shape
    storage = torch.full((b + 2, h + 2, n + 80, d + 8), float("nan"), dtype=t.dtype, device=t.device)
    view = storage[1:-1, 1:-1, 40:-40, :d]
    return view.copy_(t)


@pytest.mark.parametrize("name", ["short_last_chunk", "window_and_sinks", "packed", "last_rows_causal"])
@pytest.mark.parametrize("width", [5])
def test_nothing_outside_the_inputs_is_read(name: str, width: int) -> None:
    case = NAMED[name]
    inputs, layout = inputs_of(case, width=width), layout_of(case)
    expected = run(inputs, layout, "triton")
    ours = run([surrounded(t.detach()).requires_grad_() for t in inputs], layout, "triton")
    for out, ref in zip(ours, expected, strict=True):
        assert torch.equal(out, ref)


def test_outputs_and_gradients_follow_the_order_of_their_tensors() -> None:
    """Views of one projection are read where they lie, and nobody has to copy to join the heads again."""
    qkv = torch.randn(1, 40, 3, 2, 8, dtype=EXACT, device=DEVICE)
    inputs = [t.detach().requires_grad_() for t in qkv.permute(2, 0, 3, 1, 4)]
    ours = run(inputs, {"q_chunk": 8}, "triton")
    expected = run([t.detach().contiguous().requires_grad_() for t in inputs], {"q_chunk": 8}, "triton")
    for name, out, ref in zip(NAMES, ours, expected, strict=True):
        assert torch.equal(out, ref)
        assert ref.is_contiguous()
        assert out.is_contiguous() if name == "lse" else out.transpose(1, 2).is_contiguous()
    assert ours[0].transpose(1, 2).flatten(2).data_ptr() == ours[0].data_ptr()


def test_the_future_never_changes_the_past() -> None:
    q, k, v = torch.randn(3, 1, 2, 60, 8, dtype=EXACT, device=DEVICE)
    before = chunked_attention(q, k, v, q_chunk=20, backend="triton")
    for t in (q, k, v):
        t[:, :, 40:] = 1e4
    after = chunked_attention(q, k, v, q_chunk=20, backend="triton")
    assert torch.equal(before[:, :, :40], after[:, :, :40])


def test_backward_is_bitwise_deterministic() -> None:
    case = NAMED["window_and_sinks"]
    inputs = inputs_of(case)
    first, second = (run(inputs, case.layout, "triton") for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("block_m", [16, 32])
@pytest.mark.parametrize("block_n", [16, 32])
def test_results_do_not_depend_on_blocks(block_m: int, block_n: int) -> None:
    with pinned(**dict.fromkeys(KERNELS, Config(block_m, block_n, 4))):
        compare(NAMED["window_and_sinks"])
        compare(Case("causal", 45, 45, {"q_chunk": 1}))


def test_compiled_region_is_one_graph() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return chunked_attention(q, k, v, q_chunk=8, backend="triton").square()

    inputs = inputs_of(NAMED["chunk_causal"])
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), attend(*inputs))
    grads = [torch.autograd.grad(f(*inputs).sum(), inputs) for f in (compiled, attend)]
    for ours, ref in zip(*grads, strict=True):
        assert torch.equal(ours, ref)


@pytest.mark.parametrize("heads_inside", [False, True])
def test_opcheck(heads_inside: bool) -> None:
    tensors = [t.detach() for t in inputs_of(NAMED["packed"])]
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) if heads_inside else t for t in tensors)
    args = (*rule_of(NAMED["packed"], DEVICE), 0.3, "triton")
    torch.library.opcheck(torch.ops.mirasol.chunked_attention.default, (q, k, v, *args))
    out, lse = torch.ops.mirasol.chunked_attention(q, k, v, *args)
    arguments = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *args)
    torch.library.opcheck(torch.ops.mirasol.chunked_attention_backward.default, arguments)


def test_what_triton_cannot_serve_is_said_in_sentences() -> None:
    wide = torch.zeros(1, 1, 4, 300, device=DEVICE)
    with pytest.raises(ValueError, match="up to 256 columns, these have 300"):
        chunked_attention(wide, wide, wide, q_chunk=2, backend="triton")


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_scales_that_are_not_positive(scale: float) -> None:
    compare(Case("scaled", 30, 30, {"q_chunk": 5, "causal": True, "scale": scale}))


@pytest.mark.skipif(not device.interpreted(), reason="only Triton's interpreter refuses bfloat16")
def test_the_interpreter_refuses_bfloat16() -> None:
    low = torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="interpreter does not compute in bfloat16"):
        chunked_attention(low, low, low, q_chunk=2, backend="triton")


@pytest.mark.parametrize("name", ["chunk_causal", "window_and_sinks", "last_rows_causal", "packed"])
def test_loads_by_descriptors(name: str) -> None:
    with pinned(**dict.fromkeys(KERNELS, Config(16, 16, 4, tma=True))):
        compare(NAMED[name], width=16)


@pytest.mark.parametrize("name", ["window_and_sinks", "packed"])
def test_one_loop_that_masks_every_block(name: str) -> None:
    with pinned(**dict.fromkeys(KERNELS, Config(16, 16, 4, masks="all"))):
        compare(NAMED[name])


def test_an_expanded_tensor_is_not_described() -> None:
    """Whether a tensor map may have a stride of 0 is nowhere promised."""
    q = torch.randn(1, 2, 32, 16, dtype=EXACT, device=DEVICE)
    q = q.expand(3, -1, -1, -1)
    k = torch.randn(3, 2, 32, 16, dtype=EXACT, device=DEVICE)
    rule = rule_of(Case("expanded", 32, 32, {"q_chunk": 16}))
    assert not host._Problem(host._key(rule, q, k, k)).tma
    assert host._Problem(host._key(rule, k, k, k)).tma
    with pinned(**dict.fromkeys(KERNELS, Config(16, 16, 4, tma=True))):
        out = chunked_attention(q, k, k, q_chunk=16, backend="triton")
    assert torch.equal(out, chunked_attention(q.contiguous(), k, k, q_chunk=16, backend="triton"))


def test_a_plan_keeps_no_tensor_alive() -> None:
    """Plans are kept by shape; what they were first made for may be half of a GPU's memory."""
    with pinned(**dict.fromkeys(KERNELS, Config(16, 16, 4, tma=True))):
        inputs = inputs_of(Case("kept", 48, 48, {}), heads=2, kv_heads=2, width=16)
        out = chunked_attention(*inputs, q_chunk=16, backend="triton")
        out.sum().backward()
        kept = [weakref.ref(t) for t in inputs]
        del inputs, out
    gc.collect()
    assert [t() for t in kept] == [None] * 3


def test_the_form_that_specialises_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs its host code and its own way to load what a kernel owns, not the specialisation itself."""
    seen = []
    choose = host._Problem.config

    def spy(*args: Any) -> Config:
        seen.append(choose(*args))
        return seen[-1]

    def specialised(name: str, n_q: int, n_k: int, layout: dict[str, Any], kv_heads: int = 2) -> list[bool]:
        seen.clear()
        compare(Case(name, n_q, n_k, layout), heads=2, kv_heads=kv_heads, width=16)
        return [found.specialize for found in seen]

    monkeypatch.setattr(host._Problem, "config", spy)
    with pinned(**dict.fromkeys(KERNELS, Config(16, 16, 4, tma=True, specialize=True))):
        assert specialised("aligned", 32, 32, {"q_chunk": 16}) == [True] * 3
        assert specialised("windows", 32, 64, {"q_chunk": 16, "k_chunk": 16, "window": 1, "sinks": 1}) == [True] * 3
        assert specialised("rows to spare", 20, 32, {"q_chunk": 20, "k_chunk": 32}) == [True, False, True]
        assert specialised("odd rows", 19, 32, {"q_chunk": 19, "k_chunk": 32}) == [False] * 3
        assert specialised("grouped", 32, 32, {"q_chunk": 16}, kv_heads=1) == [False] * 3
        assert specialised("masked", 20, 20, {"q_chunk": 10}) == [False] * 3


def test_a_call_makes_its_outputs_and_little_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators and allocations of a call, forward and backward, but for the kernels themselves, which do not start."""
    monkeypatch.setattr(host, "prepare", lambda *args, **kwargs: lambda *args: None)
    monkeypatch.setattr(table, "launch", lambda *args, **kwargs: None)
    for plan in (host._plan_forward, host._plan_backward):
        plan.cache_clear()
        monkeypatch.setattr(host, plan.__name__, functools.lru_cache(plan.__wrapped__))

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(func.name())
            return func(*args, **(kwargs or {}))

    def counted(rule: dict[str, Any]) -> tuple[list[str], list[str]]:
        q, k, v = (t.detach() for t in inputs_of(Case("counted", 64, 64, {}), kv_heads=2, width=16))
        args = (*rule_of(Case("counted", 64, 64, rule), DEVICE), 0.25)
        with Count() as forward:
            out, lse = host.forward(q, k, v, host.Rule(*args[:-1]), 0.25)
        with Count() as backward:
            host.backward(out, None, q, k, v, out, lse, host.Rule(*args[:-1]), 0.25)
        return forward.seen, backward.seen

    forward, backward = counted({"q_chunk": 16})
    made, grads = ["aten::new_empty_strided", "aten::new_empty"], ["aten::new_empty_strided"] * 3
    assert forward == made
    assert backward == [*grads, "aten::empty_like"]
    table_of = ["aten::empty.memory_format"]
    forward, backward = counted({"q_chunk": edges(0, 10, 64)})
    assert [name for name in forward if "_to_copy" not in name] == [*made, *table_of]
    assert [name for name in backward if "_to_copy" not in name] == [*grads, *2 * table_of, "aten::empty_like"]


@only_on_gpu
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "layout",
    [
        {"q_chunk": 128},
        {"q_chunk": 100},
        {"q_chunk": 64, "window": 2, "sinks": 1},
        {"q_chunk": 1},
        {"q_chunk": 96, "causal": True},
        {"q_chunk": 49, "window": 1},
    ],
    ids=str,
)
def test_every_configuration(layout: dict[str, Any], width: int, dtype: torch.dtype) -> None:
    compare(Case("large", 512, 512, layout), batch=2, heads=4, kv_heads=2, width=width, dtype=dtype)


@only_on_gpu
@pytest.mark.parametrize("width", [64, 128])
def test_specialised_warps(width: int) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("warps are specialised on Hopper only")
    with specialized_warps():
        compare(Case("large", 4096, 4096, {"q_chunk": 512}), heads=4, kv_heads=4, width=width, dtype=torch.bfloat16)


@only_on_gpu
@pytest.mark.parametrize("layout", [{"q_chunk": 100}, {"q_chunk": 64, "window": 2, "sinks": 1}], ids=str)
def test_ten_runs_are_bitwise_equal(layout: dict[str, Any]) -> None:
    tensors = inputs_of(Case("large", 2048, 2048, layout), width=128, dtype=torch.bfloat16)
    first = run(tensors, layout, "triton")
    for _ in range(9):
        for one, other in zip(first, run(tensors, layout, "triton"), strict=True):
            assert torch.equal(one, other)


@only_on_gpu
@pytest.mark.parametrize("packed", [False, True])
def test_a_call_is_captured_in_a_graph(packed: bool) -> None:
    q, k, v = (t.detach() for t in inputs_of(Case("captured", 512, 512, {}), width=64, dtype=torch.bfloat16))
    cu = edges(0, 100, 512).to(DEVICE) if packed else None
    expected = chunked_attention(q, k, v, q_chunk=64, cu_seqlens_q=cu, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chunked_attention(q, k, v, q_chunk=64, cu_seqlens_q=cu, backend="triton")
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@only_on_gpu
def test_lengths_do_not_compile_again() -> None:
    def kernels() -> int:
        return sum(len(cache[0]) for cache in attention_fwd_kernel.device_caches.values())

    before = kernels()
    for i in range(20):
        chunk = (64, 128, 100, 448, 17)[i % 5] * (1 + i // 5)
        q = torch.randn(1 + i % 3, 4, chunk * (3 + i), 64, device=DEVICE, dtype=torch.bfloat16)
        chunked_attention(q, q, q, q_chunk=chunk, backend="triton")
    assert kernels() - before <= 2


@only_on_gpu
def test_more_than_2_to_the_31_elements() -> None:
    """Rows a long stride apart: offsets beyond int32 in tensors that hold little."""
    storage = torch.zeros(2**31 + 2**20, device=DEVICE, dtype=torch.bfloat16)
    stride = 2**31 // 255
    view = storage.as_strided((1, 1, 256, 64), (0, 0, stride // 8 * 8, 1))
    view.copy_(torch.randn(1, 1, 256, 64, device=DEVICE))
    near = view.contiguous()
    far_out = chunked_attention(view, view, view, q_chunk=64, backend="triton")
    assert torch.equal(far_out, chunked_attention(near, near, near, q_chunk=64, backend="triton"))


@only_on_gpu
@pytest.mark.parametrize("layout", [{"q_chunk": 64}, {"q_chunk": 50, "window": 2, "sinks": 1}, {"q_chunk": 1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sanitizer(layout: dict[str, Any], dtype: torch.dtype) -> None:
    """Small shapes for the memory checker of `make gpu`."""
    compare(Case("small", 200, 200, layout), heads=4, kv_heads=2, width=64, dtype=dtype)
