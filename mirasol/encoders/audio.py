"""From sound to tokens, chunk by chunk."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from mirasol.config import Config
from mirasol.encoders import present_or_missing
from mirasol.encoders.mel import LogMel
from mirasol.layers import sincos
from mirasol.past import Memory, Rows


class MelEmbedding(nn.Module):
    """Patches of every chunk's log-mel spectrogram, projected, with fixed positions in mel bins and frames.

    The spectrogram is causal: no sample after a chunk's end reaches its frames.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.mel = LogMel(config.sample_rate, config.n_fft, config.hop, config.n_mels)
        self.projection = nn.Linear(config.mel_patch[0] * config.mel_patch[1], config.encoder_dim)
        self.missing = nn.Parameter(torch.empty(config.encoder_dim))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.missing)

    def new_past(self, rows: Rows) -> Memory:
        """What a stream keeps of earlier chunks: the samples that the first frames of the next one reach back to."""
        return Memory(rows, self.mel.window.new_zeros(self.mel.past_samples, dtype=torch.float32))

    def patches(self, audio: Tensor, present: Tensor | None = None, past: Memory | None = None) -> Tensor:
        """audio [B, T * S] float -> normalised spectrogram patches [B, T, n_a, bins * frames].

        Args:
            present: [B, T]; the others are 0, and silent for those after them.
            past: what `new_past` gave, to go on from.
        """
        config = self.config
        (bins, frames), (rows, columns) = config.mel_patch, config.mel_grid
        audio = audio.float()
        if present is not None:
            chunks = audio.unflatten(1, (present.shape[1], -1))
            audio = torch.where(present[:, :, None], chunks, 0).flatten(1)
        before = past.read() if past is not None else None
        spectrogram = (self.mel(audio, before) - config.mel_mean) / config.mel_std
        if past is not None:
            past.write(self.mel.next_past(audio, before))
        patches = rearrange(spectrogram, "b (r p) (t c f) -> b t (r c) (p f)", r=rows, p=bins, c=columns, f=frames)
        return patches if present is None else torch.where(present[:, :, None, None], patches, 0)

    def forward(self, patches: Tensor, present: Tensor) -> Tensor:
        """patches [B, T, n_a, bins * frames], present [B, T] bool -> [B, T, n_a, encoder_dim]."""
        tokens = self.projection(patches.to(self.projection.weight.dtype))
        (bins, frames), (rows, columns) = self.config.mel_patch, self.config.mel_grid
        centres = torch.cartesian_prod(
            (torch.arange(rows, device=tokens.device) + 0.5) * bins,
            (torch.arange(columns, device=tokens.device) + 0.5) * frames,
        )
        return present_or_missing(tokens, present, self.missing) + sincos(centres, tokens.shape[-1]).to(tokens.dtype)
