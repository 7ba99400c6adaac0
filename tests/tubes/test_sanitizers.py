"""The CPU path and the rehearsed launch under AddressSanitizer and UBSan, on thousands of small clips."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE, CSRC = Path(__file__).parent, Path(__file__).parents[2] / "csrc"
FLAGS = ["-std=c++17", "-O0", "-g0", "-fopenmp", "-ffp-contract=off", "-DMIRASOL_ISA=baseline", f"-I{CSRC}"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.slow
@pytest.mark.slow
def test_no_error_in_exactly_sized_buffers(tmp_path, cxx, skip_loudly):
    if cxx is None:
        skip_loudly("the sanitizers", "no C++ compiler was found")
    sources = [CSRC / "tubes_cpu.cpp", HERE / "rehearsal.cpp", HERE / "sanitized.cpp"]
    objects = [tmp_path / f"{source.stem}.o" for source in sources]
    commands = [[cxx, *FLAGS, *SANITIZE, "-c", s, "-o", made] for s, made in zip(sources, objects, strict=True)]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for run in runs:
        _, errors = run.communicate()
        assert run.returncode == 0, errors
    program = tmp_path / "sanitized"
    subprocess.run([cxx, "-fopenmp", *SANITIZE, *objects, "-o", program], check=True)
    shown = subprocess.run([program], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert shown.stdout == "3000 runs agree\n"
