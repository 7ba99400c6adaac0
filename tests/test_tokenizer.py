"""Tokenizers: bytes, tokenizer.json, SentencePiece, and strangers that look alike."""

from __future__ import annotations

import io
import json
import pickle
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirasol.tokenizer import (
    ByteTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    batch_encode,
    expect_vocabulary,
    load_tokenizer,
)

TEXTS = ["a drum is played", "wer spielt die Trommel?", "誰が叩いていますか 🥁", "", "a\x00b\n"]


class Stranger:
    """The part of a Hugging Face tokenizer that is asked for, with its defaults; ids are letters, one of them added."""

    vocab_size = 26
    pad_token_id = None
    bos_token_id = None
    eos_token_id = 26

    def __len__(self):
        return 27

    def encode(self, text, text_pair=None, add_special_tokens=True, padding=False, **kwargs):
        return [ord(c) - 97 for c in text] + [26] * add_special_tokens

    def decode(self, token_ids, skip_special_tokens=False, **kwargs):
        return "".join("</s>" * (not skip_special_tokens) if i == 26 else chr(97 + i) for i in token_ids)


@pytest.fixture(scope="module")
def json_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(3)
    return JsonTokenizer(tokenizer, eos_token="</s>", bos_token="<s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def sentencepiece_tokenizer():
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:4] * 3),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    return SentencePieceTokenizer(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()))


@settings(deadline=None)
@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert all(0 <= i < 256 for i in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(torch.tensor(tokenizer.encode(text, add_special_tokens=True), dtype=torch.int64)) == text


def test_bytes_are_what_they_say():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé", add_special_tokens=True) == [257, 97, 0xC3, 0xA9, 258]
    assert tokenizer.decode([257, 97, 256, 258], skip_special_tokens=False) == "<bos>a<pad><eos>"
    assert tokenizer.decode([97, 0xC3]) == "a\ufffd"
    assert tokenizer.vocab_size == 259
    assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer
    for ids in ([259], [-1], torch.tensor([[1]]), torch.tensor([1.0])):
        with pytest.raises(ValueError, match="ids must be"):
            tokenizer.decode(ids)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode("\ud800")


def test_batches_are_padded_on_the_right():
    ids, lengths = batch = ByteTokenizer().batch_encode(["abc", "", "é"], bos=True, eos=True)
    assert ids.tolist() == [[257, 97, 98, 99, 258], [257, 258, 256, 256, 256], [257, 0xC3, 0xA9, 258, 256]]
    assert lengths.tolist() == [5, 2, 4]
    assert ids.dtype == lengths.dtype == torch.int64
    assert torch.equal(batch.mask, torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1] * 4 + [0]], dtype=torch.bool))
    assert ByteTokenizer().batch_encode([""]).ids.shape == (1, 0)


def test_batches_are_cut_before_the_end_id():
    tokenizer = ByteTokenizer()
    ids, lengths = tokenizer.batch_encode(["abcdef", "a"], bos=True, eos=True, max_length=4)
    assert ids.tolist() == [[257, 97, 98, 258], [257, 97, 258, 256]]
    assert lengths.tolist() == [4, 3]
    assert tokenizer.batch_encode(["abc"], eos=True, max_length=1).ids.tolist() == [[258]]
    with pytest.raises(ValueError, match="max_length must be at least 2, was 1"):
        tokenizer.batch_encode(["abc"], bos=True, eos=True, max_length=1)


def test_bad_batches_are_refused():
    with pytest.raises(TypeError, match="texts must be a sequence of str"):
        batch_encode(ByteTokenizer(), "abc")
    with pytest.raises(TypeError, match="texts must be a sequence of str"):
        batch_encode(ByteTokenizer(), [b"abc"])
    with pytest.raises(ValueError, match="texts must hold at least one text"):
        batch_encode(ByteTokenizer(), [])


