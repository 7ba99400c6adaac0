"""`extract_tubes` against a convolution, its backends against the reference, and the compiler's contract."""

from __future__ import annotations

import pytest
import torch

from mirasol.kernels import TUBEVIT_TUBES, Tube, extract_tubes, tube_grid
from mirasol.kernels.tubes.ops import extract_op, scatter_op
from tolerance import assert_close, assert_within_budget

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ODD = (
    Tube((3, 4, 5), (2, 3, 7), (1, 0, 2)),
    Tube((1, 2, 3), (1, 1, 1)),
    Tube((2, 5, 16), (3, 9, 4), (0, 1, 0)),
    Tube((4, 12, 12), (16, 32, 32), (2, 1, 3)),
)
SMALL = (Tube((2, 3, 2), (1, 2, 3), (1, 0, 1)), Tube((1, 2, 4), (2, 1, 1)))
BACKENDS = ("native", "torch")


def clip(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8)
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def convolve(video: torch.Tensor, weight: torch.Tensor, tube: Tube) -> torch.Tensor:
    """[B, frames, H, W, 3] in 0..1 -> [B, N, d], by an ordinary convolution from the tube's offset on."""
    pixels = (video - video.new_tensor(MEAN)) / video.new_tensor(STD)
    t, h, w = tube.offset
    return torch.nn.functional.conv3d(pixels.movedim(-1, 1)[:, :, t:, h:, w:], weight, stride=tube.stride).flatten(2).mT


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_projection_equals_convolution(backend):
    video = clip(2, 13, 29, 37, 3)
    for tube, tokens in zip(
        ODD, extract_tubes(video, ODD, mean=MEAN, std=STD, dtype=torch.float64, backend=backend), strict=True
    ):
        weight = torch.randn(8, 3, *tube.kernel, dtype=torch.float64)
        expected = convolve(video.double() / 255, weight, tube)
        assert tokens.shape[1] == torch.tensor(tube_grid(tube, 13, 29, 37)).prod()
        assert_close("tokens", tokens @ weight.permute(0, 2, 3, 4, 1).flatten(1).T, expected, rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("source", [torch.uint8, torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(backend, source, dtype):
    video = clip(2, 9, 20, 35, 3, dtype=source)
    tubes = ODD[:3]
    kwargs = {"mean": MEAN, "std": STD}
    exact = extract_tubes(video, tubes, dtype=torch.float64, backend="reference", **kwargs)
    plain = extract_tubes(video, tubes, dtype=dtype, backend="reference", **kwargs)
    for out, p, e in zip(
        extract_tubes(video, tubes, dtype=dtype, backend=backend, **kwargs), plain, exact, strict=True
    ):
        assert out.dtype == dtype
        assert out.is_contiguous()
        if dtype in (torch.float32, torch.float64):
            assert_close("tokens", out, e, rtol=1e-6 if dtype == torch.float32 else 1e-14)
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
@pytest.mark.parametrize("source", [torch.uint8, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout_gives_the_same_tokens(layout, source, backend):
    video = LAYOUTS[layout](clip(2, 9, 20, 37, 3, dtype=source))
    kwargs = {"mean": MEAN, "std": STD}
    expected = extract_tubes(video.contiguous(), ODD[:3], backend="reference", **kwargs)
    for out, ref in zip(extract_tubes(video, ODD[:3], backend=backend, **kwargs), expected, strict=True):
        assert_close(layout, out, ref, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
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
    assert_close("video", gradients[1], gradients[0], rtol=1e-6 if dtype == torch.float32 else 1e-13)


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


@pytest.mark.parametrize("backend", BACKENDS)
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
    assert video.grad.sum().item() == pytest.approx(
        sum((e.numel() // 3) * (1 / s) for e in expected for s in STD), 1e-4
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_is_bitwise_deterministic(backend):
    video = clip(2, 9, 20, 40, 3, dtype=torch.float32).requires_grad_()
    runs = []
    for _ in range(3):
        out = extract_tubes(video, ODD[:3], mean=MEAN, std=STD, backend=backend)
        generator = torch.Generator().manual_seed(0)
        runs.append(torch.autograd.grad(out, video, [torch.randn(o.shape, generator=generator) for o in out])[0])
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
    poisoned = video.masked_fill(~covered[None, ..., None], float("nan"))
    kwargs = {"mean": MEAN, "std": STD, "backend": backend}
    for clean, out in zip(extract_tubes(video, tubes, **kwargs), extract_tubes(poisoned, tubes, **kwargs), strict=True):
        assert torch.equal(clean, out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    out = extract_tubes(clip(0, 9, 20, 20, 3), SMALL, mean=MEAN, std=STD, backend=backend)
    assert [tuple(o.shape) for o in out] == [(0, 7 * 9 * 6, 36), (0, 5 * 19 * 17, 24)]
    video = torch.empty(0, 9, 20, 20, 3, requires_grad=True)
    sum(o.sum() for o in extract_tubes(video, SMALL, mean=MEAN, std=STD, backend=backend)).backward()
    assert video.grad.shape == video.shape


def test_the_published_tubes_give_539_tokens():
    out = extract_tubes(clip(1, 3, 32, 224, 224), TUBEVIT_TUBES, mean=MEAN, std=STD)
    assert [o.shape[1] for o in out] == [98, 147, 98, 196]
    assert sum(o.shape[1] for o in out) == 539


def test_a_chunk_of_eight_frames_gives_294_tokens():
    fitting = [TUBEVIT_TUBES[i] for i in (0, 2, 3)]
    out = extract_tubes(clip(1, 3, 8, 224, 224), fitting, mean=MEAN, std=STD)
    assert sum(o.shape[1] for o in out) == 49 + 49 + 196 == 294


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    numbers = [n for tube in SMALL for triple in tube for n in triple]
    for video in (clip(2, 5, 8, 9, 3), clip(2, 3, 5, 8, 9, dtype=torch.float32).movedim(1, -1)):
        if video.dtype == torch.uint8 and requires_grad:
            continue
        args = (video, numbers, [1.0, 2.0, 3.0], [0.0, 1.0, 2.0], torch.float32, "auto")
        torch.library.opcheck(extract_op, args)
        grads = [torch.randn_like(o) for o in extract_op(*args)]
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
    "mean of two": (lambda: clip(1, 4, 8, 8, 3), {"mean": (0.5, 0.5)}, ValueError, "mean must hold one number per"),
    "std of zero": (lambda: clip(1, 4, 8, 8, 3), {"std": (1, 0, 1)}, ValueError, "std must be positive"),
    "mean of NaN": (lambda: clip(1, 4, 8, 8, 3), {"mean": (0, float("nan"), 0)}, ValueError, "mean must hold finite"),
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
    for out, ref in zip(
        extract_tubes(video.movedim(-1, 1), SMALL, mean=MEAN, std=STD),
        extract_tubes(torch.cat([video, video], 1), SMALL, mean=MEAN, std=STD, backend="reference"),
        strict=True,
    ):
        assert_close("tokens", out, ref[:, : out.shape[1]], rtol=1e-6)
