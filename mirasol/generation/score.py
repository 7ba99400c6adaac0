"""How likely given answers are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mirasol.batch import IGNORE, check_text, expect_device
from mirasol.cache import Seen
from mirasol.config import Config
from mirasol.generation.loop import Decoder
from mirasol.kernels.core.checks import expect, expect_shape, expect_tensor


@torch.no_grad()
def score(
    decoder: Decoder,
    config: Config,
    seen: Seen,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    *,
    clip_of_text: Tensor | None = None,
) -> Tensor:
    """[Q, C] float32: summed log-probability of each answer after its prompt; `mirasol.Model.score` says more.

    Prompt and answer are run as one text, so every choice of a prompt pays for the prompt again. Prompts with as many
    choices go through the decoder together, so that a prompt's choices look at the same keys and values.
    """
    clips = _check(config, seen, prompts, answers, clip_of_text)
    scores = torch.full((len(prompts), max(map(len, answers))), -torch.inf, device=seen.device)
    for count in sorted({len(choices) for choices in answers}):
        rows = [q for q, choices in enumerate(answers) if len(choices) == count]
        text, labels = _texts(config, [(prompts[q], choice) for q in rows for choice in answers[q]])
        check_text(text, labels, None, text.shape[0], config.vocab_size)
        text, labels = text.to(seen.device), labels.to(seen.device)
        about = torch.tensor([clips[q] for q in rows], device=seen.device)
        cache = decoder.new_cache(seen, text.shape[1], count, clip_of_text=about)
        logits = decoder(text, None, cache)[:, :-1]
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="none"
        )
        scores[rows, :count] = -losses.view(len(rows), count, -1).sum(-1)
    return scores


def _check(
    config: Config,
    seen: Seen,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    clip_of_text: Tensor | None,
) -> list[int]:
    """The clip of each prompt."""
    expect(len(prompts) == len(answers), "answers", f"hold choices for each of {len(prompts)} prompts", len(answers))
    expect(len(prompts) > 0, "prompts", "hold at least one prompt", prompts)
    for i, ids in enumerate(prompts):
        expect(len(ids) > 0, f"prompts[{i}]", "not be empty", ids)
    for q, choices in enumerate(answers):
        expect(len(choices) > 0, f"answers[{q}]", "not be empty", choices)
        for c, ids in enumerate(choices):
            expect(len(ids) > 0, f"answers[{q}][{c}]", "hold at least one token", ids)
    if clip_of_text is None:
        expect(len(prompts) == seen.clips, "prompts", f"hold {seen.clips} rows like the clips", len(prompts))
        return list(range(seen.clips))
    expect_tensor("clip_of_text", clip_of_text, "Q", dtypes=(torch.int64,))
    expect_shape("clip_of_text", clip_of_text, (len(prompts),), "[Q] like prompts")
    expect_device("clip_of_text", clip_of_text, seen.device)
    clips: list[int] = clip_of_text.tolist()
    inside = min(clips) >= 0 and max(clips) < seen.clips
    expect(inside, "clip_of_text", f"hold rows of the {seen.clips} clips", clips)
    return clips


def _texts(config: Config, pairs: list[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """Prompts with their answers, [rows, L] padded, and labels that count the answers alone."""
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    text = torch.full((len(pairs), longest), config.pad_id)
    labels = torch.full_like(text, IGNORE)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        text[row, :end] = torch.tensor([*prompt, *answer])
        labels[row, len(prompt) : end] = text[row, len(prompt) : end]
    return text, labels
