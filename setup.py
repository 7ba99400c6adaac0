"""Builds the native modules of the video tubes; all static metadata is in pyproject.toml.

Neither module is needed: what cannot be built is reported here, in `_build.json` for `mirasol.kernels.build_info()`,
and replaced by PyTorch at run time.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGE = "mirasol.kernels.tubes"
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
CXX_FLAGS += ["-fno-trapping-math", "-fopenmp-simd", "-g0"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-fmad=false", "-t0"]


class Missing(Exception):
    """Why a module cannot be built."""


def find_cxx() -> str:
    named = os.environ.get("CXX") or (sysconfig.get_config_var("CXX") or "c++").split()[0]
    for candidate in (named, "c++", "g++", "clang++"):
        if shutil.which(candidate.split()[0]):
            return candidate
    raise Missing("no C++ compiler was found (CXX, c++, g++, clang++)")


def find_nvcc() -> str:
    if os.environ.get("MIRASOL_SKIP_CUDA") == "1":
        raise Missing("MIRASOL_SKIP_CUDA=1 was set")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for candidate in [*(Path(home, "bin", "nvcc") for home in homes if home), shutil.which("nvcc")]:
        if candidate and os.access(candidate, os.X_OK):
            return str(candidate)
    raise Missing("no nvcc was found (CUDA_HOME, CUDA_PATH, /usr/local/cuda, PATH)")


def gencode(listed: str) -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST: "8.0;9.0a+PTX", separated by semicolons or spaces."""
    flags = []
    for name in re.split(r"[;\s]+", listed.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if not match:
            raise Missing(f"TORCH_CUDA_ARCH_LIST holds {name!r}, which is not of the form 9.0 or 9.0+PTX")
        arch = match[1] + match[2] + match[3]
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


def binding() -> list[str]:
    """Flags of the one file per module that knows Python."""
    try:
        import pybind11
    except ImportError as error:
        raise Missing("pybind11 is not installed, which a build without isolation needs") from error
    return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]


def run(*commands: list[str]) -> None:
    """Run commands side by side."""
    started = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    told = [process.communicate()[0] for process in started]
    for command, process, text in zip(commands, started, told, strict=True):
        print(*command, text)
        if process.returncode != 0:
            raise Missing("\n".join(["the compiler failed:", *text.strip().splitlines()[-12:]]))


def build_native(target: Path, folder: Path) -> dict[str, str]:
    cxx = find_cxx()
    parts = {"bind": ["csrc/bind_cpu.cpp", *binding()], "baseline": ["csrc/tubes_cpu.cpp", "-DMIRASOL_ISA=baseline"]}
    if platform.machine() in ("x86_64", "AMD64"):
        parts["avx2"] = ["csrc/tubes_cpu.cpp", "-DMIRASOL_ISA=avx2", "-mavx2", "-mf16c"]
    objects = {str(folder / f"{name}.o"): flags for name, flags in parts.items()}
    command = [*cxx.split(), *CXX_FLAGS, "-fopenmp"]
    try:
        run([*command, "-shared", "-x", "c++", os.devnull, "-o", str(folder / "probe")])
    except Missing:
        command.remove("-fopenmp")
    run(*([*command, "-c", *flags, "-o", made] for made, flags in objects.items()))
    run([*command, "-shared", *objects, "-o", str(target)])
    return {"compiler": version_of(cxx.split()), "flags": " ".join(command[1:])}


def build_cuda(target: Path, folder: Path) -> dict[str, str]:
    find_cxx()  # nvcc needs one, and says less clearly that there is none
    flags = [*NVCC_FLAGS, *gencode(os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX")]
    command = [find_nvcc(), *flags, "-shared", "-cudart=static", "csrc/tubes_cuda.cu", "csrc/bind_cuda.cpp", *binding()]
    run([*command, "-o", str(target)])
    return {"compiler": version_of(command[:1]), "flags": " ".join(flags)}


def version_of(compiler: list[str]) -> str:
    shown = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return next((line.strip() for line in shown.splitlines() if re.search(r"\d+\.\d+", line)), compiler[0])


class BuildNative(build_ext):
    """Builds what can be built, always anew, and notes in _build.json how, or why not."""

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        target, folder = Path(self.get_ext_fullpath(ext.name)).resolve(), Path(self.build_temp).resolve()
        for each in (target.parent, folder):
            each.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            entry = {"_native": build_native, "_cuda": build_cuda}[name](target, folder)
        except Missing as why:
            entry = {"why": f"{name} was not built: {why}"}
            print(f"\n*** mirasol: {entry['why']}. It is replaced by PyTorch, which is slower. ***\n", file=sys.stderr)
        report = target.parent / "_build.json"
        entries = json.loads(report.read_text()) if report.exists() else {}
        report.write_text(json.dumps({**entries, name: entry}, indent=1))

    def copy_extensions_to_source(self) -> None:
        package = Path(self.get_finalized_command("build_py").get_package_dir(PACKAGE))
        for ext in self.extensions:  # one of an earlier build would be older than its sources
            (package / Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        shutil.copyfile(Path(self.build_lib, *PACKAGE.split("."), "_build.json"), package / "_build.json")


setup(
    ext_modules=[Extension(f"{PACKAGE}.{name}", [], optional=True) for name in ("_native", "_cuda")],
    cmdclass={"build_ext": BuildNative},
)
