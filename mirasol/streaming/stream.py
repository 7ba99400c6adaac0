"""`Stream`: a batch of live streams of a model, each a row of what it keeps."""

from __future__ import annotations

import copy
import itertools
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirasol import generation
from mirasol.batch import Clips, expect_device
from mirasol.cache import Seen
from mirasol.encoders.both import Both, in_turn
from mirasol.graphs import Captured
from mirasol.kernels.core.checks import FLOATS, expect, expect_int, expect_number, expect_tensor
from mirasol.model import Model
from mirasol.pieces import pieces
from mirasol.streaming import state as state_files
from mirasol.streaming.advance import advance, new_past, reaches
from mirasol.streaming.answer import Answer, Shown
from mirasol.streaming.beside import SideBySide
from mirasol.streaming.cutter import Chunk, Cutter
from mirasol.streaming.lanes import Lane
from mirasol.tokenizer import Tokenizer, encode_answer, encode_prompt


class Stream:
    """Streams that a model watches and listens to, chunk after chunk, and that it answers about at any time.

    Each row gives what the whole clip gives in `Model.forward` of the same windows, to rounding, and takes the same
    memory after an hour as after a minute: a Token Turing Machine's memory is all of its past, other parts keep the
    chunks of their window and their sinks. Made by `Model.stream`. Several threads may use one stream.

    Attributes:
        model, config, tokenizer, batch: what it was made with.
        chunks: how many chunks each of the B rows has seen.
        nbytes: bytes that the past takes.
    """

    def __init__(
        self,
        model: Model,
        batch: int = 1,
        *,
        tokenizer: Tokenizer | None = None,
        memory: int | None = None,
        sinks: int = 0,
        grow: bool = False,
        graphs: bool | None = None,
    ):
        self.model, self.config, self.tokenizer = model, model.config, tokenizer
        self.batch = expect_int("batch", batch)
        self._reach = reaches(model.config, memory, sinks, grow)
        self._bounded = all(reach.window is not None for reach in self._reach.values())
        on_gpu = model.modality.device.type == "cuda"
        self._graphs = on_gpu and self._bounded if graphs is None else graphs
        expect(not self._graphs or on_gpu, "graphs", "be False but on a CUDA device", graphs)
        expect(not self._graphs or self._bounded, "graphs", "be False where what is kept grows", graphs)
        self._lock = threading.RLock()
        self._taken: set[int] = set()
        self._start()
        with torch.no_grad(), generation.evaluating(model):
            self._past = new_past(model, batch, self._reach)
            self._missing = model.missing_features()
        self._past.rows.fixed = self._graphs

    def _start(self) -> None:
        """What forks do not share and files do not hold."""
        self.device = self.model.modality.device
        self._encoding, self._answering, self._captured = Lane(self.device), Lane(self.device), Captured(self._graphs)
        self._side_by_side: Both = SideBySide() if self.device.type == "cpu" else in_turn
        self._cutters: dict[int, Cutter] = {}

    @property
    def chunks(self) -> list[int]:
        return list(self._past.rows.counts)

    @property
    def nbytes(self) -> int:
        return self._past.nbytes

    @torch.no_grad()
    def push(
        self,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        *,
        rows: Sequence[int] | None = None,
        times: Sequence[float] | None = None,
        video_present: Tensor | None = None,
        audio_present: Tensor | None = None,
    ) -> Tensor:
        """Watch and hear the next chunk of each row.

        Args:
            video: [R, 3, F, H, W], uint8 (0..255) or float (0..1); None: there is no picture.
            audio: [R, S] float mono samples in -1..1; None: there is no sound.
            rows: R different rows; default: all B.
            times: R seconds, when each chunk begins; default: right after as many chunks as the row has seen.
            video_present, audio_present: [R] bool; False where a row's chunk has none.
        Returns:
            h [R, m, av_dim], what the model makes of these chunks.
        Raises:
            TypeError, ValueError: an argument of a wrong kind, shape or value, by name; nothing has changed then.
        """
        with self._lock, generation.evaluating(self.model), self._encoding.after_caller():
            chosen = self._rows(rows)
            seconds = [self.chunks[row] * self.config.seconds_per_chunk for row in chosen] if times is None else times
            expect(len(seconds) == len(chosen), "times", f"hold {len(chosen)} numbers, one a row", times)
            self._check_chunk("video", video, len(chosen))
            self._check_chunk("audio", audio, len(chosen))
            for name, present, given in (("video", video_present, video), ("audio", audio_present, audio)):
                expect(present is None or given is not None, f"{name}_present", f"come with {name}", present)
            missing_video, missing_audio = (features.expand(len(chosen), -1, -1, -1) for features in self._missing)
            clips = Clips.check(
                self.config,
                video,
                audio,
                times=torch.tensor([[expect_number("times", second)] for second in seconds], device=self.device),
                video_present=video_present,
                audio_present=audio_present,
                video_features=missing_video if video is None else None,
                audio_features=missing_audio if audio is None else None,
            )
            self._past.rows.choose(chosen)
            try:
                h = self._advance(clips)
            finally:
                self._past.rows.choose(None)
            return h

    def _advance(self, clips: Clips) -> Tensor:
        rows, video, audio = self._past.rows, clips.video, clips.audio
        if audio is None:
            self._past.sound.write(self._past.sound.initial.expand(len(rows.chosen), -1))
        parts = clips.video_present is not None or clips.audio_present is not None
        if video is None or audio is None or parts or not (rows.fixed and rows.all):
            side_by_side = self._side_by_side if video is not None and audio is not None else in_turn
            h = advance(self.model, clips, self._past, side_by_side)
        else:

            def step(video: Tensor, audio: Tensor, times: Tensor) -> Tensor:
                return advance(self.model, Clips.check(self.config, video, audio, times=times), self._past)

            h = self._captured((video.dtype, audio.dtype), step, video, audio, clips.times).clone()
        rows.count()
        return h

    def push_frames(self, frames: Tensor, times: Sequence[float], row: int = 0) -> int:
        """Hand on pictures of a row as they come, any number at a time; chunks that are complete are pushed.

        Args:
            frames: uint8 [N, 3, image_size, image_size].
            times: N seconds at which they come on screen, rising. Pictures that were dropped leave those before them on
                screen.
        Returns:
            How many chunks were pushed.
        """
        with self._lock:
            cutter = self._cutter(row)
            cutter.frames(frames, times)
            return self._push_ready(row, list(cutter.ready()))

    def push_samples(self, samples: Tensor, time: float | None = None, row: int = 0) -> int:
        """Hand on sound of a row as it comes, any number of samples at a time; chunks that are complete are pushed.

        Args:
            samples: float32 [N], mono in -1..1 at `config.sample_rate`.
            time: seconds at which the first is heard; None: right after those before.
        Returns:
            How many chunks were pushed.
        """
        with self._lock:
            cutter = self._cutter(row)
            cutter.samples(samples, time)
            return self._push_ready(row, list(cutter.ready()))

    def finish(self, row: int = 0) -> int:
        """Push what `push_frames` and `push_samples` left of a row, as at the end of a file; -> how many chunks."""
        with self._lock:
            return self._push_ready(row, list(self._cutter(row).finish()))

    def _push_ready(self, row: int, chunks: Sequence[Chunk]) -> int:
        for chunk in chunks:
            self.push(
                chunk.video[None].to(self.device) if chunk.video is not None else None,
                chunk.audio[None].to(self.device) if chunk.audio is not None else None,
                rows=[row],
                times=[chunk.start],
            )
        return len(chunks)

    def ask(self, question: str, *, row: int = 0, **options: Any) -> str:
        """The answer to a question about what a row has seen; the past stays as it is.

        Args:
            options: those of `mirasol.generation.generate`: `max_new_tokens`, `num_beams`, `stop_strings`, ...
        Raises:
            ValueError: a row that has seen nothing yet, a stream without a tokenizer.
        """
        tokenizer = self._tokenizer()
        expect(isinstance(question, str), "question", "be a string", question)
        prompt = torch.tensor([encode_prompt(tokenizer, question)], device=self.device)
        text = self.generate(prompt, rows=[row], tokenizer=tokenizer, **options)[0, prompt.shape[1] :].tolist()
        end = self._end(options)
        ids = itertools.takewhile(lambda token: token != end, text)
        return "".join(pieces(ids, tokenizer, options.get("stop_strings", ())))

    def answer(
        self, question: str, *, row: int = 0, attention: bool = False, stop_strings: Sequence[str] = (), **options: Any
    ) -> Answer:
        """The answer to a question, piece by piece; chunks may be pushed between two pieces.

        Args:
            attention: note which chunks the answer looks at.
            options: those of `mirasol.generation.steps`.
        """
        asked = time.perf_counter()
        tokenizer = self._tokenizer()
        expect(isinstance(question, str), "question", "be a string", question)
        prompt = torch.tensor([encode_prompt(tokenizer, question)], device=self.device)
        seen, chunks = self._see([row])
        options |= {"attention": attention, "graphs": self._graphs}
        steps = generation.steps(self.model.text_decoder, self.config, seen, prompt, **options)
        copies = [tensor for pair in seen.keys_values if pair is not None for tensor in pair]
        own = self._answering.iterate(_evaluated(self.model, steps), copies)
        shown = Shown(tokenizer, self._end(options), stop_strings)
        return Answer(question, own, shown, chunks, self.config.latents_per_chunk, asked)

    @torch.no_grad()
    def score(self, question: str, choices: Sequence[str], *, row: int = 0) -> list[float]:
        """How likely each of some answers is: log-probabilities in nats, summed over the tokens of each."""
        tokenizer = self._tokenizer()
        expect(len(choices) > 0, "choices", "hold at least one answer", choices)
        seen, _ = self._see([row])
        answers = [[encode_answer(tokenizer, choice) for choice in choices]]
        with generation.evaluating(self.model):
            prompts = [encode_prompt(tokenizer, question)]
            return generation.score(self.model.text_decoder, self.config, seen, prompts, answers)[0].tolist()

    @torch.no_grad()
    def generate(self, prompt: Tensor, *, rows: Sequence[int] | None = None, **options: Any) -> Tensor:
        """Continue one prompt a row.

        Args:
            prompt: int64 [R, L].
            rows: R different rows; default: all B.
            options: those of `mirasol.generation.generate`.
        Returns:
            [R * num_return_sequences, L + new] int64.
        """
        seen, _ = self._see(rows)
        with generation.evaluating(self.model):
            graphs = self._graphs
            return generation.generate(self.model.text_decoder, self.config, seen, prompt, graphs=graphs, **options)

    @torch.no_grad()
    def _see(self, rows: Sequence[int] | None) -> tuple[Seen, list[int]]:
        """What the text decoder looks at, a copy, and which chunks lie there (of the first of the rows)."""
        with self._lock, self._encoding.after_caller():
            chosen = self._rows(rows)
            for row in chosen:
                expect(self.chunks[row] > 0, "row", "have seen a chunk", row)
            self._past.rows.choose(chosen)
            try:
                # One shape at all times, so that a compiled decoder is compiled once.
                found = [ring.read(whole=self._bounded) if ring is not None else None for ring in self._past.text]
            finally:
                self._past.rows.choose(None)
            ring = next(ring for ring in self._past.text if ring is not None)
            lengths = next(one[1] for one in found if one is not None)
            pairs = [one[0] if one is not None else None for one in found]
            if len(chosen) == self.batch:  # what was read may be the buffers themselves
                pairs = [(pair[0].clone(), pair[1].clone()) if pair is not None else None for pair in pairs]
            return Seen(pairs, lengths), ring.chunks(self.chunks[chosen[0]])

    def join(self) -> int:
        """A row for a new stream, which has seen nothing.

        Raises:
            RuntimeError: all rows are taken.
        """
        with self._lock:
            free = next((row for row in range(self.batch) if row not in self._taken), None)
            if free is None:
                raise RuntimeError(f"all {self.batch} rows are taken: a stream must leave before another joins")
            self._taken.add(free)
            self.restart(free)
            return free

    def leave(self, row: int) -> None:
        """Give a row back and forget what it has seen.

        Raises:
            ValueError: a row that nobody has taken.
        """
        with self._lock:
            expect(row in self._taken, "row", f"be one of those taken, {sorted(self._taken)}", row)
            self._taken.remove(row)
            self.restart(row)

    def restart(self, row: int = 0) -> None:
        """Forget what a row has seen."""
        with self._lock:
            (row,) = self._rows([row])
            self._past.restart(row)
            self._cutters.pop(row, None)

    def fork(self) -> Stream:
        """A stream that has seen the same and goes on by itself."""
        with self._lock:
            other = copy.copy(self)
            other._lock = threading.RLock()
            other._start()
            other._taken, other._past = set(self._taken), copy.deepcopy(self._past)
            other._cutters = {row: copy.deepcopy(cutter) for row, cutter in self._cutters.items()}
            return other

    def state_dict(self) -> dict[str, Tensor]:
        """All that the stream keeps, as tensors of their own: a stream of the same settings goes on from it."""
        with self._lock:
            found = {name: tensor.clone() for name, tensor in self._past.tensors().items()}
            found["taken"] = torch.tensor([row in self._taken for row in range(self.batch)])
            for row, cutter in self._cutters.items():
                found |= {f"cutter.{row}.{name}": tensor for name, tensor in cutter.state_dict().items()}
            return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ValueError: that of a stream with another model, batch or reach, by name; nothing has changed then.
        """
        with self._lock:
            state_files.check(state, self._past.tensors(), grows=not self._bounded, rows=self.batch)
            cutters = {row: self._new_cutter() for row in state_files.rows_with_cutters(state)}
            for row, cutter in cutters.items():
                prefix = f"cutter.{row}."
                own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
                cutter.load_state_dict(own)
            self._past.load(state)
            self._cutters = cutters
            self._taken = {row for row, taken in enumerate(state["taken"].tolist()) if taken}

    def save(self, path: str | Path) -> None:
        """Write the `state_dict` to a safetensors file, in one step."""
        state_files.write(Path(path), self.state_dict(), self._settings())

    def load(self, path: str | Path) -> None:
        """Go on from a file that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a broken file, or that of a stream with another model, batch or reach; nothing has changed then.
        """
        state = state_files.read(Path(path), self._settings())
        past = self._past.tensors()
        self.load_state_dict({name: t.to(self.device) if name in past else t for name, t in state.items()})

    def _settings(self) -> str:
        """What a file's stream must have in common with the one that loads it, beside shapes."""
        return json.dumps({"config": self.config.to_dict(), "reach": self._reach}, sort_keys=True)

    def _check_chunk(self, name: str, tensor: Tensor | None, rows: int) -> None:
        """One chunk a row; `Clips.check` looks at the rest."""
        if tensor is None:
            return
        dims, length = ("R 3 F H W", self.config.frames_per_chunk)
        if name == "audio":
            dims, length = ("R S", self.config.samples_per_chunk)
        expect_tensor(name, tensor, dims, dtypes=(torch.uint8, *FLOATS))
        expect(tensor.shape[0] == rows, name, f"hold {rows} rows", tensor)
        along = 2 if name == "video" else 1
        expect(tensor.shape[along] <= length, name, f"hold one chunk, {dims.split()[along]} = {length}", tensor)
        expect_device(name, tensor, self.device)

    def _rows(self, rows: Sequence[int] | None) -> list[int]:
        if rows is None:
            return list(range(self.batch))
        chosen = [expect_int("rows", row, minimum=0) for row in rows]
        expect(len(chosen) > 0, "rows", "name at least one row", rows)
        expect(max(chosen) < self.batch, "rows", f"be below batch = {self.batch}", rows)
        expect(len(set(chosen)) == len(chosen), "rows", "be different rows", rows)
        return chosen

    def _cutter(self, row: int) -> Cutter:
        (row,) = self._rows([row])
        if row not in self._cutters:
            self._cutters[row] = self._new_cutter()
        return self._cutters[row]

    def _new_cutter(self) -> Cutter:
        c = self.config
        return Cutter(
            frames_per_chunk=c.frames_per_chunk,
            image_size=c.image_size,
            samples_per_chunk=c.samples_per_chunk,
            sample_rate=c.sample_rate,
        )

    def _end(self, options: Mapping[str, Any]) -> int:
        """The id that ends an answer."""
        end = options.get("eos_token_id")
        return self.config.eos_id if end is None else end

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("tokenizer must be given to Model.stream for questions in words, was None")
        return self.tokenizer


def _evaluated(model: Model, steps: Iterator[generation.Step]) -> Iterator[generation.Step]:
    """The steps, each of them made in evaluation mode."""
    while True:
        with generation.evaluating(model):
            step = next(steps, None)
        if step is None:
            return
        yield step
