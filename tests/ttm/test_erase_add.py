"""The erase-add write through its Triton kernels, in the interpreter without a GPU: forward and every gradient."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from ttm_helpers import Golden, erase_add_params, leaves, token_learner_params

from mirasol.kernels import ttm_scan, ttm_step, ttm_write
from mirasol.kernels.core.device import INTERPRETER, Target
from mirasol.kernels.ttm.erase_add.configs import MOST_HIDDEN, MOST_READ, MOST_SLOTS, MOST_WIDTH, Widths, sides, tiles
from mirasol.kernels.ttm.erase_add.records import Records, flatten, unflatten
from mirasol.kernels.ttm.params import EraseAddParams, MlpParams
from tolerance import assert_close, assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = Target(arch=90, kind="cuda", multiprocessors=132, shared_memory=232448)
needs_interpreter = pytest.mark.skipif(DEVICE == "cuda", reason="float64 kernels run in the interpreter only")

CASES = [  # B, s, r, S, d, hidden
    (2, 17, 5, 3, 48, 7),
    (1, 1, 1, 1, 16, 3),
    (1, 96, 32, 8, 80, 9),
    (1, 130, 5, 1, 16, 62),
    (1, 33, 4, 5, 20, 1),
]


def move(value, dtype=None):
    """A detached copy on the device, in another dtype where one is named."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(DEVICE, dtype, copy=True).requires_grad_(value.requires_grad)
    return type(value)(*[move(v, dtype) for v in value]) if isinstance(value, tuple) else value


def arguments(batch, s, r, slots, d, hidden, *, official=False, dtype=torch.float64):
    """memory, outputs and parameters; the add network has hidden layers of its own widths."""
    params = erase_add_params(d, r, slots=slots, hidden=hidden, official=official)
    wider = erase_add_params(d, r, slots=slots, hidden=hidden + 2)
    params = params._replace(add_tokens=wider.add_tokens, erase_channels=wider.erase_channels)
    memory, outputs = (torch.randn(batch, n, d, dtype=torch.float64, requires_grad=True) for n in (s, r))
    return [move(value, dtype) for value in (memory, outputs, params)]


def write(memory, outputs, params, backend="triton"):
    return ttm_write(memory, outputs, outputs, params, backend=backend)


def results(call, wanted):
    """Outputs and gradients for cotangents that are the same in every call."""
    outs = call()
    outs = outs if isinstance(outs, tuple) else (outs,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outs]
    return [*outs, *torch.autograd.grad(outs, wanted, cotangents)]


def assert_all_close(ours, expected, rtol):
    """Each within `rtol` of its own magnitude, or of 5 % of the largest where a sum cancels."""
    largest = max(e.abs().max().item() for e in expected)
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        error, allowed = (a - b).abs().max().item(), rtol * max(b.abs().max().item(), 0.05 * largest)
        assert error <= allowed, f"result {i} {list(b.shape)}: error {error:.3e} exceeds {allowed:.3e}"


@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=needs_interpreter), torch.float32])
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference(case, official, dtype):
    memory, outputs, params = arguments(*case, official=official, dtype=dtype)
    wanted = leaves(memory, outputs, params)
    ours, expected = (results(lambda b=b: write(memory, outputs, params, b), wanted) for b in ("triton", "reference"))
    assert ours[0].is_contiguous()
    assert_all_close(ours, expected, rtol=1e-11 if dtype == torch.float64 else 2e-5)


@needs_interpreter
@pytest.mark.parametrize("slots", [1, 2, 6])
def test_gradients_where_a_factor_is_exactly_zero(slots):
    """With one token its weight is 1; slot 0 erases by exactly 1 everywhere and the other slots do not."""
    memory, outputs, params = arguments(2, 1, 3, slots, 16, 4, official=True)
    tokens, channels = params.erase_tokens, params.erase_channels
    first = torch.arange(slots, device=DEVICE) == 0
    tokens = tokens._replace(w2=tokens.w2.masked_fill(first[:, None], 0.0), b2=tokens.b2.masked_fill(first, 0.0))
    channels = channels._replace(b1=torch.zeros_like(channels.b1), b2=torch.ones_like(channels.b2))
    params = params._replace(erase_tokens=move(tokens), erase_channels=move(channels))
    for bias in params.erase_channels[1], params.erase_channels[3]:
        bias.requires_grad_()
    wanted = leaves(memory, outputs, params)
    ours, expected = (results(lambda b=b: write(memory, outputs, params, b), wanted) for b in ("triton", "reference"))
    assert_all_close(ours, expected, rtol=1e-12)
    added = write(memory * 0, outputs, params)
    assert torch.equal(ours[0], added), "something of the memory was left"
    assert ours[1].abs().max() == 0, "the memory's gradient must vanish"
    bias = next(i for i, leaf in enumerate(wanted) if leaf is params.erase_channels.b2)
    assert ours[1 + bias].abs().max() > 0, "slot 0 itself still has a gradient"


