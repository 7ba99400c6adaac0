"""The encoders: space-to-depth, the interpolated kernel, positions, images, and weights of image ViTs."""

import math
import re

import pytest
import torch
from einops import rearrange
from torch import nn

import mirasol
from mirasol.config import Config
from mirasol.encoders.image_vit import load_image_vit
from mirasol.encoders.tubes import MergedTube, resize_kernel
from mirasol.encoders.video import TubeEmbedding
from mirasol.kernels import Tube
from mirasol.layers import ViT, init_weights, sincos
from tolerance import SAME_SUMS, assert_close

HERE = torch.ones(1, 1, dtype=torch.bool)


def embedding(**changes) -> TubeEmbedding:
    module = TubeEmbedding(Config.preset("tiny", **changes)).double()
    module.apply(init_weights)
    return module


def clip(frames=4, size=32, batch=1):
    return torch.rand(batch, 3, frames, size, size, dtype=torch.float64)


def normalised(video, config):
    mean, std = (torch.tensor(v, dtype=video.dtype)[:, None, None, None] for v in (config.pixel_mean, config.pixel_std))
    return (video - mean) / std


def without_positions(module, video):
    config, size = module.config, video.shape[2:]
    centres = torch.cat([tube.centres(*size) for tube in module.tubes])
    return module(video, HERE)[:, 0] - sincos(centres, config.encoder_dim).double()


def test_tokens_equal_a_convolution():
    module, video = embedding(), clip()
    tokens = []
    for tube, linear in zip(module.config.tubes, module.projections, strict=True):
        kt, kh, kw = tube.kernel
        weight = rearrange(linear.weight, "d (t h w c) -> d c t h w", t=kt, h=kh, w=kw)
        conv = nn.functional.conv3d(normalised(video, module.config), weight, linear.bias, stride=tube.stride)
        tokens.append(rearrange(conv, "b d t h w -> b (t h w) d"))
    assert_close("tokens", without_positions(module, video), torch.cat(tokens, 1))


def test_space_to_depth_keeps_the_tokens():
    tubes = (Tube((2, 8, 8), (4, 8, 8)), Tube((1, 4, 4), (4, 16, 16)))
    plain = embedding(tubes=tubes)
    merged = embedding(tubes=tubes, tube_merge=((2, 1, 1), (1, 2, 2)))
    video = clip()
    assert merged(video, HERE).shape == plain(video, HERE).shape
    parts = [a.weight.numel() // b.weight.numel() for a, b in zip(plain.projections, merged.projections, strict=True)]
    assert parts == [2, 4]
    fine = merged.tubes[1]
    weight = rearrange(merged.projections[1].weight, "d (t h w c) -> d c t h w", t=1, h=4, w=4)
    conv = nn.functional.conv3d(
        normalised(video, merged.config), weight, merged.projections[1].bias, stride=fine.fine.stride
    )
    joined = rearrange(conv, "b c t (h i) (w j) -> b (t h w) (i j c)", i=2, j=2)
    assert_close("joined", without_positions(merged, video)[:, -joined.shape[1] :], joined)


def test_space_to_depth_moves_the_centres():
    tube = MergedTube.of(Tube((2, 4, 4), (4, 8, 8)), (2, 2, 1))
    centres = tube.centres(4, 16, 16)
    assert centres[0].tolist() == [1.5, 3.5, 1.5]  # frames 0-1 and 2-3; rows 0-3 and 4-7; columns 0-3


def test_interpolated_kernel_is_resized_to_each_tube():
    module, video = embedding(tube_kernels="interpolated", tube_kernel_size=(4, 8, 8)), clip()
    tokens = []
    for tube, bias in zip(module.config.tubes, module.biases, strict=True):
        weight = resize_kernel(module.kernel, tube.kernel)
        conv = nn.functional.conv3d(normalised(video, module.config), weight, bias, stride=tube.stride)
        tokens.append(rearrange(conv, "b d t h w -> b (t h w) d"))
    assert_close("tokens", without_positions(module, video), torch.cat(tokens, 1))


def test_resized_kernel_answers_a_constant_clip_alike():
    kernel = torch.randn(5, 3, 8, 8, 8, dtype=torch.float64)
    smooth = kernel.mean((2, 3, 4), keepdim=True).expand_as(kernel)
    for size in ((16, 4, 4), (4, 12, 12), (1, 16, 16)):
        assert_close("sum", resize_kernel(smooth, size).sum((2, 3, 4)), smooth.sum((2, 3, 4)))


@pytest.mark.parametrize("dim", [64, 100, 768, 1024, 1280])
def test_positions_of_any_width_tell_places_apart(dim):
    points = torch.cartesian_prod(torch.arange(3.0), torch.arange(4.0), torch.arange(5.0))
    table = sincos(points, dim)
    assert table.shape == (60, dim)
    assert table.abs().max() <= 1
    distance = torch.cdist(table, table) + torch.eye(60)
    assert distance.min() > 0.1


def test_positions_follow_the_published_layout():
    """Groups of six channels: sin and cos of t, then of x, then of y, at the rate tau^(-j / J)."""
    table = sincos(torch.tensor([[2.0, 3.0, 5.0]]), 12)[0]
    expected = []
    for rate in (1.0, 0.01):
        for coordinate in (2.0, 3.0, 5.0):
            expected += [math.sin(coordinate * rate), math.cos(coordinate * rate)]
    assert_close("positions", table, torch.tensor(expected), rtol=SAME_SUMS)


def test_other_resolutions_and_images():
    module = embedding()
    assert module(clip(size=48), HERE).shape[2] == 6 * 6 + 3 * 3
    image = clip(frames=1)
    tokens = module(image, HERE)
    assert tokens.shape[1:3] == (1, 4)  # only the 1 x 16 x 16 tube sees one frame
    model = mirasol.Model.from_preset("tiny", combiner="ttm").eval().double()
    still = model.encode(image)
    assert torch.equal(still, model.encode(image.repeat(1, 1, 4, 1, 1)))


class ImageViT(nn.Module):
    """An image ViT without a class token, as timm computes it."""

    def __init__(self, dim=64, depth=2, heads=4, patch=16):
        super().__init__()
        self.heads = heads
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(dim, 1e-6),
                    "attn": nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)}),
                    "norm2": nn.LayerNorm(dim, 1e-6),
                    "mlp": nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)}),
                }
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.head = nn.Linear(dim, 10)

    def forward(self, image, positions):
        x = self.patch_embed["proj"](image).flatten(2).mT + positions
        for block in self.blocks:
            y = block["attn"]["qkv"](block["norm1"](x))
            q, k, v = rearrange(y, "b n (three h d) -> three b h n d", three=3, h=self.heads)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + block["attn"]["proj"](rearrange(y, "b h n d -> b n (h d)"))
            y = nn.functional.gelu(block["mlp"]["fc1"](block["norm2"](x)))
            x = x + block["mlp"]["fc2"](y)
        return self.norm(x)


