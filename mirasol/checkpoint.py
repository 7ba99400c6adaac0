"""Weights on disk: `config.json` and safetensors, as the Hugging Face Hub lays them out."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from mirasol import atomic
from mirasol.config import Config
from mirasol.kernels.core.checks import expect
from mirasol.tokenizer import Tokenizer, expect_vocabulary, import_transformers

_CONFIG, _SINGLE = "config.json", "model.safetensors"
_Module = TypeVar("_Module", bound=nn.Module)


@dataclass
class Saved:
    """What a checkpoint holds.

    Attributes:
        weights: those of the model, by name; of parameters that are one, the first name.
        language_model: the configuration of the causal language model that decodes the text, or None.
    """

    folder: Path
    config: Config
    weights: dict[str, Tensor]
    language_model: Any = None

    def build_language_model(self) -> nn.Module | None:
        """The language model without its weights, on the CPU; what its checkpoints never hold is computed."""
        if self.language_model is None:
            return None
        transformers = import_transformers()
        from transformers.initialization import no_init_weights

        # Not on "meta": there, tables that no checkpoint holds (rotary positions) would be lost. Memory that is not
        # initialised costs nothing either.
        with no_init_weights():
            model = transformers.AutoModelForCausalLM.from_config(self.language_model)
        model.tie_weights()
        return model


def save(model: nn.Module, config: Config, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    """Replace the checkpoint in `folder` in one step by this model's, and the tokenizer where one is given.

    At every moment the folder holds the old checkpoint or the new one, whole. Other files stay. Where parameters are
    sharded (FSDP2), every rank must call this, and the first writes.

    Raises:
        ValueError: a tokenizer with more ids than `config.vocab_size`.
        RuntimeError: on the other ranks, where the first could not write.
    """
    if tokenizer is not None:
        expect_vocabulary(tokenizer, config.vocab_size)
    if not _is_sharded(model):
        _write(model, model.state_dict(), config, folder, tokenizer)
        return
    from torch import distributed
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = cast(dict[str, Tensor], get_model_state_dict(model, options=options))
    failure: list[str | None] = [None]
    try:
        if distributed.get_rank() == 0:
            _write(model, weights, config, folder, tokenizer)
    except Exception as error:
        failure[0] = repr(error)
        raise
    finally:
        distributed.broadcast_object_list(failure)  # no rank goes on before the checkpoint is whole
    if failure[0] is not None:
        raise RuntimeError(f"rank 0 could not save the checkpoint to {folder}: {failure[0]}")


def locate(name: str | Path) -> Path:
    """The folder of a checkpoint: `name` itself, or the Hub's repository of that name, fetched.

    Raises:
        FileNotFoundError: neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"name must be a folder or a repository of the Hugging Face Hub, was {str(name)!r}: {error}"
        ) from error


def read(folder: Path, changes: dict[str, Any], device: torch.device) -> Saved:
    """Everything in a checkpoint's folder, as of one save.

    Args:
        changes: fields of `Config` to set otherwise.
    Raises:
        FileNotFoundError: a file that must be there, by name.
        ValueError: a broken file, by name; a change that is no field of `Config`.
    """
    known = {field.name for field in fields(Config)}
    for name in changes:
        expect(name in known, "changes", "be fields of mirasol.Config", name)

    def read_from(root: Path) -> Saved:
        if not (root / _CONFIG).is_file():
            raise FileNotFoundError(f"{folder} must be a folder with {_CONFIG}, and has none")
        values = atomic.read_json(root / _CONFIG)
        try:
            config = Config.from_dict(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{root / _CONFIG}: {error}") from error
        if changes:
            config = Config.from_dict({**values, **changes})
        lm = None
        if (root / atomic.LM_CONFIG).is_file():
            lm = import_transformers().AutoConfig.from_pretrained(root / atomic.LM_CONFIG.parent)
        return Saved(folder, config, _read_weights(folder, device), lm)

    return atomic.consistent(folder, read_from)


def fill(model: _Module, saved: Saved, *, dtype: torch.dtype | None, device: torch.device) -> _Module:
    """Give a model on `meta` its weights; every weight must be there, and none too many.

    Raises:
        ValueError: missing, unexpected or misshapen weights, by name.
    """
    expected, first = model.state_dict(keep_vars=True), _first_names(model)
    problems = [f"missing {name}" for name in expected if first[name] not in saved.weights]
    problems += [f"unexpected {name}" for name in saved.weights if name not in expected]
    problems += [
        f"{name} is {list(value.shape)}, expected {list(expected[name].shape)}"
        for name, value in saved.weights.items()
        if name in expected and value.shape != expected[name].shape
    ]
    if problems:
        raise ValueError(f"the weights in {saved.folder} do not fit the configuration: " + "; ".join(problems[:8]))
    weights: dict[str, Tensor] = {}
    for name, place in expected.items():
        if first[name] != name:
            weights[name] = weights[first[name]]
            continue
        value = saved.weights[name]
        value = value.to(dtype) if value.is_floating_point() else value
        is_parameter = isinstance(place, nn.Parameter)
        weights[name] = nn.Parameter(value, requires_grad=place.requires_grad) if is_parameter else value
    model.load_state_dict(weights, assign=True)
    # What checkpoints do not hold: the spectrogram rebuilds its buffers at every move.
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            module.to_empty(device=device, recurse=False)
    return model.to(device=device).eval()


def _write(
    model: nn.Module, weights: dict[str, Tensor], config: Config, folder: Path, tokenizer: Tokenizer | None
) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    first = _first_names(model)
    weights = {name: value for name, value in weights.items() if first[name] == name}
    with atomic.replacing(folder) as (staged, prefix):
        config.save(staged / _CONFIG)
        language_model = getattr(model.get_submodule("text_decoder"), "lm", None)
        if language_model is not None:
            language_model.config.save_pretrained(staged / atomic.LM_CONFIG.parent)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        split = split_torch_state_dict_into_shards(weights, filename_pattern=prefix + "{suffix}.safetensors")
        for file, names in split.filename_to_tensors.items():
            shard = {name: weights[name].detach().contiguous() for name in names}
            save_file(shard, staged / file, metadata={"format": "pt"})
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (staged / atomic.INDEX).write_text(json.dumps(index), encoding="utf-8")


def _read_weights(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """The weights that the index names, in its files; without an index, those of model.safetensors."""
    from safetensors import SafetensorError, safe_open

    files: dict[str, list[str] | None] = {}
    for name, file in atomic.weight_map(folder).items():
        names = files.setdefault(file, [])
        assert names is not None
        names.append(name)
    weights: dict[str, Tensor] = {}
    for file, wanted in (files or {_SINGLE: None}).items():
        path = folder / file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing" + (f", which {atomic.INDEX} names" if files else ""))
        try:
            with safe_open(path, framework="pt", device=str(device)) as shard:
                weights.update((name, shard.get_tensor(name)) for name in wanted or shard.keys())
        except SafetensorError as error:
            raise ValueError(f"{path} must be a whole safetensors file: {error}") from error
    return weights


def _first_names(model: nn.Module) -> dict[str, str]:
    """The name under which a parameter or buffer is saved, by each of its names: the first."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in model.state_dict(keep_vars=True).items()}


def _is_sharded(model: nn.Module) -> bool:
    from torch.distributed import is_available

    if not is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
