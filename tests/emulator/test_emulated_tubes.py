"""The tubes' CUDA kernels through their real host code: the bits of the C++ path, in every layout and dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from emulator.counted import counted
from emulator.proof import TARGETS
from emulator.tubes import emulated, find_nvcc
from mirasol.kernels import Tube, extract_tubes
from mirasol.kernels.tubes.geometry import TUBEVIT_TUBES


@pytest.fixture(autouse=True)
def _nvcc(skip_loudly: Callable[[str, str], None]) -> None:
    if find_nvcc() is None:
        skip_loudly("the CUDA kernels in the emulator", "no nvcc was found")


EVEN = [Tube((2, 8, 8), (4, 8, 8)), Tube((1, 16, 16), (8, 16, 16)), Tube((4, 4, 4), (4, 8, 8), (2, 2, 2))]
ODD = [Tube((3, 5, 7), (2, 4, 5), (1, 1, 2)), Tube((1, 3, 3), (1, 2, 2))]
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "channels last": lambda x: x,
    "channels first": lambda x: x.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1),
    "channels after frames": lambda x: x.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2),
    "a crop": lambda x: torch.nn.functional.pad(x, (0, 0, 1, 4, 1, 2))[:, :, 1:-2, 1:-4],
    "backwards": lambda x: x.flip(1),
}
SOURCES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
RESULTS = (torch.float32, torch.bfloat16, torch.float16)
QUICK = [(torch.uint8, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)]


def run(video: torch.Tensor, tubes: list[Tube], dtype: torch.dtype) -> list[torch.Tensor]:
    """Tokens, and the clip's gradient where it has one."""
    video = video.detach().requires_grad_(video.dtype != torch.uint8)
    call: dict[str, Any] = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), dtype=dtype, backend="native")
    tokens = extract_tubes(video, tubes, **call)
    if not video.requires_grad:
        return list(tokens)
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(t.shape, generator=generator).to(dtype) for t in tokens]
    return [*(t.detach() for t in tokens), *torch.autograd.grad(tokens, video, seeds)]


def check(target: str, source: torch.dtype, dtype: torch.dtype, layout: str, tubes: list[Tube]) -> None:
    torch.manual_seed(0)
    shape = (2, 16, 32, 48, 3) if tubes is EVEN else (2, 9, 21, 29, 3)
    video = torch.randint(0, 255, shape, dtype=torch.uint8) if source == torch.uint8 else torch.randn(shape).to(source)
    video = LAYOUTS[layout](video)
    expected = run(video, tubes, dtype)
    for seed in (0, 3):
        with emulated(target, seed=seed) as launches:
            found = run(video, tubes, dtype)
        assert [launch.errors for launch in launches] == [[]] * (1 if source == torch.uint8 else 2)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("source", "dtype"), QUICK)
@pytest.mark.parametrize("target", TARGETS)
def test_the_bits_of_the_cpp_path(target: str, source: torch.dtype, dtype: torch.dtype, layout: str) -> None:
    for tubes in (EVEN, ODD):
        check(target, source, dtype, layout, tubes)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", RESULTS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_dtype(target: str, source: torch.dtype, dtype: torch.dtype, layout: str) -> None:
    for tubes in (EVEN, ODD):
        check(target, source, dtype, layout, tubes)


@pytest.mark.parametrize(("dtype", "loads"), [(torch.float32, 1.2), (torch.bfloat16, 1.5)])
def test_sectors_of_the_gradient(dtype: torch.dtype, loads: float) -> None:
    with emulated("sm_90", count=True) as launches:
        run(torch.randn(1, 32, 112, 112, 3).to(dtype), list(TUBEVIT_TUBES), dtype)
    extract, scatter = (launch.counters for launch in launches)
    assert extract.store_sectors * 32 <= 1.01 * extract.store_bytes
    assert scatter.store_sectors * 32 <= 1.01 * scatter.store_bytes
    assert scatter.load_sectors * 32 <= loads * scatter.load_bytes


def test_what_the_emulator_raises_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emulator.machine.Kernel.launch", lambda *args, **kwargs: 1 / 0)
    with emulated("sm_90"), pytest.raises(ZeroDivisionError):
        run(torch.randn(1, 16, 32, 48, 3), EVEN, torch.float32)


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_clip_moves(target: str, figures: Callable[..., None]) -> None:
    """Kernels in unnamed namespaces have other names in every run."""
    with emulated(target, count=True) as launches:
        run(torch.zeros(1, 8, 64, 64, 3, dtype=torch.bfloat16), EVEN, torch.bfloat16)
    names = [f"extract_tubes {'forward' if 'extract' in launch.name else 'backward'}" for launch in launches]
    assert names == ["extract_tubes forward", "extract_tubes backward"]
    named = [replace(launch, name=name) for launch, name in zip(launches, names, strict=True)]
    figures(f"emulated {target}: extract_tubes", counted(named))
