"""`mirasol.Model`: the picture of the paper, in reading order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mirasol import checkpoint, generation
from mirasol.audiovideo import AudioVideoTransformer, Reconstruction
from mirasol.batch import Clips, check_latents, check_text, expect_device, within_reach
from mirasol.cache import Seen
from mirasol.causal_lm import CausalLMDecoder, config_for
from mirasol.combiner import COMBINERS
from mirasol.config import Config
from mirasol.encoders.both import Both, Encoders, in_turn
from mirasol.kernels.core.checks import expect_tensor
from mirasol.layers import SINCOS_STD, init_weights, time_positions
from mirasol.losses import Losses, latent_loss, reconstruction_loss, small_copy, small_copy_features, text_loss
from mirasol.past import Past
from mirasol.records import Record, record
from mirasol.text import TextDecoder
from mirasol.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mirasol.streaming import Stream


@record
@dataclass
class Output(Record):
    """What `Model.forward` returns. Reads like a mapping too, and in order as loss, logits, latents.

    Attributes:
        loss: weighted sum of `losses`, a float32 scalar; None where no loss was asked for.
        losses: each loss, unweighted; None likewise.
        logits: [Q, L, vocab_size] of the text; None without text.
        latents: [B, T * m, av_dim], what the text decoder looks at; 0 behind a clip's end.
    """

    loss: Tensor | None
    losses: Losses | None
    logits: Tensor | None
    latents: Tensor

    _in_order = ("loss", "logits", "latents")


@dataclass
class Encoded:
    """What becomes of clips up to h. A modality that no clip has is encoded once: B and T are then 1."""

    video: Tensor  # [B, T, n_v, encoder_dim]
    audio: Tensor  # [B, T, n_a, encoder_dim]
    mel: Tensor | None  # [B, T, n_a, bins * frames]; None where there is no sound, or features came in its place
    combined: Tensor  # [B, T, m, av_dim]
    h: Tensor  # [B, T, m, av_dim]


class Model(Encoders):
    """Mirasol3B: autoregression over chunks of video and sound, and over the text that is asked of them.

    video -> tubes -> ViT \\
                            Combiner (n -> m a chunk) -> audio-video Transformer -> h -> text decoder -> text
    sound -> log-mel -> ViT /                                                     |-> next chunk's video and sound

    Every module runs for every batch, on learned tokens where video or audio is missing, so that the ranks of a
    sharded training run never wait for one another. Initialises on `meta`; call `init_weights` after `to_empty`.

    Args:
        text_decoder: a causal language model of `transformers`, with its weights, in place of our own text decoder;
            `config` takes on its vocabulary and sizes. See `mirasol.causal_lm`.

    Source: arXiv 2311.05698; what it does not state is a field of `Config`.
    """

    _no_split_modules: tuple[str, ...] = ("Block", "DecoderBlock")

    def __init__(self, config: Config, text_decoder: nn.Module | None = None):
        if not isinstance(config, Config):
            raise TypeError(f"config must be a mirasol.Config, was {type(config).__name__}")
        if text_decoder is not None:
            config = config_for(config, text_decoder)
        super().__init__(config)
        self.enter_combiner = nn.Linear(config.encoder_dim, config.combiner_dim)
        self.modality = nn.Parameter(torch.empty(2, config.combiner_dim))
        self.combiner = COMBINERS[config.combiner](config)
        self.audio_video = AudioVideoTransformer(config)
        pixels = config.reconstruction_target == "pixels"
        mel_features = config.mel_patch[0] * config.mel_patch[1]
        self.reconstruct_video = Reconstruction(config, small_copy_features(config) if pixels else config.encoder_dim)
        self.reconstruct_audio = Reconstruction(config, mel_features if pixels else config.encoder_dim)
        self.text_decoder: TextDecoder | CausalLMDecoder
        if text_decoder is None:
            self.text_decoder = TextDecoder(config)
        else:
            self.text_decoder = decoder = CausalLMDecoder(config, text_decoder)
            self._no_split_modules = (*self._no_split_modules, *decoder.no_split_modules)
        self.init_weights()

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Model:
        """A freshly initialised model of a named size: "tiny", "small", "base" or "mirasol-3b".

        Args:
            changes: fields of `Config` to set otherwise, for example `combiner="ttm"`.
        """
        return cls(Config.preset(name, **changes))

    def init_weights(self) -> None:
        """Give every parameter and buffer its initial value in place; needed once after `to_empty`.

        A language model that was given as the text decoder keeps its own.
        """
        for child in self.children():
            (child.cross if isinstance(child, CausalLMDecoder) else child).apply(init_weights)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.modality, std=SINCOS_STD)

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
        chunks: Tensor | None = None,
        times: Tensor | None = None,
        video_present: Tensor | None = None,
        audio_present: Tensor | None = None,
        video_features: Tensor | None = None,
        audio_features: Tensor | None = None,
        latents: Tensor | None = None,
        clip_of_text: Tensor | None = None,
    ) -> Output:
        """Encode clips, predict chunk after chunk and, with `text`, token after token.

        Losses are computed in training mode and wherever `labels` are given. Clips of different lengths are padded on
        the right, by anything; each gives what it gives alone.

        Args:
            video: [B, 3, T * F, H, W], uint8 (0..255) or float (0..1); F = `config.frames_per_chunk`. One
                frame is an image: a chunk that stands still.
            audio: [B, T * S] float mono samples in -1..1 at `config.sample_rate`; S = `config.samples_per_chunk`.
            text: [Q, L] int64 token ids, padded on the right by any id.
            labels: [Q, L] int64, aligned with `text` (the shift is done here); -100 does not count.
            chunks: [B] int64, chunks of each clip, 1..T; default: T.
            times: [B, T] float, when each chunk begins, in seconds; default: one chunk after the other from 0.
            video_present, audio_present: [B] or [B, T] bool; False where a clip of the batch, or a chunk of it, has
                none, its content is then ignored. A modality that is None is missing in all clips.
            video_features: [B, T, n_v, encoder_dim] in place of the video encoder's; `video` may still be given as
                the target of the reconstruction.
            audio_features: [B, T, n_a, encoder_dim], likewise.
            latents: [B, T * m, av_dim] that `encode` gave, in place of picture and sound; only the text has a loss.
            clip_of_text: [Q] int64, the clip that each text is about; default: text q is about clip q.
        Returns:
            `Output`.
        Raises:
            TypeError, ValueError: an argument of a wrong kind, shape, length or value, by name.
        """
        given = (video, audio, times, video_present, audio_present, video_features, audio_features)
        clips: Clips | None = None
        encoded: Encoded | None = None
        if text is not None:
            expect_tensor("text", text, "Q L", dtypes=(torch.int64,))
        if latents is not None:
            if any(x is not None for x in given):
                raise ValueError("latents must come without video, audio, times and features, was given beside them")
            lengths = check_latents(self.config, latents, chunks)
            batch = latents.shape[0]
        else:
            clips = Clips.check(
                self.config,
                video,
                audio,
                chunks=chunks,
                times=times,
                video_present=video_present,
                audio_present=audio_present,
                video_features=video_features,
                audio_features=audio_features,
                text=text,
            )
            batch = clips.batch
            encoded = self.encode_clips(clips)
            latents = encoded.h.flatten(1, 2)
            lengths = clips.lengths * self.config.latents_per_chunk if clips.lengths is not None else None
        logits = None
        if text is not None:
            check_text(text, labels, clip_of_text, batch, self.config.vocab_size)
            expect_device("text", text, latents.device)
            seen, lengths = within_reach(self.config, latents, lengths)
            logits = self.text_decoder(text, seen, lengths=lengths, clip_of_text=clip_of_text)
        else:
            for name, tensor in (("labels", labels), ("clip_of_text", clip_of_text)):
                if tensor is not None:
                    raise ValueError(f"{name} must come with text, which was None")
        losses = None
        if self.training or labels is not None:
            losses = self._losses(clips, encoded, logits, labels, latents)
        return Output(losses.total(self.config) if losses is not None else None, losses, logits, latents)

    def encode(
        self,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        *,
        chunks: Tensor | None = None,
        times: Tensor | None = None,
        video_present: Tensor | None = None,
        audio_present: Tensor | None = None,
        video_features: Tensor | None = None,
        audio_features: Tensor | None = None,
    ) -> Tensor:
        """Latents h [B, T * m, av_dim] of clips, to be used for any number of questions.

        Arguments and errors as in `forward`.
        """
        clips = Clips.check(
            self.config,
            video,
            audio,
            chunks=chunks,
            times=times,
            video_present=video_present,
            audio_present=audio_present,
            video_features=video_features,
            audio_features=audio_features,
        )
        return self.encode_clips(clips).h.flatten(1, 2)

    def features(
        self,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        *,
        video_present: Tensor | None = None,
        audio_present: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the encoders make of clips: `video_features` [B, T, n_v, d] and `audio_features` [B, T, n_a, d].

        Arguments and errors as in `forward`.
        """
        clips = Clips.check(self.config, video, audio, video_present=video_present, audio_present=audio_present)
        seen, heard, _ = self.encoded(clips)
        shape = (clips.batch, clips.chunks, -1, -1)
        return seen.expand(shape), heard.expand(shape)

    def stream(
        self,
        batch: int = 1,
        *,
        tokenizer: Tokenizer | None = None,
        memory: int | None = None,
        sinks: int = 0,
        grow: bool = False,
        graphs: bool | None = None,
    ) -> Stream:
        """Watch and listen chunk after chunk, in bounded memory, and answer at any time: see `mirasol.streaming`.

        Args:
            batch: B streams that one call may push together.
            tokenizer: for questions in words.
            memory: chunks that the parts keep whose windows (`combiner_window`, `av_window`, `text_window`) the
                configuration leaves open. The stream then gives what a model with these windows gives for the whole
                clip; up to `memory` chunks, what this one does.
            sinks: first chunks that these parts keep beside them.
            grow: let them keep all chunks instead.
            graphs: capture steps in CUDA graphs; default: on a CUDA device, unless what is kept grows.
        Raises:
            ValueError: what is kept would grow with every chunk, and neither `memory` nor `grow` was given; a model
                whose chunks see later ones.
        """
        from mirasol.streaming import Stream

        return Stream(self, batch, tokenizer=tokenizer, memory=memory, sinks=sinks, grow=grow, graphs=graphs)

    @torch.no_grad()
    def see(self, latents: Tensor, *, chunks: Tensor | None = None) -> Seen:
        """What the text decoder looks at of clips, for `mirasol.generation`; any number of questions share it.

        Args:
            latents: [B, T * m, av_dim] that `encode` gave, `chunks` [B] as it was given there.
        Raises:
            TypeError, ValueError: an argument of a wrong kind, shape or value, by name.
        """
        latents, lengths = within_reach(self.config, latents, check_latents(self.config, latents, chunks))
        return self.text_decoder.see(latents, lengths)

    @torch.no_grad()
    def generate(
        self,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        prompt: Tensor | None = None,
        *,
        latents: Tensor | None = None,
        chunks: Tensor | None = None,
        times: Tensor | None = None,
        video_present: Tensor | None = None,
        audio_present: Tensor | None = None,
        video_features: Tensor | None = None,
        audio_features: Tensor | None = None,
        clip_of_text: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue `prompt` [Q, L] (default: one bos token for each clip).

        Args:
            latents: what `encode` gave, in place of picture and sound; `chunks` belongs to it then.
            clip_of_text: [Q], the clip that each prompt is about; default: prompt q is about clip q.
            options: those of `mirasol.generation.generate`: `max_new_tokens`, `do_sample`, `num_beams`, ...; and
                `stop_strings`, which end a row, with the `tokenizer` that its text is read by.
            Others as in `forward`.
        Returns:
            [Q * num_return_sequences, L + new] int64: prompt and continuation, then pad_id.
        """
        with generation.evaluating(self):
            if latents is None:
                latents = self.encode(
                    video,
                    audio,
                    chunks=chunks,
                    times=times,
                    video_present=video_present,
                    audio_present=audio_present,
                    video_features=video_features,
                    audio_features=audio_features,
                )
            seen = self.see(latents, chunks=chunks)
            return generation.generate(
                self.text_decoder, self.config, seen, prompt, clip_of_text=clip_of_text, **options
            )

    @torch.no_grad()
    def score(
        self,
        latents: Tensor,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[Sequence[int]]],
        *,
        chunks: Tensor | None = None,
        clip_of_text: Tensor | None = None,
    ) -> Tensor:
        """How likely each of some answers is: for multiple choice, and for classes by name.

        Args:
            latents: [B, T * m, av_dim] that `encode` gave, `chunks` [B] as it was given there.
            prompts: Q lists of token ids, at least one each (`mirasol.tokenizer.encode_prompt`).
            answers: for each prompt its choices, lists of token ids with the end (`encode_answer`).
            clip_of_text: [Q], the clip that each prompt is about; default: prompt q is about clip q.
        Returns:
            [Q, C] float32, log-probability of each answer in nats, summed over its tokens; -inf behind the last choice
            of a prompt that has fewer than C.
        Raises:
            TypeError, ValueError: an argument of a wrong kind, shape or value, by name.
        """
        with generation.evaluating(self):
            seen = self.see(latents, chunks=chunks)
            return generation.score(self.text_decoder, self.config, seen, prompts, answers, clip_of_text=clip_of_text)

    def save_pretrained(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Replace the checkpoint in `folder` in one step; `from_pretrained` and the Hugging Face Hub understand it.

        The folder holds the old checkpoint or the new one, whole, at every moment; other files stay. A model that is
        sharded (FSDP2) is saved by all ranks together.

        Args:
            tokenizer: travels with the weights; `mirasol.load_tokenizer(folder)` gives it back.
        Raises:
            ValueError: a tokenizer with more ids than `config.vocab_size`.
        """
        checkpoint.save(self, self.config, Path(folder), tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        text_decoder: nn.Module | None = None,
        **changes: Any,
    ) -> Model:
        """Load what `save_pretrained` wrote, from a folder or a Hub repository, in evaluation mode.

        Args:
            dtype: of the floating-point weights; default: as they were saved.
            text_decoder: takes up the saved weights of a language model that `transformers` cannot build by itself.
            changes: fields of `Config` to set otherwise, for example `text_weight=10.0`; no shape may change.
        Raises:
            FileNotFoundError: nothing there, or a file of the checkpoint is missing, by name.
            ValueError: a broken file, weights that do not fit the configuration, an unknown field, by name.
        """
        device = torch.device(device)
        saved = checkpoint.read(checkpoint.locate(name), changes, device)
        language_model = text_decoder if text_decoder is not None else saved.build_language_model()
        with torch.device("meta"):
            model = cls(saved.config, text_decoder=language_model)
        return checkpoint.fill(model, saved, dtype=dtype, device=device)

    def encode_clips(self, clips: Clips, past: Past | None = None, both: Both = in_turn) -> Encoded:
        """All up to h. With a past, one chunk of each row whose turn it is, which the past then holds too."""
        video, audio, mel = self.encoded(clips, past, both)
        shape = (clips.batch, clips.chunks, -1, -1)
        x = torch.cat(
            [
                (self.enter_combiner(video) + self.modality[0]).expand(shape),
                (self.enter_combiner(audio) + self.modality[1]).expand(shape),
            ],
            dim=2,
        )
        if self.config.combiner != "ttm" or self.config.ttm_time_stamps:
            x = x + time_positions(clips.times, self.config.seconds_per_chunk, x.shape[-1], x)
        combined = self.combiner(x, past.combiner if past else None)
        h = self.audio_video(combined, clips.times, clips.lengths, past.audio_video if past else None)
        if clips.lengths is not None:
            h = torch.where(clips.chunks_that_exist()[:, :, None, None], h, 0)
        return Encoded(video, audio, mel, combined, h)

    def _losses(
        self, clips: Clips | None, encoded: Encoded | None, logits: Tensor | None, labels: Tensor | None, like: Tensor
    ) -> Losses:
        """What weighs 0 is not computed, but for the latent loss, which tells whether chunks are told apart."""
        config = self.config
        nothing = like.new_zeros((), dtype=torch.float32)
        text = text_loss(logits, labels) if logits is not None and labels is not None else nothing
        if clips is None or encoded is None:
            return Losses(nothing, nothing, nothing, text, nothing)
        exists = clips.chunks_that_exist()
        latent, constant = latent_loss(self.audio_video.predict(encoded.h[:, :-1]), encoded.combined, exists)
        video: Tensor | None = None
        audio: Tensor | None = encoded.mel
        if config.reconstruction_target == "features":
            video = encoded.video if clips.has_video else None
            audio = encoded.audio if clips.has_audio else None
        elif config.video_weight and clips.video is not None:
            video = small_copy(clips.video, config)
        return Losses(
            latent=latent,
            video=nothing
            if config.video_weight == 0
            else _next_chunk_loss(self.reconstruct_video, encoded.h, video, clips.chunks_with_video()),
            audio=nothing
            if config.audio_weight == 0
            else _next_chunk_loss(self.reconstruct_audio, encoded.h, audio, clips.chunks_with_audio()),
            text=text,
            latent_constant=constant,
        )


def _next_chunk_loss(reconstruct: Reconstruction, h: Tensor, target: Tensor | None, counts: Tensor) -> Tensor:
    """Every rank of a sharded run runs the module, on one chunk where there is nothing to compare it with."""
    if target is None or h.shape[1] == 1:
        return torch.where(h.new_zeros((), dtype=torch.bool), reconstruct(h[:1, :1], 1).float().mean(), 0.0)
    return reconstruction_loss(reconstruct(h[:, :-1], target.shape[2]), target[:, 1:], counts[:, 1:])
