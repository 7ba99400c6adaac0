"""What frozen encoders make of clips, kept on the disk, so that training neither decodes nor encodes them again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mirasol.config import Config
from mirasol.kernels.core.checks import expect

from .clips import ClipSource, ClipTensors
from .loader import Loader
from .table import Example

if TYPE_CHECKING:
    from mirasol.model import Model

BEHIND_THE_ENCODERS = (
    "combine", "combined_", "ttm_", "av_", "mask_ratio", "reconstruction_", "vocab_size", "pad_id", "bos_id", "eos_id",
    "text_", "cross_every", "rotary_base", "latent_weight", "video_weight", "audio_weight",
)  # fmt: skip
"""Beginnings of the names of `Config`'s fields that the encoders' outputs do not depend on."""

log = logging.getLogger(__name__)


class FeatureCache:
    """Outputs of a model's encoders, a file for each span of a clip; a `ClipSource` that reads them.

        cache = cache_features(model, examples, folder)
        Loader(examples, model.config, tokenizer, batch_clips=8, source=cache)

    A file is found again while the encoders' weights and settings, the clip (path, size and time of change, or its
    content in shards), the span and `max_chunks` are the same; else it is missing, and never a stale one taken. So only
    encoders that are frozen gain by it: while they are trained every step changes them.

    Args:
        folder: of the files, made where it is missing.
        model: whose encoders are meant.
        source: where the clips are: `Shards`, or None for media files.
    """

    def __init__(self, folder: str | Path, model: Model, source: ClipSource | None = None) -> None:
        self.folder = Path(folder) / _encoders_key(model)
        self.source = source
        self._settings = _encoder_settings(model.config)

    def __call__(self, example: Example, config: Config, max_chunks: int) -> ClipTensors:
        """The features of an example's clip.

        Raises:
            FileNotFoundError: they are not in the cache, or the clip is gone.
            ValueError: a file that is damaged, or a `config` with other encoders.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        expect(_encoder_settings(config) == self._settings, "config", "have the encoders of the cache's model", config)
        path = self.path(example, max_chunks)
        if not path.is_file():
            raise FileNotFoundError(f"no features of {example.clip!r} as it is, by these encoders, in {self.folder}")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"features must be a safetensors file, was {str(path)!r}: {error}") from error
        return ClipTensors(
            tensors["times"],
            video_features=tensors.get("video_features"),
            audio_features=tensors.get("audio_features"),
        )

    def path(self, example: Example, max_chunks: int) -> Path:
        """Where the features of an example's clip are kept.

        Raises:
            OSError: the clip itself is gone.
        """
        fingerprint = getattr(self.source, "fingerprint", _file_fingerprint)
        key = [fingerprint(example.clip), example.start, example.end, max_chunks]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def has(self, example: Example, max_chunks: int) -> bool:
        """Whether an example's clip has features here; False for a clip that is gone."""
        try:
            return self.path(example, max_chunks).is_file()
        except OSError:
            return False

    def save(self, example: Example, max_chunks: int, clip: ClipTensors) -> None:
        """Keep features; who reads at the same time sees all of the file or none."""
        from safetensors.torch import save

        tensors = {"times": clip.times, "video_features": clip.video_features, "audio_features": clip.audio_features}
        data = save({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None})
        path = self.path(example, max_chunks)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            try:
                file.write(data)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise


def cache_features(
    model: Model,
    examples: Sequence[Example],
    folder: str | Path,
    *,
    max_chunks: int = 16,
    batch_clips: int = 8,
    workers: int = 0,
    bad_share: float = 0.05,
    source: ClipSource | None = None,
) -> FeatureCache:
    """Encode every span of `examples` that the cache lacks, on the model's device and in its dtype.

    It may be broken off and run again. Clips that cannot be read are logged and left out.

    Args:
        model: its encoders are used in evaluation mode.
        folder: of the cache.
        others: as in `Loader`, which is to be given the same `max_chunks`.
    Returns:
        the cache, as `source` for `Loader`.
    Raises:
        RuntimeError: too many clips that cannot be read, see `Loader`.
    """
    cache = FeatureCache(folder, model, source)
    spans = {(example.clip, example.start, example.end): example for example in examples}
    missing = [example for example in spans.values() if not cache.has(example, max_chunks)]
    log.info("%d of %d spans are in %s", len(spans) - len(missing), len(spans), cache.folder)
    if not missing:
        return cache
    loader = Loader(
        missing, model.config, None, batch_clips=batch_clips, max_chunks=max_chunks, workers=workers,
        bad_share=bad_share, source=source,
    )  # fmt: skip
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for batch in loader:
            if batch.repeated:
                continue
            _encode(model, batch.examples, batch.inputs, device, cache, max_chunks)
    finally:
        model.train(training)
    return cache


@torch.no_grad()
def _encode(
    model: Model,
    examples: list[Example],
    inputs: dict[str, torch.Tensor],
    device: torch.device,
    cache: FeatureCache,
    max_chunks: int,
) -> None:
    names = ("video", "audio", "video_present", "audio_present")
    given: dict[str, Any] = {name: inputs[name].to(device) for name in names if name in inputs}
    video, audio = (features.cpu() for features in model.features(**given))
    for i, (example, count) in enumerate(zip(examples, inputs["chunks"].tolist(), strict=True)):
        clip = ClipTensors(
            inputs["times"][i, :count],
            video_features=video[i, :count] if inputs["video_present"][i] else None,
            audio_features=audio[i, :count] if inputs["audio_present"][i] else None,
        )
        cache.save(example, max_chunks, clip)


def _encoder_settings(config: Config) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if not name.startswith(BEHIND_THE_ENCODERS)}


def _encoders_key(model: Model) -> str:
    """A hash of all that the encoders' outputs depend on."""
    digest = hashlib.sha256(repr(sorted(_encoder_settings(model.config).items())).encode())
    parts: tuple[nn.Module | None, ...]
    parts = (model.video_embedding, model.video_vit, model.audio_embedding, model.audio_vit)
    for number, part in enumerate(parts):
        for name, tensor in part.state_dict().items() if part is not None else ():
            digest.update(f"{number} {name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _file_fingerprint(clip: str) -> str:
    status = os.stat(clip)
    return f"{os.path.realpath(clip)} {status.st_size} {status.st_mtime_ns}"
