"""What a training run tells: a line of JSON a step, TensorBoard, a progress bar and, on request, trackio."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}
"""Dense bfloat16 operations a second by a part of the device's name, from NVIDIA's data sheets; the first hit holds."""


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in bfloat16; None for one that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


class Log:
    """The log of steps `start` + 1 .. `steps`; of earlier ones what is there stays, of later ones nothing.

    Every line is on its way to the disk when `write` returns: a run that is killed loses none. Of several processes the
    one that is `active` logs.
    """

    def __init__(self, folder: Path, start: int, steps: int, trackio: str | None = None, active: bool = True):
        self.active = active
        if not active:
            return
        self.path = folder / "log.jsonl"
        _cut(self.path, start)
        self.file = self.path.open("a", encoding="utf-8")
        self.board = _tensorboard(folder / "tensorboard", start)
        self.trackio = _trackio(trackio, folder.name) if trackio is not None else None
        self.bar = _progress_bar(start, steps)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self.close()

    def write(self, step: int, figures: dict[str, float | None]) -> None:
        """Log the figures of a step; None where one is not known."""
        if not self.active:
            return
        self.file.write(json.dumps({"step": step, **figures}) + "\n")
        self.file.flush()
        known = {name: value for name, value in figures.items() if value is not None}
        for name, value in known.items():
            self.board.add_scalar(name, value, step)
        if self.trackio is not None:
            self.trackio.log(known, step=step)
        shown = {"loss": f"{figures['loss']:.3f}", "clips/s": f"{figures['clips_per_s']:.1f}"}
        shown["tokens/s"] = f"{figures['tokens_per_s']:.0f}"
        if "share_of_peak" in known:
            shown["of peak"] = f"{known['share_of_peak']:.1%}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.file.close()
        self.board.close()
        self.bar.close()
        if self.trackio is not None:
            self.trackio.finish()


def _cut(path: Path, last: int) -> None:
    """Leave the lines of steps 1 .. `last`. A line that was cut short by a kill is one of a later step."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if _step(line) <= last]
    new = path.with_suffix(".new")
    new.write_text("".join(kept), encoding="utf-8")
    os.replace(new, path)


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")


def _tensorboard(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("training writes TensorBoard files: pip install -e '.[train]'") from error
    return SummaryWriter(str(folder), purge_step=start + 1)


def _trackio(project: str, name: str) -> Any:
    try:
        import trackio
    except ImportError as error:
        raise ImportError("trackio is not installed: pip install trackio") from error
    trackio.init(project=project, name=name, resume="allow")
    return trackio


def _progress_bar(start: int, steps: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("training shows its progress with tqdm: pip install -e '.[train]'") from error
    return tqdm(total=steps, initial=start, unit="step", mininterval=0.5 if sys.stderr.isatty() else 30)
