"""Log-mel spectrograms: strided frames, a real FFT and a bank of triangular filters."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mirasol.kernels.core.checks import FLOATS, describe, expect, expect_int
from mirasol.kernels.core.precision import accumulate_dtype

FLOOR = 1e-6
"""Smallest energy that the logarithm sees."""


class LogMel(nn.Module):
    """Causal log-mel spectrogram of a waveform: `log(max(filterbank |rfft(hann * frame)|^2, 1e-6))`.

    `n_fft - hop` zeros stand on the left: frame t ends just before sample (t + 1) hop, there are samples / hop frames,
    and a later sample never changes an earlier frame.

    Args:
        sample_rate: samples per second of the input, Hz.
        n_fft: samples in a frame; also the length of the periodic Hann window and of the FFT.
        hop: samples from one frame to the next, at most `n_fft`.
        n_mels: triangular filters from 0 Hz to half the sample rate, as `mel_filterbank` gives them.
    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type.
    Warns:
        UserWarning: where `n_fft` is too short for `n_mels`, so that some filters hold no frequency and are always 0.

    The two buffers are not saved in checkpoints. They are computed in float64, kept in float32 or wider whatever the
    model is cast to, and rebuilt by every move between devices or dtypes, so that `to_empty` after an initialisation
    on "meta" restores them; `reset_buffers` does the same by hand.
    """

    window: torch.Tensor
    filterbank: torch.Tensor

    def __init__(self, sample_rate: int = 16000, n_fft: int = 400, hop: int = 160, n_mels: int = 128) -> None:
        super().__init__()
        for name, value in (("sample_rate", sample_rate), ("n_fft", n_fft), ("hop", hop), ("n_mels", n_mels)):
            expect_int(name, value)
        expect(hop <= n_fft, "hop", f"be at most n_fft = {n_fft}: samples between frames would be lost", hop)
        self.sample_rate, self.n_fft, self.hop, self.n_mels = sample_rate, n_fft, hop, n_mels
        for name, shape in (("window", [n_fft]), ("filterbank", [n_mels, n_fft // 2 + 1])):
            self.register_buffer(name, torch.empty(shape, dtype=torch.float32), persistent=False)
        self.reset_buffers()
        empty = (mel_filterbank(sample_rate, n_fft, n_mels).amax(1) == 0).nonzero()[:, 0].tolist()
        if empty:
            said = f"{len(empty)} of {n_mels} mel filters hold no frequency of an FFT of {n_fft} samples"
            warnings.warn(f"{said} (the first is filter {empty[0]}): take a longer n_fft or fewer n_mels", stacklevel=2)

    @property
    def past_samples(self) -> int:
        """Samples of the past that a frame reaches back to: `n_fft - hop`."""
        return self.n_fft - self.hop

    def reset_buffers(self) -> None:
        """Compute window and filterbank again, on the device where they are."""
        device, dtype = self.window.device, accumulate_dtype(self.window.dtype)
        window = torch.hann_window(self.n_fft, periodic=True, dtype=torch.float64, device="cpu")
        filterbank = mel_filterbank(self.sample_rate, self.n_fft, self.n_mels)
        self.window, self.filterbank = window.to(device, dtype), filterbank.to(device, dtype)

    def forward(self, samples: torch.Tensor, past: torch.Tensor | None = None) -> torch.Tensor:
        """Spectrogram of a clip, or of its next piece.

        Args:
            samples: [..., samples], floating point, in -1 .. 1 by custom; a multiple of `hop`, so that none is dropped.
            past: [..., past_samples], the samples just before these, as `next_past` returns them; None at the start of
                a clip. Piece after piece then equals the whole clip.
        Returns:
            [..., n_mels, samples / hop], contiguous, dtype of `samples`; computed in float32, or float64 for float64.
        Raises:
            ValueError, TypeError: a shape, dtype or device that is not served.
        """
        self._check(samples, past)
        kind, dtype = samples.device.type, accumulate_dtype(samples.dtype)
        # Tensors on "meta" know no autocast.
        with contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
            frames = self._with_past(samples.to(dtype), past).unfold(-1, self.n_fft, self.hop)
            spectrum = torch.view_as_real(torch.fft.rfft(frames * self.window.to(dtype)))
            mel = (spectrum.square().sum(-1) @ self.filterbank.to(dtype).T).transpose(-1, -2)
            mel = mel.clamp_min(FLOOR).log()
        return mel.to(samples.dtype).contiguous()

    def next_past(self, samples: torch.Tensor, past: torch.Tensor | None = None) -> torch.Tensor:
        """The `past` of the piece after these samples, [..., past_samples], given the `past` of these."""
        self._check(samples, past)
        return self._with_past(samples, past)[..., samples.shape[-1] :].clone()

    def extra_repr(self) -> str:
        return f"{self.sample_rate} Hz, n_fft={self.n_fft}, hop={self.hop}, n_mels={self.n_mels}"

    def _with_past(self, samples: torch.Tensor, past: torch.Tensor | None) -> torch.Tensor:
        if past is None:
            return F.pad(samples, (self.past_samples, 0))
        return torch.cat([past.to(samples.dtype), samples], dim=-1)

    def _check(self, samples: torch.Tensor, past: torch.Tensor | None) -> None:
        _expect_waveform("samples", samples)
        n = samples.shape[-1]
        expect(n > 0 and n % self.hop == 0, "samples", f"hold a positive multiple of hop = {self.hop}", samples)
        expect(samples.device == self.window.device, "samples", f"be on {self.window.device} as the module is", samples)
        if past is not None:
            _expect_waveform("past", past)
            shape = (*samples.shape[:-1], self.past_samples)
            expect(tuple(past.shape) == shape, "past", f"be [..., n_fft - hop] = {list(shape)}", past)
            expect(past.dtype == samples.dtype, "past", f"be {samples.dtype} as samples are", past)
            expect(past.device == samples.device, "past", f"be on {samples.device} as samples are", past)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LogMel:
        """Every `.to(...)`, `.half()` and `.to_empty()` passes here: the buffers are rebuilt, never rounded."""
        before = self.window
        super()._apply(fn, recurse)
        if self.window is not before:
            self.reset_buffers()
        return self


def mel_filterbank(sample_rate: int, n_fft: int, n_mels: int) -> torch.Tensor:
    """Triangular mel filters over the bins of a real FFT: float64 [n_mels, n_fft // 2 + 1] on the CPU.

    Filter i rises from corner i to corner i + 1 and falls to corner i + 2, linearly in Hz, and has unit area over Hz.
    The n_mels + 2 corners are equally spaced in mel, from 0 Hz to half the sample rate. Source: M. Slaney, Auditory
    Toolbox (1998), as in `librosa.filters.mel`: 3 mel for each 200 Hz up to 1 kHz (15 mel), above it 27 mel for each
    factor of 6.4.
    """
    knee_hz, knee_mel, hz_per_mel, log_step = 1000.0, 15.0, 200 / 3, math.log(6.4) / 27
    top = sample_rate / 2
    top_mel = top / hz_per_mel if top < knee_hz else knee_mel + math.log(top / knee_hz) / log_step
    mel = torch.linspace(0, top_mel, n_mels + 2, dtype=torch.float64, device="cpu")
    above = knee_hz * ((mel - knee_mel) * log_step).exp()
    corners = torch.where(mel < knee_mel, mel * hz_per_mel, above)[:, None]
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64, device="cpu") * sample_rate / n_fft
    low, peak, high = corners[:-2], corners[1:-1], corners[2:]
    bank = torch.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)).clamp_min(0)
    return bank * (2 / (high - low))


def _expect_waveform(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, was {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be floating point (divide PCM by its full scale first), was {describe(value)}")
    expect(value.ndim >= 1, name, "be [..., samples]", value)
