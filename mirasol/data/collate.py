"""Clips and texts become the batch that `mirasol.Model.forward` takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mirasol.batch import IGNORE
from mirasol.kernels.core.checks import expect, expect_int, expect_shape, refuse
from mirasol.tokenizer import Tokenizer, encode_answer, encode_prompt

from .clips import ClipTensors


def collate(
    clips: Sequence[ClipTensors],
    questions: Sequence[str] | None = None,
    answers: Sequence[str] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    clip_of_text: Sequence[int] | None = None,
    max_text: int | None = None,
) -> dict[str, Tensor]:
    """Put B clips and Q texts into one batch: `model(**collate(...))`.

    Args:
        clips: B of them, each of its own length. T is that of the longest; the others are followed by zeros.
        questions: Q texts; "" asks nothing, as for captions and labels. None: no texts in the batch.
        answers: Q texts to be learned after the questions. None: the texts are prompts and there are no labels.
        tokenizer: makes ids of the texts.
        clip_of_text: which clip each text is about; default: text q is about clip q.
        max_text: most ids of a text. Of a longer one the question's beginning is cut off (the start id stays), then the
            answer's end, its end id with it.
    Returns:
        keyword arguments of `Model.forward`: video uint8 [B, 3, T * F, H, W], audio float32 [B, T * S],
        video_features [B, T, n_v, d] and audio_features [B, T, n_a, d], each where some clip has it; chunks int64 [B];
        times float32 [B, T]; video_present and audio_present bool [B]; with questions text int64 [Q, L], padded
        with the tokenizer's pad id (eos without one), and clip_of_text int64 [Q]; with answers labels int64 [Q, L],
        -100 at prompts and padding.
    Raises:
        ValueError: no clips, tensors that do not fit their clip's T or one another, lengths that differ, a missing
            tokenizer.
    """
    expect(len(clips) > 0, "clips", "hold at least one clip", clips)
    longest = max(clip.chunks for clip in clips)
    batch: dict[str, Tensor] = {}
    for name, axis in (("video", 1), ("audio", 0), ("video_features", 0), ("audio_features", 0)):
        tensors = [getattr(clip, name) for clip in clips]
        if any(tensor is not None for tensor in tensors):
            batch[name] = _stack(name, tensors, [clip.chunks for clip in clips], longest, axis)
    batch["chunks"] = torch.tensor([clip.chunks for clip in clips])
    batch["times"] = torch.stack([torch.cat([c.times, c.times.new_zeros(longest - c.chunks)]) for c in clips])
    batch["video_present"] = torch.tensor([clip.video_present for clip in clips])
    batch["audio_present"] = torch.tensor([clip.audio_present for clip in clips])
    if questions is None:
        for name, texts in (("answers", answers), ("clip_of_text", clip_of_text)):
            expect(texts is None, name, "come with questions", texts)
        return batch
    if tokenizer is None:
        raise ValueError("tokenizer must come with questions, was None")
    about = list(range(len(questions))) if clip_of_text is None else [int(i) for i in clip_of_text]
    expect(len(questions) > 0, "questions", "hold at least one text, or be None", questions)
    expect(len(about) == len(questions), "clip_of_text", f"hold a number for each of {len(questions)} questions", about)
    in_range = all(0 <= i < len(clips) for i in about)
    expect(in_range, "clip_of_text", f"hold numbers of clips, 0 .. {len(clips) - 1}", about)
    batch |= _texts(tokenizer, questions, answers, max_text)
    batch["clip_of_text"] = torch.tensor(about)
    return batch


def _stack(name: str, tensors: list[Tensor | None], chunks: list[int], longest: int, axis: int) -> Tensor:
    """Tensors of different T along `axis`, one after the other along a new first axis, zeros behind and for None."""
    first = next(i for i, tensor in enumerate(tensors) if tensor is not None)
    like = tensors[first]
    assert like is not None
    expect(like.shape[axis] % chunks[first] == 0, name, f"divide into the {chunks[first]} chunks of its clip", like)
    per_chunk = like.shape[axis] // chunks[first]
    size = [len(tensors), *like.shape]
    size[axis + 1] = longest * per_chunk
    out = like.new_zeros(size)
    for row, tensor, count in zip(out, tensors, chunks, strict=True):
        if tensor is None:
            continue
        shape = [*like.shape]
        shape[axis] = count * per_chunk
        expect_shape(name, tensor, shape, f"{count} chunks of the size that other clips have")
        expect(tensor.dtype == like.dtype, name, f"be {like.dtype} like that of the other clips", tensor)
        row.narrow(axis, 0, count * per_chunk).copy_(tensor)
    return out


def _texts(
    tokenizer: Tokenizer, questions: Sequence[str], answers: Sequence[str] | None, max_text: int | None
) -> dict[str, Tensor]:
    """text, and labels with answers."""
    if answers is not None:
        expect(len(answers) == len(questions), "answers", f"be as many as the {len(questions)} questions", answers)
    if max_text is not None:
        expect_int("max_text", max_text, minimum=2)
    rows, labels = [], []
    for i, question in enumerate(questions):
        prompt = encode_prompt(tokenizer, question)
        answer = encode_answer(tokenizer, answers[i]) if answers is not None else []
        if max_text is not None:
            asked = max(max_text - len(answer) - 1, 0)
            prompt = [prompt[0], *prompt[max(len(prompt) - asked, 1) :]]
            answer = answer[: max_text - len(prompt)]
        rows.append(prompt + answer)
        labels.append([IGNORE] * len(prompt) + answer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        refuse("tokenizer", "have a pad_token_id or an eos_token_id", tokenizer)
    batch = {"text": _pad(rows, pad)}
    if answers is not None:
        batch["labels"] = _pad(labels, IGNORE)
    return batch


def _pad(rows: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.int64)
