"""Clips of different lengths and texts in one batch: each clip stands in its row, and the rest is padding."""

import re

import pytest
import torch

import mirasol
from mirasol.config import Config
from mirasol.data import ClipTensors, collate
from mirasol.tokenizer import ByteTokenizer

CONFIG = Config.preset("tiny")
BYTES = ByteTokenizer()


class NoPad(ByteTokenizer):
    pad_token_id = None
    bos_token_id = None


def clip(chunks: int, video: bool = True, audio: bool = True) -> ClipTensors:
    times = torch.arange(chunks) * 0.5
    pixels = torch.randint(1, 256, (3, 4 * chunks, 32, 32), dtype=torch.uint8)
    return ClipTensors(times, pixels if video else None, torch.rand(2560 * chunks) + 0.1 if audio else None)


def test_every_row_holds_its_clip_and_then_zeros():
    clips = [clip(1), clip(3, audio=False), clip(2, video=False)]
    batch = collate(clips)
    assert set(batch) == {"video", "audio", "chunks", "times", "video_present", "audio_present"}
    assert batch["video"].shape == (3, 3, 12, 32, 32)
    assert batch["audio"].shape == (3, 7680)
    for row, one in enumerate(clips):
        if one.video is not None:
            assert torch.equal(batch["video"][row, :, : 4 * one.chunks], one.video)
        if one.audio is not None:
            assert torch.equal(batch["audio"][row, : 2560 * one.chunks], one.audio)
        assert torch.equal(batch["times"][row, : one.chunks], one.times)
    assert not batch["video"][0, :, 4:].any()
    assert not batch["video"][2].any()
    assert not batch["audio"][1].any()
    assert not batch["times"][0, 1:].any()
    assert batch["chunks"].tolist() == [1, 3, 2]
    assert batch["chunks"].dtype == torch.int64
    assert batch["video_present"].tolist() == [True, True, False]
    assert batch["audio_present"].tolist() == [True, False, True]
    assert "video" not in collate([clip(1, video=False)])


def test_features_are_padded_and_stand_for_clips_that_have_them():
    times = torch.zeros(2)
    both = ClipTensors(times, video_features=torch.rand(2, 5, 64), audio_features=torch.rand(2, 3, 64))
    short = ClipTensors(
        times[:1], video_features=torch.rand(1, 5, 64), audio_features=torch.rand(1, 3, 64), audio_present=False
    )
    batch = collate([short, both])
    assert batch["video_features"].shape == (2, 2, 5, 64)
    assert torch.equal(batch["audio_features"][1], both.audio_features)
    assert torch.equal(batch["video_features"][0, :1], short.video_features)
    assert not batch["video_features"][0, 1:].any()
    assert batch["audio_present"].tolist() == [False, True]


def test_answers_and_their_end_are_learned_and_nothing_else():
    batch = collate([clip(1)], ["ab?", ""], ["x", "long"], tokenizer=BYTES, clip_of_text=[0, 0])
    pad, bos, eos = 256, 257, 258
    assert batch["text"].tolist() == [[bos, *b"ab?\n", *b"x", eos], [bos, *b"long", eos, pad]]
    assert batch["labels"].tolist() == [[-100] * 5 + [*b"x", eos], [-100, *b"long", eos, -100]]
    assert batch["clip_of_text"].tolist() == [0, 0]
    assert {batch[name].dtype for name in ("text", "labels", "clip_of_text")} == {torch.int64}


def test_without_answers_the_texts_are_prompts():
    batch = collate([clip(1), clip(1)], ["a", ""], tokenizer=BYTES)
    assert batch["text"].tolist() == [[257, *b"a\n"], [257, 256, 256]]
    assert batch["clip_of_text"].tolist() == [0, 1]
    assert "labels" not in batch


def test_a_tokenizer_without_pad_pads_with_eos_that_is_not_learned():
    batch = collate([clip(1)] * 2, ["", ""], ["ab", "c"], tokenizer=NoPad())
    assert batch["text"].tolist() == [[258, *b"ab", 258], [258, *b"c", 258, 258]]
    assert batch["labels"].tolist() == [[-100, *b"ab", 258], [-100, *b"c", 258, -100]]


def test_long_texts_lose_the_question_s_beginning_and_then_the_answer_s_end():
    def cut(most: int) -> tuple[list[int], list[int]]:
        batch = collate([clip(1)], ["what?"], ["dog"], tokenizer=BYTES, max_text=most)
        return batch["text"][0].tolist(), batch["labels"][0].tolist()

    assert cut(11) == ([257, *b"what?\n", *b"dog", 258], [-100] * 7 + [*b"dog", 258])
    assert cut(8) == ([257, *b"t?\n", *b"dog", 258], [-100] * 4 + [*b"dog", 258])
    assert cut(5) == ([257, *b"dog", 258], [-100, *b"dog", 258])
    assert cut(3) == ([257, *b"do"], [-100, *b"do"])
    prompt = collate([clip(1)], ["what?"], tokenizer=BYTES, max_text=3)["text"]
    assert prompt.tolist() == [[257, *b"?\n"]]


def test_the_model_takes_a_batch():
    model = mirasol.Model.from_preset("tiny")
    batch = collate([clip(2), clip(2)], ["q", "r"], ["yes", "no"], tokenizer=BYTES)
    known = {name: batch[name] for name in ("video", "audio", "text", "labels", "video_present", "audio_present")}
    assert model(**known).loss.isfinite()


BAD = {
    "no clips": (dict(clips=[]), "clips must hold at least one clip"),
    "no tokenizer": (dict(questions=["a"]), "tokenizer must come with questions"),
    "no questions": (dict(questions=[], tokenizer=BYTES), "questions must hold at least one text"),
    "answers alone": (dict(answers=["a"], tokenizer=BYTES), "answers must come with questions"),
    "answers fewer": (dict(questions=["a"], answers=[], tokenizer=BYTES), "answers must be as many as the 1 questions"),
    "clip_of_text": (
        dict(questions=["a"], tokenizer=BYTES, clip_of_text=[1]),
        "clip_of_text must hold numbers of clips",
    ),
    "too many": (dict(questions=["a", "b"], tokenizer=BYTES), "clip_of_text must hold numbers of clips, 0 .. 0, was"),
    "T": (dict(clips=[ClipTensors(torch.zeros(2), audio=torch.zeros(5))]), "audio must divide into the 2 chunks"),
    "sizes": (
        dict(clips=[clip(1), ClipTensors(torch.zeros(1), torch.zeros(3, 4, 8, 8, dtype=torch.uint8))]),
        "video must be 1 chunks of the size that other clips have = [3, 4, 32, 32]",
    ),
    "dtype": (
        dict(clips=[clip(1), ClipTensors(torch.zeros(1), audio=torch.zeros(2560).double())]),
        "audio must be torch.float32 like that of the other clips",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        collate(**{"clips": [clip(1)], **changes})
