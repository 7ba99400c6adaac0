"""`extract_tubes` against a convolution, its backends against the reference, and the compiler's contract."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from devices import DEVICE, EXACT, ON_GPU, only_on_gpu
from mirasol.kernels import TUBEVIT_TUBES, Tube, build_info, extract_tubes, tube_centres, tube_grid
from mirasol.kernels.tubes.op import extract_op, scatter_op
from tolerance import POINTWISE, RTOL, assert_close, assert_within_budget

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ODD = (
    Tube((3, 4, 5), (2, 3, 7), (1, 0, 2)),
    Tube((1, 2, 3), (1, 1, 1)),
    Tube((2, 5, 16), (3, 9, 4), (0, 1, 0)),
    Tube((4, 12, 12), (16, 32, 32), (2, 1, 3)),
)
EVEN = (Tube((2, 4, 4), (2, 8, 8), (0, 0, 8)), Tube((1, 16, 16), (3, 4, 16)))
SMALL = (Tube((2, 3, 2), (1, 2, 3), (1, 0, 1)), Tube((1, 2, 4), (2, 1, 1)))
BACKENDS = ("native", "torch")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
KWARGS = {"mean": MEAN, "std": STD}


def widest(backend: str) -> torch.dtype:
    """CUDA does not serve float64."""
    return EXACT if backend == "native" else torch.float64


def clip(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8).to(DEVICE)
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)


def convolve(video: torch.Tensor, weight: torch.Tensor, tube: Tube) -> torch.Tensor:
    """[B, frames, H, W, 3] in 0..1 -> [B, N, d], by an ordinary convolution from the tube's offset on."""
    pixels = (video - video.new_tensor(MEAN)) / video.new_tensor(STD)
    t, h, w = tube.offset
    return torch.nn.functional.conv3d(pixels.movedim(-1, 1)[:, :, t:, h:, w:], weight, stride=tube.stride).flatten(2).mT


