"""Text out of the decoder: greedy, sampled or by beam search, whole or token by token; and answers, scored."""

from mirasol.generation.decode import Step, evaluating, generate, steps
from mirasol.generation.loop import LOOK_EVERY, Decoder
from mirasol.generation.score import score

__all__ = ["LOOK_EVERY", "Decoder", "Step", "evaluating", "generate", "score", "steps"]
