"""The next token of every row: the likeliest, one that is drawn, or those of a beam search."""

from __future__ import annotations

import torch
from torch import Tensor

from mirasol.kernels.core.checks import expect

Chosen = tuple[Tensor | None, Tensor]
"""The row that each row continues, or None for itself; its token."""


class Choice:
    """Of logits [R, V] the next token of every row."""

    def __call__(self, logits: Tensor, finished: Tensor, forced: Tensor | None, pad_id: int) -> Chosen:
        """-> the row that each row continues, or None for itself, and its token [R].

        Args:
            finished: bool [R], rows that have ended, whose token does not count.
            forced: bool [R], rows that are within their prompt, likewise; None: no row is.
        """
        raise NotImplementedError

    def best(self) -> Tensor | None:
        """The rows to return, best first; None: all."""
        return None


class Draw(Choice):
    """The likeliest token, or one drawn from the distribution after `temperature`, `top_k` and `top_p`."""

    def __init__(
        self,
        do_sample: bool,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        generator: torch.Generator | None,
    ):
        expect(temperature > 0, "temperature", "be above 0", temperature)
        expect(top_p is None or 0 < top_p <= 1, "top_p", "be in (0, 1]", top_p)
        expect(top_k is None or top_k >= 1, "top_k", "be at least 1", top_k)
        self.do_sample, self.temperature, self.top_k, self.top_p = do_sample, temperature, top_k, top_p
        self.generator = generator

    def __call__(self, logits: Tensor, finished: Tensor, forced: Tensor | None, pad_id: int) -> Chosen:
        if not self.do_sample:
            return None, logits.argmax(-1)
        probabilities = (logits.float() / self.temperature).softmax(-1)
        ordered, order = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        dropped = torch.zeros_like(ordered, dtype=torch.bool)
        if self.top_p is not None:
            dropped |= before >= self.top_p
        if self.top_k is not None:
            dropped[:, self.top_k :] = True
        drawn = torch.multinomial(ordered.masked_fill(dropped, 0), 1, generator=self.generator)
        return None, order.gather(-1, drawn).squeeze(-1)


class Beams(Choice):
    """The best `width` continuations per question; a finished beam competes on with the score it ended with."""

    def __init__(self, questions: int, width: int, length_penalty: float, returned: int):
        self.questions, self.width, self.length_penalty, self.returned = questions, width, length_penalty, returned
        self.scores: Tensor | None = None  # [Q, width] sum of log-probabilities
        self.new_tokens: Tensor | None = None  # [Q, width] tokens that the sum is over

    def _normalised(self, scores: Tensor, new_tokens: Tensor) -> Tensor:
        return scores / new_tokens.clamp(min=1).to(scores.dtype) ** self.length_penalty

    def __call__(self, logits: Tensor, finished: Tensor, forced: Tensor | None, pad_id: int) -> Chosen:
        questions, width, vocab = self.questions, self.width, logits.shape[-1]
        steps = logits.float().log_softmax(-1).view(questions, width, vocab)
        if self.scores is None or self.new_tokens is None:
            # All beams of a question start equal: only the first may be continued, or all would stay equal.
            self.scores = steps.new_full((questions, width), -torch.inf)
            self.scores[:, 0] = 0
            self.new_tokens = torch.zeros((questions, width), dtype=torch.int64, device=steps.device)
        finished = finished.view(questions, width)
        only_pad = torch.full_like(steps, -torch.inf)
        only_pad[..., pad_id] = 0
        steps = torch.where(finished[..., None], only_pad, steps)
        new_tokens = self.new_tokens + (~finished).long()
        totals = self.scores[..., None] + steps
        ranked = self._normalised(totals, new_tokens[..., None]).flatten(1).topk(width, dim=-1).indices
        parents, tokens = ranked // vocab, ranked % vocab
        chosen, new_tokens = totals.flatten(1).gather(1, ranked), new_tokens.gather(1, parents)
        if forced is not None:
            held = forced.view(questions, width)[:, :1]
            parents = torch.where(held, torch.arange(width, device=steps.device), parents)
            chosen = torch.where(held, self.scores, chosen)
            new_tokens = torch.where(held, self.new_tokens, new_tokens)
        self.scores, self.new_tokens = chosen, new_tokens
        return (self._first_row(steps) + parents).flatten(), tokens.flatten()

    def best(self) -> Tensor:
        assert self.scores is not None
        assert self.new_tokens is not None
        order = self._normalised(self.scores, self.new_tokens).argsort(-1, descending=True)[:, : self.returned]
        return (self._first_row(order) + order).flatten()

    def _first_row(self, like: Tensor) -> Tensor:
        """[Q, 1], the row of each question's first beam."""
        return torch.arange(self.questions, device=like.device)[:, None] * self.width
