"""Make mel_librosa.npz. Needs librosa, which the tests do not: `pip install librosa==0.11.0` in an environment apart.

Each setting gives the filterbank (float64) and the spectrogram of the stored noise with centred, reflected frames.
"""

from __future__ import annotations

from pathlib import Path

import librosa
import numpy as np

SETTINGS = {
    "whisper_128": {"sr": 16000, "n_fft": 400, "hop_length": 160, "n_mels": 128},
    "epic_sounds": {"sr": 24000, "n_fft": 2048, "hop_length": 120, "n_mels": 128},
}


def main() -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 4800).astype(np.float32)
    arrays = {"noise": noise}
    for name, setting in SETTINGS.items():
        bank = {key: value for key, value in setting.items() if key != "hop_length"}
        arrays[f"{name}/filterbank"] = librosa.filters.mel(**bank, dtype=np.float64)
        arrays[f"{name}/spectrogram"] = librosa.feature.melspectrogram(
            y=noise.astype(np.float64), **setting, power=2.0, center=True, pad_mode="reflect", dtype=np.float64
        ).astype(np.float32)
    np.savez_compressed(Path(__file__).with_name("mel_librosa.npz"), **arrays)


if __name__ == "__main__":
    main()
