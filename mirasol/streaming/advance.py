"""A model that goes on by one chunk from what it keeps of those before."""

from __future__ import annotations

from torch import Tensor

from mirasol.batch import Clips
from mirasol.config import Config
from mirasol.encoders.both import Both, in_turn
from mirasol.kernels.core.checks import expect, expect_int
from mirasol.model import Model
from mirasol.past import Past, Reach, Ring, Rows

Reaches = dict[str, Reach]


def reaches(config: Config, memory: int | None, sinks: int, grow: bool) -> Reaches:
    """How many chunks each part of the model keeps: as its configuration says, else `memory` and `sinks`.

    Raises:
        ValueError: a part that would keep all of them, unless `grow`; a model that cannot stream.
    """
    expect(config.av_causal, "config.av_causal", "be True for a stream, whose later chunks are unknown", False)
    if memory is not None:
        expect_int("memory", memory)
    expect_int("sinks", sinks, minimum=0)
    expect(sinks == 0 or memory is not None, "sinks", "be 0 without memory", sinks)
    looks_back = config.combiner in ("transformer", "attention")
    parts = ["combiner", "av", "text"] if looks_back else ["av", "text"]
    found = {part: config.reach(part) for part in parts}
    unbounded = [part for part in parts if found[part].window is None]
    if unbounded and memory is None and not grow:
        names = ", ".join(f"{part}_window" for part in unbounded)
        raise ValueError(
            f"memory must be the chunks that a stream keeps, or grow be True, for the configuration sets no {names}: "
            "what is kept would grow with every chunk; memory was None"
        )
    return {**found, **dict.fromkeys(unbounded, Reach(memory, sinks))}


def new_past(model: Model, batch: int, reach: Reaches) -> Past:
    """The past of `batch` streams that have seen nothing."""
    weight = model.modality
    rows = Rows(batch, weight.device)
    m = model.config.latents_per_chunk
    looked_at = model.text_decoder.see(weight.new_zeros(1, m, model.config.av_dim)).keys_values
    held = sum(found is not None for found in looked_at)
    expect(held > 0, "config.cross_every", "leave the text decoder a cross-attention", model.config.cross_every)
    return Past(
        rows,
        model.audio_embedding.new_past(rows),
        model.combiner.new_past(rows, reach.get("combiner", Reach())),
        model.audio_video.new_past(rows, reach["av"]),
        [
            Ring(rows, reach["text"], m, found[0].shape[1], found[0].shape[3], found[0]) if found else None
            for found in looked_at
        ],
    )


def advance(model: Model, clips: Clips, past: Past, both: Both = in_turn) -> Tensor:
    """Add one chunk to each row whose turn it is -> h [R, m, av_dim] of that chunk."""
    h = model.encode_clips(clips, past, both).h.flatten(1, 2)
    for ring, found in zip(past.text, model.text_decoder.see(h).keys_values, strict=True):
        if ring is not None and found is not None:
            ring.write(*found)
    past.rows.advance()
    return h
