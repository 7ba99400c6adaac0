"""The CUDA code compiled for every architecture that matters, and what the compiler reports of it. Needs no GPU."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("80", "90", "100")
REGISTERS = {"tubes_extract_kernel": 80, "tubes_scatter_kernel": 56}  # three and four blocks of 256 a processor
SHARED = {"unsigned char": 6144, "mirasol::Half": 12288, "mirasol::Bfloat": 12288, "float": 24576}

pytestmark = pytest.mark.slow


def _setup_list(name: str) -> list[str]:
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py has no {name}")


def _find_nvcc() -> str | None:
    named = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    return str(named) if named.exists() else shutil.which("nvcc")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The folder of the cubins, and (kernel, architecture) -> ptxas's lines; None where there is no nvcc."""
    nvcc = _find_nvcc()
    if nvcc is None:
        return None
    folder = tmp_path_factory.mktemp("cuda")
    runs = {}
    for arch in ARCHITECTURES:
        command = [nvcc, *_setup_list("NVCC_FLAGS"), f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v"]
        command += ["-o", folder / f"sm_{arch}.cubin", ROOT / "csrc" / "tubes_cuda.cu"]
        runs[arch] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    kernels = {}
    for arch, run in runs.items():
        shown, _ = run.communicate()
        assert run.returncode == 0, shown
        text = subprocess.run(["c++filt"], input=shown, capture_output=True, text=True, check=True).stdout
        for part in re.split(r"Compiling entry function", text)[1:]:
            kernels[re.search(r"tubes_\w+<[^>]*>", part)[0], arch] = part
    return folder, kernels


def test_no_kernel_spills_and_all_stay_in_their_budget(report, skip_loudly):
    if report is None:
        skip_loudly("the CUDA kernels", "no nvcc was found")
    _, kernels = report
    assert len(kernels) == (24 + 9) * len(ARCHITECTURES)
    for (name, arch), lines in kernels.items():
        frame, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", lines
        ).groups()
        assert (frame, stores, loads) == ("0", "0", "0"), f"{name} for sm_{arch}: {lines}"
        kind, source = re.match(r"(\w+)<([\w: ]+), ", name).groups()
        registers = int(re.search(r"Used (\d+) registers", lines)[1])
        assert registers <= REGISTERS[kind], f"{name} for sm_{arch} uses {registers} registers"
        shared = re.search(r"(\d+) bytes smem", lines)
        assert (int(shared[1]) if shared else 0) == (SHARED[source] if kind == "tubes_extract_kernel" else 0)


def test_accesses_are_sixteen_bytes_wide(report, skip_loudly):
    if report is None:
        skip_loudly("the CUDA kernels", "no nvcc was found")
    folder, _ = report
    nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    listing = subprocess.run(
        [nvdisasm, "-c", folder / "sm_90.cubin"], capture_output=True, text=True, check=True
    ).stdout
    sections = [s for s in re.split(r"\.section\s+\.text\.", listing)[1:] if "extract_kernel" in s.split(",")[0]]
    assert len(sections) == 24
    for section in sections:
        assert re.search(r"\bLDG\.E\.128\.CONSTANT\b", section)
        assert re.search(r"\bSTG\.E\.128\b", section)
        assert not re.search(r"\b(LDL|STL|ATOM|RED)\b", section)
