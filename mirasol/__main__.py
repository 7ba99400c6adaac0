"""mirasol: ask a model about clips and streams; train one of your own on questions about clips, and measure it.

  python -m mirasol world clip.mp4 --seed 7               write a clip to ask about, and print questions with answers
  python -m mirasol ask clip.mp4 "What colour did the last object have?"
  python -m mirasol stream /dev/video0                    watch a camera, a server or a file, and ask meanwhile
  python -m mirasol demo                                  a web page: watch a clip or a camera, ask meanwhile

  python -m mirasol worlds set/                           write a generated set to learn from
  python -m mirasol train set/questions.csv --preset small --out run/
  python -m mirasol evaluate set/questions-test.csv --run run/
  python -m mirasol shards questions.csv shards/          pack the clips of a table into archives
  python -m mirasol features run/ questions.csv cache/    keep what frozen encoders make of them

Without --run a small model answers that comes with the package and knows its own generated world only. Each command has
its --help. A table is a file, a folder of shards, or a published set as NAME:SPLIT:FOLDER:VIDEOS, such as
nextqa-mc:val:dataset:videos; the others are msrvtt-qa, activitynet-qa, nextqa-oe, vggsound and epic-sounds.
`torchrun --nproc-per-node 8 -m mirasol train ...` trains on 8 GPUs. After a mistake there is one line and exit code 2;
with --debug also where it was found.
"""

