"""Builds the native modules of the video tubes; all static metadata is in pyproject.toml.

Two modules, so that a failing CUDA build never costs the C++ one, and neither is needed: what cannot be built is
reported here, in `mirasol.kernels.build_info()`, and replaced by PyTorch at run time.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
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
X86 = platform.machine() in ("x86_64", "AMD64")

NINJA = """
rule cxx
  command = {cxx} -MMD -MF $out.d {flags} $extra -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = {nvcc} -MMD -MF $out.d {nvcc_flags} -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {link} $in -o $out
"""


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
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for candidate in [*(Path(home, "bin", "nvcc") for home in [*homes, "/usr/local/cuda"]), shutil.which("nvcc")]:
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


class BuildNative(build_ext):
    """Compiles each module with ninja and notes in _build.json what came of it."""

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            entry = {"built": True, **{"_native": self.build_cpu, "_cuda": self.build_cuda}[name](ext, target)}
        except Missing as why:
            entry = {"built": False, "why": f"{name} was not built: {why}"}
            print(f"\n*** mirasol: {entry['why']}. It is replaced by PyTorch, which is slower. ***\n", file=sys.stderr)
        report = target.parent / "_build.json"
        entries = json.loads(report.read_text()) if report.exists() else {}
        report.write_text(json.dumps({**entries, name: entry}, indent=1))

    def build_cpu(self, ext: Extension, target: Path) -> dict[str, object]:
        cxx = find_cxx()
        objects = [("tubes_cpu.cpp", "baseline", "-DMIRASOL_ISA=baseline"), ("tubes_rehearse.cpp", "rehearse", "")]
        objects.append(("bind_native.cpp", "bind", self.binding()))
        if X86:
            objects.append(("tubes_cpu.cpp", "avx2", "-mavx2 -mf16c -DMIRASOL_ISA=avx2"))
        for openmp in (["-fopenmp"], []):
            flags = CXX_FLAGS + openmp
            try:
                self.ninja(ext, target, objects, cxx=cxx, flags=flags, link=[cxx, "-shared", *openmp])
            except Missing:
                if not openmp:
                    raise
            else:
                return {"compiler": version_of(cxx), "flags": " ".join(flags), "threads": bool(openmp)}
        raise AssertionError("unreachable")

    def build_cuda(self, ext: Extension, target: Path) -> dict[str, object]:
        nvcc, cxx = find_nvcc(), find_cxx()
        archs = gencode(os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX")
        objects = [("tubes_cuda.cu", "kernels", ""), ("bind_cuda.cpp", "bind_cuda", self.binding())]
        nvcc_flags = [*NVCC_FLAGS, *archs]
        link = [nvcc, "-shared", "-cudart=static", *archs]
        self.ninja(ext, target, objects, cxx=cxx, flags=CXX_FLAGS, nvcc=nvcc, nvcc_flags=nvcc_flags, link=link)
        codes = [flag.rpartition("code=")[2] for flag in archs]
        return {"compiler": version_of(nvcc), "flags": " ".join(NVCC_FLAGS), "architectures": codes}

    def binding(self) -> str:
        """Flags of the one file per module that knows Python."""
        try:
            import pybind11
        except ImportError as error:
            raise Missing("pybind11 is not installed (a build without isolation needs pybind11 and ninja)") from error
        include = [pybind11.get_include(), sysconfig.get_path("include")]
        return " ".join([*(shlex.quote(f"-I{path}") for path in include), *(["-DMIRASOL_WITH_AVX2"] if X86 else [])])

    def ninja(
        self,
        ext: Extension,
        target: Path,
        objects: list[tuple[str, str, str]],
        *,
        cxx: str,
        flags: list[str],
        link: list[str],
        nvcc: str = "",
        nvcc_flags: list[str] | None = None,
    ) -> None:
        """Compile (source, object, its own flags) and link; the folder stays, so that rebuilds compile only changes."""
        folder = Path("build", f"{ext.name.rpartition('.')[2]}-{sys.implementation.cache_tag}").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        rules = NINJA.format(
            cxx=cxx, flags=" ".join(flags), nvcc=nvcc, nvcc_flags=" ".join(nvcc_flags or []), link=" ".join(link)
        )
        lines = [rules]
        for source, name, extra in objects:
            rule = "nvcc" if source.endswith(".cu") else "cxx"
            lines.append(f"build {name}.o: {rule} ../../csrc/{source}\n  extra = {extra}")
        lines.append(f"build {ext.name}.so: link {' '.join(f'{name}.o' for _, name, _ in objects)}\n")
        (folder / "build.ninja").write_text("\n".join(lines))
        run = subprocess.run([sys.executable, "-m", "ninja", "-C", folder], capture_output=True, text=True)
        print(run.stdout, run.stderr, sep="\n")
        if run.returncode != 0:
            raise Missing("\n".join(["the compiler failed:", *(run.stdout + run.stderr).strip().splitlines()[-12:]]))
        shutil.copyfile(folder / f"{ext.name}.so", target)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        package = Path(self.get_finalized_command("build_py").get_package_dir(PACKAGE))
        shutil.copyfile(Path(self.build_lib, *PACKAGE.split("."), "_build.json"), package / "_build.json")
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            if not built.exists():  # one of an earlier build would be older than its sources
                (package / built.name).unlink(missing_ok=True)


def version_of(compiler: str) -> str:
    shown = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=False).stdout
    lines = [line for line in shown.splitlines() if re.search(r"\d+\.\d+", line)]
    return lines[0].strip() if lines else compiler


setup(
    ext_modules=[
        Extension(f"{PACKAGE}._native", ["csrc/tubes_cpu.cpp", "csrc/bind_native.cpp"], optional=True),
        Extension(f"{PACKAGE}._cuda", ["csrc/tubes_cuda.cu", "csrc/bind_cuda.cpp"], optional=True),
    ],
    cmdclass={"build_ext": BuildNative},
)
