"""Mel spectrograms: librosa's figures, causality, streaming, gradients, buffers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mirasol.encoders.mel import LogMel, mel_filterbank
from tolerance import SAME_SUMS, assert_close

GOLDENS = Path(__file__).with_name("goldens") / "mel_librosa.npz"
SETTINGS = {
    "whisper_128": {"sample_rate": 16000, "n_fft": 400, "hop": 160, "n_mels": 128},
    "epic_sounds": {"sample_rate": 24000, "n_fft": 2048, "hop": 120, "n_mels": 128},
}
UNEVEN = {"n_fft": 63, "hop": 20, "n_mels": 8}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDENS) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def naive(mel: LogMel, samples: torch.Tensor) -> torch.Tensor:
    """One causal frame at a time, its DFT as a matrix, in float64: [n_mels, frames] of samples [samples]."""
    n = mel.n_fft
    t = torch.arange(n, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * t / n)
    angles = 2 * math.pi * torch.arange(n // 2 + 1, dtype=torch.float64)[:, None] * t / n
    bank = mel_filterbank(mel.sample_rate, n, mel.n_mels)
    frames = []
    for end in range(mel.hop, len(samples) + 1, mel.hop):
        frame = torch.zeros(n, dtype=torch.float64)
        held = samples[max(end - n, 0) : end].double()
        frame[n - len(held) :] = held
        re, im = angles.cos() @ (window * frame), angles.sin() @ (window * frame)
        frames.append((bank @ (re**2 + im**2)).clamp_min(1e-6).log())
    return torch.stack(frames, dim=-1)


@pytest.mark.parametrize("name", SETTINGS)
def test_filterbank_is_librosas(golden, name):
    setting = {key: value for key, value in SETTINGS[name].items() if key != "hop"}
    assert_close(name, mel_filterbank(**setting), golden[f"{name}/filterbank"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SETTINGS)
def test_spectrogram_is_librosas(golden, name, dtype):
    """librosa centres frame t on sample t hop. Those that reach over neither end are causal frames of the noise, moved
    until its hops fall on theirs."""
    mel, noise = LogMel(**SETTINGS[name]).to(dtype), golden["noise"].to(dtype)
    half, hop = mel.n_fft // 2, mel.hop
    moved = torch.nn.functional.pad(noise, (-half % hop, half % hop))
    out = mel(moved[: len(moved) // hop * hop])
    assert out.dtype == dtype
    assert out.is_contiguous()
    first, last = -(-half // hop), (len(noise) - half) // hop
    later = (half + -half % hop) // hop - 1  # frame t of librosa's ends half a frame after sample t hop
    expected = golden[f"{name}/spectrogram"][:, first : last + 1].to(dtype).clamp_min(1e-6).log()
    assert last - first > 20
    assert_close(name, out[:, first + later : last + later + 1], expected, rtol=SAME_SUMS)


def test_the_floor():
    silence = LogMel()(torch.zeros(320))
    assert_close("silence", silence, torch.full((128, 2), math.log(1e-6)))


@pytest.mark.parametrize("setting", [{}, UNEVEN, {"n_fft": 160, "hop": 160, "n_mels": 20}])
def test_it_is_the_naive_sum(setting):
    mel = LogMel(**setting).double()
    samples = torch.randn(5 * mel.hop, dtype=torch.float64)
    assert_close("mel", mel(samples), naive(mel, samples))


def test_any_leading_dimensions():
    mel = LogMel(**UNEVEN)
    samples = torch.randn(2, 3, 100)
    out = mel(samples)
    assert out.shape == (2, 3, 8, 5)
    assert_close("row", out[1, 2], mel(samples[1, 2]))


def test_a_later_sample_never_changes_an_earlier_frame():
    mel = LogMel()
    samples = torch.randn(2, 16000)
    changed = samples.clone()
    changed[:, 8000:] = torch.randn(2, 8000)
    before, after = mel(samples), mel(changed)
    assert before.shape == (2, 128, 100)
    assert torch.equal(before[..., :50], after[..., :50])
    assert not torch.equal(before[..., 50], after[..., 50])


@pytest.mark.parametrize("setting", [{}, UNEVEN, {"n_fft": 160, "hop": 160, "n_mels": 20}])
@pytest.mark.parametrize("pieces", [[1] * 8, [3, 1, 4], [8]])
def test_piece_after_piece_is_the_whole_clip(setting, pieces):
    mel = LogMel(**setting)
    samples = torch.randn(2, 8 * mel.hop)
    past, parts = None, []
    for piece in samples.split([count * mel.hop for count in pieces], dim=-1):
        parts.append(mel(piece, past))
        past = mel.next_past(piece, past)
        assert past.shape == (2, mel.past_samples)
    assert_close("pieces", torch.cat(parts, -1), mel(samples), rtol=SAME_SUMS)


def test_a_tone_lights_its_filter():
    mel = LogMel()
    for hz in (300.0, 1000.0, 5000.0):
        tone = torch.sin(2 * math.pi * hz * torch.arange(16000) / 16000)
        loudest = (mel(tone)[:, 50].exp() / mel.filterbank.amax(1)).argmax()
        centre = (mel.filterbank[loudest] * torch.arange(201) * 40).sum() / mel.filterbank[loudest].sum()
        assert abs(centre - hz) < max(40, 0.03 * hz)


def test_gradients():
    mel = LogMel(**UNEVEN).double()
    samples = torch.randn(2, 60, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mel, samples)
    silent = torch.zeros(2, 60, dtype=torch.float64, requires_grad=True)
    mel(silent).sum().backward()
    assert silent.grad.isfinite().all()


def test_gradients_reach_the_past():
    mel = LogMel(**UNEVEN).double()
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (40, mel.past_samples)]
    assert torch.autograd.gradcheck(mel, inputs)


def test_buffers_survive_meta_casts_and_checkpoints():
    plain = LogMel()
    assert plain.state_dict() == {}
    with torch.device("meta"):
        late = LogMel()
    assert late.window.is_meta
    for module in (late.to_empty(device="cpu"), LogMel().to_empty(device="cpu"), LogMel().bfloat16()):
        assert torch.equal(module.window, plain.window)
        assert torch.equal(module.filterbank, plain.filterbank)
    late.window.fill_(torch.nan)
    late.filterbank.fill_(torch.nan)
    late.reset_buffers()
    assert torch.equal(late.window, plain.window)
    assert torch.equal(late.filterbank, plain.filterbank)
    exact = torch.hann_window(400, dtype=torch.float64)
    assert torch.equal(LogMel().half().double().window, exact)


def test_low_precision_is_computed_in_float32():
    samples = torch.randn(1600)
    expected = LogMel()(samples.bfloat16().float()).bfloat16()
    out = LogMel().bfloat16()(samples.bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LogMel()(samples), LogMel()(samples))
        inside = LogMel()(samples)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, LogMel()(samples))


def test_compiles_whole():
    mel = LogMel()
    compiled = torch.compile(mel, fullgraph=True, backend="aot_eager")
    for frames in (10, 13):
        samples = torch.randn(2, frames * 160)
        assert_close("compiled", compiled(samples), mel(samples))


def test_unresolved_filters_are_told():
    with pytest.warns(UserWarning, match=r"mel filters hold no frequency of an FFT of 400 samples"):
        LogMel(n_mels=256)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sample_rate": 0}, "sample_rate must be at least 1, was 0"),
        ({"hop": 401}, "hop must be at most n_fft = 400"),
        ({"n_mels": 0}, "n_mels must be at least 1"),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        LogMel(**setting)


def test_bad_input_is_refused():
    mel = LogMel()
    cases = [
        ((torch.zeros(161),), ValueError, "samples must hold a positive multiple of hop = 160, was"),
        ((torch.zeros(0),), ValueError, "samples must hold a positive multiple"),
        ((torch.zeros(()),), ValueError, r"samples must be \[\.\.\., samples\]"),
        ((torch.zeros(160, dtype=torch.int16),), TypeError, "samples must be floating point"),
        (([0.0] * 160,), TypeError, "samples must be a torch.Tensor, was list"),
        ((torch.zeros(160, device="meta"),), ValueError, "samples must be on cpu"),
        ((torch.zeros(160), torch.zeros(239)), ValueError, r"past must be \[\.\.\., n_fft - hop\] = \[240\]"),
        ((torch.zeros(160), torch.zeros(240).double()), ValueError, "past must be torch.float32"),
    ]
    for inputs, error, message in cases:
        with pytest.raises(error, match=message):
            mel(*inputs)
    with pytest.raises(TypeError, match="n_fft must be an int"):
        LogMel(n_fft=400.0)