def hugging_face(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under the names of `transformers`' ViTForImageClassification."""
    renamed = {}
    for name, value in weights.items():
        for old, new in (
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("attn.proj", "attention.output.dense"),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ):
            name = name.replace(old, new)
        name = name.replace("blocks.", "encoder.layer.")
        name = "layernorm." + name.removeprefix("norm.") if name.startswith("norm.") else name
        if "attn.qkv" in name:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed["vit." + name.replace("attn.qkv", f"attention.attention.{part}")] = piece
        else:
            renamed[name if name.startswith("head") else "vit." + name] = value
    return renamed


@pytest.mark.parametrize("inflation", ["central", "average"])
@pytest.mark.parametrize("layout", ["timm", "hugging face"])
def test_a_standing_picture_is_seen_as_the_image_vit_sees_it(layout, inflation):
    image_vit = ImageViT().double()
    module = embedding(tubes=(Tube((4, 16, 16), (4, 16, 16)),))
    vit = ViT(64, 2, 4, 4, 1e-6).double()
    weights = dict(image_vit.state_dict())
    unused = load_image_vit(module, vit, weights if layout == "timm" else hugging_face(weights), inflation=inflation)
    assert unused == ["head.bias", "head.weight"]
    image = clip(frames=1)
    video = image.expand(-1, -1, 4, -1, -1)
    positions = sincos(module.tubes[0].centres(4, 32, 32), 64).double()
    expected = image_vit(normalised(image, module.config)[:, :, 0], positions)
    # The resize of a kernel goes through float32.
    assert_close("tokens", vit(module(video, HERE)[:, 0]), expected, rtol=SAME_SUMS)


def test_image_weights_reach_every_kind_of_embedding():
    weights = ImageViT().state_dict()
    config = Config.preset("tiny", tube_kernels="interpolated")
    model = mirasol.Model(config)
    load_image_vit(model.video_embedding, model.video_vit, weights)
    assert model.video_embedding.kernel.detach().count_nonzero() == 64 * 3 * 8 * 8  # the middle frame alone
    load_image_vit(model.audio_embedding, model.audio_vit, weights)
    assert torch.equal(model.audio_embedding.projection.bias, weights["patch_embed.proj.bias"])


def test_image_weights_that_do_not_fit_are_refused():
    weights = dict(ImageViT().state_dict())
    model = mirasol.Model.from_preset("tiny")
    target = (model.video_embedding, model.video_vit)
    before = model.video_vit.blocks[0].norm1.weight.clone()
    with pytest.raises(ValueError, match="weights must have 2 layers like the encoder, was 3"):
        load_image_vit(*target, ImageViT(depth=3).state_dict())
    with pytest.raises(ValueError, match=re.escape("weights must fit the encoder's [64, 64], was [128, 128]")):
        load_image_vit(*target, ImageViT(dim=128).state_dict())
    with pytest.raises(ValueError, match="weights must hold one of patch_embed"):
        load_image_vit(*target, {"conv.weight": torch.zeros(1)})
    del weights["blocks.1.norm2.bias"]
    with pytest.raises(ValueError, match=re.escape("weights must hold 'blocks.1.norm2.bias', which is missing")):
        load_image_vit(*target, weights)
    assert torch.equal(before, model.video_vit.blocks[0].norm1.weight)
