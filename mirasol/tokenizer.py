"""Text to ids and back: bytes by default, tokenizer files on request, any Hugging Face tokenizer by duck typing."""

from __future__ import annotations

import json
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from mirasol.kernels.core.checks import describe, expect, expect_int

CONFIG_FILE, JSON_FILE, SENTENCEPIECE_FILE = "tokenizer_config.json", "tokenizer.json", "tokenizer.model"


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


class TextBatch(NamedTuple):
    """Texts padded on the right.

    ids: int64 [B, L], padded with `pad_token_id`.
    lengths: int64 [B], the ids of each text, its bos and eos among them.
    """

    ids: torch.Tensor
    lengths: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """bool [B, L]: true where there is text."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]


def batch_encode(
    tokenizer: Tokenizer, texts: Sequence[str], *, bos: bool = False, eos: bool = False, max_length: int | None = None
) -> TextBatch:
    """Encode texts with any tokenizer into one right-padded batch.

    Args:
        texts: B strings, at least one.
        bos, eos: put the tokenizer's start or end id around each text. Its own template of special tokens is not used.
        max_length: most ids a text may take, bos and eos among them; its end is cut off, never the eos.
    Raises:
        TypeError: a string in place of a sequence of strings.
        ValueError: no texts, or an id that is needed and that the tokenizer lacks.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"texts must be a sequence of str, was {describe(texts)}")
    expect(len(texts) > 0, "texts", "hold at least one text", texts)
    before = [_special_id(tokenizer, "bos")] if bos else []
    after = [_special_id(tokenizer, "eos")] if eos else []
    room = None
    if max_length is not None:
        expect_int("max_length", max_length, minimum=max(len(before) + len(after), 1))
        room = max_length - len(before) - len(after)
    rows = [before + list(tokenizer.encode(text, add_special_tokens=False))[:room] + after for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    padding = _special_id(tokenizer, "pad") if any(len(row) < longest for row in rows) else 0
    return TextBatch(torch.tensor([row + [padding] * (longest - len(row)) for row in rows], dtype=torch.int64), lengths)


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

    def batch_encode(self, texts: Sequence[str], **options: Any) -> TextBatch:
        """`batch_encode` of the module with this tokenizer."""
        return batch_encode(self, texts, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer_config.json into a folder, which is made where it is missing."""
        _write_config(folder, {"tokenizer_class": "ByteTokenizer"})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByteTokenizer)

    def __hash__(self) -> int:
        return hash(ByteTokenizer)


class JsonTokenizer:
    """A tokenizer.json of Hugging Face's `tokenizers`.

    Args:
        tokenizer: a `tokenizers.Tokenizer`. Padding and truncation that its file asks for are switched off.
        bos_token, eos_token, pad_token: the strings of the special tokens; pad defaults to eos, bos to none.
    Raises:
        ValueError: a special token that is not in the vocabulary.
    """

    def __init__(self, tokenizer: Any, *, eos_token: str, bos_token: str | None = None, pad_token: str | None = None):
        self.tokenizer = tokenizer
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokens = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token or eos_token}
        ids = {name: None if token is None else self._find(name, token) for name, token in self.tokens.items()}
        self.bos_token_id, self.eos_token_id, self.pad_token_id = ids.values()
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text; with the special tokens of the file's own template on request."""
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int] | torch.Tensor, *, skip_special_tokens: bool = True) -> str:
        """Text of ids (a sequence, or an integer tensor [L])."""
        return str(self.tokenizer.decode(_id_list(ids), skip_special_tokens=skip_special_tokens))

    def batch_encode(self, texts: Sequence[str], **options: Any) -> TextBatch:
        """`batch_encode` of the module with this tokenizer."""
        return batch_encode(self, texts, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as `transformers.AutoTokenizer` reads them."""
        _write_config(folder, {"tokenizer_class": "PreTrainedTokenizerFast", **self.tokens})
        self.tokenizer.save(str(Path(folder) / JSON_FILE))

    def _find(self, name: str, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        expect(found is not None, name, "be in the tokenizer's vocabulary", token)
        return int(found)


class SentencePieceTokenizer:
    """A SentencePiece model, with the special ids that it holds.

    Args:
        processor: a `sentencepiece.SentencePieceProcessor`.
    Raises:
        ValueError: a model without an end-of-sentence id.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        held = (processor.bos_id(), processor.eos_id(), processor.pad_id())
        bos, eos, pad = (None if i < 0 else i for i in held)  # -1 says that there is none
        expect(eos is not None, "processor", "have an end-of-sentence id", processor)
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos, eos, eos if pad is None else pad
        self.vocab_size: int = processor.get_piece_size()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text, between bos (where there is one) and eos on request."""
        bos = add_special_tokens and self.bos_token_id is not None
        return list(self.processor.encode(text, add_bos=bos, add_eos=add_special_tokens))

    def decode(self, ids: Sequence[int] | torch.Tensor, *, skip_special_tokens: bool = True) -> str:
        """Text of ids (a sequence, or an integer tensor [L]); SentencePiece gives control ids no text in any case."""
        return str(self.processor.decode(_id_list(ids)))

    def batch_encode(self, texts: Sequence[str], **options: Any) -> TextBatch:
        """`batch_encode` of the module with this tokenizer."""
        return batch_encode(self, texts, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.model and tokenizer_config.json into a folder, which is made where it is missing."""
        _write_config(folder, {"tokenizer_class": "SentencePieceTokenizer"})
        (Path(folder) / SENTENCEPIECE_FILE).write_bytes(self.processor.serialized_model_proto())


def load_tokenizer(
    path: str | Path, *, eos_token: str | None = None, bos_token: str | None = None, pad_token: str | None = None
) -> ByteTokenizer | JsonTokenizer | SentencePieceTokenizer:
    """Load a tokenizer from a model's folder, a tokenizer.json or a SentencePiece .model. Nothing is downloaded.

    Args:
        path: the file, or a folder that `save_pretrained` (ours or Hugging Face's) wrote.
        eos_token, bos_token, pad_token: for a .json, the strings of its special tokens, where the
            tokenizer_config.json beside it does not name them or to overrule it.
    Raises:
        FileNotFoundError: no such file or folder.
        ImportError: the package that reads the file is not installed; the message names it.
        ValueError: a folder without a tokenizer, a file of another kind or broken, or no eos_token.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path must be a tokenizer's file or folder, was {str(path)!r}: no such path")
    named = {"eos_token": eos_token, "bos_token": bos_token, "pad_token": pad_token}
    given = {name: token for name, token in named.items() if token is not None}
    if path.is_dir():
        if _read_config(path).get("tokenizer_class") == "ByteTokenizer":
            return ByteTokenizer()
        path = _tokenizer_file(path)
    if path.suffix == ".model":
        expect(not given, "eos_token, bos_token and pad_token", "be None for a SentencePiece model", given)
        return SentencePieceTokenizer(_load_sentencepiece(path))
    expect(path.suffix == ".json", "path", "be a .json or a .model file, or a folder", str(path))
    return JsonTokenizer(_load_json(path), **_special_tokens(path, given))


def _tokenizer_file(folder: Path) -> Path:
    found = [folder / JSON_FILE, folder / SENTENCEPIECE_FILE, *sorted(folder.glob("*.model"))]
    file = next((path for path in found if path.is_file()), None)
    if file is None:
        raise ValueError(
            f"path must hold {JSON_FILE}, a .model file or a {CONFIG_FILE} of the ByteTokenizer, was {str(folder)!r}"
        )
    return file


def _special_tokens(path: Path, given: dict[str, str]) -> dict[str, str]:
    config = _read_config(path.parent)
    tokens = {}
    for name in ("eos_token", "bos_token", "pad_token"):
        token = given.get(name, config.get(name))
        if isinstance(token, dict):  # how Hugging Face writes a token that has properties
            token = token.get("content")
        if token is not None:
            tokens[name] = str(token)
    if "eos_token" not in tokens:
        raise ValueError(f"eos_token must be given, for no {CONFIG_FILE} beside {path.name} names it, was None")
    return tokens


def _load_json(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer as FastTokenizer
    except ImportError as error:
        raise _missing("tokenizers", path) from error
    try:
        return FastTokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"path must be a readable tokenizer.json, was {str(path)!r}: {error}") from error


def _load_sentencepiece(path: Path) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise _missing("sentencepiece", path) from error
    try:
        return SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
        raise ValueError(f"path must be a readable SentencePiece model, was {str(path)!r}: {error}") from error


def _missing(package: str, path: Path) -> ImportError:
    return ImportError(
        f"{path.name} is read by the package {package!r}, which is not installed: pip install -e '.[text]'"
    )


def _special_id(tokenizer: Tokenizer, name: str) -> int:
    value = getattr(tokenizer, f"{name}_token_id")
    expect(value is not None, f"tokenizer.{name}_token_id", "be set to an id", value)
    return int(value)


def _id_list(ids: Sequence[int] | torch.Tensor) -> list[int]:
    if isinstance(ids, torch.Tensor):
        expect(ids.ndim == 1 and not ids.is_floating_point(), "ids", "be an integer tensor [L]", ids)
        return [int(i) for i in ids.tolist()]
    return [int(i) for i in ids]


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{CONFIG_FILE} must be JSON, was {str(file)!r}: {error}") from error


def _write_config(folder: str | Path, config: dict[str, Any]) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (Path(folder) / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
