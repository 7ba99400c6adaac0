"""The package itself: what importing it needs, costs and touches, and what its documentation holds."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mirasol
import mirasol.kernels

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, folder: Path, **environment: str) -> str:
    """Run code in a fresh interpreter in `folder` and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCK = "import sys\nfor name in ('triton', 'mirasol.kernels.tubes._native'): sys.modules[name] = None"


def test_runs_without_triton_and_without_the_extension(tmp_path):
    code = f"""{BLOCK}
import torch, mirasol
from mirasol.kernels import chunked_attention
q = torch.randn(1, 2, 8, 16)
chunked_attention(q, q, q, q_chunk=4)
model = mirasol.Model.from_preset("tiny", combiner="ttm").eval()
print(model.encode(torch.zeros(1, 3, 8, 32, 32)).shape[1])
"""
    assert run(code, tmp_path).strip() == "8"


@pytest.mark.parametrize(
    "call",
    [
        "chunked_attention(x, x, x, q_chunk=2, backend='triton')",
        "combiner_project(x, 2, x[0, 0], backend='triton')",
        "ttm_read(x[0], x[0], TokenLearnerParams(*[w[0]] * 2, w, w[:, 0], w, w[:, 0]), backend='triton')",
    ],
)
def test_compiled_kernels_say_why_they_cannot_run_on_a_cpu(call, tmp_path):
    code = f"""
import torch
from mirasol.kernels import TokenLearnerParams, chunked_attention, combiner_project, ttm_read
x, w = torch.zeros(1, 2, 4, 4), torch.zeros(4, 4)
try:
    {call}
except ValueError as error:
    print(error)
"""
    said = run(code, tmp_path, TRITON_INTERPRET="0")
    assert 'cannot run with backend="triton": Its kernels need tensors on a GPU' in said


def test_importing_is_quick_and_touches_no_device(tmp_path):
    code = """
import time, torch
start = time.perf_counter()
import mirasol, mirasol.kernels
mirasol.Model
print(time.perf_counter() - start)
assert not torch.cuda.is_initialized()
import sys
for heavy in ("matplotlib", "av", "transformers", "huggingface_hub", "torch.distributed.tensor"):
    assert heavy not in sys.modules, heavy
"""
    assert min(float(run(code, tmp_path)) for _ in range(3)) < 2.0


def test_top_level_kernels_is_left_to_others(tmp_path):
    where = run("import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)", tmp_path).strip()
    assert str(ROOT) not in where


def test_source_tree_imports_without_an_installation(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import mirasol.kernels as k; print(k.__name__)"
    assert run(code, tmp_path).strip() == "mirasol.kernels"


@pytest.mark.parametrize("name", [n for n in dir(mirasol.kernels) if inspect.isfunction(getattr(mirasol.kernels, n))])
def test_public_functions_are_documented(name):
    """A docstring speaks of every parameter; one that takes tensors has the usual sections."""
    function = getattr(mirasol.kernels, name)
    text = inspect.getdoc(function) or ""
    assert len(text) > 80
    if "torch.Tensor" in str(inspect.signature(function)):
        for section in ("Args:", "Returns:"):
            assert section in text, f"{name} lacks {section}"
    for parameter in inspect.signature(function).parameters:
        assert parameter in text, f"{name} says nothing of {parameter}"


def test_everything_promised_is_there():
    for name in mirasol.__all__:
        assert getattr(mirasol, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Modle'"):
        mirasol.Modle  # noqa: B018
