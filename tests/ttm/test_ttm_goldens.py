"""Outputs, memories and all gradients of the official Token Turing Machine, from files that its own code made."""

from __future__ import annotations

import pytest
import torch
from ttm_helpers import Golden

from mirasol.kernels.ttm import ttm_scan
from tolerance import ROUNDED_GOLDENS, assert_close

FORMS = [("reference", "auto"), ("torch", "parallel"), ("torch", "stepwise"), ("torch", "auto")]
FILES = ["tokenlearner", "tokenlearner_pos", "latent_query", "erase_add_official"]


def is_exactly_zero(key: str) -> bool:
    """Gradients that vanish in exact arithmetic, so that the file holds nothing but its own rounding.

    A bias shared by all tokens of a softmax falls out of it. And in the erase-add file memory starts at zeros, where
    all its tokens are alike and stay so: which of them a slot selects makes no difference.
    """
    biases = ("key/bias", "token_masking/Dense_1/bias")
    selection = ("TokenAddEraseWrite_0/LayerNorm_0", "TokenAddEraseWrite_0/MlpBlock_0")
    return key.endswith(biases) or key.startswith(selection)


@pytest.mark.parametrize(("backend", "form"), FORMS)
@pytest.mark.parametrize("name", FILES)
def test_matches_the_official_code(name, backend, form):
    golden = Golden(name)
    inputs = golden.tensor("inputs").requires_grad_()
    outputs, memories = ttm_scan(
        golden.initial_memory(),
        inputs,
        golden.read_params(),
        golden.process,
        golden.write_params(),
        form=form,
        backend=backend,
        return_memories=True,
    )
    assert_close("outputs", outputs, golden.tensor("outputs"), rtol=ROUNDED_GOLDENS)
    assert_close("memories", memories, golden.tensor("memories"), rtol=ROUNDED_GOLDENS)
    loss = (outputs * golden.tensor("cotangent_outputs")).sum()
    loss = loss + (memories[:, -1] * golden.tensor("cotangent_last_memory")).sum()
    grads = torch.autograd.grad(loss, [inputs, *golden.params.values()], allow_unused=True)
    assert_close("grad_inputs", grads[0], golden.tensor("grad_inputs"), rtol=ROUNDED_GOLDENS)
    for (key, expected), grad in zip(golden.gradients().items(), grads[1:], strict=True):
        if is_exactly_zero(key):
            assert expected.abs().max() < 1e-5, f"{key}: the file holds more than its own rounding"
            assert grad is None or grad.abs().max() < 1e-10, key
        else:
            assert_close(key, grad, expected, rtol=ROUNDED_GOLDENS)
