"""The server of the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mirasol.demo.options import DemoOptions
from mirasol.embedded import WORLD

LEARNED = "This model has learned from generated clips only: about anything else it guesses."
"""What the page says of a model whose folder tells of its world."""


def open_page(run: str | Path, options: DemoOptions = DemoOptions()) -> tuple[Any, str]:  # noqa: B008
    """Serve the page in threads of its own; -> Gradio's Blocks, to be closed or waited for, and the page's address.

    Args:
        run: folder of a model, as training leaves it.
    Raises:
        ImportError: gradio or PyAV is not installed.
        FileNotFoundError, ValueError: a folder without a model; a model that cannot stream.
        OSError: a port that is taken.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the page needs the package gradio: pip install -e '.[demo]'") from error
    from mirasol.demo import layout, page
    from mirasol.demo.examples import find_examples
    from mirasol.demo.visitor import Visitor
    from mirasol.demo.visitors import Visitors
    from mirasol.evaluation.answer import Answerer
    from mirasol.evaluation.options import AnswerOptions

    answerer = Answerer(run, AnswerOptions(device=options.device))
    model, tokenizer = answerer.model, answerer.tokenizer

    def new_stream() -> Any:
        return model.stream(tokenizer=tokenizer, memory=options.memory, sinks=options.sinks)

    reach = model.config.reach("text")
    window, sinks = (options.memory, options.sinks) if reach.window is None else (reach.window, reach.sinks)
    new_stream()  # a model that cannot stream is told now

    def new_visitor() -> Visitor:
        return Visitor(new_stream, window, sinks, options.max_new_tokens)

    note = LEARNED if (Path(run) / WORLD).is_file() else ""
    blocks = page.build(Visitors(new_visitor, options.visitors), find_examples(run, options.examples), note)
    system = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # Gradio's own come from a server
    _, address, shared = blocks.queue(default_concurrency_limit=None).launch(
        server_name=options.host,
        server_port=options.port or None,
        share=options.share,
        theme=gradio.themes.Default(font=system[0], font_mono=system[1]),
        css_paths=[layout.CSS],
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    return blocks, shared or address
