"""The compiled modules below the operator: every instruction set, the GPU's program rehearsed on the CPU, refusals."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pybind11
import pytest
import torch

from mirasol.kernels import Tube, build_info, extract_tubes, tube_grid
from mirasol.kernels.tubes import eager, native
from tolerance import POINTWISE, assert_close, assert_within_budget


@pytest.fixture(autouse=True)
def _native(skip_loudly):
    if not build_info()["cpu"]["available"]:
        skip_loudly("the native extension", build_info()["cpu"]["why"])


@pytest.fixture(scope="session")
def rehearsal(tmp_path_factory, cxx):
    """The module _cuda, in which a CPU walks through every warp's part in place of a GPU; None without a compiler."""
    if cxx is None:
        return None
    root, target = Path(__file__).parents[2], tmp_path_factory.mktemp("rehearsal") / "_cuda.so"
    include = [f"-I{path}" for path in (root / "csrc", pybind11.get_include(), sysconfig.get_path("include"))]
    command = [cxx, "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", *include]
    command += [root / "csrc" / "bind_cuda.cpp", Path(__file__).with_name("rehearsal.cpp"), "-o", target]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    spec = importlib.util.spec_from_file_location("rehearsal._cuda", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["cpu", "rehearsed"])
def run(request, rehearsal, skip_loudly):
    """Either path: run("extract" or "scatter", the numbers of a call)."""
    if request.param == "cpu":
        return lambda function, call: getattr(module(), function)(call, 2, "")
    if rehearsal is None:
        skip_loudly("the rehearsal of the CUDA kernels", "no C++ compiler was found")
    return lambda function, call: getattr(rehearsal, function)(call, 0)


SCALE, SHIFT = [0.017, 0.0175, 0.0174], [-2.1, -2.0, -1.8]
CODES = native._CODES
ODD = [
    Tube((3, 4, 5), (2, 3, 7), (1, 0, 2)),
    Tube((1, 2, 3), (1, 1, 1)),
    Tube((2, 5, 16), (3, 9, 4), (0, 1, 0)),
    Tube((2, 9, 20), (5, 3, 11), (0, 0, 5)),
]
EVEN = [Tube((2, 4, 4), (2, 8, 8), (0, 0, 8)), Tube((1, 8, 8), (3, 8, 8)), Tube((1, 16, 16), (1, 16, 16))]


def module():
    return native._load("_native")[0]


def numbers(tubes):
    return [n for tube in tubes for triple in tube for n in triple]


def arguments(video, tubes, dtype):
    """What the bindings take for a clip [B, frames, H, W, 3], and the buffers that they fill."""
    grids = [math.prod(tube_grid(tube, *video.shape[1:4])) for tube in tubes]
    tokens = [torch.full((len(video), n, t.size), torch.nan, dtype=dtype) for n, t in zip(grids, tubes, strict=True)]
    pointers = [t.data_ptr() for t in tokens]
    sizes, strides = list(video.shape[:4]), list(video.stride())
    call = (video.data_ptr(), CODES[video.dtype], sizes, strides, numbers(tubes), SCALE, SHIFT, pointers, CODES[dtype])
    return call, tokens


def clip(*shape, dtype=torch.uint8):
    return torch.randint(0, 256, shape, dtype=torch.uint8) if dtype == torch.uint8 else torch.randn(shape).to(dtype)


LAYOUTS = {
    "packed": lambda v: v,
    "planar": lambda v: v.movedim(-1, 1).contiguous().movedim(1, -1),
    "strided": lambda v: v.movedim(0, -1).contiguous().movedim(-1, 0),
    "row pitch of 3": lambda v: torch.cat([v.flatten(3), v.flatten(3)[..., :3]], 3)[..., :-3].unflatten(3, (-1, 3)),
    "one byte off": lambda v: torch.cat([v.flatten()[:1], v.flatten()])[1:].view(v.shape),
}


