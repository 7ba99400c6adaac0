"""`bench` is no package: its folder goes on the path, as `python bench/run.py` puts it there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
