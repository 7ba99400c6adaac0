"""What setup.py makes of a machine: without a compiler, without CUDA, editable; and what type checkers see of it."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
IGNORED = shutil.ignore_patterns(
    "build", "dist", ".*", "__pycache__", "*.so", "*.egg-info", "_build.json", "bench", "tests"
)
EMBEDDED = ("config.json", "model.safetensors", "tokenizer_config.json", "README.md", "world.json")
"""Files of the model that comes with the package."""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A copy of the sources, and an environment in which no compiler can be found."""
    copy = tmp_path_factory.mktemp("sources") / "mirasol"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=IGNORED)
    return copy, {**os.environ, "PATH": str(copy / "nowhere"), "CXX": "no-such-compiler"}


def _build(bare, kind: str, **variables: str) -> tuple[zipfile.ZipFile, str]:
    copy, environment = bare[0], {**bare[1], **variables}
    command = f"import setuptools.build_meta as b; print('made', b.build_{kind}('dist'))"
    run = subprocess.run([sys.executable, "-c", command], cwd=copy, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return zipfile.ZipFile(copy / "dist" / re.search(r"^made (.*)$", run.stdout, re.MULTILINE)[1]), run.stderr


def test_without_a_compiler_the_wheel_is_pure_python_and_says_so(bare):
    wheel, told = _build(bare, "wheel")
    names = set(wheel.namelist())
    assert not [name for name in names if name.endswith(".so")]
    assert {"mirasol/py.typed", "mirasol/kernels/py.typed", "mirasol/kernels/tubes/api.py"} <= names
    assert {f"mirasol/embedded/{name}" for name in EMBEDDED} <= names
    assert not [name for name in names if name.startswith(("kernels/", "src/", "csrc/", "tests/"))]
    report = json.loads(wheel.read("mirasol/kernels/tubes/_build.json"))
    for module in ("_native", "_cuda"):
        assert re.search(rf"\*\*\* mirasol: {module} was not built: .*slower", told)
    assert "no C++ compiler was found" in report["_native"]["why"]


def test_the_model_in_the_package_is_part_of_the_source_distribution(bare):
    command = "import setuptools.build_meta as b; print('made', b.build_sdist('dist'))"
    run = subprocess.run([sys.executable, "-c", command], cwd=bare[0], env=bare[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    with tarfile.open(bare[0] / "dist" / re.search(r"^made (.*)$", run.stdout, re.MULTILINE)[1]) as sources:
        names = {name.partition("/")[2] for name in sources.getnames()}
    assert {f"src/mirasol/embedded/{name}" for name in EMBEDDED} <= names


# Stands for a compiler: it makes the files that it is asked for.
TOUCH = """#!/bin/sh
before=
for word; do
  case "$before" in -o | -MF) : > "$word" ;; esac
  before=$word
done
"""


@pytest.mark.parametrize("skip", ["", "1"])
def test_a_failing_cuda_build_does_not_cost_the_other_module(bare, tmp_path, skip):
    tools = {"c++": TOUCH, "nvcc": "#!/bin/sh\necho 'nvcc fatal: out of luck' >&2\nexit 1\n"}
    (tmp_path / "bin").mkdir()
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    variables = {"CXX": str(tmp_path / "bin" / "c++"), "CUDA_HOME": str(tmp_path), "MIRASOL_SKIP_CUDA": skip}
    wheel, told = _build(bare, "wheel", **variables)
    modules = [name.split(".")[0] for name in wheel.namelist() if name.endswith(".so")]
    assert modules == ["mirasol/kernels/tubes/_native"]
    report = json.loads(wheel.read("mirasol/kernels/tubes/_build.json"))
    assert "-O3" in report["_native"]["flags"]
    assert "why" not in report["_native"]
    assert ("MIRASOL_SKIP_CUDA=1 was set" if skip else "nvcc fatal: out of luck") in report["_cuda"]["why"]
    assert "*** mirasol: _cuda was not built" in told


def test_a_module_that_is_not_built_again_does_not_stay(bare):
    copy, environment = bare
    package = copy / "kernels" / "tubes"
    stale = [package / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in ("_native", "_cuda")]
    for module in stale:
        module.touch()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=copy, env=environment, check=True, capture_output=True)
    assert not [module for module in stale if module.exists()]
    assert set(json.loads((package / "_build.json").read_text())) == {"_native", "_cuda"}


def test_an_editable_install_is_resolved_by_type_checkers_elsewhere(bare, tmp_path):
    wheel, _ = _build(bare, "editable")
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python*/site-packages")
    wheel.extractall(packages)
    user = tmp_path / "elsewhere" / "user.py"
    user.parent.mkdir()
    user.write_text("from mirasol.kernels import Tube\nwrong: int = Tube((1, 1, 1), (1, 1, 1))\n")
    check = [sys.executable, "-m", "mypy", "--python-executable", python, "--cache-dir", tmp_path / "cache"]
    run = subprocess.run([*check, user], cwd=user.parent, capture_output=True, text=True)
    assert 'variable has type "int"' in run.stdout, run.stdout + run.stderr
    assert "import-not-found" not in run.stdout
    found = "import importlib.util as u; print(bool(u.find_spec('mirasol')), u.find_spec('kernels'))"
    shown = subprocess.run([python, "-c", found], cwd=user.parent, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["True", "None"]


@pytest.fixture
def script(monkeypatch):
    """The functions of setup.py, without a build."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_architectures_of_the_field(script):
    flags = script["gencode"]("8.0; 9.0a+PTX 10.0f")
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
        "-gencode=arch=compute_100f,code=sm_100f",
    ]
    with pytest.raises(script["Missing"], match="TORCH_CUDA_ARCH_LIST holds 'Hopper'"):
        script["gencode"]("Hopper")


def test_where_nvcc_is_looked_for(script, monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert script["find_nvcc"]() == str(nvcc)
    monkeypatch.setenv("MIRASOL_SKIP_CUDA", "1")
    with pytest.raises(script["Missing"], match="MIRASOL_SKIP_CUDA=1 was set"):
        script["find_nvcc"]()
