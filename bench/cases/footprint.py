"""What training and streaming hold in memory, every Combiner: predicted for large models, measured on a small one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from core.counting import TEXT_TOKENS
from core.harness import peak_memory
from core.rows import Case, Row, Settings, dtype_name
from mirasol import Config, Model, cost
from report.savings import EVERYTHING, SUITE, TTM_ALONE

THIS, ALL = "this chunk", "all earlier chunks"
EVERY_COMBINER: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"Transformer, {n} layer{'s' * (n > 1)}{', this chunk' * (window == 1)}": (
            THIS if window == 1 else ALL,
            {"combiner": "transformer", "combiner_layers": n, "combiner_window": window},
        )
        for n in (6, 4, 1)
        for window in (None, 1)
    },
    **{
        f"Perceiver resampler, {n} layer{'s' * (n > 1)}": (THIS, {"combiner": "perceiver", "combiner_layers": n})
        for n in (6, 1)
    },
    "attention pooling": (ALL, {"combiner": "attention"}),
    "attention pooling, this chunk": (THIS, {"combiner": "attention", "combiner_window": 1}),
    TTM_ALONE: ("all, by its memory", {"combiner": "ttm"}),
    f"{TTM_ALONE}, plain": ("all, by its memory", {"combiner": "ttm", "ttm_official": True}),
    "mean pooling": (THIS, {"combiner": "mean"}),
    "none": ("its token", {"combiner": "none"}),
}
"""What each sees, and how it is asked for: the cheaper ones too, against which TTM need not save anything.

TTM is grouped and time-stamped; plain: one memory from zeros, as its paper has it.
"""
GPUS = {"24 GB": 24e9, "80 GB": 80e9}
WINDOW = 64
"""Chunks that a stream in bounded memory keeps: two minutes."""
MEASURED = ("tiny", 32)
"""Preset and chunks of what is measured."""
AGREES = (0.9, 1.1)
"""What is predicted over what is measured."""
STREAMED = 17
"""Chunks pushed: one more than there is room for at first."""


def cases(presets: tuple[str, ...], frames: int) -> list[Case]:
    return [
        *(Case(f"memory {preset}", partial(_predict, preset, frames)) for preset in presets),
        Case("measured memory", _measure_all),
    ]


def step(config: Config, chunks: int, text_tokens: int) -> dict[str, int]:
    """Bytes that a training step of one clip holds at most beside weights and moments, in bfloat16 by autocast."""
    held = partial(cost.peak, config, chunks, text_tokens, dtype=torch.bfloat16)
    return {"step_bytes": held(), "checkpointed_bytes": held(checkpointing=True)}


def _predict(preset: str, frames: int, settings: Settings) -> list[Row]:
    """Bytes of a step and of a stream, and the longest clips that GPUs hold, by the cost model."""
    once = Config.preset(preset, combiner="none", av_causal=False)
    found = {EVERYTHING: ("the whole clip", once)}
    found |= {name: (sees, Config.preset(preset, **changes)) for name, (sees, changes) in EVERY_COMBINER.items()}
    rows = []
    for name, (sees, config) in found.items():
        row = Row(SUITE, f"memory {preset}", name, mode="count", device="meta", dtype="bfloat16")
        row.shape = f"{preset}, {TEXT_TOKENS} text tokens"
        row.detail = {
            "preset": preset,
            "frames": frames,
            "sees": sees,
            "frames_per_chunk": config.frames_per_chunk,
            "seconds_per_chunk": config.seconds_per_chunk,
            "parameters": cost.parameters(config).total,
            **step(config, frames // config.frames_per_chunk, TEXT_TOKENS),
            "trained": {gpu: _trained(config, size) for gpu, size in GPUS.items()},
        }
        if config.av_causal:
            row.detail["stream"] = _stream(config)
            row.detail["streamed"] = {gpu: _streamed(config, size) for gpu, size in GPUS.items()}
        rows.append(row)
    return rows


def _trained(config: Config, gpu: float) -> list[int]:
    """Chunks of the longest clip that a GPU trains on: as it is, and with blocks checkpointed."""
    held = partial(cost.training_bytes, config, text_tokens=TEXT_TOKENS)
    return [cost.longest(held, gpu), cost.longest(partial(held, checkpointing=True), gpu)]


def _streamed(config: Config, gpu: float) -> int:
    """Chunks of the longest stream that a GPU remembers whole."""
    return cost.longest(partial(cost.stream_bytes, config), gpu)


def _stream(config: Config) -> dict[str, int]:
    """Bytes of a stream: the Combiner's, what a chunk adds to it and to all parts, and the same bounded by windows."""
    shorter, longer = (cost.stream(config, chunks, dtype=torch.bfloat16) for chunks in (WINDOW, 2 * WINDOW))
    bounded = cost.stream(config, WINDOW, memory=WINDOW, dtype=torch.bfloat16)
    return {
        "combiner": shorter.combiner,
        "combiner_a_chunk": (longer.combiner - shorter.combiner) // WINDOW,
        "a_chunk": (longer.total - shorter.total) // WINDOW,
        "bounded": bounded.total,
        "combiner_bounded": bounded.combiner,
    }


def _measure_all(settings: Settings) -> list[Row]:
    """Nothing is timed: one thread, for pieces so small that a second one would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_measure(name, again, settings) for name in EVERY_COMBINER for again in (False, True)]
    finally:
        torch.set_num_threads(threads)


def _measure(name: str, checkpointing: bool, settings: Settings) -> Row:
    """The most that forward and backward hold, and what a stream keeps, beside what the cost model says.

    On a GPU kernels keep less of the summaries than is predicted, and the allocator rounds: it is shown, not judged.
    """
    preset, chunks = MEASURED
    config = Config.preset(preset, **EVERY_COMBINER[name][1])
    row = Row(SUITE, "measured memory", f"{name}{', checkpointed' * checkpointing}", mode="step", role="ours")
    row.device, row.dtype = settings.device.type, dtype_name(torch.float32)
    row.shape = f"{preset}, {chunks} chunks, {TEXT_TOKENS} text tokens"
    torch.manual_seed(0)
    model = Model(config).to(settings.device)
    stream = model.stream(grow=True)
    for _ in range(0 if checkpointing else STREAMED):
        stream.push()
    if checkpointing:
        kinds = model._no_split_modules
        apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ in kinds)
    size = (1, 3, chunks * config.frames_per_chunk, config.image_size, config.image_size)
    video = torch.randint(0, 256, size, dtype=torch.uint8, device=settings.device)
    audio = settings.randn(1, chunks * config.samples_per_chunk, dtype=torch.float32)
    text = torch.randint(0, 256, (1, TEXT_TOKENS), device=settings.device)
    model.train()
    _, row.peak_bytes, _ = peak_memory(lambda: model(video, audio, text, text).loss.backward(), settings.device)
    predicted = cost.peak(config, chunks, TEXT_TOKENS, checkpointing=checkpointing)
    row.detail = {"preset": preset, "predicted_bytes": predicted}
    agrees = AGREES[0] <= predicted / row.peak_bytes <= AGREES[1]
    if not agrees and settings.device.type == "cpu":
        row.status, row.reason = "FAIL", f"held {row.peak_bytes} bytes, the cost model says {predicted}"
    if not checkpointing:
        expected = cost.stream(config, STREAMED).total
        row.detail |= {"stream_bytes": stream.nbytes, "stream_predicted": expected}
        if stream.nbytes != expected:
            row.status, row.reason = "FAIL", f"a stream keeps {stream.nbytes} bytes, the cost model says {expected}"
    return row
