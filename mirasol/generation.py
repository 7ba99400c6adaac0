"""Text out of the decoder: greedy, sampled or by beam search, always with a key-value cache; and answers, scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mirasol.batch import IGNORE, check_clip_of_text, check_text, check_values, expect_device, may_look_at
from mirasol.causal_lm import CausalLMDecoder
from mirasol.config import Config
from mirasol.kernels.core.checks import expect, expect_int, expect_shape, expect_tensor
from mirasol.text import TextDecoder

LOOK_EVERY = 8
"""Steps between two looks at whether all rows have ended, on a device that one has to wait for."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the mode it had after."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def generate(
    decoder: TextDecoder | CausalLMDecoder,
    config: Config,
    latents: Tensor,
    prompt: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    clip_of_text: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    max_new_tokens: int = 32,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    num_return_sequences: int = 1,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue prompts token by token.

    Args:
        latents: [B, N, av_dim].
        prompt: [Q, L] int64, right-padded where `prompt_lengths` says so; default: one bos token a clip.
        lengths: [B], how many of the N latents of each clip count; None: all.
        clip_of_text: [Q], the clip that each prompt is about; None: prompt q is about clip q.
        prompt_lengths: [Q] int64, tokens of each prompt; default: all L.
        max_new_tokens: tokens after the longest prompt; a shorter prompt's row gains the difference.
        do_sample: draw from the distribution after `temperature`, `top_k` and `top_p`; otherwise take the likeliest.
        num_beams: width of the beam search; 1 is none. Not together with `do_sample`.
        length_penalty: a beam's score is its log-probability over (new tokens) ** length_penalty.
        num_return_sequences: rows per prompt: samples, or the best beams (then at most `num_beams`).
        eos_token_id: ends a row; default: that of the configuration.
        generator: random numbers of the draws.
    Returns:
        [Q * num_return_sequences, L + max_new_tokens or less] int64, `pad_id` after a row's end.
    Raises:
        TypeError, ValueError: an argument of a wrong kind or shape, an option out of range, by name.
    """
    if prompt is None:
        texts = latents.shape[0] if clip_of_text is None else clip_of_text.shape[0]
        prompt = torch.full((texts, 1), config.bos_id, dtype=torch.int64, device=latents.device)
    ends = _check(prompt, prompt_lengths, latents, clip_of_text, config)
    expect_int("max_new_tokens", max_new_tokens)
    expect_int("num_beams", num_beams)
    expect_int("num_return_sequences", num_return_sequences)
    expect(temperature > 0, "temperature", "be above 0", temperature)
    expect(top_p is None or 0 < top_p <= 1, "top_p", "be in (0, 1]", top_p)
    expect(top_k is None or top_k >= 1, "top_k", "be at least 1", top_k)
    expect(not (do_sample and num_beams > 1), "do_sample", "be False with num_beams > 1", do_sample)
    if num_beams > 1:
        expect(num_return_sequences <= num_beams, "num_return_sequences", "be at most num_beams", num_return_sequences)
    else:
        expect(
            num_return_sequences == 1 or do_sample,
            "num_return_sequences",
            "be 1 unless do_sample",
            num_return_sequences,
        )

    copies = num_beams if num_beams > 1 else num_return_sequences
    texts = prompt.shape[0]
    rows = prompt.repeat_interleave(copies, 0)
    longest = prompt.shape[1] + max_new_tokens
    cache = decoder.new_cache(latents, longest, copies, lengths=lengths, clip_of_text=clip_of_text)
    if num_beams > 1:
        choose: _Choice = _Beams(texts, num_beams, length_penalty, num_return_sequences)
    else:
        choose = _Draw(do_sample, temperature, top_k, top_p, generator)

    text = torch.full((rows.shape[0], longest), config.pad_id, dtype=torch.int64, device=rows.device)
    text[:, : rows.shape[1]] = rows
    end = config.eos_id if eos_token_id is None else eos_token_id
    finished = torch.zeros(rows.shape[0], dtype=torch.bool, device=rows.device)
    position = prompt.shape[1] if ends is None else int(ends.min())
    ends = torch.full((texts,), position, device=rows.device) if ends is None else ends
    ends = ends.repeat_interleave(copies, 0)
    logits = decoder(text[:, :position], None, cache)[:, -1]
    while True:
        forced = position < ends
        parents, tokens = choose(logits.float().log_softmax(-1), finished, forced, config.pad_id)
        if parents is not None:
            cache.reorder(parents)
            text, finished = text[parents], finished[parents]
        tokens = torch.where(forced, text[:, position], torch.where(finished, config.pad_id, tokens))
        text[:, position] = tokens
        finished = finished | (~forced & (tokens == end))
        position += 1
        look = may_look_at(finished) or position % LOOK_EVERY == 0
        if position == longest or (look and bool(finished.all())):
            break
        logits = decoder(tokens[:, None], None, cache)[:, -1]
    return _cut(choose.best(text[:, :position], ends), prompt.shape[1], end)


@torch.no_grad()
def score(
    decoder: TextDecoder | CausalLMDecoder,
    config: Config,
    latents: Tensor,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    *,
    lengths: Tensor | None = None,
    clip_of_text: Tensor | None = None,
) -> Tensor:
    """[Q, C] float32: summed log-probability of each answer after its prompt; `mirasol.Model.score` says more.

    Prompt and answer are run as one text, so every choice of a prompt pays for the prompt again.
    """
    expect(len(prompts) == len(answers), "answers", f"hold choices for each of {len(prompts)} prompts", len(answers))
    expect(len(prompts) > 0, "prompts", "hold at least one prompt", prompts)
    for name, lists in (("prompts", prompts), ("answers", answers)):
        for i, ids in enumerate(lists):
            expect(len(ids) > 0, f"{name}[{i}]", "not be empty", ids)
    pairs = [(q, c) for q, choices in enumerate(answers) for c in range(len(choices))]
    for q, c in pairs:
        expect(len(answers[q][c]) > 0, f"answers[{q}][{c}]", "hold at least one token", answers[q][c])
    texts = [[*prompts[q], *answers[q][c]] for q, c in pairs]
    longest = max(map(len, texts))
    device = latents.device
    text = torch.tensor([row + [config.pad_id] * (longest - len(row)) for row in texts])
    labels = torch.full_like(text, IGNORE)
    for row, (q, c) in enumerate(pairs):
        first = len(prompts[q])
        labels[row, first : first + len(answers[q][c])] = torch.tensor(list(answers[q][c]))
    clip = torch.tensor([q for q, _ in pairs])
    if clip_of_text is None:
        expect(
            len(prompts) == latents.shape[0], "prompts", f"hold {latents.shape[0]} rows like the clips", len(prompts)
        )
    else:
        expect_tensor("clip_of_text", clip_of_text, "Q", dtypes=(torch.int64,))
        expect_shape("clip_of_text", clip_of_text, (len(prompts),), "[Q] like prompts")
        expect_device("clip_of_text", clip_of_text, device)
        clip = clip_of_text.cpu()[clip]
    check_text(text, labels, clip, latents.shape[0], config.vocab_size)
    text, labels, clip = text.to(device), labels.to(device), clip.to(device)
    logits = decoder(text, latents, lengths=lengths, clip_of_text=clip)[:, :-1]
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="none"
    )
    scores = torch.full((len(prompts), max(map(len, answers))), -torch.inf, device=device)
    scores[tuple(torch.tensor(pairs, device=device).T)] = -losses.view(len(pairs), -1).sum(1)
    return scores


def _cut(text: Tensor, prompt: int, end: int) -> Tensor:
    """Without the columns behind the last row's end, which are there where nobody looked in time."""
    new = text[:, prompt:]
    behind = ((new == end).cumsum(1) - (new == end).long()) > 0  # pad that follows an end
    used = int((~behind).any(0).sum())
    return text[:, : prompt + used]


class _Choice:
    """The next token of every row from its log-probabilities [rows, V]."""

    def __call__(self, logprobs: Tensor, finished: Tensor, forced: Tensor, pad_id: int) -> tuple[Tensor | None, Tensor]:
        """-> (row that each row continues, or None for itself; its token)."""
        raise NotImplementedError

    def best(self, text: Tensor, prompt_lengths: Tensor) -> Tensor:
        """The rows to return, of [rows, length]."""
        return text


class _Draw(_Choice):
    def __init__(
        self,
        do_sample: bool,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        generator: torch.Generator | None,
    ):
        self.do_sample, self.temperature, self.top_k, self.top_p = do_sample, temperature, top_k, top_p
        self.generator = generator

    def __call__(self, logprobs: Tensor, finished: Tensor, forced: Tensor, pad_id: int) -> tuple[None, Tensor]:
        if not self.do_sample:
            return None, logprobs.argmax(-1)
        probabilities = (logprobs / self.temperature).softmax(-1)
        ordered, order = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        dropped = torch.zeros_like(ordered, dtype=torch.bool)
        if self.top_p is not None:
            dropped |= before >= self.top_p
        if self.top_k is not None:
            dropped[:, self.top_k :] = True
        drawn = torch.multinomial(ordered.masked_fill(dropped, 0), 1, generator=self.generator)
        return None, order.gather(-1, drawn).squeeze(-1)


class _Beams(_Choice):
    """The best `width` continuations per clip; a finished beam competes on with the score it ended with."""

    def __init__(self, batch: int, width: int, length_penalty: float, returned: int):
        self.batch, self.width, self.length_penalty, self.returned = batch, width, length_penalty, returned
        self.scores: Tensor | None = None  # [B, width] sum of log-probabilities
        self.new_tokens: Tensor | None = None  # [B, width] tokens that the sum is over

    def _normalised(self, scores: Tensor, new_tokens: Tensor) -> Tensor:
        return scores / new_tokens.clamp(min=1).to(scores.dtype) ** self.length_penalty

    def __call__(self, logprobs: Tensor, finished: Tensor, forced: Tensor, pad_id: int) -> tuple[Tensor | None, Tensor]:
        batch, width, vocab = self.batch, self.width, logprobs.shape[-1]
        if self.scores is None or self.new_tokens is None:
            # All beams of a clip start equal: only the first may be continued, or all would stay equal.
            self.scores = logprobs.new_full((batch, width), -torch.inf)
            self.scores[:, 0] = 0
            self.new_tokens = torch.zeros((batch, width), dtype=torch.int64, device=logprobs.device)
        finished, forced = finished.view(batch, width), forced.view(batch, width)
        steps = logprobs.view(batch, width, vocab)
        only_pad = torch.full_like(steps, -torch.inf)
        only_pad[..., pad_id] = 0
        steps = torch.where(finished[..., None], only_pad, steps)
        new_tokens = self.new_tokens + (~finished).long()
        totals = self.scores[..., None] + steps
        ranked = self._normalised(totals, new_tokens[..., None]).flatten(1).topk(width, dim=-1).indices
        parents, tokens = ranked // vocab, ranked % vocab
        stay = torch.arange(width, device=logprobs.device).expand(batch, width)
        held = forced[:, :1]
        parents = torch.where(held, stay, parents)
        chosen = totals.flatten(1).gather(1, ranked)
        self.scores = torch.where(held, self.scores, chosen)
        self.new_tokens = torch.where(held, self.new_tokens, new_tokens.gather(1, parents))
        first_row = torch.arange(batch, device=logprobs.device)[:, None] * width
        return (first_row + parents).flatten(), tokens.flatten()

    def best(self, text: Tensor, prompt_lengths: Tensor) -> Tensor:
        assert self.scores is not None
        assert self.new_tokens is not None
        order = self._normalised(self.scores, self.new_tokens).argsort(-1, descending=True)[:, : self.returned]
        first_row = torch.arange(self.batch, device=text.device)[:, None] * self.width
        return text[(first_row + order).flatten()]


def _check(
    prompt: Tensor, prompt_lengths: Tensor | None, latents: Tensor, clip_of_text: Tensor | None, config: Config
) -> Tensor | None:
    expect_tensor("prompt", prompt, "Q L", dtypes=(torch.int64,))
    expect(prompt.shape[0] > 0 and prompt.shape[1] > 0, "prompt", "hold at least one token", prompt)
    expect_device("prompt", prompt, latents.device)
    check_clip_of_text(clip_of_text, "prompt", prompt, latents.shape[0])
    check_values("prompt", prompt, 0, config.vocab_size, f"token ids in [0, vocab_size = {config.vocab_size})")
    if prompt_lengths is not None:
        expect_tensor("prompt_lengths", prompt_lengths, "Q", dtypes=(torch.int64,))
        expect_shape("prompt_lengths", prompt_lengths, prompt.shape[:1], "[Q]")
        expect_device("prompt_lengths", prompt_lengths, latents.device)
        longest = prompt.shape[1]
        check_values("prompt_lengths", prompt_lengths, 1, longest + 1, f"lengths in [1, {longest}]")
    return prompt_lengths