def test_a_stranger_is_a_tokenizer():
    stranger = Stranger()
    assert isinstance(stranger, Tokenizer)
    assert not isinstance(object(), Tokenizer)
    assert batch_encode(stranger, ["abc", "xyz"], eos=True).ids.tolist() == [[0, 1, 2, 26], [23, 24, 25, 26]]
    with pytest.raises(ValueError, match="pad_token_id must be set to an id, was None"):
        batch_encode(stranger, ["abc", "x"])
    with pytest.raises(ValueError, match="bos_token_id must be set"):
        batch_encode(stranger, ["abc"], bos=True)
    expect_vocabulary(stranger, 27)
    with pytest.raises(ValueError, match="vocab_size must be at least 27, the ids of Stranger, was 26"):
        expect_vocabulary(stranger, 26)
    expect_vocabulary(ByteTokenizer(), 259)


@pytest.mark.parametrize("kind", ["json_tokenizer", "sentencepiece_tokenizer"])
def test_files_round_trip(kind, request, tmp_path):
    tokenizer = request.getfixturevalue(kind)
    assert isinstance(tokenizer, Tokenizer)
    tokenizer.save_pretrained(tmp_path / "model")
    (file,) = [path for path in (tmp_path / "model").iterdir() if path.name != "tokenizer_config.json"]
    for loaded in (tokenizer, load_tokenizer(tmp_path / "model"), load_tokenizer(file)):
        assert type(loaded) is type(tokenizer)
        assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 2)
        assert loaded.vocab_size == tokenizer.vocab_size
        for text in TEXTS[:4]:
            ids = loaded.encode(text)
            assert ids == tokenizer.encode(text)
            assert max(ids, default=0) < loaded.vocab_size
            assert loaded.decode(torch.tensor(ids, dtype=torch.int64)) == text
            assert loaded.encode(text, add_special_tokens=True) == [1, *ids, 2]
        longest = max(len(loaded.encode(text)) for text in TEXTS[:4])
        assert longest > 3
        batch = loaded.batch_encode(TEXTS[:4], bos=True, eos=True)
        assert batch.ids.shape == (4, longest + 2)
        assert loaded.decode(batch.ids[1, : batch.lengths[1]]) == TEXTS[1]
        assert (batch.ids[~batch.mask] == loaded.pad_token_id).all()


def test_bytes_are_saved_beside_a_model(tmp_path):
    ByteTokenizer().save_pretrained(tmp_path / "new" / "model")
    assert load_tokenizer(tmp_path / "new" / "model") == ByteTokenizer()


def test_special_tokens_of_a_json(json_tokenizer, tmp_path):
    json_tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": None}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (None, 2, 2)
    assert load_tokenizer(tmp_path, eos_token="<pad>").eos_token_id == 0
    with pytest.raises(ValueError, match="eos_token must be in the tokenizer's vocabulary, was '<nil>'"):
        load_tokenizer(tmp_path, eos_token="<nil>")
    config.unlink()
    with pytest.raises(
        ValueError, match=r"eos_token must be given, for no tokenizer_config\.json beside tokenizer\.json"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("name", "package"), [("tokenizer.json", "tokenizers"), ("a.model", "sentencepiece")])
def test_a_missing_package_is_named(name, package, tmp_path, monkeypatch):
    (tmp_path / name).write_text("{}")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install -e '\.\[text\]'"):
        load_tokenizer(tmp_path, **({"eos_token": "</s>"} if name.endswith("json") else {}))


def test_bad_paths_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such path"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"path must hold tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(ValueError, match=r"path must be a \.json or a \.model file"):
        load_tokenizer(tmp_path / "vocab.txt")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must be JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("name", "package"), [("bad.json", "tokenizers"), ("bad.model", "sentencepiece")])
def test_broken_files_are_refused(name, package, tmp_path):
    pytest.importorskip(package)
    (tmp_path / name).write_text("not a tokenizer")
    with pytest.raises(ValueError, match="path must be a readable"):
        load_tokenizer(tmp_path / name)
