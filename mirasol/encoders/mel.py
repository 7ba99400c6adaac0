"""Log-mel spectrograms: strided frames, a real FFT and a bank of triangular filters."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from mirasol.kernels.core.checks import FLOATS, describe, expect, expect_int
from mirasol.kernels.core.precision import accumulate_dtype

Scale = Literal["slaney", "htk"]
Norm = Literal["slaney"] | None
Log = Literal["log", "log10", "none"]
Padding = Literal["causal", "center"]


class LogMel(nn.Module):
    """(Log-)mel spectrogram of a waveform: `log(max(filterbank |rfft(hann * frame)|^power, floor))`.

    Args:
        sample_rate: samples per second of the input, Hz.
        n_fft: samples in a frame; also the length of the periodic Hann window and of the FFT.
        hop: samples from one frame to the next, at most `n_fft`.
        n_mels: triangular filters, their corners equally spaced in mel from `f_min` to `f_max` Hz (default: half the
            sample rate).
        scale: "slaney" (linear below 1 kHz, logarithmic above; librosa, Whisper) or "htk" (2595 log10(1 + f / 700)).
        norm: "slaney" gives each filter unit area over Hz; None gives it unit peak.
        power: 2 for power, 1 for magnitude.
        log: "log" (natural), "log10", or "none" for the linear spectrogram, which has no floor.
        floor: smallest value that the logarithm sees.
        padding: "causal": `n_fft - hop` zeros on the left only. Frame t ends just before sample (t + 1) hop, there are
            samples / hop frames, and a later sample never changes an earlier frame. "center": `n_fft // 2` samples
            reflected on either side, frame t centred on sample t hop, 1 + samples // hop frames for an even `n_fft`
            (librosa with `pad_mode="reflect"`; Whisper drops the last frame).
    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type.
    Warns:
        UserWarning: where `n_fft` is too short for `n_mels`, so that some filters hold no frequency and are always 0.

    The two buffers are not saved in checkpoints. They are computed in float64, kept in float32 or wider whatever the
    model is cast to, and rebuilt by every move between devices or dtypes, so that `to_empty` after an initialisation
    on "meta" restores them; `reset_buffers` does the same by hand.

    Source of the formulas: M. Slaney, Auditory Toolbox (1998); the HTK book; as in `librosa.filters.mel`.
    """

    window: torch.Tensor
    filterbank: torch.Tensor

    def __init__(
        self,
        sample_rate: int = 16000,
        n_fft: int = 400,
        hop: int = 160,
        n_mels: int = 128,
        *,
        f_min: float = 0.0,
        f_max: float | None = None,
        scale: Scale = "slaney",
        norm: Norm = "slaney",
        power: float = 2.0,
        log: Log = "log",
        floor: float = 1e-6,
        padding: Padding = "causal",
    ) -> None:
        super().__init__()
        f_max = sample_rate / 2 if f_max is None else f_max
        for name, value in (("sample_rate", sample_rate), ("n_fft", n_fft), ("hop", hop), ("n_mels", n_mels)):
            expect_int(name, value)
        expect(hop <= n_fft, "hop", f"be at most n_fft = {n_fft}: samples between frames would be lost", hop)
        expect(0 <= f_min < f_max, "f_min", f"be at least 0 and below f_max = {f_max}", f_min)
        expect(f_max <= sample_rate / 2, "f_max", f"be at most half the sample rate, {sample_rate / 2}", f_max)
        expect(scale in ("slaney", "htk"), "scale", 'be "slaney" or "htk"', scale)
        expect(norm in ("slaney", None), "norm", 'be "slaney" or None', norm)
        expect(power in (1, 2), "power", "be 1 or 2", power)
        expect(log in ("log", "log10", "none"), "log", 'be "log", "log10" or "none"', log)
        expect(floor > 0, "floor", "be positive", floor)
        expect(padding in ("causal", "center"), "padding", 'be "causal" or "center"', padding)
        self.sample_rate, self.n_fft, self.hop, self.n_mels = sample_rate, n_fft, hop, n_mels
        self.f_min, self.f_max = float(f_min), float(f_max)
        self.scale, self.norm, self.power, self.log, self.floor = scale, norm, power, log, floor
        self.padding = padding
        for name, shape in (("window", [n_fft]), ("filterbank", [n_mels, n_fft // 2 + 1])):
            self.register_buffer(name, torch.empty(shape, dtype=torch.float32), persistent=False)
        self.reset_buffers()
        self._warn_of_empty_filters()

    @property
    def past_samples(self) -> int:
        """Samples of the past that a causal frame reaches back to: `n_fft - hop`."""
        return self.n_fft - self.hop

    def reset_buffers(self) -> None:
        """Compute window and filterbank again, on the device where they are."""
        device, dtype = self.window.device, accumulate_dtype(self.window.dtype)
        window = torch.hann_window(self.n_fft, periodic=True, dtype=torch.float64, device="cpu")
        self.window, self.filterbank = window.to(device, dtype), self._exact_filterbank().to(device, dtype)

    def forward(self, samples: torch.Tensor, past: torch.Tensor | None = None) -> torch.Tensor:
        """Spectrogram of a clip, or of its next piece.

        Args:
            samples: [..., samples], floating point, in -1 .. 1 by custom. Causal: a multiple of `hop`, so that no
                sample is dropped. Centred: more than `n_fft // 2`.
            past: causal only: [..., past_samples], the samples just before these, as `next_past` returns them; None
                at the start of a clip. Piece after piece then equals the whole clip.
        Returns:
            [..., n_mels, frames], contiguous, dtype of `samples`; computed in float32, or float64 for float64.
        Raises:
            ValueError, TypeError: a shape, dtype or device that is not served.
        """
        self._check(samples, past)
        with _without_autocast(samples.device.type):
            dtype = accumulate_dtype(samples.dtype)
            frames = self._pad(samples.to(dtype), past).unfold(-1, self.n_fft, self.hop)
            spectrum = torch.view_as_real(torch.fft.rfft(frames * self.window.to(dtype)))
            energy = spectrum.square().sum(-1) if self.power == 2 else torch.linalg.vector_norm(spectrum, dim=-1)
            mel = (energy @ self.filterbank.to(dtype).T).transpose(-1, -2)
            if self.log != "none":
                mel = mel.clamp_min(self.floor)
                mel = mel.log() if self.log == "log" else mel.log10()
        return mel.to(samples.dtype).contiguous()

    def next_past(self, samples: torch.Tensor, past: torch.Tensor | None = None) -> torch.Tensor:
        """The `past` of the piece after these samples, [..., past_samples], given the `past` of these."""
        self._check(samples, past)
        return self._with_past(samples, past)[..., samples.shape[-1] :].clone()

    def extra_repr(self) -> str:
        return (
            f"{self.sample_rate} Hz, n_fft={self.n_fft}, hop={self.hop}, n_mels={self.n_mels}, scale={self.scale!r}, "
            f"norm={self.norm!r}, power={self.power}, log={self.log!r}, padding={self.padding!r}"
        )

    def _exact_filterbank(self) -> torch.Tensor:
        return mel_filterbank(
            self.sample_rate, self.n_fft, self.n_mels, self.f_min, self.f_max, scale=self.scale, norm=self.norm
        )

    def _with_past(self, samples: torch.Tensor, past: torch.Tensor | None) -> torch.Tensor:
        if past is None:
            return F.pad(samples, (self.past_samples, 0))
        return torch.cat([past.to(samples.dtype), samples], dim=-1)

    def _pad(self, samples: torch.Tensor, past: torch.Tensor | None) -> torch.Tensor:
        if self.padding == "causal":
            return self._with_past(samples, past)
        side = self.n_fft // 2
        rows = samples.reshape(-1, 1, samples.shape[-1])  # reflection is not served for vectors
        return F.pad(rows, (side, side), mode="reflect").reshape(*samples.shape[:-1], -1)

    def _check(self, samples: torch.Tensor, past: torch.Tensor | None) -> None:
        _expect_waveform("samples", samples)
        n = samples.shape[-1]
        if self.padding == "causal":
            expect(n > 0 and n % self.hop == 0, "samples", f"hold a positive multiple of hop = {self.hop}", samples)
        else:
            expect(n > self.n_fft // 2, "samples", f"hold more than n_fft // 2 = {self.n_fft // 2}", samples)
        expect(samples.device == self.window.device, "samples", f"be on {self.window.device} as the module is", samples)
        if past is not None:
            expect(self.padding == "causal", "past", 'be None unless padding="causal"', past)
            _expect_waveform("past", past)
            shape = (*samples.shape[:-1], self.past_samples)
            expect(tuple(past.shape) == shape, "past", f"be [..., n_fft - hop] = {list(shape)}", past)
            expect(past.dtype == samples.dtype, "past", f"be {samples.dtype} as samples are", past)
            expect(past.device == samples.device, "past", f"be on {samples.device} as samples are", past)

    def _warn_of_empty_filters(self) -> None:
        empty = (self._exact_filterbank().amax(1) == 0).nonzero()[:, 0].tolist()
        if empty:
            warnings.warn(
                f"{len(empty)} of {self.n_mels} mel filters hold no frequency of an FFT of {self.n_fft} samples "
                f"(the first is filter {empty[0]}): take a longer n_fft or fewer n_mels",
                stacklevel=3,
            )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LogMel:
        """Every `.to(...)`, `.half()` and `.to_empty()` passes here: the buffers are rebuilt, never rounded."""
        before = self.window
        super()._apply(fn, recurse)
        if self.window is not before:
            self.reset_buffers()
        return self


def _without_autocast(kind: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast off on a kind of device; tensors on "meta" have none."""
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def mel_filterbank(
    sample_rate: int,
    n_fft: int,
    n_mels: int,
    f_min: float = 0.0,
    f_max: float | None = None,
    *,
    scale: Scale = "slaney",
    norm: Norm = "slaney",
) -> torch.Tensor:
    """Triangular mel filters over the bins of a real FFT: float64 [n_mels, n_fft // 2 + 1] on the CPU.

    Filter i rises from corner i to corner i + 1 and falls to corner i + 2, linearly in Hz; the n_mels + 2 corners are
    equally spaced in mel. Arguments as in `LogMel`; frequencies in Hz.
    """
    f_max = sample_rate / 2 if f_max is None else f_max
    to_mel, to_hz = (_hz_to_htk, _htk_to_hz) if scale == "htk" else (_hz_to_slaney, _slaney_to_hz)
    low_mel, high_mel = to_mel(torch.tensor([f_min, f_max], dtype=torch.float64, device="cpu")).tolist()
    corners = to_hz(torch.linspace(low_mel, high_mel, n_mels + 2, dtype=torch.float64, device="cpu"))[:, None]
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64, device="cpu") * sample_rate / n_fft
    low, peak, high = corners[:-2], corners[1:-1], corners[2:]
    bank = torch.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)).clamp_min(0)
    return bank * (2 / (high - low)) if norm == "slaney" else bank


