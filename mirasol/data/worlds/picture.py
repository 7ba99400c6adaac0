"""How what is seen looks: plain shapes of saturated colours on dark grey, large enough for 32 x 32 pixels."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .spec import PLACES, Picture

GREY = 40
RGB = {"red": (240, 30, 30), "green": (30, 220, 30), "blue": (40, 60, 255), "yellow": (240, 230, 30)}
RADIUS = 0.17
"""Of an object, as a share of the picture's side; a quarter of the picture holds it wherever it moves."""
WAY = 0.08
"""How far it moves to each side of its place's middle, likewise."""
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@lru_cache(maxsize=1024)
def draw_chunk(picture: Picture, frames: int, size: int) -> np.ndarray:
    """uint8 [frames, size, size, 3], read-only: the objects cross their places once in a chunk, in the next again."""
    out = np.full((frames, size, size, 3), GREY, dtype=np.uint8)
    rgb, (right, down) = np.array(RGB[picture.colour]), STEPS[picture.direction]
    for frame, image in enumerate(out):
        moved = WAY * (2 * (frame + 0.5) / frames - 1)
        cover = np.zeros((size, size))
        for place in picture.places:
            row, column = divmod(PLACES.index(place), 2)
            x, y = 0.25 + 0.5 * column + right * moved, 0.25 + 0.5 * row + down * moved
            cover = np.maximum(cover, _cover(picture.shape, x, y, size))
        image[:] = np.round(GREY + cover[..., None] * (rgb - GREY))
    out.setflags(write=False)
    return out


def _cover(shape: str, x: float, y: float, size: int) -> np.ndarray:
    """float64 [size, size]: how much of each pixel an object covers, from its distance to the outline."""
    middle = (np.arange(size) + 0.5) / size
    dx, dy = middle[None, :] - x, middle[:, None] - y
    across, along = np.abs(dx), np.abs(dy)
    if shape == "circle":
        distance = np.hypot(dx, dy) - RADIUS
    elif shape == "square":
        distance = np.maximum(across, along) - RADIUS
    elif shape == "triangle":  # its tip above, its base below
        distance = np.maximum(dy - RADIUS, (2 * across - dy - RADIUS) / 5**0.5)
    else:
        thin = RADIUS / 3
        distance = np.minimum(np.maximum(across - RADIUS, along - thin), np.maximum(along - RADIUS, across - thin))
    return np.clip(0.5 - distance * size, 0, 1)
