"""Text to ids and back: bytes by default, any Hugging Face tokenizer by duck typing."""

from __future__ import annotations

import json
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch

from mirasol import atomic
from mirasol.kernels.core.checks import expect

CONFIG_FILE = "tokenizer_config.json"


@runtime_checkable
class Tokenizer(Protocol):
    """What the model asks of a tokenizer; every Hugging Face tokenizer has it."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def pad_token_id(self) -> int | None: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...
    def decode(self, ids: Any, *, skip_special_tokens: bool = ...) -> str: ...
    def save_pretrained(self, folder: str | Path, /) -> Any: ...


def encode_prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    """Ids of what stands before an answer: the start id (bos, else eos) and the question's line, where one is asked."""
    name = "bos" if tokenizer.bos_token_id is not None else "eos"
    asked = list(tokenizer.encode(question + "\n", add_special_tokens=False)) if question else []
    return [_special_id(tokenizer, name), *asked]


def encode_answer(tokenizer: Tokenizer, answer: str) -> list[int]:
    """Ids of an answer and of its end, as they are learned and scored."""
    return [*tokenizer.encode(answer, add_special_tokens=False), _special_id(tokenizer, "eos")]


def expect_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ValueError where a model of `vocab_size` ids cannot embed every id of the tokenizer.

    Hugging Face's `vocab_size` leaves out added tokens; its `len` counts them.
    """
    size = max(tokenizer.vocab_size, len(tokenizer) if isinstance(tokenizer, Sized) else 0)
    expect(vocab_size >= size, "vocab_size", f"be at least {size}, the ids of {type(tokenizer).__name__}", vocab_size)


class ByteTokenizer:
    """UTF-8 bytes as ids 0 .. 255, then pad 256, bos 257, eos 258. Needs no file; the round trip is exact."""

    vocab_size = 259
    pad_token_id = 256
    bos_token_id = 257
    eos_token_id = 258
    _NAMES = ("<pad>", "<bos>", "<eos>")

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text, between bos and eos on request.

        Raises:
            UnicodeEncodeError (a ValueError): a lone surrogate, which UTF-8 does not hold.
        """
        ids = list(text.encode("utf-8"))
        return [self.bos_token_id, *ids, self.eos_token_id] if add_special_tokens else ids

    def decode(self, ids: Sequence[int] | torch.Tensor, *, skip_special_tokens: bool = True) -> str:
        """Text of ids (a sequence, or an integer tensor [L]).

        Bytes that are not UTF-8, such as a character that was cut short, become U+FFFD. pad, bos and eos are left out,
        or shown as <pad>, <bos>, <eos>.

        Raises:
            ValueError: an id outside 0 .. 258.
        """
        data = bytearray()
        for i in _id_list(ids):
            expect(0 <= i < self.vocab_size, "ids", f"be in 0 .. {self.vocab_size - 1}", i)
            if i < 256:
                data.append(i)
            elif not skip_special_tokens:
                data += self._NAMES[i - 256].encode()
        return data.decode("utf-8", errors="replace")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer_config.json into a folder, which is made where it is missing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps({"tokenizer_class": "ByteTokenizer"}, indent=2)
        (Path(folder) / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByteTokenizer)

    def __hash__(self) -> int:
        return hash(ByteTokenizer)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in a model's folder: the ByteTokenizer, or what `transformers.AutoTokenizer` finds there.

    Nothing is downloaded.

    Raises:
        FileNotFoundError: no such folder, or none with a tokenizer_config.json.
        ImportError: not the ByteTokenizer, and transformers is not installed.
        ValueError: a broken file, or one that is no tokenizer's.
    """
    folder = Path(folder)

    def read(root: Path) -> Tokenizer:
        # What a checkpoint was saved without stays from an earlier save, beside it.
        found = next((place for place in (root, folder) if (place / CONFIG_FILE).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"folder must hold {CONFIG_FILE}, was {str(folder)!r}, which holds none")
        if atomic.read_json(found / CONFIG_FILE).get("tokenizer_class") == "ByteTokenizer":
            return ByteTokenizer()
        auto = import_transformers().AutoTokenizer
        try:
            return cast(Tokenizer, auto.from_pretrained(found, local_files_only=True))
        except Exception as error:  # the packages beneath raise bare Exception
            raise ValueError(f"folder must hold a tokenizer's files, was {str(folder)!r}: {error}") from error

    return atomic.consistent(folder, read)


def import_transformers() -> Any:
    """The package, which reads tokenizers and language models."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("this needs the package 'transformers': pip install -e '.[text]'") from error
    return transformers


def _special_id(tokenizer: Tokenizer, name: str) -> int:
    value = getattr(tokenizer, f"{name}_token_id")
    expect(value is not None, f"tokenizer.{name}_token_id", "be set to an id", value)
    return int(value)


def _id_list(ids: Sequence[int] | torch.Tensor) -> list[int]:
    if isinstance(ids, torch.Tensor):
        expect(ids.ndim == 1 and not ids.is_floating_point(), "ids", "be an integer tensor [L]", ids)
        return [int(i) for i in ids.tolist()]
    return [int(i) for i in ids]
