"""A thin PyTorch model of Mirasol3B over `mirasol.kernels`.

    import mirasol
    model = mirasol.Model.from_preset("tiny", combiner="ttm")

Importing this imports torch and nothing heavier; names below are loaded at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mirasol.config import Config as Config
    from mirasol.embedded import EMBEDDED as EMBEDDED
    from mirasol.encoders.mel import LogMel as LogMel
    from mirasol.losses import Losses as Losses
    from mirasol.media import Clip as Clip
    from mirasol.media import load as load
    from mirasol.model import Model as Model
    from mirasol.model import Output as Output
    from mirasol.tokenizer import ByteTokenizer as ByteTokenizer
    from mirasol.tokenizer import load_tokenizer as load_tokenizer

__version__ = "0.1.0"

_HOMES = {
    "Config": "config",
    "EMBEDDED": "embedded",
    "Losses": "losses",
    "Clip": "media",
    "load": "media",
    "LogMel": "encoders.mel",
    "Model": "model",
    "Output": "model",
    "ByteTokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mirasol' has no attribute {name!r}")
    return getattr(import_module(f"mirasol.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
