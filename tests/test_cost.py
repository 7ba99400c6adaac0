"""Parameters and memory by arithmetic, against the model itself and against what autograd keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.profiler import ProfilerActivity, profile

from mirasol import Config, Model, cost
from mirasol.config import CombinerKind
from mirasol.cost import scale
from mirasol.cost.__main__ import main
from mirasol.cost.fits import MOST, USABLE

PARTS = {
    "video": ("video_embedding", "video_vit"),
    "audio": ("audio_embedding", "audio_vit"),
    "enter": ("enter_combiner", "modality"),
    "combiner": ("combiner",),
    "audio_video": ("audio_video.slots", "audio_video.mask", "audio_video.blocks", "audio_video.norm"),
    "losses": ("audio_video.predict", "reconstruct_video", "reconstruct_audio"),
    "text": ("text_decoder",),
}
VARIANTS: list[dict[str, Any]] = [
    *(dict(combiner=kind) for kind in get_args(CombinerKind)),
    dict(combiner="ttm", ttm_official=True),
    dict(combiner="ttm", ttm_groups=4, ttm_write="erase_add", ttm_initial_memory="normal"),
    dict(combiner="ttm", ttm_summary="latent_query", ttm_process="mixer", ttm_positions=False),
    dict(combiner="ttm", ttm_summary="latent_query", combiner_heads=16, combiner_dim=32, ttm_groups=1),
    dict(combiner="ttm", ttm_summary="mean", ttm_process="mlp", ttm_layers=2),
    dict(reconstruction_target="features", share_encoders=True, cross_every=2, text_layers=3, mlp_ratio=2),
    dict(tube_merge=((1, 2, 2), (1, 1, 1)), av_dim=96, text_dim=128, vocab_size=400),
    dict(tube_kernels="interpolated", tube_kernel_size=(4, 6, 6)),
    dict(combiner_window=1, combiner_sinks=1, av_window=1, av_sinks=1, text_window=1, text_sinks=1),
]


def inputs(config: Config, chunks: int, length: int) -> dict[str, Tensor]:
    size = (1, 3, chunks * config.frames_per_chunk, config.image_size, config.image_size)
    text = torch.randint(0, 256, (1, length))
    return {
        "video": torch.randint(0, 256, size, dtype=torch.uint8),
        "audio": 0.1 * torch.randn(1, chunks * config.samples_per_chunk),
        "text": text,
        "labels": text,
    }


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Bytes of all memory that autograd keeps, but for parameters and buffers; each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # holds on to the tensors, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in own:
            kept[address] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def checkpoint_blocks(model: Model) -> None:
    """As `mirasol.train` does it."""
    kinds = model._no_split_modules
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ in kinds)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_parameters_by_part(changes):
    config = Config.preset("tiny", **changes)
    with torch.device("meta"):
        model = Model(config)
    found = {
        part: sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes))
        for part, prefixes in PARTS.items()
    }
    assert asdict(cost.parameters(config)) == found
    assert sum(found.values()) == model.num_parameters()["total"]


@pytest.mark.parametrize("combiner", ["transformer", "ttm"])
def test_parameters_of_the_3b_model(combiner):
    config = Config.preset("mirasol-3b", combiner=combiner)
    with torch.device("meta"):
        model = Model(config)
    assert cost.parameters(config).total == model.num_parameters()["total"]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_what_backward_needs(changes):
    config = Config.preset("tiny", **changes)
    model = Model(config).train()
    for chunks, length in ((1, 5), (4, 60)):
        with kept_for_backward(model) as measured:
            model(**inputs(config, chunks, length))
        assert cost.activations(config, chunks, length) == pytest.approx(measured(), rel=0.06)


@pytest.mark.parametrize(
    ("combiner", "dtype"), [("transformer", torch.bfloat16), ("ttm", torch.bfloat16), ("ttm", torch.float32)]
)
def test_what_backward_needs_of_a_larger_model(combiner, dtype):
    config = Config.preset("small", combiner=combiner, image_size=64)
    model = Model(config).train()
    autocast = dtype != torch.float32
    with kept_for_backward(model) as measured, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(**inputs(config, 3, 32))
    casts = cost.memory(config, 3, 32, dtype=dtype).casts
    assert (casts > measured() / 2) == autocast
    assert cost.activations(config, 3, 32, dtype=dtype) + casts == pytest.approx(measured(), rel=0.06)


def test_checkpointed_blocks_keep_their_input():
    config = Config.preset("small", combiner="transformer", image_size=64)
    model = Model(config).train()
    x = torch.randn(1, 3 * config.tokens_per_chunk, config.combiner_dim, requires_grad=True)
    with kept_for_backward(model) as largest:
        model.combiner.blocks[0](x, config.tokens_per_chunk)
    checkpoint_blocks(model)
    with kept_for_backward(model) as measured:
        model(**inputs(config, 3, 32))
    found = measured() + largest() - x.nbytes
    assert cost.activations(config, 3, 32, checkpointing=True) == pytest.approx(found, rel=0.06)
    assert found < cost.activations(config, 3, 32) / 3


def largest_sum(step: Callable[[], Any]) -> int:
    """Bytes that a call holds at most beyond those held before, from every allocation and release of PyTorch's."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    ("changes", "dtype"),
    [*((each, torch.float32) for each in VARIANTS), *((each, torch.bfloat16) for each in VARIANTS[:6])],
    ids=str,
)
def test_what_a_training_step_holds_at_most(changes, dtype, checkpointing):
    config = Config.preset("tiny", **changes)
    model = Model(config).train()
    if checkpointing:
        checkpoint_blocks(model)
    clip, optimizer = inputs(config, 16, 60), torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            loss = model(**clip).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's moments
    found = largest_sum(step)
    assert cost.peak(config, 16, 60, dtype=dtype, checkpointing=checkpointing) == pytest.approx(found, rel=0.12)


