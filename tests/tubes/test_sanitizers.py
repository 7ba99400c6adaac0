"""The CPU path and the rehearsed launch under AddressSanitizer and UBSan, on thousands of small clips."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
FLAGS = ["-std=c++17", "-O0", "-g0", "-fopenmp", "-ffp-contract=off", "-DMIRASOL_ISA=baseline"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def test_no_error_in_exactly_sized_buffers(tmp_path, skip_loudly):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        skip_loudly("the sanitizers", "no C++ compiler was found")
    objects = [tmp_path / f"{name}.o" for name in ("tubes_cpu", "tubes_rehearse", "check_cpu")]
    runs = [
        subprocess.Popen(
            [compiler, *FLAGS, *SANITIZE, "-c", CSRC / f"{made.stem}.cpp", "-o", made], stderr=subprocess.PIPE
        )
        for made in objects
    ]
    for run in runs:
        _, errors = run.communicate()
        assert run.returncode == 0, errors.decode()
    program = tmp_path / "check"
    subprocess.run([compiler, "-fopenmp", *SANITIZE, *objects, "-o", program], check=True)
    shown = subprocess.run([program], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert shown.stdout == "3000 runs agree\n"
