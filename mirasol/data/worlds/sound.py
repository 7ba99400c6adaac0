"""How what is heard sounds: a tone of some pitch, an instrument's overtones, steady or in pulses."""

from __future__ import annotations

import numpy as np

from .spec import Sound

HERTZ = {"low": 200.0, "middle": 450.0, "high": 1000.0, "shrill": 2200.0}
OVERTONES = {"flute": (1,), "organ": (1, 2), "clarinet": (1, 3), "violin": (1, 2, 3)}
"""Multiples of the pitch, equally loud."""
PULSE = {"steady": None, "slow": 0.16, "fast": 0.04}
"""Seconds from pulse to pulse; a pulse sounds for the first half of them."""
EDGE = 0.004
"""Seconds in which a tone comes and goes, so that it does not click."""


def play(sound: Sound, samples: int, rate: int) -> np.ndarray:
    """float32 [samples], in -0.6 .. 0.6."""
    time = np.arange(samples) / rate
    overtones = OVERTONES[sound.instrument]
    wave = sum(np.sin(2 * np.pi * HERTZ[sound.pitch] * multiple * time) for multiple in overtones)
    period = PULSE[sound.rhythm]
    lasts = samples / rate if period is None else period / 2
    since = time if period is None else time % period
    loudness = np.clip(np.minimum(since, lasts - since) / EDGE, 0, 1)
    return (0.6 / len(overtones) * wave * loudness).astype(np.float32)