@needs_interpreter
@pytest.mark.parametrize("official", [False, True])
def test_gradcheck(official):
    memory, outputs, params = arguments(1, 3, 2, 2, 5, 2, official=official)

    def run(memory, outputs, *flat):
        return write(memory, outputs, unflatten(flat, official))

    assert torch.autograd.gradcheck(run, (memory, outputs, *flatten(params)), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16])
def test_low_precision_stays_within_the_budget_of_plain_pytorch(dtype):
    low = arguments(1, 40, 8, 4, 64, 32, dtype=dtype)
    exact = [move(value, torch.float64) for value in low]
    found = [
        results(lambda a=a, b=b: write(*a, b), leaves(*a))
        for a, b in ((low, "triton"), (low, "reference"), (exact, "reference"))
    ]
    largest = max(true.abs().max().item() for true in found[2])
    for i, (ours, plain, true) in enumerate(zip(*found, strict=True)):
        if true.abs().max() < 1e-9:  # a bias that the softmax forgets: nothing but rounding on either side
            assert ours.abs().max() < 2 * torch.finfo(dtype).eps * largest
        else:
            assert_within_budget(f"result {i} {list(true.shape)}", ours, plain, true)


def test_nothing_is_read_around_the_tokens_and_nothing_left_unwritten(monkeypatch):
    """Memory and outputs lie in NaN, their rows apart, and fresh memory holds NaN."""
    B, s, r, d = 2, 19, 6, 20
    _, _, params = arguments(B, s, r, 3, d, 5, dtype=torch.float32)
    around = torch.full((s + r + 8, B, d + 8), float("nan"), device=DEVICE)
    memory = around[2 : 2 + s, :, 4 : 4 + d].transpose(0, 1)
    outputs = around[4 + s : 4 + s + r, :, 4 : 4 + d].transpose(0, 1)
    with torch.no_grad():
        memory.normal_()
        outputs.normal_()
    packed = [t.contiguous().requires_grad_() for t in (memory, outputs)]
    expected = results(lambda: write(*packed, params), leaves(*packed, params))
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(torch.nan))
    strided = [t.detach().requires_grad_() for t in (memory, outputs)]
    ours = results(lambda: write(*strided, params), leaves(*strided, params))
    for a, b in zip(ours, expected, strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)


