"""The demo's page, as a person uses it."""

import math

import pytest
from driver import ANSWER, MEMORY, QUESTION, SECONDS, VISITORS

from mirasol.config import Config
from mirasol.data.worlds import write_world
from mirasol.demo.examples import SEEDS

CHUNK = Config.preset("tiny").seconds_per_chunk

WATCH = """() => {
    window.written = [];
    new MutationObserver(() => {
        const text = [...document.querySelectorAll('#chat .bot .message-content')].at(-1)?.innerText ?? '';
        const chunk = [...document.querySelectorAll('#strip .chunk')].at(-1)?.dataset.chunk;
        if (text !== window.written.at(-1)?.text) window.written.push({ text: text, chunk: Number(chunk) });
    }).observe(document.body, { subtree: true, childList: true, characterData: true });
}"""
"""Notes what is written of the newest answer, and how far the stream is then."""


def test_a_clip_plays_with_sound_while_it_is_watched_and_an_answer_is_written_meanwhile(visit, clip):
    here = visit()
    assert here.chunks() == []
    here.take(clip)
    player = here.page.locator("#clip video")
    here.page.click("#play")
    here.wait_for_chunk(4)
    playing = player.evaluate("v => [v.paused, v.muted, v.volume, v.currentTime, v.webkitAudioDecodedByteCount]")
    assert playing[:3] == [False, False, 1]
    assert 0 < playing[3] < SECONDS
    assert playing[4] > 0
    assert abs(playing[3] - CHUNK * len(here.chunks())) < 2, "the player and the stream go together"

    here.page.evaluate(WATCH)
    here.ask(QUESTION)
    here.page.wait_for_function("text => window.written.at(-1)?.text === text", arg=ANSWER)
    written = [piece for piece in here.page.evaluate("window.written") if piece["text"] not in ("", "…")]
    assert len(written) >= 5
    assert all(ANSWER.startswith(piece["text"]) for piece in written)
    assert written[-1]["chunk"] > written[0]["chunk"], "the stream goes on while the answer is written"
    assert here.page.input_value("#question textarea, #question input") == ""

    cells = here.chunks()
    shares = [float(cell["share"]) for cell in cells]
    assert sum(shares) == pytest.approx(1, abs=0.2), "all but what has left the memory since"
    assert shares[-1] == 0, "the newest chunk came after the question"
    bar = here.page.locator("#strip .looked-at .bar").first
    red, green, blue = bar.evaluate(
        "bar => { const box = document.createElement('canvas').getContext('2d', { willReadFrequently: true });"
        "box.fillStyle = getComputedStyle(bar).backgroundColor; box.fillRect(0, 0, 1, 1);"
        "return [...box.getImageData(0, 0, 1, 1).data].slice(0, 3); }"
    )
    assert red > green > blue
    assert bar.bounding_box()["height"] > 10

    past = here.figure("past")
    assert past.endswith((" kB", " MB"))
    assert float(here.figure("process").split()[0]) > 1
    for name in ("chunk", "lag", "first-token"):
        assert here.figure(name).endswith(("ms", " s")), name

    assert here.wait_for_status("over").startswith(f"Saw 0:0{SECONDS:.1f} of {clip.name}"), "itself, not what is played"
    chunks = math.ceil(SECONDS / CHUNK)
    cells = here.chunks()
    assert [int(cell["chunk"]) for cell in cells] == list(range(chunks - MEMORY, chunks))
    assert all(cell["video"] == cell["audio"] == "1" for cell in cells)
    assert here.figure("past") == past
    here.ask(QUESTION)  # what was seen may still be asked about
    here.page.wait_for_function("document.querySelectorAll('#chat .bot .message-content').length === 2")
    here.page.wait_for_function("text => window.written.at(-1)?.text === text", arg=ANSWER)


def test_camera_and_microphone_are_watched_until_one_stops_and_starts_over(visit):
    here = visit()
    here.page.get_by_role("tab", name="Camera").click()
    here.page.click("#record")
    here.wait_for_chunk(8)
    assert here.page.locator("#camera video").evaluate("v => v.videoWidth") > 0
    cells = here.chunks()
    assert len(cells) >= 8
    assert all(cell["video"] == "1" and cell["audio"] == "1" for cell in cells[1:]), "the first may begin in its middle"
    assert "the camera" in here.wait_for_status("live")
    here.ask(QUESTION)
    here.page.wait_for_selector("#strip .looked-at")
    here.page.click("#stop")
    assert here.wait_for_status("over").startswith("Saw 0:0")
    here.page.wait_for_function("document.querySelector('#camera video').srcObject === null")
    here.page.click("#start-over")
    here.wait_for_status("idle")
    assert here.chunks() == here.answers() == []
    here.page.click("#record")  # and once more
    here.wait_for_chunk(2)


def test_what_is_no_clip_is_refused_in_a_sentence_and_an_example_is_taken_instead(visit, clip, tmp_path):
    wrong = tmp_path / "notes.mp4"
    wrong.write_text("no film")
    here = visit()
    here.page.click("#play")
    here.page.get_by_text("There is no clip to play").wait_for()
    here.ask(QUESTION)
    here.page.get_by_text("There is nothing to ask about yet").wait_for()
    here.page.set_input_files("#clip input[type=file]", wrong)
    here.page.get_by_text("notes.mp4 cannot be played: Invalid data found").wait_for()
    assert here.page.locator("#clip video").count() == 0
    here.page.click("#example input")
    here.page.get_by_role("option", name=clip.name).click()
    here.wait_for_player()
    here.page.click("#play")
    here.wait_for_chunk(1)


def test_clips_of_the_world_that_a_model_has_learned_come_with_questions(learned, visit, tmp_path):
    address, world = learned
    questions = [write_world(tmp_path / "clip.mp4", seed, **world) for seed in SEEDS[:2]]
    here = visit(address)
    here.page.get_by_text("learned from generated clips only").wait_for()
    assert not here.page.locator("#suggestion").is_visible()
    for seed, asked in zip(SEEDS, questions, strict=False):
        here.page.click("#example input")
        here.page.get_by_role("option", name=f"world-{seed}.mp4").click()
        here.wait_for_player()
        here.page.get_by_role("option").first.wait_for(state="hidden")
        here.page.click("#suggestion input")
        for question, answer in asked:
            here.page.get_by_role("option", name=f"{question} ({answer})").wait_for()
    here.page.get_by_role("option", name=asked[1][0]).click()
    here.page.click("#play")
    here.wait_for_status("over")
    assert len(here.chunks()) == world["chunks"]
    assert here.page.input_value("#question textarea, #question input") == asked[1][0]
    here.page.click("#ask")
    here.page.wait_for_selector("#strip .looked-at")


def test_each_visitor_has_a_stream_and_who_closes_the_page_makes_room(visit, clip):
    pages = [visit() for _ in range(VISITORS + 1)]
    for one in pages[:VISITORS]:
        one.take(clip)
        one.page.click("#play")
    for one in pages[:VISITORS]:
        one.wait_for_chunk(1)
    pages[0].ask(QUESTION)
    pages[0].page.wait_for_selector("#strip .looked-at")
    assert pages[1].answers() == []
    late = pages[-1]
    late.take(clip)
    late.page.click("#play")
    late.page.get_by_text(f"All {VISITORS} places are taken").wait_for()
    assert late.chunks() == []
    pages[0].page.close()
    for _ in range(20):  # the server hears of it in a moment
        late.page.wait_for_timeout(500)
        late.page.click("#play")
        if late.page.locator("#status [data-state=live]").count():
            break
    late.wait_for_chunk(1)
