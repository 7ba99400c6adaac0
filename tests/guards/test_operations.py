"""How many operations of PyTorch the eager paths call: each is a launch on a GPU, and Python's time anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aot.harness import RunImplementations
from figures import changes, check, renew
from mirasol import Config, Model, generation
from mirasol.encoders.both import in_turn
from mirasol.kernels import chunked_attention, combiner_project, extract_tubes, ttm_scan
from ttm.ttm_helpers import token_learner_params

D, S, R, N, T = 32, 8, 4, 12, 3


class Counted(RunImplementations):
    """Counts what is called, our own operators by what runs behind them; views of a tensor cost nothing."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += not func.is_view and func.namespace == "aten"
        return super().__torch_dispatch__(func, types, args, kwargs)


def count(call: Callable[[], Any]) -> int:
    with Counted() as counted:
        call()
    return counted.calls


def values(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def attend(**options: Any) -> Tensor:
    return chunked_attention(*(values(1, 2, T * N, 16) for _ in range(3)), q_chunk=N, backend="torch", **options)


def project() -> Tensor:
    parameters = (values(D, D), *(values(D) for _ in range(3)))
    return combiner_project(values(1, T, N, D), R, *parameters, backend="torch")


def scan() -> Tensor:
    read, write = (token_learner_params(D, k, dtype=torch.float32) for k in (R, S))
    return ttm_scan(values(1, S, D), values(1, T, N, D), read, torch.tanh, write, backend="torch")[0]


def tubes() -> Tensor:
    config = Config.preset("tiny")
    video = torch.rand(1, 3, config.frames_per_chunk, config.image_size, config.image_size, requires_grad=True)
    found = extract_tubes(video, config.tubes, mean=config.pixel_mean, std=config.pixel_std, backend="torch")
    return torch.cat([tube.flatten() for tube in found])


OPERATORS: dict[str, Callable[[], Tensor]] = {
    "chunked_attention": attend,
    "chunked_attention, window": lambda: attend(window=2),
    "combiner_project": project,
    "extract_tubes": tubes,
    "ttm_scan": scan,
}


def test_operations_of_operators(figures) -> None:
    found = {}
    for name, call in OPERATORS.items():
        call()  # what depends on shapes alone is kept from now on
        out: list[Tensor] = []
        found[f"{name}: forward"] = count(lambda call=call, out=out: out.append(call()))
        found[f"{name}: backward"] = count(lambda out=out: out[0].backward(torch.ones_like(out[0])))
    figures("operations of PyTorch, eager", found)


def inputs(config: Config) -> tuple[Tensor, Tensor]:
    size = (1, 3, config.frames_per_chunk, config.image_size, config.image_size)
    return torch.randint(0, 256, size, dtype=torch.uint8), torch.zeros(1, config.samples_per_chunk)


@torch.no_grad()
def test_operations_of_a_step(figures) -> None:
    """One chunk of a stream, one token of an answer: neither depends on how much came before."""
    found = {}
    for name in ("ttm", "transformer"):
        model = Model(Config.preset("tiny", combiner=name)).eval()
        stream, clip = model.stream(memory=4), inputs(model.config)
        stream._side_by_side = in_turn  # counted in this thread
        counts = [count(lambda stream=stream, clip=clip: stream.push(*clip)) for _ in range(7)]
        assert len(set(counts[-2:])) == 1
        found[f"a chunk of a stream, {name}"] = counts[-1]
    seen = model.see(model.encode(*clip))
    steps = generation.steps(model.text_decoder, model.config, seen, torch.tensor([[257, 65]]), max_new_tokens=5)
    counts = [count(lambda: next(steps)) for _ in range(4)]
    assert len(set(counts[1:])) == 1
    found["a token of an answer"] = counts[-1]
    figures("operations of PyTorch, a step", found)


def test_what_moved_is_named_with_the_command_that_renews(tmp_path) -> None:
    file = tmp_path / "figures.json"
    renew("other", {"x": 1}, file)
    renew("section", {"same": 1, "up": 2, "down": 3, "gone": 4}, file)
    check("section", {"same": 1, "up": 2, "down": 3, "gone": 4}, file)
    found = {"same": 1, "up": 5, "down": 2, "new": 6}
    with pytest.raises(AssertionError, match=r"up: rose from 2 to 5\n  down: fell from 3 to 2(.|\n)*`make figures`"):
        check("section", found, file)
    assert changes({"gone": 4}, {"new": 6}) == ["new: 6, which is new", "gone: was 4, is gone"]
    renew("section", found, file)
    check("section", found, file)
    check("other", {"x": 1}, file)
    with pytest.raises(AssertionError, match="x: 1, which is new"):
        check("never reviewed", {"x": 1}, file)


def test_a_dearer_path_is_seen() -> None:
    x = torch.ones(2)
    assert count(lambda: x.view(1, 2)) == 0
    assert count(lambda: x + 1) == 1
    assert count(lambda: x + 1 + 1) == 2
    assert count(lambda: chunked_attention(*(values(1, 2, 8, 16) for _ in range(3)), q_chunk=4, backend="torch")) > 1
