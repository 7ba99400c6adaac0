"""The CUDA code compiled for every architecture that matters, and what the compiler reports of it. Needs no GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import triton

from emulator.tubes import find_nvcc, nvcc_flags

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("80", "90", "100")
REGISTERS = {"tubes_extract_kernel": 80, "tubes_scatter_kernel": 64}  # three and four blocks of 256 a processor
SHARED = {"unsigned char": 6144, "mirasol::Half": 12288, "mirasol::Bfloat": 12288, "float": 24576}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The folder of the cubins, and (kernel, architecture) -> ptxas's lines; None where there is no nvcc."""
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    folder = tmp_path_factory.mktemp("cuda")
    runs = {}
    for arch in ARCHITECTURES:
        command = [nvcc, *nvcc_flags(), f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v"]
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
        assert int(shared[1]) == SHARED[source if kind == "tubes_extract_kernel" else "float"]


def test_accesses_are_wide(report, skip_loudly):
    if report is None:
        skip_loudly("the CUDA kernels", "no nvcc was found")
    folder, _ = report
    nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    listing = subprocess.run(
        [nvdisasm, "-c", folder / "sm_90.cubin"], capture_output=True, text=True, check=True
    ).stdout
    sections = re.split(r"\.section\s+\.text\.", listing)[1:]
    assert len(sections) == 24 + 9
    for section in sections:
        kernel = subprocess.run(["c++filt", section.split(",")[0]], capture_output=True, text=True, check=True).stdout
        kind, types = re.search(r"tubes_(\w+)_kernel<([^>]*)>", kernel).groups()
        # Extraction moves 16 bytes; its gradient four elements, of tokens' dtype and of the clip's.
        loads, stores = [128 if kind == "extract" or name == "float" else 64 for name in types.split(", ")[:2]]
        assert re.search(rf"\bLDG\.E\.{loads}\.CONSTANT\b", section), kernel
        assert re.search(rf"\bSTG\.E\.{stores}\b", section), kernel
        assert not re.search(r"\b(LDL|STL|ATOM|RED)\b", section), kernel
