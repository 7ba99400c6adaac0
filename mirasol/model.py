"""`mirasol.Model`: the picture of the paper, in reading order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirasol import checkpoint, generation
from mirasol.audiovideo import AudioVideoTransformer, Reconstruction
from mirasol.batch import Clips, check_text
from mirasol.combiner import MeanCombiner, NoCombiner, TransformerCombiner, TTMCombiner
from mirasol.config import Config
from mirasol.encoders.audio import MelEmbedding
from mirasol.encoders.video import TubeEmbedding
from mirasol.layers import ViT, init_weights, sequence_positions
from mirasol.losses import Losses, latent_loss, reconstruction_loss, small_copy, small_copy_features, text_loss
from mirasol.text import TextDecoder

_COMBINERS = {"transformer": TransformerCombiner, "ttm": TTMCombiner, "mean": MeanCombiner, "none": NoCombiner}


@dataclass
class Output:
    """What `Model.forward` returns.

    Attributes:
        loss: weighted sum of `losses`, a float32 scalar; None where no loss was asked for.
        losses: each loss, unweighted; None likewise.
        logits: [B, L, vocab_size] of the text; None without text.
        latents: [B, T * m, av_dim], what the text decoder looks at.
    """

    loss: Tensor | None
    losses: Losses | None
    logits: Tensor | None
    latents: Tensor


@dataclass
class _Encoded:
    video: Tensor  # [B, T, n_v, encoder_dim]
    audio: Tensor  # [B, T, n_a, encoder_dim]
    mel: Tensor | None  # [B, T, n_a, bins * frames]; None where features came in its place
    combined: Tensor  # [B, T, m, av_dim]
    h: Tensor  # [B, T, m, av_dim]


class Model(nn.Module):
    """Mirasol3B: autoregression over chunks of video and sound, and over the text that is asked of them.

    video -> tubes -> ViT \\
                            Combiner (n -> m a chunk) -> audio-video Transformer -> h -> text decoder -> text
    sound -> log-mel -> ViT /                                                     |-> next chunk's video and sound

    Every module runs for every batch, on learned tokens where video or audio is missing, so that the ranks of a
    sharded training run never wait for one another. Initialises on `meta`; call `init_weights` after `to_empty`.

    Source: arXiv 2311.05698; what it does not state is a field of `Config`.
    """

    _no_split_modules = ("Block", "DecoderBlock")

    def __init__(self, config: Config):
        super().__init__()
        if not isinstance(config, Config):
            raise TypeError(f"config must be a mirasol.Config, was {type(config).__name__}")
        self.config = config
        vit = (config.encoder_dim, config.encoder_layers, config.encoder_heads, config.mlp_ratio, config.norm_eps)
        self.video_embedding = TubeEmbedding(config)
        self.video_vit = ViT(*vit)
        self.audio_embedding = MelEmbedding(config)
        self.audio_vit = None if config.share_encoders else ViT(*vit)
        self.enter_combiner = nn.Linear(config.encoder_dim, config.combiner_dim)
        self.modality = nn.Parameter(torch.empty(2, config.combiner_dim))
        self.combiner = _COMBINERS[config.combiner](config)
        self.audio_video = AudioVideoTransformer(config)
        pixels = config.reconstruction_target == "pixels"
        mel_features = config.mel_patch[0] * config.mel_patch[1]
        self.reconstruct_video = Reconstruction(config, small_copy_features(config) if pixels else config.encoder_dim)
        self.reconstruct_audio = Reconstruction(config, mel_features if pixels else config.encoder_dim)
        self.text_decoder = TextDecoder(config)
        self.init_weights()

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Model:
        """A freshly initialised model of a named size: "tiny", "small", "base" or "mirasol-3b".

        Args:
            changes: fields of `Config` to set otherwise, for example `combiner="ttm"`.
        """
        return cls(Config.preset(name, **changes))

    def init_weights(self) -> None:
        """Give every parameter and buffer its initial value in place; needed once after `to_empty`."""
        self.apply(init_weights)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.modality, std=0.02)

    def num_parameters(self) -> dict[str, int]:
        """Numbers of parameters: "audio_video" (all up to h and the reconstruction), "text", "total"."""
        text = sum(p.numel() for p in self.text_decoder.parameters())
        total = sum(p.numel() for p in self.parameters())
        return {"audio_video": total - text, "text": text, "total": total}

    def forward(
        self,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        text: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        video_present: Tensor | None = None,
        audio_present: Tensor | None = None,
        video_features: Tensor | None = None,
        audio_features: Tensor | None = None,
    ) -> Output:
        """Encode clips, predict chunk after chunk and, with `text`, token after token.

        Losses are computed in training mode and wherever `labels` are given.

        Args:
            video: [B, 3, T * F, H, W], uint8 (0..255) or float (0..1); F = `config.frames_per_chunk`. One
                frame is an image: a chunk that stands still.
            audio: [B, T * S] float mono samples in -1..1 at `config.sample_rate`; S = `config.samples_per_chunk`.
            text: [B, L] int64 token ids, right-padded with `config.pad_id`.
            labels: [B, L] int64, aligned with `text` (the shift is done here); -100 and pad_id do not count.
            video_present, audio_present: [B] bool; False where a clip of the batch has none, its content is then
                ignored. A modality that is None is missing in all clips.
            video_features: [B, T, n_v, encoder_dim] in place of the video encoder's; `video` may still be given as
                the target of the reconstruction.
            audio_features: [B, T, n_a, encoder_dim], likewise.
        Returns:
            `Output`.
        Raises:
            TypeError, ValueError: an argument of a wrong kind, shape or length, by name.
        """
        if text is not None:
            check_text(self.config, text, labels)
        elif labels is not None:
            raise ValueError("labels must come with text, which was None")
        clips = Clips.check(
            self.config, video, audio, video_present, audio_present, video_features, audio_features, text
        )
        encoded = self._encode(clips)
        latents = encoded.h.flatten(1, 2)
        logits = self.text_decoder(text, latents) if text is not None else None
        losses = None
        if self.training or labels is not None:
            losses = self._losses(clips, encoded, logits, labels)
        return Output(losses.total(self.config) if losses is not None else None, losses, logits, latents)

    def encode(
        self,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        *,
        video_present: Tensor | None = None,
        audio_present: Tensor | None = None,
        video_features: Tensor | None = None,
        audio_features: Tensor | None = None,
    ) -> Tensor:
        """Latents h [B, T * m, av_dim] of clips, to be used for any number of questions.

        Arguments and errors as in `forward`.
        """
        clips = Clips.check(self.config, video, audio, video_present, audio_present, video_features, audio_features)
        return self._encode(clips).h.flatten(1, 2)

    @torch.no_grad()
    def generate(
        self,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        prompt: Tensor | None = None,
        *,
        latents: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue `prompt` [B, L] (default: one bos token) for each clip.

        Args:
            latents: what `encode` gave, in place of video and audio; the way for clips that lack one of these.
            options: those of `mirasol.generation.generate`: `max_new_tokens`, `do_sample`, `num_beams`, ...
        Returns:
            [B * num_return_sequences, L + new] int64: prompt and continuation, then pad_id.
        """
        training = self.training
        self.eval()
        try:
            if latents is None:
                latents = self.encode(video, audio)
            return generation.generate(self.text_decoder, latents, prompt, **options)
        finally:
            self.train(training)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and safetensors files that `from_pretrained` and the Hugging Face Hub understand."""
        checkpoint.save(self, self.config, Path(folder))

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> Model:
        """Load what `save_pretrained` wrote, from a folder or a Hub repository.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: weights that do not fit the configuration, by name.
        """
        folder = checkpoint.locate(name)
        with torch.device("meta"):
            model = cls(Config.load(folder / "config.json"))
        return checkpoint.load(model, folder, dtype=dtype, device=torch.device(device))

    def _encode(self, clips: Clips) -> _Encoded:
        video, audio = clips.video_features, clips.audio_features
        mel = None
        if video is None:
            video = _per_chunk(self.video_vit, self.video_embedding(clips.video, clips.video_present))
        if audio is None:
            mel = self.audio_embedding.patches(clips.audio)
            audio_vit = self.audio_vit if self.audio_vit is not None else self.video_vit
            audio = _per_chunk(audio_vit, self.audio_embedding(mel, clips.audio_present))
        video_in = self.enter_combiner(video) + self.modality[0]
        audio_in = self.enter_combiner(audio) + self.modality[1]
        x = torch.cat([video_in, audio_in], dim=2)
        combined = self.combiner(x + sequence_positions(0, x.shape[1], x.shape[-1], x)[:, None])
        return _Encoded(video, audio, mel, combined, self.audio_video(combined))

    def _losses(self, clips: Clips, encoded: _Encoded, logits: Tensor | None, labels: Tensor | None) -> Losses:
        text = encoded.h.new_zeros((), dtype=torch.float32)
        if logits is not None and labels is not None:
            text = text_loss(logits, labels, self.config.pad_id)
        if self.config.reconstruction_target == "features":
            video, audio = encoded.video, encoded.audio
        else:
            video = small_copy(clips.video, self.config)
            audio = encoded.mel if encoded.mel is not None else self.audio_embedding.patches(clips.audio)
        return Losses(
            latent=latent_loss(self.audio_video.predict(encoded.h), encoded.combined),
            video=_next_chunk_loss(self.reconstruct_video, encoded.h, video, clips.video_present),
            audio=_next_chunk_loss(self.reconstruct_audio, encoded.h, audio, clips.audio_present),
            text=text,
        )


def _per_chunk(vit: ViT, tokens: Tensor) -> Tensor:
    """Run a ViT on [B, T, n, d] with the chunks folded into the batch."""
    return vit(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])


def _next_chunk_loss(reconstruct: Reconstruction, h: Tensor, target: Tensor, present: Tensor) -> Tensor:
    return reconstruction_loss(reconstruct(h, target.shape[2]), target, present)
