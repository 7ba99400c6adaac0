"""Prompts continued: all tokens at once, or one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mirasol.batch import check_clip_of_text, check_values, expect_device
from mirasol.cache import Cache, Seen
from mirasol.config import Config
from mirasol.generation.choice import Beams, Choice, Draw
from mirasol.generation.loop import Decoder, Run
from mirasol.generation.stops import Stops
from mirasol.kernels.core.checks import expect, expect_int, expect_shape, expect_tensor
from mirasol.pieces import check_stops
from mirasol.tokenizer import Tokenizer

ROOM = 64
"""Buffers are as long as a multiple of this: texts of many lengths then have buffers of few, each compiled once."""


class Step(NamedTuple):
    """A token of every row.

    Attributes:
        tokens: int64 [R]; of a row that has ended, `pad_id`; of one that is within its prompt, the prompt's token.
        attention: float32 [R, N], how the cross-attentions, in the mean over layers and heads, shared their attention
            among the latents when they chose the token: sums to 1. None where it was not asked for.
    """

    tokens: Tensor
    attention: Tensor | None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the mode it had after."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


@torch.no_grad()
def generate(
    decoder: Decoder,
    config: Config,
    seen: Seen,
    prompt: Tensor | None = None,
    *,
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
    stop_strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    graphs: bool = False,
) -> Tensor:
    """Continue prompts token by token.

    Args:
        seen: what `decoder.see` made of C clips.
        prompt: [Q, L] int64, right-padded where `prompt_lengths` says so; default: one bos token a clip.
        clip_of_text: [Q], the clip that each prompt is about; None: prompt q is about clip q.
        prompt_lengths: [Q] int64, tokens of each prompt; default: all L.
        max_new_tokens: tokens after the longest prompt; a shorter prompt's row gains the difference.
        do_sample: draw from the distribution after `temperature`, `top_k` and `top_p`; otherwise take the likeliest.
        num_beams: width of the beam search; 1 is none. Not together with `do_sample`.
        length_penalty: a beam's score is its log-probability over (new tokens) ** length_penalty.
        num_return_sequences: rows per prompt: samples, or the best beams (then at most `num_beams`).
        eos_token_id: ends a row; default: that of the configuration.
        generator: random numbers of the draws.
        stop_strings: a row ends, too, with the token that completes one of these in its new text.
        tokenizer: decodes what `stop_strings` are looked for in; needed with them only.
        graphs: capture the step of one token in a CUDA graph; on a CUDA device, with our own text decoder.
    Returns:
        [Q * num_return_sequences, L + max_new_tokens or less] int64, `pad_id` after a row's end.
    Raises:
        TypeError, ValueError: an argument of a wrong kind or shape, an option out of range, by name.
    """
    expect_int("num_beams", num_beams)
    expect_int("num_return_sequences", num_return_sequences)
    expect(not (do_sample and num_beams > 1), "do_sample", "be False with num_beams > 1", do_sample)
    choose: Choice = Draw(do_sample, temperature, top_k, top_p, generator)
    copies = num_return_sequences
    if num_beams > 1:
        expect(copies <= num_beams, "num_return_sequences", "be at most num_beams", copies)
        prompt = _prompt(config, seen, prompt, clip_of_text)
        choose, copies = Beams(prompt.shape[0], num_beams, length_penalty, copies), num_beams
    else:
        expect(copies == 1 or do_sample, "num_return_sequences", "be 1 unless do_sample", copies)
    run = _set_up(
        decoder,
        config,
        seen,
        prompt,
        choose,
        copies=copies,
        clip_of_text=clip_of_text,
        prompt_lengths=prompt_lengths,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        graphs=graphs,
    )
    rows, length = run.prompt.shape
    text = torch.full((rows, run.longest), config.pad_id, dtype=torch.int64, device=seen.device)
    text[:, :length] = run.prompt
    position = run.first
    for parents, tokens, _ in run.moves():
        if parents is not None:
            text = text[parents]
        text[:, position] = tokens
        position += 1
    return _best(run, text[:, :position])


def steps(
    decoder: Decoder,
    config: Config,
    seen: Seen,
    prompt: Tensor | None = None,
    *,
    clip_of_text: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    max_new_tokens: int = 32,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_return_sequences: int = 1,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
    stop_strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    attention: bool = False,
    graphs: bool = False,
) -> Iterator[Step]:
    """Continue prompts, and hand out each token when it is there: those that `generate` puts behind the prompts.

    The first step is behind the shortest prompt. Whether rows have ended is looked at every `LOOK_EVERY` tokens only on
    a device that one has to wait for: steps of nothing but `pad_id` may come last, and of a row that has written a stop
    string, tokens that `generate` leaves out.

    Args:
        attention: also say what each token looked at.
        Others, and what is raised, as in `generate`. The decoder is to be in evaluation mode.
    """
    expect_int("num_return_sequences", num_return_sequences)
    run = _set_up(
        decoder,
        config,
        seen,
        prompt,
        Draw(do_sample, temperature, top_k, top_p, generator),
        copies=num_return_sequences,
        clip_of_text=clip_of_text,
        prompt_lengths=prompt_lengths,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        graphs=graphs,
    )
    if attention:
        run.cache.cross.watch()
    return (Step(tokens, shares) for _, tokens, shares in run.moves())


@torch.no_grad()
def _set_up(
    decoder: Decoder,
    config: Config,
    seen: Seen,
    prompt: Tensor | None,
    choose: Choice,
    *,
    copies: int,
    clip_of_text: Tensor | None,
    prompt_lengths: Tensor | None,
    max_new_tokens: int,
    eos_token_id: int | None,
    stop_strings: Sequence[str],
    tokenizer: Tokenizer | None,
    graphs: bool,
) -> Run:
    """Check the arguments and make the cache."""
    prompt = _prompt(config, seen, prompt, clip_of_text)
    expect_int("max_new_tokens", max_new_tokens)
    expect(not graphs or seen.device.type == "cuda", "graphs", "be False but on a CUDA device", graphs)
    check_stops("stop_strings", stop_strings)
    length, first, ends = prompt.shape[1], prompt.shape[1], None
    if prompt_lengths is not None:
        expect_tensor("prompt_lengths", prompt_lengths, "Q", dtypes=(torch.int64,))
        expect_shape("prompt_lengths", prompt_lengths, prompt.shape[:1], "[Q]")
        expect_device("prompt_lengths", prompt_lengths, seen.device)
        check_values("prompt_lengths", prompt_lengths, 1, length + 1, f"lengths in [1, {length}]")
        first, ends = int(prompt_lengths.min()), prompt_lengths.repeat_interleave(copies)
    end = config.eos_id if eos_token_id is None else eos_token_id
    rows, longest = prompt.repeat_interleave(copies, 0), length + max_new_tokens
    stops: Stops | None = None
    if stop_strings:
        expect(tokenizer is not None, "tokenizer", "come with stop_strings", tokenizer)
        assert tokenizer is not None
        stops = Stops(stop_strings, tokenizer, rows.shape[0], end)
    cache = decoder.new_cache(seen, -(-longest // ROOM) * ROOM, copies, clip_of_text=clip_of_text)
    graphs = graphs and isinstance(cache, Cache)
    return Run(decoder, cache, rows, ends, first, longest, end, config.pad_id, choose, stops, graphs)


def _prompt(config: Config, seen: Seen, prompt: Tensor | None, clip_of_text: Tensor | None) -> Tensor:
    """[Q, L], checked; one bos token for each question where none is given."""
    if prompt is None:
        questions = seen.clips if clip_of_text is None else clip_of_text.shape[0]
        prompt = torch.full((questions, 1), config.bos_id, dtype=torch.int64, device=seen.device)
    expect_tensor("prompt", prompt, "Q L", dtypes=(torch.int64,))
    expect(prompt.shape[0] > 0 and prompt.shape[1] > 0, "prompt", "hold at least one token", prompt)
    expect_device("prompt", prompt, seen.device)
    check_clip_of_text(clip_of_text, "prompt", prompt, seen.clips)
    check_values("prompt", prompt, 0, config.vocab_size, f"token ids in [0, vocab_size = {config.vocab_size})")
    return prompt


def _best(run: Run, text: Tensor) -> Tensor:
    """The rows to return, with padding behind their ends, and without the columns where nobody looked in time."""
    columns = torch.arange(text.shape[1], device=text.device)
    length = run.prompt.shape[1]
    ended = (text == run.end) & (columns >= (length if run.ends is None else run.ends[:, None]))
    behind = ended.cumsum(1) > ended
    if run.stops is not None:
        taken = [text.shape[1] if at is None else at for at in run.stops.at]
        behind = behind | (columns >= run.first + torch.tensor(taken, device=text.device)[:, None])
    text, rows = text.masked_fill(behind, run.pad_id), run.choose.best()
    if rows is not None:
        text, behind = text[rows], behind[rows]
    return text[:, : max(length, int((~behind).any(0).sum()))]
