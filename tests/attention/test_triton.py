"""The Triton kernels in the interpreter, and the host code around them, against the dense reference.

On a machine with a GPU these tests run the compiled kernels instead, in float32 and float16.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from attention_cases import CASES, Case, edges, make_inputs, random_case

from mirasol.kernels import chunked_attention
from mirasol.kernels.attention import configs, triton_launch
from mirasol.kernels.attention.configs import Tile
from mirasol.kernels.core import device
from tolerance import assert_close, assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = torch.float64 if DEVICE == "cpu" else torch.float32  # float64 kernels exist in the interpreter only
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
NAMED = {case.name: case for case in CASES}


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
    inputs, layout = inputs_of(case, **changes), layout_of(case)
    ours = run(inputs, layout, "triton", lse_gradient)
    exact = run([t.detach().double().requires_grad_() for t in inputs], layout, "reference", lse_gradient)
    for name, out, ref in zip(("out", "lse", "dq", "dk", "dv"), ours, exact, strict=True):
        assert_close(f"{case.name} {name}", out, ref, rtol=TOLERANCE[inputs[0].dtype])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_named_layouts(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("seed", range(12))
def test_random_layouts(seed: int) -> None:
    rng = random.Random(seed)
    heads, kv_heads = rng.choice([(1, 1), (3, 1), (4, 2)])
    compare(random_case(rng, 60), heads=heads, kv_heads=kv_heads, width=rng.choice([5, 16, 24]))


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
    case = Case("aligned", n_q, n_k, layout)
    where = triton_launch.Where(
        layout["q_chunk"], layout.get("k_chunk", layout["q_chunk"]), *(None,) * 4, layout.get("window"), 0, False
    )
    q, k = torch.empty(1, 2, n_q, 8), torch.empty(1, 1, n_k, 8)
    problem = triton_launch._problem(q, k, where)
    assert all(problem.aligned(kernel, Tile(16, 16, 4, 1)) for kernel in configs.KERNELS)
    compare(case)


def test_what_is_not_aligned() -> None:
    def problem(n: int, chunk: int, **rule: Any) -> Any:
        where = triton_launch.Where(chunk, chunk, *(None,) * 4, None, 0, rule.get("causal", False))
        return triton_launch._problem(torch.empty(1, 1, n, 8), torch.empty(1, 1, n, 8), where)

    def aligned(found: Any, block_m: int, block_n: int) -> tuple[bool, bool]:
        tile = Tile(block_m, block_n, 4, 1)
        return found.aligned(configs.FORWARD, tile), found.aligned(configs.BACKWARD_KV, tile)

    assert aligned(problem(64, 24), 16, 16) == (False, False)
    assert aligned(problem(72, 24), 16, 8) == (False, False)
    assert aligned(problem(72, 24), 8, 8) == (True, True)
    assert aligned(problem(70, 16), 16, 16) == (False, False)
    assert aligned(problem(70, 70), 16, 16) == (False, False)
    assert aligned(problem(70, 70), 16, 10) == (True, False)
    assert aligned(problem(64, 32, causal=True), 16, 16) == (False, False)
    assert aligned(problem(64, 1), 16, 16) == (False, False)


@pytest.mark.parametrize("name", ["window_and_sinks", "packed_uneven", "last_rows_causal"])
def test_float32(name: str) -> None:
    compare(NAMED[name], dtype=torch.float32, width=32)


@pytest.mark.parametrize("name", ["window_and_sinks", "packed", "hidden_rows"])
def test_float16_is_as_good_as_plain_attention(name: str) -> None:
    case = NAMED[name]
    inputs, layout = inputs_of(case, dtype=torch.float16, width=32), layout_of(case)
    ours = run(inputs, layout, "triton")
    exact = run([t.detach().double().requires_grad_() for t in inputs], layout, "reference")
    plain = run([t.detach().requires_grad_() for t in inputs], layout, "reference")
    for label, out, low, ref in zip(("out", "lse", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        if label != "lse":
            assert_within_budget(f"{name} {label}", out, low, ref)


@pytest.mark.parametrize("layout", [{"q_chunk": 1}, {"q_chunk": 8, "k_chunk": 40, "window": 3}, {"q_chunk": 3}])
@pytest.mark.parametrize("n_q", [1, 3])
def test_streaming_steps_are_split_over_keys(n_q: int, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def spy(programs: int, key_tiles: int, target: device.Target) -> int:
        counts.append(configs_splits(programs, key_tiles, target))
        return counts[-1]

    configs_splits = configs.splits
    monkeypatch.setattr(configs, "splits", spy)
    compare(Case("step", n_q, 150, layout), heads=4)
    assert max(counts) > 1


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 kernels exist in the interpreter only")
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
    """What `torch.empty` returns is filled with NaN: an element that no program writes shows."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    case = NAMED[name]
    inputs, layout = inputs_of(case), layout_of(case)
    monkeypatch.setattr(triton_launch.torch, "empty", poisoned)
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


