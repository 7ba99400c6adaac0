"""A run's folder: what it was told, and checkpoints from which it goes on to the step."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from mirasol.data import Loader
from mirasol.training.options import INDIFFERENT, TrainOptions
from mirasol.training.processes import Processes

OPTIONS, CHECKPOINTS = "options.json", "checkpoints"
_WRITTEN = (
    OPTIONS,
    CHECKPOINTS,
    "log.jsonl",
    "tensorboard",
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
_DONE, _TEMPORARY = "step-", ".tmp-"


def open_run(options: TrainOptions, questions: str, here: Processes) -> Path:
    """The run's folder, ready to be written; what lies there must be this run, or nothing.

    Args:
        questions: a digest of the table, which may not change within a run either.
    Raises:
        FileExistsError: a folder with other things in it.
        ValueError: options that may not change within a run have changed, by name.
    """
    folder = Path(options.out)
    is_run = (folder / OPTIONS).is_file()
    told = json.loads(json.dumps({**options.to_dict(), "questions": questions}))
    if not is_run and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"out must be a new folder, an empty one or a run's, was {options.out!r}")
    if is_run and not options.fresh and _complete(folder / CHECKPOINTS):
        _expect_same(folder, json.loads((folder / OPTIONS).read_text(encoding="utf-8")), told)
    here.wait()
    if here.rank == 0:
        if is_run and options.fresh:
            _clear(folder)
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        new = folder / (OPTIONS + ".new")
        new.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        os.replace(new, folder / OPTIONS)
        for left in (folder / CHECKPOINTS).glob(f"{_TEMPORARY}*"):
            shutil.rmtree(left)
    here.wait()
    return folder


class Checkpoints:
    """Checkpoints of model, optimizer and loader, written in the background by `torch.distributed.checkpoint`.

    One is written under a temporary name and renamed when it is complete: no half of one is ever found. Leaving the
    `with` block waits for the last. A run may go on with another number of processes.

    Args:
        folder: the run's.
        keep: the newest ones that are kept.
    """

    def __init__(
        self, folder: Path, keep: int, model: nn.Module, optimizer: optim.Optimizer, loader: Loader, here: Processes
    ):
        self.folder, self.keep = folder / CHECKPOINTS, keep
        self.model, self.optimizer, self.loader, self.here = model, optimizer, loader, here
        self.how: dict[str, Any] = {"process_group": here.group, "no_dist": here.group is None}
        if here.group is None:  # what no_dist=True asks for is warned of all the same, from another thread
            warnings.filterwarnings("ignore", "torch.distributed is .* in a single process", UserWarning)
        self.last = 0  # the step of the newest one
        self.writing: tuple[str, Future[Any]] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Of several processes, the others may not come here after an error, unless it is one of all of them.
        if kind is None or self.here.world == 1 or issubclass(kind, FloatingPointError):
            self.finish()

    def resume(self) -> int:
        """Load the newest complete checkpoint; return its step, 0 where there is none."""
        names = _complete(self.folder)
        if not names:
            return 0
        state = self._state()
        dcp.load(state, checkpoint_id=self.folder / names[-1], **self.how)
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        self.loader.load_state_dict(json.loads(state["loader"]))
        self.last = int(names[-1].removeprefix(_DONE))
        return self.last

    def save(self, step: int) -> None:
        """Begin to write a checkpoint, unless that of this step is there; the one before is waited for."""
        self.finish()
        if step == self.last:
            return
        name = f"{_DONE}{step:08d}"
        result = dcp.async_save(self._state(), checkpoint_id=self.folder / f"{_TEMPORARY}{name}", **self.how)
        assert isinstance(result, Future)
        self.last, self.writing = step, (name, result)

    def poll(self) -> None:
        """Publish a checkpoint whose writing has come to its end meanwhile."""
        if self.writing is not None and self.writing[1].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and publish it.

        Raises:
            Whatever kept it from being written.
        """
        if self.writing is None:
            return
        (name, future), self.writing = self.writing, None
        future.result()
        if self.here.rank == 0:
            os.replace(self.folder / f"{_TEMPORARY}{name}", self.folder / name)
            for old in _complete(self.folder)[: -self.keep]:
                # Renamed first: half of a checkpoint must not bear the name of a whole one.
                os.replace(self.folder / old, self.folder / f"{_TEMPORARY}{old}")
                shutil.rmtree(self.folder / f"{_TEMPORARY}{old}")

    def _state(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "loader": json.dumps(self.loader.state_dict()),  # its place is the same on all ranks
        }


def _complete(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.glob(f"{_DONE}*"))


def _clear(folder: Path) -> None:
    for pattern in _WRITTEN:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _expect_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    names = [name for name in {**before, **now} if name not in INDIFFERENT]
    changed = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"the run in {str(folder)!r} can only be continued with the options that it began with: "
            + "; ".join(changed)
            + ". Choose another folder with --out, or begin anew with --fresh"
        )
