"""What a training run begins with: questions, clips, model and tokenizer."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirasol import checkpoint
from mirasol.config import Config
from mirasol.data import ClipSource, Example, cache_features
from mirasol.encoders.image_vit import load_image_vit
from mirasol.kernels.core.checks import expect
from mirasol.model import Model
from mirasol.tokenizer import ByteTokenizer, Tokenizer, expect_vocabulary, import_transformers, load_tokenizer
from mirasol.training.optim import parameters_of
from mirasol.training.options import TrainOptions
from mirasol.training.processes import Processes


def build(options: TrainOptions) -> tuple[Model, Tokenizer]:
    """Make or load the model that the options name, on the CPU in float32, and its tokenizer.

    Raises:
        TypeError, ValueError, OSError: what cannot be loaded, or fields of the configuration that cannot work, by name.
    """
    if options.init is not None:
        model, tokenizer = _pretrained(options)
    else:
        model, tokenizer = _new(options)
    expect_vocabulary(tokenizer, model.config.vocab_size)
    if options.image_vit is not None:
        weights = _read_weights(Path(options.image_vit))
        load_image_vit(model.video_embedding, model.video_vit, weights)
        load_image_vit(model.audio_embedding, model.audio_vit or model.video_vit, weights)
    return model, tokenizer


def use_features(
    model: Model, examples: Sequence[Example], source: ClipSource | None, options: TrainOptions, here: Processes
) -> ClipSource:
    """What reads the features of all clips, which are encoded where they are missing, by each process its share.

    Raises:
        ValueError: encoders that learn, whose features would change at every step.
    """
    encoders = ("video_embedding", "video_vit", "audio_embedding", "audio_vit")
    learn = [part for part in encoders if any(p.requires_grad for p in parameters_of(model, part))]
    expect(not learn, "freeze", f"hold {' '.join(learn)} with features", options.freeze)
    spans = list({(example.clip, example.start, example.end): example for example in examples}.values())
    cache = cache_features(
        model,
        spans[here.rank :: here.world],
        str(options.features),
        max_chunks=options.max_chunks,
        workers=options.workers or 0,
        source=source,
    )
    here.wait()
    return cache


def _pretrained(options: TrainOptions) -> tuple[Model, Tokenizer]:
    folder = checkpoint.locate(str(options.init))
    changes = {"text_weight": 10.0, **options.config}
    model = Model.from_pretrained(folder, dtype=torch.float32, **changes)
    return model, load_tokenizer(options.tokenizer or folder)


def _new(options: TrainOptions) -> tuple[Model, Tokenizer]:
    preset = options.preset or "small"
    if options.text_decoder is not None:
        language_model, tokenizer = _language_model(options.text_decoder)
        return Model(Config.preset(preset, **options.config), text_decoder=language_model), tokenizer
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer is not None else ByteTokenizer()
    return Model(Config.preset(preset, **{**_vocabulary(tokenizer), **options.config})), tokenizer


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("tokenizer must have an end-of-sequence id, had none")
    pad, bos = (eos if i is None else i for i in (tokenizer.pad_token_id, tokenizer.bos_token_id))
    size = max(tokenizer.vocab_size, len(tokenizer) if isinstance(tokenizer, Sized) else 0)
    return {"vocab_size": size, "pad_id": pad, "bos_id": bos, "eos_id": eos}


def _language_model(name: str) -> tuple[nn.Module, Tokenizer]:
    transformers = import_transformers()
    language_model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return language_model, transformers.AutoTokenizer.from_pretrained(name)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"image_vit must be a file of weights, was {str(path)!r}: no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    weights: Any = torch.load(path, map_location="cpu", weights_only=True)
    expect(isinstance(weights, dict), "image_vit", "hold a state dict", type(weights).__name__)
    return weights
