"""From pixels to tokens, chunk by chunk."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from mirasol.config import Config
from mirasol.encoders import present_or_missing
from mirasol.encoders.tubes import fitting, resize_kernel
from mirasol.kernels import extract_tubes
from mirasol.layers import sincos


class TubeEmbedding(nn.Module):
    """Sparse video tubes of every chunk, projected, with fixed positions of the tubes' centres.

    Any resolution and any number of frames that the tubes fit; an image (one frame) is seen by the tubes of one frame.
    A clip without video takes the same way through the same parameters, ending in a learned token: in sharded training
    every rank runs every module.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.tubes = config, config.merged_tubes
        dim = config.encoder_dim
        if config.tube_kernels == "separate":
            self.projections = nn.ModuleList(nn.Linear(tube.fine.size, dim // tube.parts) for tube in self.tubes)
        else:
            self.kernel = nn.Parameter(torch.empty(dim, 3, *config.tube_kernel_size))
            self.biases = nn.Parameter(torch.empty(len(self.tubes), dim))
        self.missing = nn.Parameter(torch.empty(dim))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.missing)
        if self.config.tube_kernels == "interpolated":
            nn.init.xavier_uniform_(self.kernel.flatten(1))
            nn.init.zeros_(self.biases)

    def forward(self, video: Tensor, present: Tensor) -> Tensor:
        """video [B, 3, T * F, H, W] uint8 or float, present [B, T] bool -> [B, T, n_v, encoder_dim].

        A video of one frame is one chunk.
        """
        config, dtype = self.config, self.missing.dtype
        frames = config.frames_per_chunk if video.shape[2] > 1 else 1
        chunks = rearrange(video, "b c (t f) h w -> (b t) c f h w", f=frames)
        height, width = chunks.shape[3:]
        used = fitting(self.tubes, frames)
        pixels = extract_tubes(
            chunks, [self.tubes[i].fine for i in used], mean=config.pixel_mean, std=config.pixel_std, dtype=dtype
        )
        if video.is_floating_point():
            # What is absent may hold NaN, which would go through a weight's gradient where the token's is 0.
            pixels = [torch.where(present.flatten()[:, None, None], tube, 0) for tube in pixels]
        tokens = torch.cat(
            [self.tubes[i].join(self._project(i, x), frames, height, width) for i, x in zip(used, pixels, strict=True)],
            dim=1,
        )
        centres = torch.cat([self.tubes[i].centres(frames, height, width, tokens.device) for i in used])
        positions = sincos(centres, config.encoder_dim).to(tokens.dtype)
        tokens = tokens.unflatten(0, (video.shape[0], -1))
        return present_or_missing(tokens, present, self.missing) + positions

    def _project(self, index: int, pixels: Tensor) -> Tensor:
        if self.config.tube_kernels == "separate":
            return self.projections[index](pixels)
        weight = rearrange(resize_kernel(self.kernel, self.tubes[index].fine.kernel), "d c t h w -> d (t h w c)")
        return nn.functional.linear(pixels, weight, self.biases[index])
