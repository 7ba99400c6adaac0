"""Sources that are read as they come: the same as `load` in any container or pipe, and in time whoever is slow."""

from __future__ import annotations

import http.server
import io
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")

import av

from clips import frame_numbers, write_clip
from mirasol.media import feeds, load
from mirasol.media import live as live_module
from mirasol.media.backlog import Backlog
from mirasol.media.live import Picture, Sound, open_live
from mirasol.streaming.cutter import Cutter

RATE, SIZE, FRAMES, SAMPLES = 16000, 48, 4, 4000
SHAPE = dict(frames_per_chunk=FRAMES, samples_per_chunk=SAMPLES, sample_rate=RATE)
ASKED = dict(size=SIZE, sample_rate=RATE)
FILES = {
    "a.mp4": {},
    "b.mp4": dict(codec="libx264", b_frames=2),
    "c.ts": dict(codec="libx264", b_frames=2),
    "d.mkv": dict(rate=48000),
    "holes.mkv": dict(audio_codec="pcm_s16le", silence=(0.5, 1.2), sound_from=0.2, rate=22050),
    "silent.mp4": dict(tones=None),
    "sound.wav": dict(width=0, audio_codec="pcm_s16le"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    return {name: write_clip(folder / name, **options) for name, options in FILES.items()}


def cut(items, **changes) -> list:
    cutter, chunks = Cutter(**{**SHAPE, "image_size": SIZE, **changes}), []
    for item in items:
        if isinstance(item, Picture):
            cutter.frames(item.frame[None], [item.time])
        else:
            cutter.samples(item.samples, item.time)
        chunks += cutter.ready()
    return [*chunks, *cutter.finish()]


def expect_as_loaded(chunks, file) -> None:
    expected = load(file, chunks=len(chunks), size=SIZE, **SHAPE)
    for t, chunk in enumerate(chunks):
        frames, samples = slice(t * FRAMES, (t + 1) * FRAMES), slice(t * SAMPLES, (t + 1) * SAMPLES)
        if expected.video is not None and expected.video_valid[t].any():
            assert torch.equal(chunk.video, expected.video[:, frames])
        else:
            assert chunk.video is None
        if expected.audio is not None and expected.audio_valid[samples].any():
            assert torch.equal(chunk.audio, expected.audio[samples])
        else:
            assert chunk.audio is None
    assert 8 <= len(chunks) <= 9


@pytest.mark.parametrize("name", FILES)
def test_a_file_becomes_the_chunks_of_load(files, name):
    with open_live(files[name], **ASKED) as live:
        chunks = cut(live)
    expect_as_loaded(chunks, files[name])
    assert (live.dropped, live.skipped, live.real_time) == (0, 0.0, False)


@pytest.mark.parametrize("name", ["c.ts", "d.mkv", "holes.mkv", "sound.wav"])
def test_a_pipe_gives_what_the_file_gives(files, name):
    with subprocess.Popen(["cat", str(files[name])], stdout=subprocess.PIPE) as process:
        with open_live(process.stdout, **ASKED) as live:
            chunks = cut(live)
        assert process.wait() == 0
    expect_as_loaded(chunks, files[name])


def test_standard_input_and_named_pipes(files, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(files["c.ts"].read_bytes())))
    with open_live("-", **ASKED) as live:
        expect_as_loaded(cut(live), files["c.ts"])
    os.mkfifo(tmp_path / "pipe")
    writer = subprocess.Popen(["cp", str(files["d.mkv"]), str(tmp_path / "pipe")])
    with writer, open_live(str(tmp_path / "pipe"), **ASKED) as live:
        expect_as_loaded(cut(live), files["d.mkv"])


def test_what_is_written_into_a_pipe_comes_out_at_once(tmp_path):
    """Not when a buffer is full: packets of half a second, flushed, then silence."""
    reading, writing = os.pipe()
    file = write_clip(tmp_path / "long.ts", seconds=6.0, key_every=12).read_bytes()
    first = len(file) // 2
    done, waited = threading.Event(), []

    def write():
        with open(writing, "wb", buffering=0) as sink:
            sink.write(file[:first])
            waited.append(done.wait(20))
            sink.write(file[first:])

    thread = threading.Thread(target=write)
    thread.start()
    with open(reading, "rb") as pipe, open_live(pipe, **ASKED) as live:
        times = []
        for item in live:
            if isinstance(item, Picture):
                times.append(item.time)
                if item.time > 2.0:
                    done.set()
    thread.join()
    assert times[-1] == pytest.approx(5.96, abs=0.01)
    assert len(times) == 150
    assert waited == [True]


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def server(files):
    folder = files["a.mp4"].parent
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://user:secret@127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("name", ["a.mp4", "c.ts", "d.mkv"])
def test_a_server_gives_what_the_file_gives_in_real_time(files, server, name):
    begun = time.monotonic()
    with open_live(f"{server}/{name}", **ASKED) as live:
        chunks = cut(live)
    expect_as_loaded(chunks, files[name])
    assert live.real_time
    assert live.dropped == 0
    assert 1.8 < time.monotonic() - begun < 6


def test_servers_that_have_nothing(server, monkeypatch):
    for url, message in (
        (f"{server}/none.mp4", r"source must be a stream that can be read, was 'http://127.0.0.1:\d+/none.mp4': .*404"),
        ("rtsp://me:secret@127.0.0.1:9/x", r"was 'rtsp://127.0.0.1:9/x': ConnectionRefusedError: Connection refused"),
    ):
        with pytest.raises(ConnectionError, match=message) as failure, open_live(url, **ASKED):
            pass
        assert "secret" not in str(failure.value)


@pytest.mark.parametrize("scheme", ["rtsp", "http", "tcp", "rtmp"])
def test_a_server_that_does_not_answer_is_given_up(scheme):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        url = f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/live"
        silence = pytest.raises(TimeoutError, match=r"source must answer, was .*: nothing came for 1 s")
        with silence, open_live(url, timeout=1.0, **ASKED):
            pass
        assert time.monotonic() - begun < 5


def serve(connections: list[bytes], then_silent: bool = False):
    """A TCP server that sends each of some bytes to one connection; its port."""
    listening = socket.create_server(("127.0.0.1", 0))

    def run():
        with listening:
            for data in connections:
                with listening.accept()[0] as connection:
                    connection.sendall(data)
                    if then_silent:
                        time.sleep(3)

    threading.Thread(target=run, daemon=True).start()
    return listening.getsockname()[1]


def test_a_server_that_is_lost_is_found_again(files, monkeypatch):
    monkeypatch.setattr(live_module, "PAUSES", (0.3, 0.3))
    data = files["c.ts"].read_bytes()
    with open_live(f"tcp://127.0.0.1:{serve([data, data])}", **ASKED) as live:
        items = list(live)
    times = [item.time for item in items if isinstance(item, Picture)]
    assert len(times) == 100
    gap = times[50] - times[49]
    assert 0.2 < gap < 3  # time went on
    assert all(before < after for before, after in itertools.pairwise(times))


def test_a_server_that_falls_silent_fails_in_the_end(files, monkeypatch):
    monkeypatch.setattr(live_module, "PAUSES", (0.1,))
    port = serve([files["c.ts"].read_bytes()], then_silent=True)
    items, lost = [], pytest.raises(ConnectionError, match=r"source must go on, was 'tcp://127.0.0.1:\d+'")
    with open_live(f"tcp://127.0.0.1:{port}", timeout=1.0, **ASKED) as live, lost:
        for item in live:
            items.append(item)
    assert sum(isinstance(item, Picture) for item in items) >= 45


PUSH = """
import sys, time
import av
file, url = sys.argv[1:]
for _ in range(100):
    try:
        with av.open(url, "w", format="rtsp", options={"rtsp_transport": "tcp"}) as sink, av.open(file) as source:
            streams = {stream.index: sink.add_stream_from_template(stream) for stream in source.streams}
            begun = first = None
            for packet in source.demux():
                if packet.dts is None:
                    continue
                now = float(packet.dts * packet.time_base)
                if begun is None:
                    begun, first = time.monotonic(), now
                time.sleep(max(0.0, now - first - (time.monotonic() - begun)))
                packet.stream = streams[packet.stream.index]
                sink.mux(packet)
        break
    except OSError:  # nobody listens yet
        time.sleep(0.1)
"""


def test_rtsp(files, monkeypatch):
    """From another process, which sends a file in real time to the one that listens."""
    monkeypatch.setattr(live_module, "PAUSES", ())
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"rtsp://127.0.0.1:{free.getsockname()[1]}/live"
    listen = {"rtsp_flags": "listen", "listen_timeout": "20"}
    with subprocess.Popen([sys.executable, "-c", PUSH, str(files["b.mp4"]), url]) as process:
        with open_live(url, options=listen, timeout=20.0, **ASKED) as live:
            chunks = cut(live)
        process.kill()
    assert 7 <= len(chunks) <= 9
    for chunk in chunks[:7]:
        assert chunk.audio is not None
        assert chunk.video is not None
    expected = load(files["b.mp4"], chunks=9, size=SIZE, **SHAPE)
    assert torch.equal(chunks[0].video, expected.video[:, :FRAMES])


def test_real_time_paces_a_file(files):
    begun, late = time.monotonic(), []
    with open_live(files["b.mp4"], real_time=True, **ASKED) as live:
        for item in live:
            late.append(time.monotonic() - begun - item.time)
    assert min(late) > -0.05
    assert sorted(late)[len(late) // 2] < 0.5
    assert time.monotonic() - begun > 1.9


def test_a_slow_consumer_loses_pictures_and_keeps_real_time(tmp_path):
    """It takes 0.15 s for each picture, of which 25 a second come."""
    file = write_clip(tmp_path / "long.mp4", seconds=6.0, sound_seconds=6.0)
    begun, late, numbers, heard = time.monotonic(), [], [], []
    with open_live(file, real_time=True, backlog=1.0, fit="squash", **ASKED) as live:
        for item in live:
            if time.monotonic() - begun < 6:  # what comes after is what was left at the end
                late.append(time.monotonic() - begun - item.time - live.skipped)
            if isinstance(item, Picture):
                numbers += frame_numbers(item.frame[:, None])
                time.sleep(0.15)
            else:
                heard.append((item.time, len(item.samples) / RATE))
    assert max(late) < 1.0 + 1.0
    assert numbers == sorted(set(numbers))
    assert len(numbers) < 75
    assert live.dropped > 60
    assert live.skipped > 2
    assert time.monotonic() - begun < 12
    # the gaps are closed: what is given is nearly in one piece
    assert sum(length for _, length in heard) > 0.8 * (heard[-1][0] - heard[0][0])


def test_too_many_pictures_are_dropped_and_no_sound(monkeypatch):
    monkeypatch.setattr("mirasol.media.backlog.PICTURE_BYTES", 0)
    feed = []
    for i in range(100):
        feed += [Picture(i / 25, torch.zeros(3, 4, 4, dtype=torch.uint8)), Sound(i / 25, torch.zeros(640))]
    stop = threading.Event()
    live = Backlog([(item for item in feed)], stop, 60.0)
    live._threads[0].join()
    items = list(live)
    assert [item.time for item in items if isinstance(item, Picture)] == [i / 25 for i in range(92, 100)]
    assert sum(isinstance(item, Sound) for item in items) == 100
    assert live.dropped == 92
    assert live.skipped == 0


def test_leaving_early_stops_the_threads(tmp_path):
    file = write_clip(tmp_path / "long.mp4", seconds=8.0)
    before, begun = threading.active_count(), time.monotonic()
    with open_live(file, real_time=True, **ASKED) as live:
        next(live)
    assert threading.active_count() == before
    assert time.monotonic() - begun < 3
    assert not list(live)


def test_sources_that_are_none(tmp_path, files):
    (tmp_path / "text.mp4").write_text("nothing to see here")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1.0,\na.mp4\n")
    for source, error, message in (
        (tmp_path / "none.mp4", FileNotFoundError, r"source must be a file, a camera .*none\.mp4': no such file"),
        (tmp_path / "text.mp4", ValueError, r"must be a file that FFmpeg reads, .*text\.mp4"),
        (tmp_path / "list.m3u8", ValueError, r"must be a file that FFmpeg reads, .*list\.m3u8"),
        ("/dev/video77", FileNotFoundError, "source must be a camera that is there, was '/dev/video77'"),
        ("gopher://x/y", ValueError, "source must be a file, a device, - or a URL of rtsp, .*'gopher://x/y'"),
        ("file:///etc/passwd", ValueError, "was 'file:///etc/passwd'"),
        (io.BytesIO(b"nothing to see here" * 1000), ConnectionError, "source must be a stream that can be read"),
    ):
        with pytest.raises(error, match=message), open_live(source, **ASKED):
            pass
    for name, value, message in (
        ("size", 0, "size must be at least 1"),
        ("fit", "stretch", 'fit must be "crop" or "squash"'),
        ("backlog", 0, "backlog must be positive seconds"),
        ("timeout", float("nan"), "timeout must be"),
        ("microphone", "default", "microphone must be left out, unless source is a camera"),
        ("options", {"a": "b"}, "options must be left out for files and pipes"),
    ):
        with pytest.raises(ValueError, match=message), open_live(files["a.mp4"], **{**ASKED, name: value}):
            pass


def test_a_file_without_any_picture_or_sound(tmp_path, files):
    data = bytearray(files["silent.mp4"].read_bytes())
    place = data.index(b"mdat") + 4
    size = int.from_bytes(data[place - 8 : place - 4], "big") - 8
    data[place : place + size] = bytes(size)
    (tmp_path / "broken.mp4").write_bytes(data)
    nothing = pytest.raises(ValueError, match=r"source must show or sound something, was .*broken\.mp4'; video: ")
    with nothing, open_live(tmp_path / "broken.mp4", **ASKED) as live:
        list(live)


def test_a_server_opens_nothing_but_its_own_scheme(server, files, tmp_path):
    """A playlist on a server, which names others."""
    playlist = files["a.mp4"].parent / "list.m3u8"
    playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\nc.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(ConnectionError, match="source must be a stream"), open_live(f"{server}/list.m3u8", **ASKED):
        pass


def test_a_camera_and_its_microphone(files, monkeypatch):
    """Two devices with one clock, that of the wall, into one stream; files stand in for them."""
    opened, real = [], av.open
    # both start in the same second of the wall's clock, the sound 0.3 s earlier

    def device(name, **how):
        opened.append((name, how["format"], how.get("container_options")))
        return real(str(files["silent.mp4" if how["format"] == "v4l2" else "sound.wav"]))

    monkeypatch.setattr(live_module.Path, "exists", lambda self: True)
    monkeypatch.setattr(av, "open", device)
    with open_live("/dev/video3", microphone="hw:1", options={"framerate": "30"}, **ASKED) as live:
        chunks = cut(live)
    assert opened == [
        ("/dev/video3", "v4l2", {"timestamps": "abs", "framerate": "30"}),
        ("hw:1", "alsa", None),
    ]
    assert len(chunks) == 8
    assert all(chunk.video is not None and chunk.audio is not None for chunk in chunks)
    assert feeds.microphone_options("pulse:usb") == ("usb", {"format": "pulse"})


def write_long(file: Path, short: Path, hours: float) -> None:
    """A short file's packets, again and again, one after the other in time."""
    with av.open(str(short)) as source:
        packets = [packet for packet in source.demux() if packet.dts is not None]
        seconds = 2.0
        with av.open(str(file), "w") as sink:
            streams = {stream.index: sink.add_stream_from_template(stream) for stream in source.streams}
            for turn in range(int(hours * 3600 / seconds)):
                for packet in packets:
                    base, stream = packet.time_base, packet.stream
                    copy = av.Packet(bytes(packet))
                    copy.time_base, copy.stream = base, streams[stream.index]
                    shift = round(Fraction(turn * 2) / base)
                    copy.dts, copy.pts, copy.duration = packet.dts + shift, packet.pts + shift, packet.duration
                    copy.is_keyframe = packet.is_keyframe
                    sink.mux(copy)


@pytest.mark.slow
def test_two_hours_pass_in_bounded_memory(tmp_path):
    script = f"""
import re
from pathlib import Path
from mirasol.media.live import Picture, open_live
from mirasol.streaming.cutter import Cutter

def memory(what):
    return int(re.search(rf"{{what}}:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

cutter = Cutter(frames_per_chunk=2, image_size=16, samples_per_chunk=8000, sample_rate=8000)
count = before = 0
with open_live({str(tmp_path / "long.mkv")!r}, size=16, sample_rate=8000) as live:
    for item in live:
        if isinstance(item, Picture):
            before = before or memory("VmRSS")
            cutter.frames(item.frame[None], [item.time])
        else:
            cutter.samples(item.samples, item.time)
        count += sum(1 for _ in cutter.ready())
count += sum(1 for _ in cutter.finish())
print(count, before, memory("VmHWM"), memory("VmRSS"))
"""
    short = write_clip(
        tmp_path / "short.mkv", fps=2, width=32, height=32, rate=8000, audio_codec="pcm_s16le", key_every=4
    )
    write_long(tmp_path / "long.mkv", short, 2.0)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    count, before, highest, end = map(float, done.stdout.split())
    assert count == 7200
    assert highest - before < 100  # MiB
    assert end - before < 60
