"""Text as its ids come: whole characters, stop strings across ids, and nothing taken that is not needed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirasol import ByteTokenizer
from mirasol.pieces import pieces

BYTES = ByteTokenizer()
TEXTS = ["a drum is played", "wer spielt die Trömmel?", "誰が叩いていますか 🥁", "", "a\x00b\n", " x  y "]
LETTERS = st.text(alphabet="abn\n ü誰🥁", max_size=12)


@pytest.fixture(scope="module", params=["byte level", "metaspace"])
def trained(request):
    """Small tokenizers that cut characters into several ids, in transformers' clothes."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    pre, decoders = tokenizers.pre_tokenizers, tokenizers.decoders
    if request.param == "byte level":
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=["</s>"], initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(TEXTS * 3, trainer)
    else:  # as Llama's: words begin with their space, what is no piece falls back to bytes, several to a run
        words = {"</s>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
        for piece in ("<unk>", "▁", "▁a", "▁drum", "d", "r", "u", "m", "b"):
            words[piece] = len(words)
        model = tokenizers.models.BPE(vocab=words, merges=[], byte_fallback=True, unk_token="<unk>")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@given(LETTERS)
def test_pieces_make_up_the_text_in_whole_characters(text):
    found = list(pieces(BYTES.encode(text), BYTES))
    assert found == list(text)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_a_learned_tokenizer_make_up_what_it_decodes(trained, text):
    ids = [*trained.encode(text, add_special_tokens=False), trained.eos_token_id]
    found = list(pieces(ids, trained))
    assert "".join(found) == trained.decode(ids, skip_special_tokens=True)
    assert all(found)
    assert "\ufffd" not in "".join(found)


def test_a_character_that_is_cut_at_the_end_is_left_out():
    assert list(pieces(BYTES.encode("aü")[:-1], BYTES)) == ["a"]
    assert list(pieces([0xFF, 97], BYTES)) == ["\ufffda"], "what is no character is told when something follows"


@given(LETTERS, st.lists(st.text(alphabet="abn\n ü", min_size=1, max_size=3), max_size=3))
def test_nothing_is_told_from_the_first_stop_string_on(text, stop):
    """Against cutting the text where, read character by character, a stop string is complete first."""
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(string) for string in stop)]
    expected = text
    if ends:
        expected = min((text[: ends[0]].split(string, 1)[0] for string in stop), key=len)
    assert "".join(pieces(BYTES.encode(text), BYTES, stop)) == expected


def test_what_may_begin_a_stop_string_is_held_back_and_no_id_too_many_is_taken():
    source = iter(BYTES.encode("ab\nc\n\nrest"))
    found = pieces(source, BYTES, ["\n\n"])
    assert [next(found) for _ in range(3)] == ["a", "b", "\nc"]
    assert list(found) == []
    assert bytes(source) == b"rest"
    assert list(pieces(BYTES.encode("a\n"), BYTES, ["\n\n"])) == ["a", "\n"], "at the end nothing is held back"


def test_pieces_come_before_the_ids_are_all_there():
    def ids():
        yield from BYTES.encode("ü")
        raise AssertionError("asked for more than the first character needs")

    assert next(pieces(ids(), BYTES)) == "ü"


@pytest.mark.parametrize(
    ("stop", "error", "message"),
    [
        ("\n", TypeError, "stop must be a sequence of strings"),
        ([1], TypeError, "stop must be a sequence of strings"),
        (["a", ""], ValueError, "stop must hold no empty string"),
    ],
)
def test_wrong_stop_strings_are_refused(stop, error, message):
    with pytest.raises(error, match=message):
        pieces([1], BYTES, stop)