def test_a_training_step_of_short_clips_holds_its_gradients():
    config = Config.preset("small")
    gradients = 4 * cost.parameters(config).total
    assert gradients <= cost.peak(config, 1, 8) < 1.05 * gradients < cost.peak(config, 64, 8)
    kept = cost.activations(config, 64, 8)
    assert kept < cost.peak(config, 64, 8) < 1.1 * kept
    assert cost.peak(config, 64, 8, clips=3) > 2.9 * kept


@pytest.mark.parametrize("memory", [None, 3])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_what_a_stream_keeps(changes, memory):
    config = Config.preset("tiny", **changes)
    stream = Model(config).stream(memory=memory, grow=memory is None)
    clip = inputs(config, 1, 1)
    for chunks in range(1, 19):  # past the first 16, for which there is room from the start
        stream.push(clip["video"], clip["audio"])
        if chunks in (1, 16, 17, 18):
            found = cost.stream(config, chunks, memory=memory)
            assert found.total == stream.nbytes
            held = dict.fromkeys(asdict(found), 0)
            for name, tensor in stream._past.tensors().items():
                held[name.split(".")[0]] += tensor.nbytes
            assert asdict(found) == held


def test_what_a_stream_of_another_dtype_keeps():
    config = Config.preset("tiny", combiner="ttm")
    stream = Model(config).to(torch.bfloat16).stream(memory=5, sinks=1)
    assert cost.stream(config, 1, memory=5, sinks=1, dtype=torch.bfloat16).total == stream.nbytes


def test_the_longest_clip_fits_and_one_chunk_more_does_not():
    config = Config.preset("base", combiner="ttm")
    for checkpointing in (False, True):
        held = partial(cost.training_bytes, config, text_tokens=64, checkpointing=checkpointing)
        most = cost.longest(held, 24e9)
        assert held(most) <= USABLE * 24e9 < held(most + 1)
    assert cost.longest(partial(cost.stream_bytes, config, memory=64), 24e9) == MOST
    grown = cost.longest(partial(cost.stream_bytes, config), 24e9)
    assert cost.stream_bytes(config, grown) <= USABLE * 24e9 < cost.stream_bytes(config, grown + 1)
    assert cost.longest(partial(cost.training_bytes, Config.preset("mirasol-3b"), text_tokens=64), 24e9) == 0


def test_bytes_of_a_training_step_are_those_of_its_parts():
    config = Config.preset("small")
    parts = cost.memory(config, 8, 64, clips=2)
    held = cost.training_bytes(config, 8, 64, clips=2)
    assert held - cost.peak(config, 8, 64, clips=2, dtype=torch.bfloat16) == (
        parts.parameters + parts.optimizer + parts.inputs
    )
    assert held < parts.total  # which counts all gradients beside all that backward needs


def test_memory_is_shared_between_gpus_but_for_what_is_gathered():
    config = Config.preset("base", combiner="ttm")
    one = cost.memory(config, 16, 64, clips=2)
    eight = cost.memory(config, 16, 64, clips=2, world=8)
    assert one.parameters == 4 * cost.parameters(config).total
    assert eight.optimizer == 2 * eight.parameters == 2 * -(-one.parameters // 4 // 8) * 4
    assert (eight.casts, eight.activations, eight.inputs) == (one.casts, one.activations, one.inputs)
    assert one.gathered == 0 < eight.gathered
    assert one.activations == 2 * cost.activations(config, 16, 64, dtype=torch.bfloat16)
    assert one.inputs == 2 * 16 * (3 * 8 * 224 * 224 + 4 * config.samples_per_chunk)
    assert one.total == sum(asdict(one).values())
    assert cost.memory(config, 16, 64, dtype=torch.float32).casts == 0
    assert one.casts == one.parameters // 2 > 10 * cost.memory(config, 16, 64, checkpointing=True).casts
    wide = replace(config, text_dim=1536)
    assert cost.memory(wide, 16, 64, world=8).gathered > eight.gathered


def test_the_page_of_scale_holds_what_the_command_prints(capsys, tmp_path):
    page = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
    main(["--table"])
    printed = capsys.readouterr().out
    before, _, rest = page.read_text().partition(scale.BEGIN)
    assert rest.partition(scale.END)[0].strip() == printed.strip()
    old = tmp_path / "page.md"
    old.write_text(f"{before}{scale.BEGIN}\nold\n{scale.END}")
    main(["--write", str(old)])
    assert old.read_text() == page.read_text().rstrip("\n")
    with pytest.raises(ValueError, match="the page must hold"):
        scale.replaced("a page")


def test_what_fits_is_what_memory_says():
    run = scale.Run("ttm", 64, 8)
    most = run.clips("H100", True)
    assert run.memory(most, True).total <= scale.USABLE * scale.DEVICES["H100"] < run.memory(most + 1, True).total
    assert scale.Run("transformer", 128, 1).clips("H100", False) == 0
    assert run.clips("H200", True) > most > run.clips("H100", False)
    slow = scale.Run("ttm", 64, 64)
    assert slow.seconds(1, False) == slow.sent() / scale.NETWORK
    assert run.seconds(8, True) == pytest.approx(4 / 3 * run.seconds(8, False))
