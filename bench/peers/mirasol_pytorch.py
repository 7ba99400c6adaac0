"""mirasol-pytorch, a public reimplementation of the same paper, and our model in the same setting.

Both have the same numbers of chunks and of tokens in a chunk, widths, heads and depths, a Combiner that sees its own
chunk, and the same text; both predict the next chunk's combined tokens, reconstruct its video and sound, and predict
the text. Depths are those of the peer's README.

What differs. The peer takes a spectrogram of as many frames a chunk as there are chunks: it lays out no other number
right. It has 8 register tokens in its encoders, computes every Combiner layer for all tokens, and reconstructs by one
linear layer: all pixels in its default form, a smaller copy in the other. Ours takes samples and pixels in uint8,
computes the last Combiner layer for m tokens, and reconstructs 28 x 28 pixels and the spectrogram by Transformers of 2
layers. Our TTM sees earlier chunks too.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.harness import Unavailable
from mirasol import Config
from mirasol.kernels import Tube

INSTALL = "pip install -c constraints.txt -e '.[peers]'"
FRAMES, MELS, VOCABULARY = 8, 128, 259
PATCH, DEPTH = 16, 4
"""Pixels along a side and frames of a patch of video; also the size of the smaller copy that is reconstructed."""
MEL_PATCH = (16, 2)


@dataclass(frozen=True)
class Setting:
    """Sizes of both models."""

    chunks: int = 16
    size: int = 128  # 128 tokens of video a chunk, and 64 of sound
    width: int = 512
    heads: int = 8
    encoder: int = 2
    combiner: int = 2
    audio_video: int = 6
    decoder: int = 6
    text: int = 64
    clips: int = 1


QUICK = Setting(chunks=4, size=32, width=128, heads=2, encoder=1, audio_video=1, decoder=1, text=8)


def config(at: Setting, combined: int, combiner: str) -> Config:
    """Our model, with `combined` tokens a chunk."""
    return Config(
        frames_per_chunk=FRAMES, image_size=at.size, tubes=(Tube((DEPTH, PATCH, PATCH), (DEPTH, PATCH, PATCH)),),
        samples_per_chunk=at.chunks * 1920, n_fft=2048, hop=1920, n_mels=MELS, mel_patch=MEL_PATCH,
        encoder_dim=at.width, encoder_layers=at.encoder, encoder_heads=at.heads,
        combiner=combiner, combined_tokens=combined,
        combiner_dim=at.width, combiner_layers=at.combiner, combiner_heads=at.heads, combiner_window=1,
        av_dim=at.width, av_layers=at.audio_video, av_heads=at.heads,
        reconstruction_dim=at.width // 2, reconstruction_heads=at.heads // 2,
        text_dim=at.width, text_layers=at.decoder, text_heads=at.heads,
    )  # fmt: skip


def inputs(at: Setting, config: Config) -> dict[str, Tensor]:
    """Clips for ours."""
    generator = torch.Generator().manual_seed(0)
    frames, text = at.chunks * FRAMES, torch.randint(0, 256, (at.clips, at.text), generator=generator)
    return {
        "video": torch.randint(0, 256, (at.clips, 3, frames, at.size, at.size), dtype=torch.uint8, generator=generator),
        "audio": 0.1 * torch.randn(at.clips, at.chunks * config.samples_per_chunk, generator=generator),
        "text": text,
        "labels": text,
    }


def peer(at: Setting, combined: int, small: bool) -> nn.Module:
    """The peer with `combined` tokens a chunk, by default or with its small reconstruction.

    Raises:
        Unavailable: not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mirasol_pytorch import Mirasol
    except ImportError as error:
        raise Unavailable(f"mirasol-pytorch cannot be imported ({INSTALL}): {error}") from error
    encoder = {"dim": at.width, "depth": at.encoder, "heads": at.heads}
    return Mirasol(
        dim=at.width, attn_heads=at.heads, num_text_tokens=VOCABULARY,
        video_image_size=at.size, video_frames_per_timechunk=FRAMES, video_patch_size=(PATCH, DEPTH),
        video_recon_patch_size=(PATCH, DEPTH) if small else None,
        audio_freq_dim=MELS, audio_time_dim_per_timechunk=at.chunks, audio_patch_size=MEL_PATCH,
        audio_encoder=encoder, video_encoder=encoder, encoder_depth=at.audio_video, decoder_depth=at.decoder,
        combiner_depth=at.combiner, combiner_output_num_tokens=combined,
    )  # fmt: skip


def peer_inputs(at: Setting) -> dict[str, Tensor]:
    """Clips for the peer: pixels in 0..1 and a spectrogram."""
    generator = torch.Generator().manual_seed(0)
    return {
        "video": torch.rand(at.clips, 3, at.chunks * FRAMES, at.size, at.size, generator=generator),
        "audio": torch.randn(at.clips, MELS, at.chunks * at.chunks, generator=generator),
        "text": torch.randint(0, 256, (at.clips, at.text), generator=generator),
    }


def peer_heads(at: Setting, combined: int, small: bool) -> int:
    """Parameters of the peer's three linear layers over all combined tokens of a chunk: most of what it has."""
    inner = combined * at.width
    pixels = 3 * (PATCH * PATCH * DEPTH if small else at.size * at.size * FRAMES)
    return inner * (inner + pixels + MELS * at.chunks)
