"""Weights of an image ViT for the encoders: timm's and Hugging Face's layouts, inflated to tubes and spectrograms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from mirasol.encoders.audio import MelEmbedding
from mirasol.encoders.tubes import Triple, resize_kernel
from mirasol.encoders.video import TubeEmbedding
from mirasol.kernels.core.checks import expect
from mirasol.layers import Block, ViT

Inflation = Literal["central", "average"]


class _Layout(NamedTuple):
    """Names in a state dict; `{}` is the layer."""

    patch: str
    norm1: str
    qkv: tuple[str, ...]
    out: str
    norm2: str
    mlp: tuple[str, str]
    norm: str


_LAYOUTS = (
    _Layout(  # timm
        patch="patch_embed.proj",
        norm1="blocks.{}.norm1",
        qkv=("blocks.{}.attn.qkv",),
        out="blocks.{}.attn.proj",
        norm2="blocks.{}.norm2",
        mlp=("blocks.{}.mlp.fc1", "blocks.{}.mlp.fc2"),
        norm="norm",
    ),
    _Layout(  # Hugging Face
        patch="embeddings.patch_embeddings.projection",
        norm1="encoder.layer.{}.layernorm_before",
        qkv=tuple(f"encoder.layer.{{}}.attention.attention.{part}" for part in ("query", "key", "value")),
        out="encoder.layer.{}.attention.output.dense",
        norm2="encoder.layer.{}.layernorm_after",
        mlp=("encoder.layer.{}.intermediate.dense", "encoder.layer.{}.output.dense"),
        norm="layernorm",
    ),
)


@torch.no_grad()
def load_image_vit(
    embedding: TubeEmbedding | MelEmbedding,
    vit: ViT,
    weights: Mapping[str, Tensor],
    *,
    inflation: Inflation = "central",
) -> list[str]:
    """Initialise an encoder from the state dict of an image ViT of the same width and depth, in place.

    The patch kernel [d, 3, p, p] is resized to the height and width of each tube, scaled so that its answer to a
    constant picture stays, and inflated in time. A spectrogram's kernel is its sum over the colours, resized. Positions
    and the class token are not taken over: the encoder's positions are fixed, and it has no class token.

    Args:
        embedding: `model.video_embedding` or `model.audio_embedding`.
        vit: `model.video_vit` or `model.audio_vit`.
        weights: state dict of `timm`'s VisionTransformer or of `transformers`' ViTModel (also within a classifier).
        inflation: "central" puts the kernel into the middle frame of a tube and zeros elsewhere; "average" spreads it
            evenly over the frames. Both answer a standing picture as the image ViT does.
    Returns:
        Names in `weights` that were not used, sorted.
    Raises:
        ValueError: an unknown layout, a missing weight, or a width or depth that differs, by name; nothing has been
            changed then.
    """
    expect(inflation in ("central", "average"), "inflation", "be 'central' or 'average'", inflation)
    source = _Source(weights)
    layout = source.layout
    depth = source.depth(layout.norm1)
    expect(depth == len(vit.blocks), "weights", f"have {len(vit.blocks)} layers like the encoder", depth)
    copies: list[tuple[Tensor, Tensor]] = []
    for kind in ("weight", "bias"):
        for i, block in enumerate(cast(Iterable[Block], vit.blocks)):
            qkv = torch.cat([source.take(f"{name.format(i)}.{kind}") for name in layout.qkv])
            width = qkv.shape[0] // 3
            copies += [
                (getattr(block.attention.query, kind), qkv[:width]),
                (getattr(block.attention.key_value, kind), qkv[width:]),
            ]
            for layer, name in (
                (block.norm1, layout.norm1),
                (block.attention.out, layout.out),
                (block.norm2, layout.norm2),
                (block.mlp.enter, layout.mlp[0]),
                (block.mlp.leave, layout.mlp[1]),
            ):
                copies.append((getattr(layer, kind), source.take(f"{name.format(i)}.{kind}")))
        copies.append((getattr(vit.norm, kind), source.take(f"{layout.norm}.{kind}")))
    kernel, bias = source.take(f"{layout.patch}.weight").float(), source.take(f"{layout.patch}.bias")
    copies += (
        _tube_copies(embedding, kernel, bias, inflation)
        if isinstance(embedding, TubeEmbedding)
        else (_mel_copies(embedding, kernel, bias))
    )
    for target, value in copies:
        expect(target.shape == value.shape, "weights", f"fit the encoder's {list(target.shape)}", value)
    for target, value in copies:
        target.copy_(value)
    return sorted(source.unused)


class _Source:
    """A state dict, its layout, and which of its names were used."""

    def __init__(self, weights: Mapping[str, Tensor]):
        self.weights, self.unused = weights, set(weights)
        for layout in _LAYOUTS:
            found = [name for name in weights if name.endswith(f"{layout.patch}.weight")]
            if found:
                self.layout, self.prefix = layout, found[0].removesuffix(f"{layout.patch}.weight")
                return
        known = ", ".join(f"{layout.patch}.weight" for layout in _LAYOUTS)
        raise ValueError(f"weights must hold one of {known}, was {sorted(weights)[:4]}")

    def take(self, name: str) -> Tensor:
        full = self.prefix + name
        if full not in self.weights:
            raise ValueError(f"weights must hold {full!r}, which is missing")
        self.unused.discard(full)
        return self.weights[full]

    def depth(self, norm: str) -> int:
        layers = 0
        while f"{self.prefix}{norm.format(layers)}.weight" in self.weights:
            layers += 1
        return layers


def _tube_copies(
    embedding: TubeEmbedding, kernel: Tensor, bias: Tensor, inflation: Inflation
) -> list[tuple[Tensor, Tensor]]:
    if embedding.config.tube_kernels == "interpolated":
        inflated = _inflate(kernel, embedding.config.tube_kernel_size, inflation)
        return [(embedding.kernel, inflated), (embedding.biases, bias.expand(len(embedding.tubes), -1))]
    merged = [tube.merge for tube in embedding.tubes if tube.parts > 1]
    expect(not merged, "embedding", "have no space-to-depth, whose kernels are narrower than an image ViT's", merged)
    copies: list[tuple[Tensor, Tensor]] = []
    linears = cast(Iterable[nn.Linear], embedding.projections)
    for tube, projection in zip(embedding.tubes, linears, strict=True):
        inflated = _inflate(kernel, tube.fine.kernel, inflation)
        copies += [(projection.weight, rearrange(inflated, "d c t h w -> d (t h w c)")), (projection.bias, bias)]
    return copies


def _mel_copies(embedding: MelEmbedding, kernel: Tensor, bias: Tensor) -> list[tuple[Tensor, Tensor]]:
    flat = resize_kernel(kernel.sum(1, keepdim=True)[:, :, None], (1, *embedding.config.mel_patch))
    return [(embedding.projection.weight, rearrange(flat, "d 1 1 p f -> d (p f)")), (embedding.projection.bias, bias)]


def _inflate(kernel: Tensor, size: Triple, inflation: Inflation) -> Tensor:
    """[d, 3, p, p] -> [d, 3, t, h, w]."""
    frames = size[0]
    flat = resize_kernel(kernel[:, :, None], (1, *size[1:]))
    if inflation == "average":
        return flat.expand(-1, -1, frames, -1, -1) / frames
    return nn.functional.pad(flat, (0, 0, 0, 0, frames // 2, frames - 1 - frames // 2))
