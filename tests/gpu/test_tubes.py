"""`extract_tubes` in CUDA: bitwise parity with plain PyTorch, gradients, determinism, streams, graphs, large clips."""

from __future__ import annotations

import pytest
import torch

from mirasol.kernels import TUBEVIT_TUBES, Tube, build_info, extract_tubes
from tolerance import assert_close, assert_within_budget

pytestmark = pytest.mark.gpu
KWARGS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
ODD = (
    Tube((3, 4, 5), (2, 3, 7), (1, 0, 2)),
    Tube((1, 2, 3), (1, 1, 1)),
    Tube((2, 5, 16), (3, 9, 4), (0, 1, 0)),
    Tube((2, 9, 20), (5, 3, 11), (0, 0, 5)),
)
LAYOUTS = {
    "packed": lambda v: v,
    "planar": lambda v: v.movedim(-1, 1).contiguous(),
    "channels first of packed memory": lambda v: v.movedim(-1, 1),
    "columns kept apart": lambda v: v.repeat_interleave(2, 3)[:, :, :, ::2],
    "one element off": lambda v: torch.cat([v.flatten()[:1], v.flatten()])[1:].view(v.shape),
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def clip(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).cuda()
    return torch.randn(shape, generator=generator).to("cuda", dtype)


def test_the_cuda_module_is_built():
    assert build_info()["cuda"]["available"], build_info()["cuda"]["why"]


@pytest.mark.parametrize("tubes", [ODD, TUBEVIT_TUBES], ids=["odd", "published"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", [torch.uint8, *FLOATS])
@pytest.mark.parametrize("dtype", FLOATS)
def test_tokens_equal_pytorch_bitwise(tubes, layout, source, dtype):
    video = LAYOUTS[layout](clip(3, 21, 52, 64, 3, dtype=source))
    plain = extract_tubes(video, tubes, dtype=dtype, backend="torch", **KWARGS)
    for out, ref in zip(extract_tubes(video, tubes, dtype=dtype, backend="native", **KWARGS), plain, strict=True):
        assert torch.equal(out, ref)


def gradient(video: torch.Tensor, dtype: torch.dtype, backend: str) -> torch.Tensor:
    leaf = video.clone().requires_grad_()
    out = extract_tubes(leaf, ODD, dtype=dtype, backend=backend, **KWARGS)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator).to(video.dtype).to("cuda", dtype) for o in out]
    return torch.autograd.grad(out, leaf, cotangents)[0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["packed", "planar"])
def test_gradients(dtype, layout):
    video = LAYOUTS[layout](clip(2, 9, 20, 48, 3, dtype=dtype))
    ours, plain = gradient(video, dtype, "native"), gradient(video, dtype, "torch")
    exact = gradient(video.double(), torch.float64, "torch")
    assert_within_budget("video", ours, plain, exact)
    if dtype == torch.float32:
        assert_close("video", ours, exact.float(), rtol=1e-6)
    for _ in range(10):
        assert torch.equal(gradient(video, dtype, "native"), ours)


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


def test_compiles_without_a_graph_break():
    compiled = torch.compile(lambda v: extract_tubes(v, ODD, dtype=torch.bfloat16, **KWARGS), fullgraph=True)
    video = clip(2, 9, 20, 48, 3)
    for out, ref in zip(compiled(video), extract_tubes(video, ODD, dtype=torch.bfloat16, **KWARGS), strict=True):
        assert torch.equal(out, ref)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_clip_on_another_device_than_the_current_one():
    video = clip(1, 9, 20, 48, 3)
    expected = extract_tubes(video, ODD, backend="native", **KWARGS)
    for out, ref in zip(extract_tubes(video.to("cuda:1"), ODD, backend="native", **KWARGS), expected, strict=True):
        assert out.device.index == 1
        assert torch.equal(out.cpu(), ref.cpu())
    assert torch.cuda.current_device() == 0


def test_clips_beyond_two_gibibytes():
    frames = 2**31 // (224 * 224 * 3) + 40
    video = torch.randint(0, 256, (1, frames, 224, 224, 3), dtype=torch.uint8, device="cuda")
    expected = extract_tubes(video, TUBEVIT_TUBES, dtype=torch.bfloat16, backend="torch", **KWARGS)
    for out, ref in zip(
        extract_tubes(video, TUBEVIT_TUBES, dtype=torch.bfloat16, backend="native", **KWARGS), expected, strict=True
    ):
        assert torch.equal(out, ref)


def test_what_cuda_does_not_serve_is_told():
    with pytest.raises(ValueError, match="do not serve float64"):
        extract_tubes(clip(1, 9, 20, 48, 3), ODD, dtype=torch.float64, backend="native", **KWARGS)
    tokens = extract_tubes(clip(1, 9, 20, 48, 3), ODD, dtype=torch.float64, **KWARGS)
    assert tokens[0].dtype == torch.float64


def test_small_shapes_for_the_sanitizer():
    for layout in LAYOUTS.values():
        video = layout(clip(2, 9, 20, 48, 3, dtype=torch.float32)).requires_grad_()
        out = extract_tubes(video, ODD, dtype=torch.bfloat16, backend="native", **KWARGS)
        sum(o.float().sum() for o in out).backward()
    torch.cuda.synchronize()
