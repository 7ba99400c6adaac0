"""Weights on disk: `config.json` and safetensors, as the Hugging Face Hub lays them out."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from mirasol.config import Config

_CONFIG = "config.json"
_Module = TypeVar("_Module", bound=nn.Module)


def save(model: nn.Module, config: Config, folder: Path) -> None:
    """Write the configuration and the weights (in shards where they are large) into `folder`."""
    from huggingface_hub import save_torch_model

    folder.mkdir(parents=True, exist_ok=True)
    config.save(folder / _CONFIG)
    save_torch_model(model, folder)


def locate(name: str | Path) -> Path:
    """The folder of a checkpoint: `name` itself, or the Hub's repository of that name, fetched.

    Raises:
        FileNotFoundError: neither.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / _CONFIG).is_file():
            raise FileNotFoundError(f"name must be a folder with {_CONFIG}, was {str(name)!r}, which has none")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"name must be a folder or a repository of the Hugging Face Hub, was {str(name)!r}: {error}"
        ) from error


def load(model: _Module, folder: Path, *, dtype: torch.dtype | None, device: torch.device) -> _Module:
    """Fill a model that lies on `meta` with the weights in `folder`; every weight must be there, and none too many.

    Raises:
        ValueError: missing, unexpected or misshapen weights, by name.
    """
    from safetensors.torch import load_file

    weights: dict[str, torch.Tensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} must hold *.safetensors files, and holds none")
    for file in files:
        weights.update(load_file(file, device=str(device)))
    expected = model.state_dict()
    problems = [f"missing {name}" for name in expected if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in expected]
    problems += [
        f"{name} is {list(weights[name].shape)}, expected {list(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if problems:
        raise ValueError(f"the weights in {folder} do not fit {_CONFIG}: " + "; ".join(problems[:8]))
    # Also brings back what checkpoints do not hold: the spectrogram rebuilds its buffers at every move.
    model.to_empty(device=device)
    model.load_state_dict(weights, assign=True)
    return model.to(dtype=dtype).eval() if dtype is not None else model.eval()
