"""The adapter that lmms-eval runs; only lmms-eval imports this module."""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms

from mirasol.data import ClipTensors, Example, collate, load_clip
from mirasol.data.loader import BROKEN
from mirasol.evaluation.answer import Answerer, Encoded
from mirasol.evaluation.options import AnswerOptions
from mirasol.kernels.core.checks import expect, expect_int

log = logging.getLogger(__name__)


class Mirasol(lmms):
    """A trained model as lmms-eval asks it, in one process: each clip is decoded ahead and encoded once.

    A task hands over one path of a media file for each question; a clip that cannot be read is named in the log and
    answered by "".

    Args:
        pretrained: a folder that training left, with its tokenizer.
        batch_size: takes what lmms-eval passes; clips are encoded one by one.
        device: "cpu" or "cuda"; a GPU where there is one.
        bf16, max_chunks, max_new_tokens: as in `AnswerOptions`; a task's own max_new_tokens comes first.
        kept: clips whose latents are kept, for the rounds and choices that come back to them.
        readers: threads that decode clips ahead.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        bf16: bool | None = None,
        max_chunks: int | None = None,
        max_new_tokens: int = 32,
        kept: int = 64,
        readers: int = 4,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        expect_int("kept", kept)
        expect_int("readers", readers)
        options = AnswerOptions(max_chunks=max_chunks, max_new_tokens=max_new_tokens, device=device, bf16=bf16)
        self._answerer = Answerer(pretrained, options)
        self._kept, self._readers = kept, readers
        self._latents: OrderedDict[str, Encoded | None] = OrderedDict()
        self.batch_size = batch_size

    @property
    def device(self) -> torch.device:
        return self._answerer.device

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Free answers; a request's arguments are (context, options, doc_to_visual, doc_id, task, split)."""
        answers = [""] * len(requests)
        for i, encoded in self._clips([self._path(*request.args[2:6]) for request in requests]):
            context, how = requests[i].args[:2]
            answers[i] = self._generate(encoded, context, how)
            self.cache_hook.add_partial("generate_until", (context, how), answers[i])
        return answers

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """The answers of all rounds of each request, whose arguments have doc_to_text after doc_to_visual.

        doc_to_text(doc, previous_output=, round_idx=, previous_round_info=) gives the next round, as (visuals, context,
        whether it is over, the answers so far, what it wants back).
        """
        rounds: list[list[str]] = [[] for _ in requests]
        paths = [self._path(request.args[2], *request.args[4:7]) for request in requests]
        for i, first in self._clips(paths):
            context, how, _, doc_to_text, doc_id, task, split = requests[i].args
            doc, encoded = self.task_dict[task][split][doc_id], first
            said, info = [self._generate(encoded, context, how)], None
            while True:
                visuals, context, over, said, info = doc_to_text(
                    doc, previous_output=said, round_idx=len(said), previous_round_info=info
                )
                said = list(said)
                if over:
                    break
                if visuals:
                    encoded = self._encode_path(_one_path(visuals))
                said.append(self._generate(encoded, context, how))
            rounds[i] = said
        return rounds

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """(loss, whether greedy decoding gives it) of each continuation.

        The loss is the negative log-probability in nats, for lmms-eval takes the choice with the least value, whatever
        the name says. Arguments: (context, continuation or doc_to_target, doc_to_visual, doc_id, task, split). A clip
        that cannot be read gives an infinite loss.
        """
        results = [(float("inf"), False)] * len(requests)
        for i, encoded in self._clips([self._path(*request.args[2:6]) for request in requests]):
            context, continuation, _, doc_id, task, split = requests[i].args
            if callable(continuation):
                continuation = continuation(self.task_dict[task][split][doc_id])
            if encoded is not None:
                text = str(continuation).strip()
                loss = -self._answerer.score(encoded, [context], [[text]], [0])[0][0]
                greedy = self._answerer.generate(
                    encoded, [context], [0], num_beams=1, max_new_tokens=self._length(text)
                )
                results[i] = (loss, greedy[0] == text)
        return results

    def _length(self, text: str) -> int:
        return len(self._answerer.tokenizer.encode(text, add_special_tokens=False)) + 1

    def _generate(self, encoded: Encoded | None, context: str, how: dict[str, Any]) -> str:
        if encoded is None:
            return ""
        answer = self._answerer.generate(encoded, [context], [0], **_generation(how))[0]
        until = how.get("until") or ()
        for stop in [until] if isinstance(until, str) else until:
            answer = answer.split(stop, 1)[0] if stop else answer
        return answer.strip()

    def _path(self, doc_to_visual: Callable[[Any], Any], doc_id: int, task: str, split: str) -> str:
        return _one_path(doc_to_visual(self.task_dict[task][split][doc_id]))

    def _clips(self, paths: Sequence[str]) -> Iterator[tuple[int, Encoded | None]]:
        """(number of the request, its encoded clip or None): all of a clip together, later clips read ahead."""
        rows: dict[str, list[int]] = {}
        for i, path in enumerate(paths):
            rows.setdefault(path, []).append(i)
        waiting = deque(path for path in rows if path not in self._latents)
        with ThreadPoolExecutor(self._readers) as readers:
            ahead: dict[str, Future[ClipTensors]] = {}
            for path, asked in rows.items():
                while waiting and len(ahead) < 2 * self._readers:
                    later = waiting.popleft()
                    ahead[later] = readers.submit(self._read, later)
                encoded = self._encode_path(path, ahead.pop(path, None))
                for i in asked:
                    yield i, encoded

    def _encode_path(self, path: str, clip: Future[ClipTensors] | None = None) -> Encoded | None:
        """The latents of a file, kept for the next time; None where it cannot be read."""
        if path not in self._latents:
            try:
                tensors = clip.result() if clip is not None else self._read(path)
                self._latents[path] = self._answerer.encode(collate([tensors]))
            except BROKEN as error:
                log.warning("%s is answered by nothing: %s", path, error)
                self._latents[path] = None
        self._latents.move_to_end(path)
        encoded = self._latents[path]
        while len(self._latents) > self._kept:
            self._latents.popitem(last=False)
        return encoded

    def _read(self, path: str) -> ClipTensors:
        return load_clip(Example(path), self._answerer.model.config, self._answerer.max_chunks)


def _one_path(visuals: Any) -> str:
    """The path that a task hands over.

    Raises:
        ValueError: pictures, arrays of sound, or none or several files.
    """
    visuals = visuals if isinstance(visuals, list | tuple) else [visuals]
    must = "be the path of one media file, for the model takes picture and sound from a clip"
    expect(len(visuals) == 1 and isinstance(visuals[0], str), "visuals", must, visuals)
    return str(visuals[0])


def _generation(how: dict[str, Any]) -> dict[str, Any]:
    """Options of `Model.generate` of a task's."""
    options = {name: how[name] for name in ("max_new_tokens", "num_beams") if how.get(name)}
    if how.get("do_sample") and how.get("temperature", 1.0) > 0:
        names = ("temperature", "top_p", "top_k")
        options |= {"do_sample": True, **{name: how[name] for name in names if how.get(name)}}
    return options