@pytest.mark.parametrize("isa", module().instruction_sets if module() else [])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_instruction_set_equals_pytorch_bitwise(isa, layout, source):
    video = LAYOUTS[layout](clip(2, 9, 20, 48, 3, dtype=source))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = eager.extract(video, ODD + EVEN, SCALE, SHIFT, dtype)
        for threads in (1, 3):
            call, tokens = arguments(video, ODD + EVEN, dtype)
            module().extract(call, threads, isa)
            for out, ref in zip(tokens, expected, strict=True):
                assert torch.equal(out, ref), f"{dtype}: {(out - ref).abs().max()}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_of_every_kind_of_number(dtype):
    """All 2^16 numbers through a token and back: subnormal, infinite, not a number; and the ties between them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    between = (every.double() * (1 + torch.finfo(dtype).eps / 2)).float()
    tube = [Tube((1, 1, 4), (1, 1, 4))]
    for source in (every.float(), between, every):
        video = source.repeat_interleave(3).view(1, 1, 16, -1, 3)
        for target in (dtype, torch.float32):
            for isa in module().instruction_sets:
                call, (out,) = arguments(video, tube, target)
                module().extract((*call[:5], [1.0] * 3, [0.0] * 3, *call[7:]), 1, isa)
                expected = video.reshape(out.shape).to(target)
                assert torch.equal(out.isnan(), expected.isnan())
                assert torch.equal(out.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_the_rehearsed_launch_equals_pytorch_bitwise(layout, source, rehearsal, skip_loudly):
    if rehearsal is None:
        skip_loudly("the rehearsal of the CUDA kernels", "no C++ compiler was found")
    video = LAYOUTS[layout](clip(2, 9, 20, 48, 3, dtype=source))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for tubes in (ODD, EVEN):
            call, tokens = arguments(video, tubes, dtype)
            rehearsal.extract(call, 0)
            for out, ref in zip(tokens, eager.extract(video, tubes, SCALE, SHIFT, dtype), strict=True):
                assert torch.equal(out, ref)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_equal_pytorch(dtype, run):
    shape = [2, 9, 20, 48, 3]
    grads = [g.to(dtype) for g in eager.extract(torch.randn(shape), ODD + EVEN, SCALE, SHIFT, torch.float32)]
    video = torch.full(shape, torch.nan, dtype=dtype)
    call, _tokens = arguments(video, ODD + EVEN, dtype)
    run("scatter", (*call[:7], [g.data_ptr() for g in grads], call[8]))
    plain = eager.scatter(grads, ODD + EVEN, SCALE, shape, dtype)
    exact = eager.scatter([g.double() for g in grads], ODD + EVEN, SCALE, shape, torch.float64)
    assert_within_budget("video", video, plain, exact)
    if dtype == torch.float32:
        assert_close("video", video, exact, rtol=POINTWISE[dtype])


def test_every_instruction_set_sums_gradients_alike():
    shape = [2, 9, 20, 48, 3]
    grads = eager.extract(torch.randn(shape), ODD + EVEN, SCALE, SHIFT, torch.float32)
    videos = []
    for isa in module().instruction_sets:
        for threads in (1, 3):
            videos.append(torch.full(shape, torch.nan))
            call, _tokens = arguments(videos[-1], ODD + EVEN, torch.float32)
            module().scatter((*call[:7], [g.data_ptr() for g in grads], call[8]), threads, isa)
            assert torch.equal(videos[-1], videos[0])


def test_negative_strides_and_overlapping_memory(run):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 9, 20, 48, 3), dtype=np.uint8)
    for view in (pixels[:, ::-1, ::-1, ::-1], pixels[..., ::-1], np.broadcast_to(pixels[:, :, :1], pixels.shape)):
        dense = torch.from_numpy(view.copy())
        call, tokens = arguments(dense, ODD, torch.float32)
        run("extract", (view.ctypes.data, call[1], call[2], list(view.strides), *call[4:]))
        for out, ref in zip(tokens, eager.extract(dense, ODD, SCALE, SHIFT, torch.float32), strict=True):
            assert torch.equal(out, ref)


def test_clips_beyond_two_gibibytes(run):
    frames = 2**31 // (224 * 224 * 3) + 40
    video = torch.empty(1, frames, 224, 224, 3, dtype=torch.uint8)  # pages that are never touched are never made
    tubes = [Tube((2, 4, 4), (frames - 4, 32, 32), (1, 8, 8)), Tube((1, 16, 16), (1, 16, 16), (frames - 1, 0, 0))]
    assert video.numel() > 2**31
    for frame in (1, 2, frames - 3, frames - 2, frames - 1):
        video[:, frame] = torch.randint(0, 256, video[:, frame].shape, dtype=torch.uint8)
    call, tokens = arguments(video, tubes, torch.float32)
    run("extract", call)
    for out, ref in zip(tokens, eager.extract(video, tubes, SCALE, SHIFT, torch.float32), strict=True):
        assert torch.equal(out, ref)


def test_sizes_and_strides_whose_products_pass_all_integers(run):
    """A clip of one pixel, repeated: addresses stay at that pixel, whatever the sizes."""
    pixel = torch.tensor([7, 8, 9], dtype=torch.uint8)
    video = pixel.expand(1, 2**20, 2**20, 2**20, 3)
    tubes = [Tube((1, 1, 4), (2**19, 2**19, 2**19), (2**19, 2**19, 2**20 - 4))]
    call, (tokens,) = arguments(video, tubes, torch.float32)
    run("extract", call)
    expected = (pixel * torch.tensor(SCALE) + torch.tensor(SHIFT)).expand(4, 3)
    assert_close("tokens", tokens[0, 0].view(4, 3), expected)


def test_a_token_may_span_more_than_two_gibibytes(run):
    """Three frames 2^30 elements apart, of which only the pages that are touched exist."""
    video = torch.empty(2**31 + 12, dtype=torch.uint8).as_strided((1, 3, 2, 2, 3), (0, 2**30, 6, 3, 1))
    video.copy_(clip(1, 3, 2, 2, 3))
    tube = [Tube((3, 1, 1), (1, 1, 1))]
    call, (tokens,) = arguments(video, tube, torch.float32)
    run("extract", call)
    assert torch.equal(tokens, eager.extract(video, tube, SCALE, SHIFT, torch.float32)[0])


def test_frames_too_far_apart_are_refused_by_the_launch(rehearsal, skip_loudly):
    if rehearsal is None:
        skip_loudly("the rehearsal of the CUDA kernels", "no C++ compiler was found")
    call, _tokens = arguments(clip(1, 3, 2, 2, 3), [Tube((3, 1, 1), (1, 1, 1))], torch.float32)
    with pytest.raises(ValueError, match="strides along frames, H and W must be less than 2\\^31"):
        rehearsal.extract((*call[:3], [0, 2**31, 6, 3, 1], *call[4:]), 0)


@pytest.mark.parametrize("sizes", [(2**15, 2**8, 2**8, 1), (1, 1, 1, 2**30)])
def test_gradients_of_too_many_or_too_long_rows_are_refused_by_the_launch(sizes, rehearsal, skip_loudly):
    if rehearsal is None:
        skip_loudly("the rehearsal of the CUDA kernels", "no C++ compiler was found")
    tube = numbers([Tube((1, 1, 1), (2**8, 2**8, 2**30))])
    call = (16, CODES[torch.float32], sizes, [0] * 5, tube, SCALE, SHIFT, [16], CODES[torch.float32])
    with pytest.raises(ValueError, match="2\\^31 rows or more, or elements a row"):
        rehearsal.scatter(call, 0)


REFUSED = {
    "a tube that does not fit": (4, [1, 1, 25, 1, 1, 1, 0, 0, 0], "yields no token"),
    "an offset beyond the clip": (4, [1, 1, 1, 1, 1, 1, 0, 20, 0], "yields no token"),
    "an empty kernel": (4, [0, 1, 1, 1, 1, 1, 0, 0, 0], "kernel, stride >= 1"),
    "a stride of zero": (4, [1, 1, 1, 1, 0, 1, 0, 0, 0], "kernel, stride >= 1"),
    "a negative offset": (4, [1, 1, 1, 1, 1, 1, 0, -1, 0], "offset >= 0"),
    "eight numbers": (4, [1] * 8, "nine numbers each"),
    "no tube": (4, [], "nine numbers each"),
    "no frames": (2, [1, 0, 20, 24], "sizes must lie in"),
    "three sizes": (2, [1, 9, 20], "sizes must be B, frames, H, W"),
    "too many tokens": (2, [2**30, 9, 20, 24], "fewer than 2\\^31 tokens"),
    "a null clip": (0, 0, "null pointer"),
    "an unknown dtype": (1, 9, "dtype must be a code"),
    "two scales": (5, [1.0, 2.0], "three numbers"),
    "no buffer": (7, [], "one token buffer is needed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_numbers_are_refused_before_memory_is_touched(case):
    place, value, message = REFUSED[case]
    call, tokens = arguments(clip(1, 9, 20, 24, 3), [Tube((1, 2, 2), (2, 2, 2))], torch.float32)
    with pytest.raises(ValueError, match=message):
        module().extract((*call[:place], value, *call[place + 1 :]), 1, "")
    assert tokens[0].isnan().all()


def test_build_info_says_what_is_built():
    info = build_info()
    assert set(info) == {"cpu", "cuda"}
    assert info["cpu"]["isa"] == module().instruction_sets[0]
    for entry in info.values():
        assert entry["available"] or entry["why"]


def test_a_missing_module_is_replaced_and_its_reason_told(monkeypatch, caplog):
    video, kwargs = clip(1, 9, 20, 24, 3), {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    expected = extract_tubes(video, ODD[:3], backend="native", **kwargs)
    monkeypatch.setattr(native, "_load", lambda name: (None, "no C++ compiler was found"))
    native.tell_missing.cache_clear()
    for _ in range(2):
        for out, ref in zip(extract_tubes(video, ODD[:3], **kwargs), expected, strict=True):
            assert torch.equal(out, ref)
    (line,) = caplog.messages
    assert line.endswith("several times slower: no C++ compiler was found")
    with pytest.raises(ValueError, match='cannot run with backend="native": no C\\+\\+ compiler was found'):
        extract_tubes(video, ODD[:3], backend="native", **kwargs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU answers")
def test_what_cuda_says_reaches_the_caller():
    cuda, why = native._load("_cuda")
    if cuda is None:
        assert why
        return
    call, _tokens = arguments(clip(1, 9, 20, 24, 3), ODD[:1], torch.float32)
    with pytest.raises(RuntimeError, match=r"CUDA: .* \(cudaError"):
        cuda.extract(call, 0)
