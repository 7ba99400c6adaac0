"""A trained model that answers: free text, the likeliest of some choices, or a class, about batches of clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirasol.embedded import learned_chunks
from mirasol.evaluation.options import AnswerOptions
from mirasol.generation import generate
from mirasol.kernels.core.checks import expect
from mirasol.model import Model
from mirasol.tokenizer import Tokenizer, encode_answer, encode_prompt, load_tokenizer


class Encoded(NamedTuple):
    """Clips that any number of questions may be asked of: latents [B, T * m, av_dim], chunks int64 [B]."""

    latents: Tensor
    chunks: Tensor


class Answerer:
    """A model and its tokenizer, which answer questions about clips that are encoded once.

    Args:
        run: a folder that `Model.save_pretrained` wrote with its tokenizer, as training does.

    Attributes:
        max_chunks: most chunks of a clip, by the options or as the run has learned.
    Raises:
        FileNotFoundError, ValueError: as `Model.from_pretrained` and `load_tokenizer`.
    """

    def __init__(self, run: str | Path, options: AnswerOptions) -> None:
        self.options = options
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        bf16 = options.bf16 if options.bf16 is not None else self.device.type == "cuda"
        self.tokenizer: Tokenizer = load_tokenizer(run)
        self.model = Model.from_pretrained(run, dtype=torch.bfloat16 if bf16 else None, device=self.device)
        self.max_chunks = options.max_chunks or learned_chunks(run)
        self._lists: dict[str, list[int]] = {}

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, Tensor]) -> Encoded:
        """Encode B clips: what `mirasol.data.collate` makes of them."""
        clips = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        dtype = next(self.model.parameters()).dtype
        for name in ("video_features", "audio_features"):
            if name in clips:
                clips[name] = clips[name].to(dtype)
        return Encoded(self.model.encode(**clips), clips["chunks"])

    def generate(
        self, encoded: Encoded, questions: Sequence[str], clip_of_text: Sequence[int], **how: Any
    ) -> list[str]:
        """Free answers to Q questions, of at most `max_new_tokens` each, the same whatever else is asked at once.

        Args:
            clip_of_text: Q numbers, the clip that each question is about.
            how: options of `Model.generate` in place of those that this was made with.
        """
        how = {"max_new_tokens": self.options.max_new_tokens, "num_beams": self.options.num_beams, **how}
        seen = self.model.see(encoded.latents, chunks=encoded.chunks)
        answers: list[str] = [""] * len(questions)
        for rows in self._alike(questions, how["num_beams"]):
            prompts = torch.tensor([self._prompt(questions[i]) for i in rows], device=self.device)
            clips = torch.tensor([clip_of_text[i] for i in rows], device=self.device)
            texts = generate(self.model.text_decoder, self.model.config, seen, prompts, clip_of_text=clips, **how)
            for i, ids in zip(rows, texts[:, prompts.shape[1] :].tolist(), strict=True):
                answers[i] = self._text(ids)
        return answers

    def score(
        self,
        encoded: Encoded,
        questions: Sequence[str],
        choices: Sequence[Sequence[str]],
        clip_of_text: Sequence[int],
    ) -> list[list[float]]:
        """Log-probability, in nats, of each choice as the answer to its question, with `mean_per_token` by token.

        Args:
            choices: for each of Q questions its choices, which may differ in number.
        Returns:
            Q lists of numbers, one for each choice.
        """
        pairs = [(q, c) for q, texts in enumerate(choices) for c in range(len(texts))]
        scores = [[0.0] * len(texts) for texts in choices]
        for first in range(0, len(pairs), self.options.texts_at_once):
            part: dict[int, list[int]] = {}
            for q, c in pairs[first : first + self.options.texts_at_once]:
                part.setdefault(q, []).append(c)
            answers = [[self._answer(choices[q][c]) for c in columns] for q, columns in part.items()]
            found = self.model.score(
                encoded.latents,
                [self._prompt(questions[q]) for q in part],
                answers,
                chunks=encoded.chunks,
                clip_of_text=torch.tensor([clip_of_text[q] for q in part], device=self.device),
            ).tolist()
            for (q, columns), told, ids in zip(part.items(), found, answers, strict=True):
                for i, c in enumerate(columns):
                    scores[q][c] = told[i] / len(ids[i]) if self.options.mean_per_token else told[i]
        return scores

    def _alike(self, questions: Sequence[str], num_beams: int) -> list[list[int]]:
        """Indices of questions of the same length, so that none is padded, in parts of a bounded number of rows."""
        by_length: dict[int, list[int]] = {}
        for i, question in enumerate(questions):
            by_length.setdefault(len(self._prompt(question)), []).append(i)
        most = max(self.options.texts_at_once // num_beams, 1)
        return [rows[i : i + most] for rows in by_length.values() for i in range(0, len(rows), most)]

    def _prompt(self, question: str) -> list[int]:
        return encode_prompt(self.tokenizer, question)

    def _answer(self, text: str) -> list[int]:
        """Ids of an answer, kept, for classes come again with every clip."""
        if text not in self._lists:
            self._lists[text] = encode_answer(self.tokenizer, text)
        return self._lists[text]

    def _text(self, ids: list[int]) -> str:
        end = self.model.config.eos_id
        if end in ids:
            ids = ids[: ids.index(end)]
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def read_classes(path: str | Path) -> tuple[str, ...]:
    """The classes of a text file, one a line, in its order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no classes, or one that comes twice.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'classes must be "table" or a text file with a class a line, was {str(path)!r}')
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    classes = tuple(line.strip() for line in lines if line.strip())
    expect(len(classes) > 0, "classes", "hold at least one line", str(path))
    doubled = sorted({name for name in classes if classes.count(name) > 1})
    expect(not doubled, "classes", f"name each class once in {path}", doubled)
    return classes
