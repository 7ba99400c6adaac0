"""Readers of published sets, on small files in exactly their formats."""

import json
import re
from pathlib import Path

import pytest

from mirasol.data import Example, read_examples
from mirasol.data.sets import SETS

VIDEOS = Path("/videos")


def write(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        path = folder / re.sub("_(csv|json)$", r".\1", name)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def read(name: str, folder: Path, split: str, videos: Path = VIDEOS) -> list[Example]:
    return SETS[name](folder, split, videos)


def test_msrvtt_qa(tmp_path):
    rows = [
        {"answer": "couch", "category_id": 14, "id": 158581, "question": "what do three sit on?", "video_id": 6513},
        {"answer": "two", "category_id": 3, "id": 158582, "question": "how many men fight?", "video_id": 9},
    ]
    assert read("msrvtt-qa", write(tmp_path, val_qa_json=rows), "val") == [
        Example("/videos/video6513.mp4", "what do three sit on?", "couch", type="what", id="158581"),
        Example("/videos/video9.mp4", "how many men fight?", "two", type="how", id="158582"),
    ]


ASKED = [
    {"video_name": "TIEzvhv6xaI", "question": "is the athlete indoor", "question_id": "v_TIEzvhv6xaI_2"},
    {"video_name": "7X3-P_uAsU", "question": "what is ahead", "question_id": "v_7X3-P_uAsU_10"},
]
TOLD = [
    {"answer": "yes", "type": 3, "question_id": "v_TIEzvhv6xaI_2"},
    {"answer": "lake", "type": 8, "question_id": "v_7X3-P_uAsU_10"},
]


def test_activitynet_qa_finds_videos_of_any_suffix(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "v_7X3-P_uAsU.mkv").touch()
    assert read("activitynet-qa", write(tmp_path, test_q_json=ASKED, test_a_json=TOLD), "test", videos) == [
        Example(f"{videos}/v_TIEzvhv6xaI.mp4", "is the athlete indoor", "yes", type="yes/no", id="v_TIEzvhv6xaI_2"),
        Example(f"{videos}/v_7X3-P_uAsU.mkv", "what is ahead", "lake", type="other", id="v_7X3-P_uAsU_10"),
    ]


MC = """video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4
4010069381,369,640,480,how do the two man play the instrument,0,6,CH,roll the handle,tap,strum,"hit, with sticks",pat
2909445186,500,640,480,what did he do after sitting,4,11,TN,a,b,c,d,e
"""
MAP = {"4010069381": "1106/4010069381", "2909445186": "0101/2909445186"}


def test_nextqa_multiple_choice(tmp_path):
    expected = [
        Example(
            "/videos/1106/4010069381.mp4",
            "how do the two man play the instrument",
            "roll the handle",
            type="CH",
            choices=("roll the handle", "tap", "strum", "hit, with sticks", "pat"),
            id="4010069381_6",
        ),
        Example(
            "/videos/0101/2909445186.mp4",
            "what did he do after sitting",
            "e",
            type="TN",
            choices=("a", "b", "c", "d", "e"),
            id="2909445186_11",
        ),
    ]
    assert read("nextqa-mc", write(tmp_path, val_csv=MC, map_vid_vidorID_json=MAP), "val") == expected
    (tmp_path / "map_vid_vidorID.json").unlink()
    assert [e.clip for e in read("nextqa-mc", tmp_path, "val")] == ["/videos/4010069381.mp4", "/videos/2909445186.mp4"]


def test_nextqa_open_ended_with_the_test_s_second_answers(tmp_path):
    table = "video,frame_count,width,height,question,answer,qid,type\n"
    table += "4924794333,1058,640,360,is the baby old enough,no,4,DB\n4924794333,1058,640,360,why cry,fell,5,CW\n"
    write(tmp_path, test_csv=table, val_csv=table, add_reference_answer_test_json={"4924794333": {"5": "it fell"}})
    first, second = read("nextqa-oe", tmp_path, "test")
    assert first == Example("/videos/4924794333.mp4", "is the baby old enough", "no", type="DB", id="4924794333_4")
    assert (second.answer, second.references, second.id) == ("fell", ("it fell",), "4924794333_5")
    assert [e.references for e in read("nextqa-oe", tmp_path, "val")] == [(), ()]


def test_vggsound_in_both_of_its_forms(tmp_path):
    whole = '---g-f_I2yQ,1,people marching,test\n-3Kv4fdm7Uk,30,"fly, housefly buzzing",train\n'
    whole += "LDoXsip0BEQ,177,parrot talking,test\n"
    parts = "---g-f_I2yQ_000001.mp4,people marching\nLDoXsip0BEQ_000177.mp4,parrot talking\n"
    expected = [
        Example("/videos/---g-f_I2yQ_000001.mp4", "", "people marching", id="---g-f_I2yQ_000001.mp4"),
        Example("/videos/LDoXsip0BEQ_000177.mp4", "", "parrot talking", id="LDoXsip0BEQ_000177.mp4"),
    ]
    write(tmp_path, test_csv=parts)
    assert read("vggsound", tmp_path, "test") == expected
    write(tmp_path, vggsound_csv=whole)
    assert read("vggsound", tmp_path, "test") == expected
    assert [e.answer for e in read("vggsound", tmp_path, "train")] == ["fly, housefly buzzing"]


EPIC = """annotation_id,participant_id,video_id,start_timestamp,stop_timestamp,start_sample,stop_sample"""


def test_epic_sounds(tmp_path):
    labelled = f"{EPIC},description,class,class_id\nP01_11_0,P01,P01_11,00:00:02.069,01:00:02.993,49656,86471832,"
    labelled += "clang / clatter,ceramic / wood collision,34\n"
    unlabelled = f"{EPIC}\nP02_106_0,P02,P02_106,00:00:03.855,00:00:04.142,92520,99408\n"
    write(tmp_path, EPIC_Sounds_validation_csv=labelled, EPIC_Sounds_recognition_test_timestamps_csv=unlabelled)
    videos = tmp_path / "P01" / "videos"
    videos.mkdir(parents=True)
    (videos / "P01_11.MP4").touch()
    (seen,), (unseen,) = (read("epic-sounds", tmp_path, split, tmp_path) for split in ("val", "test"))
    assert seen.clip == str(videos / "P01_11.MP4")
    assert (seen.answer, seen.id) == ("ceramic / wood collision", "P01_11_0")
    assert (seen.start, seen.end) == pytest.approx((2.069, 3602.993))
    assert unseen == Example(str(tmp_path / "P02_106.mp4"), start=3.855, end=4.142, id="P02_106_0")


BAD = {
    "no file": ("msrvtt-qa", {}, FileNotFoundError, "val_qa.json: no such file"),
    "no list": ("msrvtt-qa", dict(val_qa_json={"a": 1}), ValueError, "val_qa.json: must hold a JSON list, was a dict"),
    "no key": ("msrvtt-qa", dict(val_qa_json=[{"id": 1, "question": "q"}]), ValueError, "entry 0: must have a text 'v"),
    "cut off": ("msrvtt-qa", dict(val_qa_json='[{"id": 1,'), ValueError, "val_qa.json: must be JSON"),
    "answers missing": (
        "activitynet-qa",
        dict(val_q_json=ASKED, val_a_json=TOLD[:1]),
        ValueError,
        "val_a.json must answer the 2 questions of val_q.json, had 1",
    ),
    "another order": (
        "activitynet-qa",
        dict(val_q_json=ASKED, val_a_json=TOLD[::-1]),
        ValueError,
        "entry 0: question_id must be 'v_TIEzvhv6xaI_2' as in val_q.json, was 'v_7X3-P_uAsU_10'",
    ),
    "type 9": (
        "activitynet-qa",
        dict(val_q_json=ASKED[:1], val_a_json=[{**TOLD[0], "type": 9}]),
        ValueError,
        "column 'type': must be a whole number below 9, was '9'",
    ),
    "open-ended as multiple choice": (
        "nextqa-mc",
        dict(val_csv="video,question,answer,qid,type\n1,q,a,0,CW\n"),
        ValueError,
        "val.csv: must have the columns ['a0', 'a1', 'a2', 'a3', 'a4'], had ['video',",
    ),
    "multiple choice as open-ended": (
        "nextqa-oe",
        dict(val_csv=MC),
        ValueError,
        "val.csv, line 2: is of the table of multiple choice",
    ),
    "choice 5": ("nextqa-mc", dict(val_csv=MC.replace(",0,6,", ",5,6,")), ValueError, "line 2, column 'answer'"),
    "not in the map": (
        "nextqa-mc",
        dict(val_csv=MC, map_vid_vidorID_json={}),
        ValueError,
        "map_vid_vidorID.json: must name the file of video '4010069381'",
    ),
    "split": ("vggsound", dict(vggsound_csv="a,1,b,test\n"), ValueError, "split must be one that"),
    "no start": ("vggsound", dict(vggsound_csv="a,x,b,val\n"), ValueError, "line 1: the last column must be train or"),
    "time": (
        "epic-sounds",
        dict(EPIC_Sounds_validation_csv=f"{EPIC},class\nP_0,P,P_1,0:0:1.5,soon,1,2,x\n"),
        ValueError,
        "line 2, column 'stop_timestamp': must be HH:MM:SS.mmm, was 'soon'",
    ),
}


@pytest.mark.parametrize(("name", "files", "error", "message"), BAD.values(), ids=BAD.keys())
def test_errors_name_file_entry_and_column(tmp_path, name, files, error, message):
    with pytest.raises(error, match=re.escape(message)):
        read(name, write(tmp_path, **files), "val")


def test_a_published_set_goes_by_one_name_on_the_command_line(tmp_path):
    write(tmp_path, **{"val_qa_json": [dict(answer="red", category_id=1, id=7, question="what is it", video_id=3)]})
    examples, source = read_examples(f"msrvtt-qa:val:{tmp_path}:videos")
    assert examples == read("msrvtt-qa", tmp_path, "val", Path("videos"))
    assert source is None
    with pytest.raises(ValueError, match="table must be NAME:SPLIT:FOLDER:VIDEOS for a published set"):
        read_examples("vggsound:a")
    with pytest.raises(FileNotFoundError, match=r"path must be a table, was 'other:val:a:b'"):
        read_examples("other:val:a:b")