import ast
import inspect
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MISTAKES = (ValueError, TypeError, OSError, ImportError, ArithmeticError, LookupError, RuntimeError)
"""What bad input raises, in our own code and in the libraries that read it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    if name not in COMMANDS:
        print(f"mirasol: the command must be one of {', '.join(COMMANDS)}, was {name!r}", file=sys.stderr)
        return 2
    try:
        COMMANDS[name](arguments[1:])
    except KeyboardInterrupt:
        print(f"mirasol {name}: interrupted", file=sys.stderr)
        return 130
    except MISTAKES as error:
        if debug or isinstance(error, KeyError | IndexError):  # what bad input raises is a plain LookupError
            raise
        text = str(error)
        if "Original Traceback" in text:  # from a process that reads clips
            text = text.strip().splitlines()[-1].partition(": ")[2]
        print(f"mirasol {name}: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
        return 2
    return 0


# What is imported for --help is light; each command imports the rest when it runs.


def _train(arguments: list[str]) -> None:
    from mirasol.training.options import TrainOptions

    options = _call("train", TrainOptions, arguments)
    from mirasol.train import train

    print(train(options))


def _evaluate(arguments: list[str]) -> None:
    from mirasol.embedded import EMBEDDED
    from mirasol.evaluation.options import EvaluateOptions

    def evaluate(table: Path, run: Path = EMBEDDED, more: EvaluateOptions = EvaluateOptions()) -> None:  # noqa: B008
        """Let a model answer a table of questions about clips, and measure how well it does.

        An example with choices is answered by the likeliest of them, others freely, or by a class with --classes.

        Args:
            table: table of questions, or folder of shards.
            run: folder of the model, as training leaves it; default: the model in the package.
            more: how clips are answered, and what is written.
        """
        from mirasol.evaluate import evaluate

        for measure, groups in evaluate(run, table, more)["metrics"].items():
            for group, found in groups.items():
                value = "-" if found["value"] is None else f"{found['value']:.3f}"
                print(f"{measure:24}{group:24}{value:>8}  of {found['count']}")
        print(Path(more.out) / "report.html")

    _call("evaluate", evaluate, arguments)


def _ask(arguments: list[str]) -> None:
    from mirasol.embedded import EMBEDDED
    from mirasol.evaluation.options import AnswerOptions

    def ask(
        clip: Path,
        question: str,
        run: Path = EMBEDDED,
        start: float | None = None,
        end: float | None = None,
        choices: tuple[str, ...] = (),
        more: AnswerOptions = AnswerOptions(),  # noqa: B008
    ) -> None:
        """Ask a model one question about one clip.

        Args:
            clip: media file.
            question: what is asked.
            run: folder of the model, as training leaves it; default: the model in the package.
            start: seconds from which on the clip is looked at.
            end: seconds up to which the clip is looked at.
            choices: answer with the likeliest of these.
            more: how it is answered.
        """
        from mirasol.evaluate import ask

        print(ask(run, str(clip), question, start=start, end=end, choices=choices, options=more))

    _call("ask", ask, arguments)


def _stream(arguments: list[str]) -> None:
    from mirasol.embedded import EMBEDDED
    from mirasol.streaming.options import StreamOptions

    def stream(source: str, run: Path = EMBEDDED, more: StreamOptions = StreamOptions()) -> None:  # noqa: B008
        """Watch and listen for as long as it lasts, in bounded memory. A line typed meanwhile is a question.

        Args:
            source: media file; camera (/dev/video0); URL (rtsp, rtmp, http, https, srt, tcp, udp); or - for a pipe, as
                from ffmpeg.
            run: folder of the model, as training leaves it; default: the model in the package.
            more: what is kept and shown.
        """
        from mirasol.streaming.terminal import watch

        watch(run, source, more)

    _call("stream", stream, arguments)


def _demo(arguments: list[str]) -> None:
    from mirasol.demo.options import DemoOptions
    from mirasol.embedded import EMBEDDED

    def demo(run: Path = EMBEDDED, more: DemoOptions = DemoOptions()) -> None:  # noqa: B008
        """Serve a web page on which a model watches and listens to a clip or a camera, and answers meanwhile.

        Args:
            run: folder of the model, as training leaves it; default: the model in the package.
            more: how the page is served, and what a stream keeps.
        """
        from mirasol.demo.serve import open_page

        page, address = open_page(run, more)
        print(address, flush=True)
        page.block_thread()

    _call("demo", demo, arguments)


def _worlds(arguments: list[str]) -> None:
    def worlds(
        folder: Path,
        clips: int = 64,
        seed: int = 0,
        chunks: int = 16,
        events: int | None = None,
        per_type: float = 1.0,
        types: tuple[str, ...] = (),
        preset: str = "tiny",
    ) -> None:
        """Write a generated set: objects that move, sounds of known pitch, and questions about both, at a time or long
        after. Prints which share of the test can be guessed by majority, from the question, the video or the sound.

        Args:
            folder: where clips/, questions.csv (to learn from), questions-test.csv (other clips), questions-heldout.csv
                (objects and sounds never learned), questions-wordings.csv (the test in other words) and worlds.json
                (these settings, all floors) are written.
            clips: how many; a fifth of them is for the test, a fifth for what is held out.
            seed: of what happens in the clips.
            chunks: that a clip lasts; models must be told as many with --max-chunks.
            events: that follow each other in a clip; default: half as many as chunks.
            per_type: questions of each type, per clip, about.
            types: of the questions that are asked, as the tables tell them; default: all.
            preset: of the models that a chunk and a picture are made for.
        """
        from mirasol.config import Config
        from mirasol.data.worlds import FLOORS, TABLES, Look, write_worlds

        look = Look.of(Config.preset(preset))
        floors = write_worlds(
            folder, clips, seed, chunks=chunks, events=events, per_type=per_type, types=types or None, look=look
        )
        print(f"{TABLES[1]:20}{'questions':>10}{''.join(f'{name:>10}' for name in FLOORS)}")
        for name, row in floors[TABLES[1]].items():
            print(f"{name:20}{row['count']:10}{''.join(f'{row[floor]:10.3f}' for floor in FLOORS)}")
        print(folder)

    _call("worlds", worlds, arguments)


def _world(arguments: list[str]) -> None:
    from mirasol.embedded import EMBEDDED

    def world(
        clip: Path, seed: int = 7, chunks: int | None = None, events: int | None = None, run: Path = EMBEDDED
    ) -> None:
        """Write one clip such as a model has learned from, and print commands that ask about it, one of each type of
        question, each above the true answer.

        Args:
            clip: media file to write.
            seed: of what happens.
            chunks: that it lasts; default: as in the world that the model has learned, if its folder tells, else 16.
            events: that follow each other; default: likewise, else half as many as chunks.
            run: folder of the model that is asked; default: the model in the package.
        """
        from mirasol.data.worlds import write_world
        from mirasol.embedded import learned_chunks, learned_world

        told = learned_world(run)
        if chunks is not None:
            told |= dict(chunks=chunks, events=None)
        if events is not None:
            told |= dict(events=events)
        more = [] if run == EMBEDDED else ["--run", str(run)]
        if told["chunks"] > learned_chunks(run):
            more += ["--max-chunks", str(told["chunks"])]
        for question, answer in write_world(clip, seed, **told):
            print(shlex.join(["python", "-m", "mirasol", "ask", str(clip), question, *more]))
            print(f"    {answer}")

    _call("world", world, arguments)


def _shards(arguments: list[str]) -> None:
    def shards(table: Path, out: Path, shard_bytes: int = 2**30) -> None:
        """Copy the clips of a table and its questions into tar archives (WebDataset's layout) with an index.

        Args:
            table: table of questions.
            out: folder of the archives; the other commands take it in place of a table.
            shard_bytes: at which an archive is full.
        """
        from mirasol.data import read_examples, write_shards

        write_shards(read_examples(table)[0], out, shard_bytes=shard_bytes)
        print(out)

    _call("shards", shards, arguments)


def _features(arguments: list[str]) -> None:
    def features(run: Path, table: Path, out: Path, max_chunks: int = 16, batch: int = 8, workers: int = 0) -> None:
        """Keep what a model's encoders make of the clips of a table: training it with --init RUN --features OUT and
        frozen encoders then neither reads nor encodes a clip.

        Args:
            run: folder of the model.
            table: table of questions, or folder of shards.
            out: folder of the features.
            max_chunks: most chunks of a clip; training must be told the same.
            batch: clips that are encoded at once.
            workers: processes that read clips; 0: this one.
        """
        import torch

        from mirasol import Model
        from mirasol.data import cache_features, read_examples

        examples, source = read_examples(table)
        model = Model.from_pretrained(run, device="cuda" if torch.cuda.is_available() else "cpu")
        settings: dict[str, Any] = dict(max_chunks=max_chunks, batch_clips=batch, workers=workers, source=source)
        print(cache_features(model, examples, out, **settings).folder)

    _call("features", features, arguments)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "ask": _ask,
    "stream": _stream,
    "demo": _demo,
    "worlds": _worlds,
    "world": _world,
    "shards": _shards,
    "features": _features,
}


def _call(name: str, what: Callable[..., Any], arguments: list[str]) -> Any:
    """Call `what` with the arguments of the command line; a dict is written KEY=VALUE KEY=VALUE."""
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def pairs(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        if info.type_origin is not dict:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="KEY=VALUE ...",
            instance_from_str=lambda given: dict(_pair(pair) for pair in given),
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [f"{key}={item}" for key, item in value.items()],
        )

    kinds = typing.get_type_hints(what)
    for key, parameter in inspect.signature(what).parameters.items():
        if parameter.default is inspect.Parameter.empty:
            what.__annotations__[key] = typing.Annotated[kinds[key], tyro.conf.arg(metavar=key.upper())]
    how = (tyro.conf.PositionalRequiredArgs, tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    with registry:
        return tyro.cli(what, prog=f"python -m mirasol {name}", args=arguments, config=how)


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ValueError(f"must be KEY=VALUE, was {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


if __name__ == "__main__":
    sys.exit(main())