# Slaney's scale: 3 mel for each 200 Hz up to 1 kHz (15 mel), above it 27 mel for each factor of 6.4.
_KNEE_HZ, _KNEE_MEL, _HZ_PER_MEL, _LOG_STEP = 1000.0, 15.0, 200 / 3, math.log(6.4) / 27


def _hz_to_slaney(hz: torch.Tensor) -> torch.Tensor:
    above = _KNEE_MEL + (hz.clamp_min(_KNEE_HZ) / _KNEE_HZ).log() / _LOG_STEP
    return torch.where(hz < _KNEE_HZ, hz / _HZ_PER_MEL, above)


def _slaney_to_hz(mel: torch.Tensor) -> torch.Tensor:
    return torch.where(mel < _KNEE_MEL, mel * _HZ_PER_MEL, _KNEE_HZ * ((mel - _KNEE_MEL) * _LOG_STEP).exp())


def _hz_to_htk(hz: torch.Tensor) -> torch.Tensor:
    return 2595 * (1 + hz / 700).log10()


def _htk_to_hz(mel: torch.Tensor) -> torch.Tensor:
    return 700 * (10 ** (mel / 2595) - 1)


def _expect_waveform(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, was {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be floating point (divide PCM by its full scale first), was {describe(value)}")
    expect(value.ndim >= 1, name, "be [..., samples]", value)