def test_native_code_is_built_for_the_device(skip_loudly):
    info = build_info()[DEVICE.type]
    assert info["available"] or not ON_GPU, info["why"]
    if not info["available"]:
        skip_loudly("the native extension", info["why"])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_projection_equals_convolution(backend):
    video, dtype = clip(2, 13, 29, 37, 3), widest(backend)
    for tube, tokens in zip(ODD, extract_tubes(video, ODD, dtype=dtype, backend=backend, **KWARGS), strict=True):
        weight = torch.randn(8, 3, *tube.kernel, dtype=torch.float64, device=DEVICE)
        projected = tokens.double() @ weight.permute(0, 2, 3, 4, 1).flatten(1).T
        assert tokens.shape[1] == math.prod(tube_grid(tube, 13, 29, 37))
        assert_close("tokens", projected, convolve(video.double() / 255, weight, tube), rtol=RTOL[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("source", [torch.uint8, *FLOATS])
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(backend, source, dtype):
    video, tubes = clip(2, 9, 20, 35, 3, dtype=source), ODD[:3]
    if torch.float64 in (source, dtype) and widest(backend) != torch.float64:
        with pytest.raises(ValueError, match="do not serve float64"):
            extract_tubes(video, tubes, dtype=dtype, backend=backend, **KWARGS)
        backend = "auto"
    exact = extract_tubes(video, tubes, dtype=torch.float64, backend="reference", **KWARGS)
    plain = extract_tubes(video, tubes, dtype=dtype, backend="reference", **KWARGS)
    for out, p, e in zip(
        extract_tubes(video, tubes, dtype=dtype, backend=backend, **KWARGS), plain, exact, strict=True
    ):
        assert out.dtype == dtype
        assert out.is_contiguous()
        if dtype in POINTWISE:
            assert_close("tokens", out, e, rtol=POINTWISE[dtype])
        else:
            assert_within_budget("tokens", out, p, e)


LAYOUTS = {
    "channels last": lambda v: v,
    "channels first": lambda v: v.movedim(-1, 1).contiguous(),
    "channels first of channels-last memory": lambda v: v.movedim(-1, 1),
    "flipped rows kept apart": lambda v: v.repeat_interleave(2, 2)[:, :, ::2],
    "columns kept apart": lambda v: v.repeat_interleave(3, 3)[:, :, :, 1::3],
    "shared frames": lambda v: v[:, :1].expand(-1, 9, -1, -1, -1),
    "batch last": lambda v: v.movedim(0, -1).contiguous().movedim(-1, 0),
    "misaligned": lambda v: torch.cat([v.flatten()[:1], v.flatten()])[1:].view(v.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", [torch.uint8, torch.float32, torch.bfloat16])
def test_any_layout_gives_the_same_tokens(layout, source):
    video = LAYOUTS[layout](clip(2, 9, 20, 37, 3, dtype=source))
    for dtype in (torch.float32, torch.bfloat16):
        for tubes in (ODD[:3], EVEN):
            plain = extract_tubes(video, tubes, dtype=dtype, backend="torch", **KWARGS)
            exact = extract_tubes(video.contiguous(), tubes, backend="reference", **KWARGS)
            ours = extract_tubes(video, tubes, dtype=dtype, backend="native", **KWARGS)
            for out, p, e in zip(ours, plain, exact, strict=True):
                assert torch.equal(out, p)
                if dtype == torch.float32:
                    assert_close(layout, out, e, rtol=POINTWISE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", sorted({torch.float32, EXACT}, key=str))
@pytest.mark.parametrize("channels_first", [False, True])
def test_gradient(backend, dtype, channels_first):
    video = clip(2, 7, 11, 25, 3, dtype=dtype)
    video = video.movedim(-1, 1).contiguous() if channels_first else video
    cotangents = None
    gradients = []
    for which in ("reference", backend):
        leaf = video.clone().requires_grad_()
        out = extract_tubes(leaf, ODD[:3], mean=MEAN, std=STD, dtype=dtype, backend=which)
        cotangents = cotangents or [torch.randn_like(o) for o in out]
        gradients.append(torch.autograd.grad(out, leaf, cotangents)[0])
    assert_close("video", gradients[1], gradients[0], rtol=POINTWISE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_a_low_precision_clip(backend, dtype):
    video = clip(1, 5, 9, 21, 3, dtype=dtype)
    gradients = {}
    for name, which, precision in (
        ("ours", backend, dtype),
        ("plain", "reference", dtype),
        ("exact", "reference", None),
    ):
        leaf = (video.double() if precision is None else video.clone()).requires_grad_()
        out = extract_tubes(leaf, SMALL, mean=MEAN, std=STD, dtype=precision or torch.float64, backend=which)
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype).to(o) for o in out]
        gradients[name] = torch.autograd.grad(out, leaf, cotangents)[0]
    assert gradients["ours"].dtype == dtype
    assert_within_budget("video", gradients["ours"], gradients["plain"], gradients["exact"])


@pytest.mark.parametrize("backend", [b for b in BACKENDS if widest(b) == torch.float64])
def test_gradcheck(backend):
    video = clip(1, 4, 4, 8, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: extract_tubes(v, SMALL, mean=MEAN, std=STD, dtype=torch.float64, backend=backend), video
    )


def test_gradient_of_some_outputs_only():
    video = clip(1, 9, 20, 20, 3, dtype=torch.float32).requires_grad_()
    _, second = extract_tubes(video, SMALL, mean=MEAN, std=STD)
    second.sum().backward()
    expected = extract_tubes(video.detach().requires_grad_(), SMALL[1:], mean=MEAN, std=STD, backend="reference")
    total = torch.tensor(sum((e.numel() // 3) * (1 / s) for e in expected for s in STD), dtype=torch.float64)
    assert_close("video", video.grad.double().sum().cpu(), total, rtol=RTOL[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_is_bitwise_deterministic(backend):
    video = clip(2, 9, 20, 40, 3, dtype=torch.float32).requires_grad_()
    runs = []
    for _ in range(3):
        out = extract_tubes(video, ODD[:3], mean=MEAN, std=STD, backend=backend)
        generator = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(o.shape, generator=generator).to(DEVICE) for o in out]
        runs.append(torch.autograd.grad(out, video, cotangents)[0])
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_pixels_that_no_tube_covers_do_not_matter(backend):
    video = clip(1, 32, 96, 96, 3, dtype=torch.float32)
    tubes = TUBEVIT_TUBES[:3]
    covered = torch.zeros(32, 96, 96, dtype=torch.bool)
    for tube in tubes:
        axes = []
        for size, n, k, s, o in zip(covered.shape, tube_grid(tube, 32, 96, 96), *tube, strict=True):
            hit = torch.zeros(size, dtype=torch.bool)
            for i in range(n):
                hit[o + i * s : o + i * s + k] = True
            axes.append(hit)
        covered |= axes[0][:, None, None] & axes[1][None, :, None] & axes[2]
    assert 0.05 < covered.float().mean().item() < 0.5
    poisoned = video.masked_fill(~covered[None, ..., None].to(DEVICE), float("nan"))
    kwargs = {"mean": MEAN, "std": STD, "backend": backend}
    for clean, out in zip(extract_tubes(video, tubes, **kwargs), extract_tubes(poisoned, tubes, **kwargs), strict=True):
        assert torch.equal(clean, out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    out = extract_tubes(clip(0, 9, 20, 20, 3), SMALL, mean=MEAN, std=STD, backend=backend)
    assert [tuple(o.shape) for o in out] == [(0, 7 * 9 * 6, 36), (0, 5 * 19 * 17, 24)]
    video = torch.empty(0, 9, 20, 20, 3, device=DEVICE, requires_grad=True)
    sum(o.sum() for o in extract_tubes(video, SMALL, mean=MEAN, std=STD, backend=backend)).backward()
    assert video.grad.shape == video.shape


def test_the_published_tubes_give_539_tokens():
    out = extract_tubes(clip(1, 3, 32, 224, 224), TUBEVIT_TUBES, mean=MEAN, std=STD)
    assert [o.shape[1] for o in out] == [98, 147, 98, 196]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_opcheck(dtype):
    numbers = [n for tube in SMALL for triple in tube for n in triple]
    args = (clip(2, 3, 5, 8, 9, dtype=dtype).movedim(1, -1), numbers, [1.0, 2.0, 3.0], [0.0, 1.0, 2.0])
    torch.library.opcheck(extract_op, (*args, torch.float32, "auto"))
    grads = [torch.randn_like(o) for o in extract_op(*args, torch.float32, "auto")]
    torch.library.opcheck(scatter_op, (grads, numbers, [1.0, 2.0, 3.0], [2, 5, 8, 9, 3], torch.float32, "auto"))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(dynamic, compiler):
    torch._dynamo.reset()

    def run(video):
        return [o * 2 for o in extract_tubes(video, SMALL, mean=MEAN, std=STD)]

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=compiler)
    for shape in ((2, 5, 8, 9, 3), (3, 7, 11, 13, 3), (3, 3, 6, 8, 10)):
        video = clip(*shape, dtype=torch.float32).requires_grad_()
        again = video.detach().clone().requires_grad_()
        for ours, plain in zip(compiled(video), run(again), strict=True):
            assert torch.equal(ours, plain)
            ours.square().sum().backward(retain_graph=True)
            plain.square().sum().backward(retain_graph=True)
        assert torch.equal(video.grad, again.grad)


def test_counts_no_flops():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        extract_tubes(clip(1, 9, 20, 20, 3), SMALL, mean=MEAN, std=STD)
    assert counter.get_total_flops() == 0


def test_exports():
    class Tokens(torch.nn.Module):
        def forward(self, video):
            return extract_tubes(video, SMALL, mean=MEAN, std=STD)

    video = clip(1, 5, 8, 9, 3)
    exported = torch.export.export(Tokens(), (video,))
    for ours, plain in zip(exported.module()(video), Tokens()(video), strict=True):
        assert torch.equal(ours, plain)


REFUSED = {
    "neither layout": (
        lambda: clip(1, 4, 8, 8, 4),
        {},
        ValueError,
        r"\[B, frames, H, W, 3\] or \[B, 3, frames, H, W\]",
    ),
    "both layouts": (lambda: clip(1, 3, 8, 8, 3), {}, ValueError, "movedim"),
    "four dimensions": (lambda: clip(4, 8, 8, 3), {}, ValueError, "video must be"),
    "int64": (lambda: torch.zeros(1, 4, 8, 8, 3, dtype=torch.int64), {}, TypeError, "video must be of dtype uint8"),
    "not a tensor": (lambda: [1, 2], {}, TypeError, "video must be a torch.Tensor"),
    "mean of two": (lambda: clip(1, 4, 8, 8, 3), {"mean": (0.5, 0.5)}, ValueError, "mean must hold three numbers"),
    "one mean": (lambda: clip(1, 4, 8, 8, 3), {"mean": 0.5}, TypeError, "mean must hold three numbers"),
    "mean as a tensor": (lambda: clip(1, 4, 8, 8, 3), {"mean": torch.ones(3)}, TypeError, r"pass its tolist\(\)"),
    "std as tensors": (lambda: clip(1, 4, 8, 8, 3), {"std": [*torch.ones(3)]}, TypeError, r"std\[0\] must be a number"),
    "std of NaN": (lambda: clip(1, 4, 8, 8, 3), {"std": (1, 1, float("nan"))}, ValueError, r"std\[2\] must be finite"),
    "std of zero": (lambda: clip(1, 4, 8, 8, 3), {"std": (1, 0, 1)}, ValueError, "std must be positive"),
    "mean of NaN": (
        lambda: clip(1, 4, 8, 8, 3),
        {"mean": (0, float("nan"), 0)},
        ValueError,
        r"mean\[1\] must be finite",
    ),
    "dtype": (lambda: clip(1, 4, 8, 8, 3), {"dtype": torch.int32}, TypeError, "dtype must be float32"),
    "backend": (lambda: clip(1, 4, 8, 8, 3), {"backend": "cuda"}, ValueError, "backend must be one of auto, native"),
    "triton": (lambda: clip(1, 4, 8, 8, 3), {"backend": "triton"}, ValueError, "native code"),
    "too short": (lambda: clip(1, 2, 8, 8, 3), {}, ValueError, r"tubes\[0\] must fit the clip, but yields no token"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    make, override, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        extract_tubes(make(), **{"tubes": SMALL, "mean": MEAN, "std": STD, **override})


def test_three_frames_with_channels_last_by_a_view():
    video = clip(1, 3, 8, 9, 3)
    tokens = extract_tubes(video.movedim(-1, 1), SMALL, **KWARGS)
    longer = extract_tubes(torch.cat([video, video], 1), SMALL, backend="reference", **KWARGS)
    for out, ref in zip(tokens, longer, strict=True):
        assert_close("tokens", out, ref[:, : out.shape[1]], rtol=POINTWISE[torch.float32])


def test_integers_of_numpy():
    video = clip(1, 5, 8, 9, 3)
    same = [Tube(*[tuple(np.array(triple)) for triple in tube]) for tube in SMALL]
    for out, ref in zip(extract_tubes(video, same, **KWARGS), extract_tubes(video, SMALL, **KWARGS), strict=True):
        assert torch.equal(out, ref)
    sizes = np.array([5, 8, 9])
    assert torch.equal(tube_centres(same, *sizes), tube_centres(SMALL, 5, 8, 9))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch.func.jvp itself
def test_torch_func_is_told_to_take_the_reference():
    video = clip(1, 5, 8, 9, 3, dtype=torch.float32)

    def total(video, backend="auto"):
        return sum(o.sum() for o in extract_tubes(video, SMALL, backend=backend, **KWARGS))

    for transform in (
        torch.func.grad(total),
        torch.func.vmap(lambda v: total(v[None])),
        lambda v: torch.func.jvp(total, (v,), (v,)),
    ):
        with pytest.raises(NotImplementedError, match=r'extract_tubes does not support .*backend="reference"'):
            transform(video)
    with pytest.raises(NotImplementedError, match="extract_tubes does not support"):
        torch.func.vmap(lambda v: extract_tubes(v, SMALL, **KWARGS))(clip(2, 1, 5, 8, 9, 3))
    expected = torch.autograd.grad(total(leaf := video.clone().requires_grad_()), leaf)[0]
    assert_close("video", torch.func.grad(lambda v: total(v, "reference"))(video), expected)


def test_parameters_are_differentiated_by_torch_func():
    """A uint8 clip has no gradient, so nothing is asked of it."""
    video = clip(1, 5, 8, 9, 3)
    first = extract_tubes(video, SMALL, **KWARGS)[0]
    gradient = torch.func.grad(lambda w: (extract_tubes(video, SMALL, **KWARGS)[0] @ w).sum())(
        torch.ones(36, device=DEVICE)
    )
    assert_close("weight", gradient, first.sum((0, 1)))


def test_second_derivatives_raise():
    video = clip(1, 5, 8, 9, 3, dtype=torch.float32).requires_grad_()
    (gradient,) = torch.autograd.grad(
        sum(o.square().sum() for o in extract_tubes(video, SMALL, **KWARGS)), video, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="extract_tubes has no second derivative"):
        gradient.sum().backward()


def test_shapes_alone_on_a_device_without_data():
    video = torch.empty(2, 5, 8, 9, 3, device="meta", requires_grad=True)
    for backend in ("auto", "native", "torch", "reference"):
        out = extract_tubes(video, SMALL, dtype=torch.bfloat16, backend=backend, **KWARGS)
        assert [tuple(o.shape) for o in out] == [(2, 27, 36), (2, 126, 24)]
        assert {(o.device.type, o.dtype) for o in out} == {("meta", torch.bfloat16)}
        (gradient,) = torch.autograd.grad(sum(o.sum() for o in out), video)
        assert gradient.shape == video.shape


@only_on_gpu
def test_streams_and_graphs():
    video = clip(2, 21, 52, 64, 3)
    expected = extract_tubes(video, TUBEVIT_TUBES, backend="torch", **KWARGS)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tokens = extract_tubes(video, TUBEVIT_TUBES, backend="native", **KWARGS)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = extract_tubes(video, TUBEVIT_TUBES, backend="native", **KWARGS)
    graph.replay()
    for a, b, ref in zip(tokens, captured, expected, strict=True):
        assert torch.equal(a, ref)
        assert torch.equal(b, ref)


@only_on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_clip_on_another_device_than_the_current_one():
    video = clip(1, 9, 20, 48, 3)
    expected = extract_tubes(video, ODD[:3], backend="native", **KWARGS)
    for out, ref in zip(extract_tubes(video.to("cuda:1"), ODD[:3], backend="native", **KWARGS), expected, strict=True):
        assert out.device.index == 1
        assert torch.equal(out.cpu(), ref.cpu())
    assert torch.cuda.current_device() == 0


@only_on_gpu
def test_clips_beyond_two_gibibytes_on_a_gpu():
    frames = 2**31 // (224 * 224 * 3) + 40
    video = torch.randint(0, 256, (1, frames, 224, 224, 3), dtype=torch.uint8, device="cuda")
    plain = extract_tubes(video, TUBEVIT_TUBES, dtype=torch.bfloat16, backend="torch", **KWARGS)
    ours = extract_tubes(video, TUBEVIT_TUBES, dtype=torch.bfloat16, backend="native", **KWARGS)
    for out, ref in zip(ours, plain, strict=True):
        assert torch.equal(out, ref)


@only_on_gpu
def test_small_shapes_for_the_sanitizer():
    for layout in LAYOUTS.values():
        video = layout(clip(2, 9, 20, 48, 3, dtype=torch.float32)).requires_grad_()
        out = extract_tubes(video, ODD[:3], dtype=torch.bfloat16, backend="native", **KWARGS)
        sum(o.float().sum() for o in out).backward()
    torch.cuda.synchronize()
