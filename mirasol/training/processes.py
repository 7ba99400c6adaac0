"""Where a training run computes: one process, or the processes of `torchrun` among which the model is sharded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mirasol.kernels.core.checks import expect
from mirasol.model import Model
from mirasol.training.options import TrainOptions


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        cores: CPU cores of this process, its share where several run on a machine.
        group: a process group on the CPU for what is written in the background; None in a run of one process.
    """

    rank: int
    world: int
    device: torch.device
    cores: int
    group: Any = None

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor that is sharded, as one."""
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def processes(options: TrainOptions) -> Iterator[Processes]:
    """The processes that `torchrun` or an initialised `torch.distributed` tells of, or this one alone."""
    cuda = torch.cuda.is_available()
    expect(options.device in (None, "cpu", "cuda"), "device", "be cpu or cuda", options.device)
    expect(options.device != "cuda" or cuda, "device", "be cpu, for no GPU is found", options.device)
    kind = options.device or ("cuda" if cuda else "cpu")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else "cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    cores = len(os.sched_getaffinity(0))
    mine = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if mine:
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        yield Processes(0, 1, device, cores)
        return
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    group = dist.new_group(backend="gloo")
    try:
        yield Processes(dist.get_rank(), world, device, max(cores // local, 1), group)
    finally:
        dist.destroy_process_group(None if mine else group)


def shard(model: Model, options: TrainOptions, here: Processes) -> None:
    """Apply activation checkpointing, compilation and sharding to the model, block by block, in place."""
    kinds = model._no_split_modules
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    if options.activation_checkpointing:
        from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapping

        wrapping.apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ in kinds)
        blocks = [module for module in model.modules() if isinstance(module, wrapping.CheckpointWrapper)]
    if options.compile:
        for block in blocks:
            block.compile()
    if here.world > 1:
        from torch.distributed.fsdp import fully_shard

        # Of the latents, which are one: nothing here changes them in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        mesh = dist.init_device_mesh(here.device.type, (here.world,))
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh)
