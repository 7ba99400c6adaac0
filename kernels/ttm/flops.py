"""Work of the Token Turing Machine operators: matrix products only, 2 operations per multiply-add.

The one place where the formulas stand: the operators register them with `torch.utils.flop_counter`, and cost models
call them.
"""

from __future__ import annotations


def summary_flops(batch: int, tokens: int, d: int, hidden: int, k: int) -> int:
    """Forward of a TokenLearner summary of `tokens` tokens, or of a part of them.

    Scores cost d x hidden and hidden x k a token, the weighted sum k x d. The work of a part of the tokens is
    proportional to it, so reading and writing costs the same in the time-parallel and in the step-by-step form.

    Args:
        batch: B; tokens: p; d: their width.
        hidden, k: width of the score network, and tokens of the summary.
    """
    return 2 * batch * tokens * (d * hidden + hidden * k + k * d)


def summary_backward_flops(
    batch: int,
    tokens: int,
    d: int,
    hidden: int,
    k: int,
    tokens_with_grad: int | None = None,
    scores_again: bool = False,
) -> int:
    """Backward of `summary_flops`.

    Args:
        batch, tokens, d, hidden, k: as there; gradients of scores and weights are taken for all tokens.
        tokens_with_grad: tokens that need a gradient themselves; None: all.
        scores_again: whether scores are computed again from the hidden layer, as the Triton kernels do; the `torch`
            backend keeps the weights.
    """
    with_grad = tokens if tokens_with_grad is None else tokens_with_grad
    products = 3 if scores_again else 2
    return 2 * batch * (tokens * (k * d + products * hidden * k + hidden * d) + with_grad * (k + hidden) * d)


def linear_summary_flops(batch: int, tokens: int, d: int, rows: int) -> int:
    """Forward of a summary whose scores are linear in the tokens, for `rows` = heads x summary tokens."""
    return 4 * batch * tokens * d * rows


def linear_summary_backward_flops(batch: int, tokens: int, d: int, rows: int, tokens_with_grad: int) -> int:
    """Backward of `linear_summary_flops`: two products for all tokens, two for those that need a gradient."""
    return 4 * batch * (tokens + tokens_with_grad) * d * rows


def scan_flops(
    batch: int, chunks: int, inputs: int, d: int, memory: int, read: int, hidden: tuple[int, int] = (64, 64)
) -> int:
    """Forward of `ttm_scan` with TokenLearner read and write, without the process unit.

    Args:
        batch: B; chunks: T; inputs: n, tokens a chunk; d: their width; memory: s; read: r.
        hidden: widths of the read's and the write's score networks.
    """
    reading = summary_flops(batch, memory + inputs, d, hidden[0], read)
    writing = summary_flops(batch, memory + inputs + read, d, hidden[1], memory)
    return chunks * (reading + writing)
