"""What only a GPU shows: CUDA graphs and CUDA streams change nothing but the time."""

from __future__ import annotations

import pytest
import torch

from devices import only_on_gpu
from mirasol import ByteTokenizer, Model

pytestmark = only_on_gpu


@pytest.mark.parametrize("combiner", ["transformer", "ttm"])
def test_captured_steps_are_the_plain_ones(combiner):
    windows = dict(combiner_window=2, av_window=3, text_window=4)
    model = Model.from_preset("tiny", combiner=combiner, **windows).eval().cuda()
    config, tokens = model.config, ByteTokenizer()
    captured, plain = (model.stream(batch=2, tokenizer=tokens, graphs=graphs) for graphs in (True, False))
    for _ in range(9):
        video = torch.randint(0, 256, (2, 3, config.frames_per_chunk, 32, 32), dtype=torch.uint8, device="cuda")
        audio = 0.1 * torch.randn(2, config.samples_per_chunk, device="cuda")
        torch.testing.assert_close(captured.push(video, audio), plain.push(video, audio), rtol=1e-4, atol=1e-4)
        answers = [stream.ask("What?", row=1, max_new_tokens=20) for stream in (captured, plain)]
        assert answers[0] == answers[1]
    assert captured.chunks == plain.chunks == [9, 9]


def test_chunks_go_on_beside_an_answer():
    model = Model.from_preset("tiny", combiner="ttm").eval().cuda()
    config, stream = model.config, model.stream(tokenizer=ByteTokenizer(), memory=4)
    video = torch.zeros(1, 3, config.frames_per_chunk, 32, 32, dtype=torch.uint8, device="cuda")
    stream.push(video)
    expected = stream.ask("What?", max_new_tokens=24)
    answer = stream.answer("What?", max_new_tokens=24, attention=True)
    for _ in answer:
        stream.push(video)
    assert answer.text == expected