def test_backward_is_bitwise_deterministic():
    memory, outputs, params = arguments(3, 40, 5, 6, 48, 7, dtype=torch.float32)
    first, second = (results(lambda: write(memory, outputs, params), leaves(memory, outputs, params)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_of_one_result_do_not_reach_into_another():
    """The parameters' gradients share one piece of memory: writing into one must leave the others alone."""
    memory, outputs, params = arguments(1, 5, 3, 2, 16, 4, dtype=torch.float32)
    grads = torch.autograd.grad(write(memory, outputs, params).sum(), flatten(params))
    spans = sorted((g.data_ptr(), g.data_ptr() + 4 * g.numel()) for g in grads if g.is_contiguous())
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


@pytest.mark.parametrize("official", [False, True])
def test_opcheck(official):
    memory, outputs, params = arguments(2, 9, 3, 2, 8, 3, official=official, dtype=torch.float32)
    flat = [p.detach() for p in flatten(params)]
    memory, outputs = memory.detach(), outputs.detach().transpose(0, 1).contiguous().transpose(0, 1)
    torch.library.opcheck(torch.ops.mirasol.ttm_erase_add.default, (memory, outputs, flat, official))
    out, *saved = torch.ops.mirasol.ttm_erase_add.default(memory, outputs, flat, official)
    backward = torch.ops.mirasol.ttm_erase_add_backward.default
    torch.library.opcheck(backward, (torch.randn_like(out), saved, memory, outputs, flat, official))


def test_compiles_whole():
    memory, outputs, params = arguments(1, 9, 3, 2, 16, 4, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(write, fullgraph=True, backend="aot_eager")
    wanted = leaves(memory, outputs, params)
    ours, expected = (results(lambda f=f: f(memory, outputs, params), wanted) for f in (compiled, write))
    assert_all_close(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("form", ["parallel", "stepwise"])
def test_scan_and_steps_through_the_kernels(form):
    B, T, s, n, r, d = 2, 3, 9, 12, 3, 16
    memory, inputs = (torch.randn(*shape, requires_grad=True) for shape in ((B, s, d), (B, T, n, d)))
    values = memory, inputs, token_learner_params(d, r, hidden=8), erase_add_params(d, r, hidden=8)
    memory, inputs, read, writing = (move(value, torch.float32) for value in values)

    def scan(backend, form):
        return ttm_scan(memory, inputs, read, torch.tanh, writing, form=form, return_memories=True, backend=backend)

    wanted = leaves(memory, inputs, read, writing)
    expected = results(lambda: scan("reference", "auto"), wanted)
    assert_all_close(results(lambda: scan("triton", form), wanted), expected, rtol=5e-5)
    state = memory
    for t in range(T):
        out, state = ttm_step(state, inputs[:, t], read, torch.tanh, writing, backend="triton")
        assert_close(f"output {t}", out, expected[0][:, t])
        assert_close(f"memory {t}", state, expected[1][:, t])


@needs_interpreter
def test_matches_the_official_code():
    golden = Golden("erase_add_official")
    inputs = golden.tensor("inputs").requires_grad_()
    outputs, memories = ttm_scan(
        golden.initial_memory(), inputs, golden.read_params(), golden.process, golden.write_params(),
        backend="triton", return_memories=True,
    )  # fmt: skip
    assert_close("outputs", outputs, golden.tensor("outputs"))
    assert_close("memories", memories, golden.tensor("memories"))
    loss = (outputs * golden.tensor("cotangent_outputs")).sum()
    loss = loss + (memories[:, -1] * golden.tensor("cotangent_last_memory")).sum()
    grads = torch.autograd.grad(loss, [inputs, *golden.params.values()])
    assert_close("grad_inputs", grads[0], golden.tensor("grad_inputs"))
    largest = max(g.abs().max().item() for g in golden.gradients().values())
    for (key, expected), grad in zip(golden.gradients().items(), grads[1:], strict=True):
        if expected.abs().max() > 1e-5 * largest:  # below lie gradients that cancel: the file's own rounding
            assert_close(key, grad, expected, rtol=5e-5)
        else:
            assert grad.abs().max() < 1e-5 * largest, key


def test_autocast_gives_the_autocast_dtype():
    memory, outputs, params = arguments(1, 9, 3, 2, 16, 4, dtype=torch.float32)
    with torch.autocast(DEVICE, dtype=torch.float16):
        out = write(memory, outputs, params)
    assert out.dtype == torch.float16
    out.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves(memory, outputs, params))


def test_counted_work_is_that_of_pytorch_and_what_backward_computes_again():
    B, s, r, d = 2, 9, 3, 16
    memory, outputs, params = arguments(B, s, r, 2, d, 4, dtype=torch.float32)
    counts = {}
    for backend in ("triton", "torch"):
        with FlopCounterMode(display=False) as forward:
            out = write(memory, outputs, params, backend)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        counts[backend] = forward.get_total_flops(), backward.get_total_flops()
    assert counts["triton"][0] == counts["torch"][0]
    again = 2 * B * d * r * (params.erase_tokens.w1.shape[0] + params.add_tokens.w1.shape[0])
    assert counts["triton"][1] == counts["torch"][1] + again


def test_refusals_are_sentences_and_auto_takes_pytorch():
    memory, outputs = torch.randn(1, 4, 8, device=DEVICE), torch.randn(1, 2, 8, device=DEVICE)
    many = move(erase_add_params(8, 2, slots=MOST_SLOTS + 1, hidden=MOST_HIDDEN + 1), torch.float32)
    message = rf"at most {MOST_SLOTS} slots, there are {MOST_SLOTS + 1}\. .* at most {MOST_HIDDEN} hidden units"
    with pytest.raises(ValueError, match=message):
        write(memory, outputs, many)
    read = move(token_learner_params(8, 2, hidden=4), torch.float32)
    with pytest.raises(ValueError, match=f"at most {MOST_HIDDEN} hidden units"):
        ttm_scan(memory, outputs[:, None], read, torch.tanh, many, backend="triton")
    assert_close("auto", write(memory, outputs, many, "auto"), write(memory, outputs, many, "reference"))


@given(st.integers(1, MOST_WIDTH), st.integers(1, MOST_READ), st.integers(1, MOST_SLOTS), st.integers(1, MOST_HIDDEN))
@settings(max_examples=60, deadline=None)
def test_sides_cover_the_shape(d, read, slots, hidden):
    widths = Widths(d, read, slots, hidden, hidden, hidden)
    for target in (HOPPER, INTERPRETER):
        for itemsize in (2, 4):
            found = sides(widths, itemsize, target)
            padded = (found.slots, found.read, found.select, found.tokens, found.channels)
            for side, size in zip(padded, (slots, read, hidden, hidden, hidden), strict=True):
                assert side >= size
                assert side & (side - 1) == 0
            assert found.group in (1, 2, 4)
            for tile in dataclasses.astuple(tiles(found, itemsize, target)):
                assert all(side & (side - 1) == 0 for side in tile[:2])


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_the_flat_gradient_holds_every_parameter_once(d, read, slots, hidden, other):
    def mlp(inside, width, outside):
        return MlpParams(*[torch.empty(s) for s in ((width, inside), (width,), (outside, width), (outside,))])

    def network(width):
        return torch.empty(d), torch.empty(d), mlp(read, width, slots), mlp(d, width, d)

    scores = torch.empty(d), torch.empty(d), mlp(d, hidden, slots)
    params = EraseAddParams(*scores, *network(hidden), *network(other))
    records = Records(Widths(d, read, slots, hidden, max(hidden, other), max(hidden, other)))
    views = records.gradients(torch.arange(records.total), params)
    assert [v.shape for v in views] == [p.shape for p in flatten(params)]
    places = torch.cat([v.flatten() for v in views])
    assert places.unique().numel() == places.numel()
    assert hidden != other or places.numel() == records.total
    assert unflatten(flatten(params), params.official) == params
