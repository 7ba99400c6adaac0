"""Tokenizers: bytes, those of transformers, and strangers that look alike."""

from __future__ import annotations

import pickle
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mirasol
from mirasol.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    encode_answer,
    encode_prompt,
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

    def save_pretrained(self, save_directory, **kwargs):
        raise NotImplementedError


@pytest.fixture(scope="module")
def trained():
    """A small BPE in transformers' clothes that pads with its end and has no start, as GPT-2's."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    fast.add_tokens(["<clip>"])
    return fast


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


def test_a_stranger_is_a_tokenizer():
    stranger = Stranger()
    assert isinstance(stranger, Tokenizer)
    assert not isinstance(object(), Tokenizer)
    assert encode_prompt(stranger, "") == [26], "without a start id, the end id stands before a text"
    assert encode_answer(stranger, "abc") == [0, 1, 2, 26]
    expect_vocabulary(stranger, 27)
    with pytest.raises(ValueError, match="vocab_size must be at least 27, the ids of Stranger, was 26"):
        expect_vocabulary(stranger, 26)
    expect_vocabulary(ByteTokenizer(), 259)
    stranger.eos_token_id = None
    for call in (encode_prompt, encode_answer):
        with pytest.raises(ValueError, match=r"tokenizer\.eos_token_id must be set to an id, was None"):
            call(stranger, "")


def test_prompts_and_answers_of_bytes():
    tokenizer = ByteTokenizer()
    assert encode_prompt(tokenizer, "a?") == [257, 97, 63, 10]
    assert encode_prompt(tokenizer, "") == [257]
    assert encode_answer(tokenizer, "é") == [0xC3, 0xA9, 258]


def test_transformers_tokenizers_travel_with_the_model(trained, tmp_path):
    assert isinstance(trained, Tokenizer)
    assert trained.vocab_size < len(trained)
    ids = dict(vocab_size=len(trained), pad_id=trained.pad_token_id, bos_id=0, eos_id=trained.eos_token_id)
    model = mirasol.Model.from_preset("tiny", **ids)
    model.save_pretrained(tmp_path, trained)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (None, 0, 0)
    for text in TEXTS:
        assert loaded.encode(text, add_special_tokens=False) == trained.encode(text, add_special_tokens=False)
        assert loaded.decode(torch.tensor(loaded.encode(text)), skip_special_tokens=True) == text
    assert loaded.encode("<clip>") == [len(trained) - 1]
    smaller = mirasol.Model.from_preset("tiny", **{**ids, "vocab_size": len(trained) - 1})
    with pytest.raises(ValueError, match=f"vocab_size must be at least {len(trained)}"):
        smaller.save_pretrained(tmp_path, trained)
    model.save_pretrained(tmp_path, ByteTokenizer())
    assert not (tmp_path / "tokenizer.json").exists()
    assert load_tokenizer(tmp_path) == ByteTokenizer()


def test_the_end_of_a_text_is_learned_where_it_also_pads(trained):
    """Labels leave out padding by -100, never by the id that pads."""
    assert trained.pad_token_id == trained.eos_token_id
    rows = [encode_prompt(trained, "who?") + encode_answer(trained, answer) for answer in ("a drum", "")]
    before = len(encode_prompt(trained, "who?"))
    text = torch.full((2, max(map(len, rows))), trained.pad_token_id)
    labels = torch.full_like(text, -100)
    for row, ids in enumerate(rows):
        text[row, : len(ids)] = torch.tensor(ids)
        labels[row, before : len(ids)] = torch.tensor(ids[before:])
    sizes = dict(vocab_size=len(trained), pad_id=0, bos_id=0, eos_id=0)
    model = mirasol.Model.from_preset("tiny", text_layers=1, **sizes)
    latents = torch.randn(2, 4, model.config.av_dim)
    optimizer = torch.optim.AdamW(model.text_decoder.parameters(), lr=5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(latents=latents, text=text, labels=labels).losses.text
        loss.backward()
        optimizer.step()
    new = model.generate(latents=latents, prompt=text[:, :before], max_new_tokens=12)[:, before:]
    assert [trained.decode(row, skip_special_tokens=True) for row in new] == ["a drum", ""]
    assert (new == trained.eos_token_id).any(1).all()


def test_bytes_are_saved_beside_a_model(tmp_path):
    ByteTokenizer().save_pretrained(tmp_path / "new" / "model")
    assert load_tokenizer(tmp_path / "new" / "model") == ByteTokenizer()


def test_a_missing_package_is_named(trained, tmp_path, monkeypatch):
    trained.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"'transformers': pip install -e '\.\[text\]'"):
        load_tokenizer(tmp_path)


def test_bad_folders_are_refused(tmp_path):
    pytest.importorskip("transformers")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=r"folder must hold tokenizer_config\.json"):
            load_tokenizer(folder)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must be JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "tokenizer.json").write_text("not a tokenizer")
    with pytest.raises(ValueError, match="folder must hold a tokenizer's files"):
        load_tokenizer(tmp_path)
