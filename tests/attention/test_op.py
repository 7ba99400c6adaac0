"""The operators under PyTorch's machinery: opcheck, compile, export, checkpointing, autocast, FLOPs, bad input."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import CASES, Case, edges, make_inputs, rule_of
from torch.utils import flop_counter
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from devices import DEVICE, EXACT
from mirasol.kernels import chunked_attention, merge_attention, visible_pairs
from tolerance import assert_close

NAMED = {case.name: case for case in CASES}


@pytest.mark.parametrize("name", ["window_and_sinks", "last_rows_causal", "uneven", "packed", "hidden_rows"])
def test_opcheck(name: str) -> None:
    case = NAMED[name]
    q, k, v = make_inputs(case, dtype=torch.float32, requires_grad=False)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    args = (*rule_of(case), 0.3, "torch")
    torch.library.opcheck(torch.ops.mirasol.chunked_attention.default, (q, k, v, *args))
    out, lse = torch.ops.mirasol.chunked_attention(q, k, v, *args)
    for grad_lse in (None, torch.randn_like(lse)):
        arguments = (torch.randn_like(out), grad_lse, q, k, v, out, lse, *args)
        torch.library.opcheck(torch.ops.mirasol.chunked_attention_backward.default, arguments)


@pytest.mark.parametrize("name", ["window_and_sinks", "last_rows_causal", "uneven", "packed"])
def test_gradcheck(name: str) -> None:
    case = NAMED[name]
    inputs = make_inputs(case, batch=1, heads=2, kv_heads=1, width=4)

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = chunked_attention(*tensors, **case.layout, return_lse=True, backend="torch")
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_is_one_graph(dynamic: bool) -> None:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = chunked_attention(q * 2, k, v, q_chunk=chunk, window=2, sinks=1, return_lse=True)
        return out + 1, lse

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n, chunk in ((24, 4), (35, 5)):
        inputs = make_inputs(Case("compiled", n, n, {}))
        ours, ref = compiled(*inputs, chunk), run(*inputs, chunk)
        for out, expected in zip(ours, ref, strict=True):
            assert torch.equal(out, expected)
        grads = [torch.autograd.grad(t[0].sum() + t[1].sum(), inputs) for t in (ours, ref)]
        for out, expected in zip(*grads, strict=True):
            assert torch.equal(out, expected)


def test_dynamic_lengths_do_not_recompile() -> None:
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: chunked_attention(q, k, v, q_chunk=4), fullgraph=True, dynamic=True, backend=frames
    )
    for n in (16, 23, 40, 41):
        compiled(*make_inputs(Case("dynamic", n, n, {}), requires_grad=False))
    assert frames.frame_count == 1


def test_export() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return chunked_attention(q, k, v, q_chunk=4, window=2)

    inputs = make_inputs(Case("export", 20, 20, {}), requires_grad=False)
    tokens = torch.export.Dim("tokens", min=8, max=4096)
    program = torch.export.export(Attention(), tuple(inputs), dynamic_shapes=({2: tokens},) * 3)
    longer = make_inputs(Case("export", 33, 33, {}), requires_grad=False)
    assert torch.equal(program.module()(*longer), Attention()(*longer))


def test_activation_checkpointing() -> None:
    inputs = make_inputs(NAMED["window"])

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return chunked_attention(*tensors, **NAMED["window"].layout).square().sum()

    direct = torch.autograd.grad(run(*inputs), inputs)
    again = torch.autograd.grad(checkpoint(run, *inputs, use_reentrant=False), inputs)
    for ours, ref in zip(again, direct, strict=True):
        assert torch.equal(ours, ref)


def test_autocast_casts_as_matrix_products_do() -> None:
    inputs = make_inputs(NAMED["window"], dtype=torch.float32, width=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = chunked_attention(*inputs, **NAMED["window"].layout, return_lse=True)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    low = [t.detach().bfloat16() for t in inputs]
    assert torch.equal(out, chunked_attention(*low, **NAMED["window"].layout))
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_flops_are_those_of_visible_pairs(case: Case) -> None:
    inputs = make_inputs(case)
    with FlopCounterMode(display=False) as counter:
        chunked_attention(*inputs, **case.layout, backend="torch").sum().backward()
    pairs = visible_pairs(case.n_q, case.n_k, **case.layout)
    assert counter.get_total_flops() == 14 * pairs * 8 * 4 * 2  # 2 + 5 matrix products, D, H, B


def test_flops_of_full_attention_are_those_of_sdpa() -> None:
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 4, 32, 8))
    with FlopCounterMode(display=False) as forward:
        out = chunked_attention(q, k, v, q_chunk=32)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == flop_counter.sdpa_flop_count(q.shape, k.shape, v.shape)
    expected = flop_counter.sdpa_backward_flop_count(out.shape, q.shape, k.shape, v.shape)
    assert backward.get_total_flops() == expected


def test_meta_tensors_give_shapes() -> None:
    q, k, v = (t.to("meta") for t in make_inputs(NAMED["last_rows"], dtype=torch.bfloat16, requires_grad=False))
    out, lse = chunked_attention(q, k, v, q_chunk=3, k_chunk=10, return_lse=True, backend="torch")
    assert out.shape == q.shape
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous()
    assert lse.shape == q.shape[:3]
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_second_derivative_is_refused_where_it_is_taken(backend: str) -> None:
    """Also where the incoming gradient is a constant, as in a gradient penalty; the first may be used as it is."""
    inputs = [t.detach().to(DEVICE, EXACT).requires_grad_() for t in make_inputs(NAMED["window"])]
    out = chunked_attention(*inputs, q_chunk=5, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), inputs[0], create_graph=True)
    (plain,) = torch.autograd.grad(chunked_attention(*inputs, q_chunk=5, backend=backend).sum(), inputs[0])
    assert torch.equal(grad, plain)
    with pytest.raises(NotImplementedError, match='chunked_attention has no second derivative: pass backend="ref'):
        (grad.square().sum() + inputs[0].sum()).backward()
    (exact,) = torch.autograd.grad(
        chunked_attention(*inputs, q_chunk=5, backend="reference").sum(), inputs[0], create_graph=True
    )
    grad_of_grad = torch.autograd.grad(exact.square().sum(), inputs[0])[0]
    assert grad_of_grad.abs().max() > 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_are_refused_in_a_sentence(transform: str, backend: str) -> None:
    q = torch.randn(3, 1, 2, 8, 4, dtype=EXACT, device=DEVICE)

    def attend(x: torch.Tensor, backend: str = backend) -> torch.Tensor:
        return chunked_attention(x, x, x, q_chunk=4, backend=backend)

    def run(backend: str) -> Any:
        if transform == "vmap":
            return torch.func.vmap(lambda x: attend(x, backend))(q)
        if transform == "grad":
            return torch.func.grad(lambda x: attend(x, backend).sum())(q[0])
        return torch.func.jvp(lambda x: attend(x, backend), (q[0],), (q[1],))[1]

    with pytest.raises(NotImplementedError, match=r"chunked_attention does not support torch.func .*reference"):
        run(backend)
    assert torch.isfinite(run("reference")).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda x, e: chunked_attention(x, x, x, q_chunk=4),
        lambda x, e: chunked_attention(x * 2, x, x, q_chunk=e),
        lambda x, e: chunked_attention(x * 2, x, x + 1, q_chunk=4, cu_seqlens_q=e),
        lambda x, e: chunked_attention(x * 2, x, x + 1, q_chunk=e, cu_seqlens_q=e, cu_seqlens_k=e),
    ],
    ids=["one tensor three times", "edges for both", "packed queries alone", "the same edges everywhere"],
)
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_tensor_given_twice_trains_in_one_graph(call: Any, backend: str) -> None:
    x = torch.randn(1, 2, 24, 4, dtype=torch.float64, requires_grad=True)
    e = edges(0, 9, 24)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    ours, ref = (torch.autograd.grad(f(x, e).square().sum(), x)[0] for f in (compiled, call))
    assert_close("gradient", ours, ref)


@pytest.mark.parametrize("mixed", ["v", "q"])
def test_autocast_takes_mixed_dtypes(mixed: str) -> None:
    """Rotary embeddings in float32 beside values in bfloat16 are what training code hands over."""
    inputs = dict(zip("qkv", make_inputs(NAMED["window"], dtype=torch.float32, width=16), strict=True))
    inputs[mixed] = inputs[mixed].detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = chunked_attention(*inputs.values(), **NAMED["window"].layout)
    low = [t.detach().bfloat16() for t in inputs.values()]
    assert torch.equal(out, chunked_attention(*low, **NAMED["window"].layout))
    with pytest.raises(ValueError, match="must be torch"):
        chunked_attention(*inputs.values(), **NAMED["window"].layout)


def test_integers_of_numpy_and_lists_of_edges_are_taken() -> None:
    x = torch.randn(1, 2, 12, 4)
    expected = chunked_attention(x, x, x, q_chunk=4, window=2, sinks=1)
    assert torch.equal(chunked_attention(x, x, x, q_chunk=np.int64(4), window=np.int32(2), sinks=np.int8(1)), expected)
    expected = chunked_attention(x, x, x, q_chunk=edges(0, 5, 12), cu_seqlens_q=edges(0, 12))
    assert torch.equal(chunked_attention(x, x, x, q_chunk=[0, 5, 12], cu_seqlens_q=(0, np.int64(12))), expected)


def bad_inputs() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    t = torch.zeros
    return {
        "not a tensor": ({"q": [1.0]}, TypeError, "q must be a torch.Tensor, was list"),
        "three dimensions": ({"q": t(2, 8, 4)}, ValueError, "q must be [B, H, Nq, D], was [2, 8, 4] float32 on cpu"),
        "integers": ({"q": t(1, 2, 8, 4, dtype=torch.int32)}, TypeError, "q must be of dtype"),
        "mixed dtypes": ({"k": t(1, 2, 8, 4).double()}, ValueError, "k must be torch.float32 like the other tensors"),
        "other batch": ({"k": t(3, 2, 8, 4)}, ValueError, "k must have B and D of q"),
        "heads that do not divide": ({"k": t(1, 3, 8, 4), "v": t(1, 3, 8, 4)}, ValueError, "divides 2"),
        "v unlike k": ({"v": t(1, 2, 7, 4)}, ValueError, "v must be the shape of k = [1, 2, 8, 4]"),
        "chunk of nothing": ({"q_chunk": 0}, ValueError, "q_chunk must be at least 1, was 0"),
        "chunk as float": ({"q_chunk": 2.0}, TypeError, "q_chunk must be an int, was 2.0"),
        "window of nothing": ({"window": 0}, ValueError, "window must be at least 1"),
        "negative sinks": ({"window": 1, "sinks": -1}, ValueError, "sinks must be at least 0"),
        "edges in int64": ({"q_chunk": torch.tensor([0, 8])}, TypeError, "q_chunk must be of dtype int32"),
        "edges that end early": ({"q_chunk": edges(0, 7)}, ValueError, "q_chunk must run from 0 to 8"),
        "packed keys alone": ({"cu_seqlens_k": edges(0, 8)}, ValueError, "cu_seqlens_k must come with cu_seqlens_q"),
        "sinks alone": ({"sinks": 1}, ValueError, "sinks must be 0 without a window, was 1"),
        "scale as text": ({"scale": "x"}, TypeError, "scale must be a number, was 'x'"),
        "scale that is not a number": ({"scale": float("nan")}, ValueError, "scale must be finite, was nan"),
        "endless scale": ({"scale": float("inf")}, ValueError, "scale must be finite, was inf"),
        "causal as text": ({"causal": "no"}, TypeError, "causal must be True or False, was 'no'"),
        "causal as nothing": ({"causal": None}, TypeError, "causal must be True or False, was None"),
        "edges of floats": ({"q_chunk": [0, 4.0, 8]}, TypeError, "q_chunk[1] must be an int, was 4.0"),
        "edges without values": (
            {"q_chunk": edges(0, 8).to("meta")},
            ValueError,
            "q_chunk must be on the CPU or on cpu",
        ),
        "one edge": ({"q_chunk": [8]}, ValueError, "q_chunk must hold at least two edges"),
        "unknown backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
    }


@pytest.mark.parametrize("name", bad_inputs())
def test_bad_input_names_the_argument(name: str) -> None:
    change, error, message = bad_inputs()[name]
    arguments: dict[str, Any] = {key: torch.zeros(1, 2, 8, 4) for key in "qkv"} | {"q_chunk": 4} | change
    q, k, v = (arguments.pop(key) for key in "qkv")
    with pytest.raises(error, match=re.escape(message)):
        chunked_attention(q, k, v, **arguments)


def test_merging_unlike_tensors_is_refused() -> None:
    out, lse = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="out_b must be the shape of out_a"):
        merge_attention(out, lse, torch.zeros(2, 3, 5), lse)
    with pytest.raises(ValueError, match="lse_b must be the shape of out_a without D"):
        merge_attention(out, lse, out, torch.zeros(2, 4))


def test_results_are_those_of_eager_under_inference_mode() -> None:
    inputs = make_inputs(NAMED["packed"], requires_grad=False)
    outside = chunked_attention(*inputs, **NAMED["packed"].layout)
    with torch.inference_mode():
        assert_close("out", chunked_attention(*inputs, **NAMED["packed"].layout), outside)
