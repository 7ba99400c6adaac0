"""Text out of the decoder: greedy, sampled or by beam search, always with a key-value cache."""

from __future__ import annotations

import torch
from torch import Tensor

from mirasol.kernels.core.checks import expect, expect_int, expect_shape, expect_tensor
from mirasol.text import TextDecoder


@torch.no_grad()
def generate(
    decoder: TextDecoder,
    latents: Tensor,
    prompt: Tensor | None = None,
    *,
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
        prompt: [B, L] int64, right-padded where `prompt_lengths` says so; default: one bos token.
        prompt_lengths: [B] int64, tokens of each prompt; default: all L.
        max_new_tokens: tokens after the longest prompt; a shorter prompt's row gains the difference.
        do_sample: draw from the distribution after `temperature`, `top_k` and `top_p`; otherwise take the likeliest.
        num_beams: width of the beam search; 1 is none. Not together with `do_sample`.
        length_penalty: a beam's score is its log-probability over (new tokens) ** length_penalty.
        num_return_sequences: rows per clip: samples, or the best beams (then at most `num_beams`).
        eos_token_id: ends a row; default: that of the configuration.
        generator: random numbers of the draws.
    Returns:
        [B * num_return_sequences, L + max_new_tokens or less] int64, `pad_id` after a row's end.
    Raises:
        TypeError, ValueError: an argument of a wrong kind or shape, an option out of range, by name.
    """
    config = decoder.config
    expect_tensor("latents", latents, "B N av_dim")
    expect_shape("latents", latents, (*latents.shape[:2], config.av_dim), "[B, N, av_dim]")
    batch = latents.shape[0]
    if prompt is None:
        prompt = torch.full((batch, 1), config.bos_id, dtype=torch.int64, device=latents.device)
    lengths = _check(prompt, prompt_lengths, batch)
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
    rows = prompt.repeat_interleave(copies, 0)
    lengths = lengths.repeat_interleave(copies, 0)
    longest = prompt.shape[1] + max_new_tokens
    cache = decoder.new_cache(latents, longest, copies)
    if num_beams > 1:
        choose: _Choice = _Beams(batch, num_beams, length_penalty, num_return_sequences)
    else:
        choose = _Draw(do_sample, temperature, top_k, top_p, generator)

    text = torch.full((rows.shape[0], longest), config.pad_id, dtype=torch.int64, device=rows.device)
    text[:, : rows.shape[1]] = rows
    end = config.eos_id if eos_token_id is None else eos_token_id
    finished = torch.zeros(rows.shape[0], dtype=torch.bool, device=rows.device)
    position = int(lengths.min())
    logits = decoder(text[:, :position], None, cache)[:, -1]
    while True:
        forced = position < lengths
        parents, tokens = choose(logits.float().log_softmax(-1), finished, forced, config.pad_id)
        if parents is not None:
            cache.reorder(parents)
            text, finished = text[parents], finished[parents]
        tokens = torch.where(forced, text[:, position], torch.where(finished, config.pad_id, tokens))
        text[:, position] = tokens
        finished = finished | (~forced & (tokens == end))
        position += 1
        if position == longest or bool(finished.all()):
            break
        logits = decoder(tokens[:, None], None, cache)[:, -1]
    return choose.best(text[:, :position], lengths)


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


def _check(prompt: Tensor, lengths: Tensor | None, batch: int) -> Tensor:
    expect_tensor("prompt", prompt, "B L", dtypes=(torch.int64,))
    expect(prompt.shape[0] == batch, "prompt", f"hold {batch} rows like the clips", prompt)
    expect(prompt.shape[1] > 0, "prompt", "hold at least one token", prompt)
    if lengths is None:
        return torch.full((batch,), prompt.shape[1], dtype=torch.int64, device=prompt.device)
    expect_tensor("prompt_lengths", lengths, "B", dtypes=(torch.int64,))
    expect_shape("prompt_lengths", lengths, (batch,), "[B]")
    expect(
        bool((lengths >= 1).all()) and bool((lengths <= prompt.shape[1]).all()),
        "prompt_lengths",
        f"lie in [1, {prompt.shape[1]}]",
        lengths.tolist(),
    )
    return lengths
