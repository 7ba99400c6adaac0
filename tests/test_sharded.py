"""Sharded training (FSDP2) on two processes, one of whose batches lacks the sound."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import mirasol
from tolerance import assert_close


def batch(rank: int, config: mirasol.Config) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    size, frames = config.image_size, 2 * config.frames_per_chunk
    text = torch.randint(0, 256, (1, 6), generator=generator)
    inputs = {
        "video": torch.randint(0, 256, (1, 3, frames, size, size), dtype=torch.uint8, generator=generator),
        "text": text,
        "labels": text,
    }
    if rank == 0:
        inputs["audio"] = torch.randn(1, 2 * config.samples_per_chunk, generator=generator) * 0.1
    return inputs


def make_model() -> mirasol.Model:
    torch.manual_seed(0)
    return mirasol.Model.from_preset("tiny", combiner="ttm", mask_ratio=0.0).train()


def train_step(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    model = make_model()
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(**batch(rank, model.config)).loss.backward()
    grads = {}
    for name, p in model.named_parameters():
        assert isinstance(p.grad, DTensor), name
        grads[name] = p.grad.full_tensor()
    if rank == 0:
        torch.save(grads, f"{folder}/grads.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_missing_modality_neither_hangs_nor_harms(tmp_path):
    mp.spawn(train_step, (str(tmp_path),), nprocs=2)
    sharded = torch.load(tmp_path / "grads.pt")
    model = make_model()
    for rank in range(2):
        (model(**batch(rank, model.config)).loss / 2).backward()
    for name, p in model.named_parameters():
        assert_close(name, sharded[name], p.grad)
