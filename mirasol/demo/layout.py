"""What stands where on the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from mirasol.demo import view

HERE = Path(__file__).parent
CSS = HERE / "page.css"

TICK = 0.4
"""Seconds between two looks at a stream."""

ABOUT = """## mirasol watches and listens
Chunk by chunk, for as long as it lasts, with a memory of fixed size. Ask at any time: the stream goes on meanwhile."""

CAMERA = '<div class="camera"><video autoplay muted playsinline></video></div>'


@dataclass(frozen=True)
class Parts:
    """What a visitor sees and presses. camera: records while its value, a key, is not empty."""

    clip: gr.Video
    example: gr.Dropdown
    play: gr.Button
    camera: gr.HTML
    record: gr.Button
    stop: gr.Button
    start_over: gr.Button
    chat: gr.Chatbot
    question: gr.Textbox
    ask: gr.Button
    suggestion: gr.Dropdown
    status: gr.HTML
    strip: gr.HTML
    figures: gr.HTML
    timer: gr.Timer


def lay_out(examples: Sequence[str], receive: Callable[[dict[str, str]], bool], note: str) -> Parts:
    """Put everything on the page that is being made.

    Args:
        examples: names of clips to offer.
        receive: what the camera's script calls with each piece of its recording.
        note: what is to be known about the model.
    """
    gr.Markdown(f"{ABOUT} {note}")
    with gr.Row(equal_height=True):
        with gr.Column(scale=5):
            with gr.Tab("Clip"):
                clip = gr.Video(sources=["upload"], label="Clip", height=250, elem_id="clip", buttons=[])
                offered: Any = dict(label="or an example", visible=bool(examples), elem_id="example")
                example = gr.Dropdown(examples, value=None, **offered)
                play = gr.Button("Play", variant="primary", elem_id="play")
            with gr.Tab("Camera and microphone"):
                script = (HERE / "camera.js").read_text(encoding="utf-8")
                how: Any = dict(html_template=CAMERA, js_on_load=script, server_functions=[receive])
                camera = gr.HTML("", elem_id="camera", **how)
                record = gr.Button("Start the camera", variant="primary", elem_id="record")
            with gr.Row():
                stop = gr.Button("Stop", elem_id="stop")
                start_over = gr.Button("Start over", elem_id="start-over")
        with gr.Column(scale=4):
            plain: Any = dict(buttons=[], render_markdown=False, feedback_options=None)
            hint = "Ask about what has been seen and heard, at any time."
            chat = gr.Chatbot(label="Questions and answers", height=390, placeholder=hint, elem_id="chat", **plain)
            with gr.Row():
                bare: Any = dict(show_label=False, container=False, max_length=1000)
                hint = "What colour did the last object have?"
                question = gr.Textbox(placeholder=hint, scale=5, elem_id="question", **bare)
                ask = gr.Button("Ask", variant="primary", scale=1, min_width=80, elem_id="ask")
            label = "or one that this clip can be asked, with the true answer when it is over"
            suggestion = gr.Dropdown([], value=None, label=label, visible=False, elem_id="suggestion")
    status = gr.HTML(view.status(None), elem_id="status")
    strip = gr.HTML(view.strip(None), elem_id="strip")
    figures = gr.HTML(view.figures(None), elem_id="figures")
    timer = gr.Timer(TICK, active=False)
    return Parts(
        clip,
        example,
        play,
        camera,
        record,
        stop,
        start_over,
        chat,
        question,
        ask,
        suggestion,
        status,
        strip,
        figures,
        timer,
    )