def test_strided_views_are_read_where_they_lie() -> None:
    qkv = torch.randn(1, 40, 3, 2, 8, dtype=EXACT, device=DEVICE)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = chunked_attention(q, k, v, q_chunk=8, backend="triton")
    assert out.is_contiguous()
    expected = chunked_attention(*(t.contiguous() for t in (q, k, v)), q_chunk=8, backend="triton")
    assert torch.equal(out, expected)


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
def test_results_do_not_depend_on_tiles(block_m: int, block_n: int) -> None:
    tile = Tile(block_m, block_n, 4, 1)
    with configs.pinned(**dict.fromkeys(configs.KERNELS, tile)):
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


def test_opcheck() -> None:
    q, k, v = (t.detach() for t in inputs_of(NAMED["packed"]))
    cu = edges(0, 9, 9, 20, 33).to(DEVICE)
    args = (4, 4, None, None, cu, cu, 2, 1, False, 0.3, "triton")
    torch.library.opcheck(torch.ops.mirasol.chunked_attention.default, (q, k, v, *args))
    out, lse = torch.ops.mirasol.chunked_attention(q, k, v, *args)
    arguments = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *args)
    torch.library.opcheck(torch.ops.mirasol.chunked_attention_backward.default, arguments)


def test_what_triton_cannot_serve_is_said_in_sentences() -> None:
    wide = torch.zeros(1, 1, 4, 300, device=DEVICE)
    with pytest.raises(ValueError, match="up to 256 columns, these have 300"):
        chunked_attention(wide, wide, wide, q_chunk=2, backend="triton")
    small = torch.zeros(1, 1, 4, 8, device=DEVICE)
    with pytest.raises(ValueError, match="a scale above 0"):
        chunked_attention(small, small, small, q_chunk=2, scale=0.0, backend="triton")


@pytest.mark.skipif(not device.interpreted(), reason="only Triton's interpreter refuses bfloat16")
def test_the_interpreter_refuses_bfloat16() -> None:
    low = torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="interpreter does not compute in bfloat16"):
        chunked_attention(low, low, low, q_chunk=2, backend="triton")


@pytest.mark.parametrize("name", ["chunk_causal", "window_and_sinks", "last_rows_causal", "packed"])
def test_loads_by_descriptors(name: str) -> None:
    with configs.pinned(**dict.fromkeys(configs.KERNELS, Tile(16, 16, 4, 1, tma=True))):
        compare(NAMED[name], width=16)


@pytest.mark.parametrize("name", ["window_and_sinks", "packed"])
def test_one_loop_that_masks_every_tile(name: str) -> None:
    with configs.pinned(**dict.fromkeys(configs.KERNELS, Tile(16, 16, 4, 1, masks="all"))):
        compare(NAMED[name])


def test_the_form_that_specialises_warps() -> None:
    """The interpreter runs its host code and its own way to load queries, not the specialisation itself."""
    seen = []
    choose = triton_launch._tile

    def spy(*args: Any) -> Tile:
        seen.append(choose(*args))
        return seen[-1]

    pinned = Tile(16, 16, 4, 1, tma=True, warp_specialize=True)
    with pytest.MonkeyPatch.context() as patch, configs.pinned(forward=pinned):
        patch.setattr(triton_launch, "_tile", spy)
        compare(Case("aligned", 64, 64, {"q_chunk": 32}), heads=2, kv_heads=2, width=16)
        assert seen[0].warp_specialize
        compare(Case("grouped", 64, 64, {"q_chunk": 32}), heads=2, kv_heads=1, width=16)
        compare(Case("masked", 40, 40, {"q_chunk": 20}), heads=2, kv_heads=2, width=16)
        assert not any(found.warp_specialize for found in seen[1:])
