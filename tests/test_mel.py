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
    "htk_40": {
        "sample_rate": 16000,
        "n_fft": 512,
        "hop": 160,
        "n_mels": 40,
        "scale": "htk",
        "norm": None,
        "f_min": 20.0,
    },
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
    bank = mel_filterbank(mel.sample_rate, n, mel.n_mels, scale=mel.scale, norm=mel.norm)
    frames = []
    for end in range(mel.hop, len(samples) + 1, mel.hop):
        frame = torch.zeros(n, dtype=torch.float64)
        held = samples[max(end - n, 0) : end].double()
        frame[n - len(held) :] = held
        re, im = angles.cos() @ (window * frame), angles.sin() @ (window * frame)
        frames.append((bank @ (re**2 + im**2) ** (mel.power / 2)).clamp_min(mel.floor).log())
    return torch.stack(frames, dim=-1)


@pytest.mark.parametrize("name", SETTINGS)
def test_filterbank_is_librosas(golden, name):
    setting = {key: value for key, value in SETTINGS[name].items() if key != "hop"}
    assert_close(name, mel_filterbank(**setting), golden[f"{name}/filterbank"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SETTINGS)
def test_centred_spectrogram_is_librosas(golden, name, dtype):
    mel = LogMel(**SETTINGS[name], log="none", padding="center").to(dtype)
    out = mel(golden["noise"].to(dtype))
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(name, out, golden[f"{name}/spectrogram"], rtol=SAME_SUMS)


def test_logarithms_and_floor(golden):
    noise = golden["noise"] * 1e-2
    linear = LogMel(log="none")(noise)
    assert (linear < 1e-6).any()
    assert (linear > 1e-6).any()
    assert_close("log", LogMel()(noise), linear.clamp_min(1e-6).log())
    assert_close("log10", LogMel(log="log10", floor=1e-3)(noise), linear.clamp_min(1e-3).log10())
    silence = LogMel()(torch.zeros(320))
    assert_close("silence", silence, torch.full((128, 2), math.log(1e-6)))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("setting", [{}, UNEVEN, {"n_fft": 160, "hop": 160, "n_mels": 20}])
def test_causal_is_the_naive_sum(setting, power):
    mel = LogMel(**setting, power=power).double()
    samples = torch.randn(5 * mel.hop, dtype=torch.float64)
    assert_close("mel", mel(samples), naive(mel, samples))


def test_any_leading_dimensions():
    mel = LogMel(**UNEVEN)
    samples = torch.randn(2, 3, 100)
    for padding in ("causal", "center"):
        mel.padding = padding
        out = mel(samples)
        assert out.shape == (2, 3, 8, 5)  # centred: the right edge of an odd frame is short by a sample
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
    mel = LogMel(log="none", norm=None)
    for hz in (300.0, 1000.0, 5000.0):
        tone = torch.sin(2 * math.pi * hz * torch.arange(16000) / 16000)
        loudest = mel(tone)[:, 50].argmax()
        centre = (mel.filterbank[loudest] * torch.arange(201) * 40).sum() / mel.filterbank[loudest].sum()
        assert abs(centre - hz) < max(40, 0.03 * hz)


@pytest.mark.parametrize("setting", [{}, {"power": 1}, {"log": "none"}, {"padding": "center"}])
def test_gradients(setting):
    mel = LogMel(**UNEVEN, **setting).double()
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
        LogMel(scale="htk")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sample_rate": 0}, "sample_rate must be at least 1, was 0"),
        ({"hop": 401}, "hop must be at most n_fft = 400"),
        ({"n_mels": 0}, "n_mels must be at least 1"),
        ({"f_min": 9000.0}, "f_min must be at least 0 and below f_max"),
        ({"f_max": 9000.0}, "f_max must be at most half the sample rate"),
        ({"scale": "bark"}, "scale must be"),
        ({"norm": "l2"}, "norm must be"),
        ({"power": 3}, "power must be 1 or 2"),
        ({"log": "ln"}, "log must be"),
        ({"floor": 0.0}, "floor must be positive"),
        ({"padding": "same"}, "padding must be"),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        LogMel(**setting)


def test_bad_input_is_refused():
    mel, centred = LogMel(), LogMel(padding="center")
    cases = [
        (mel, (torch.zeros(161),), ValueError, "samples must hold a positive multiple of hop = 160, was"),
        (mel, (torch.zeros(0),), ValueError, "samples must hold a positive multiple"),
        (mel, (torch.zeros(()),), ValueError, r"samples must be \[\.\.\., samples\]"),
        (mel, (torch.zeros(160, dtype=torch.int16),), TypeError, "samples must be floating point"),
        (mel, ([0.0] * 160,), TypeError, "samples must be a torch.Tensor, was list"),
        (mel, (torch.zeros(160, device="meta"),), ValueError, "samples must be on cpu"),
        (mel, (torch.zeros(160), torch.zeros(239)), ValueError, r"past must be \[\.\.\., n_fft - hop\] = \[240\]"),
        (mel, (torch.zeros(160), torch.zeros(240).double()), ValueError, "past must be torch.float32"),
        (centred, (torch.zeros(200),), ValueError, "samples must hold more than n_fft // 2 = 200"),
        (centred, (torch.zeros(480), torch.zeros(240)), ValueError, "past must be None unless"),
    ]
    for module, inputs, error, message in cases:
        with pytest.raises(error, match=message):
            module(*inputs)
    with pytest.raises(TypeError, match="n_fft must be an int"):
        LogMel(n_fft=400.0)
