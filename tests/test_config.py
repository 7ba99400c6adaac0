"""The configuration: presets, what it refuses, and the way to JSON and back."""

import json
import re
from dataclasses import FrozenInstanceError

import pytest
import torch

import mirasol
from mirasol.config import PRESETS, Config


@pytest.mark.parametrize("name", PRESETS)
def test_survives_json(name):
    config = Config.preset(name)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_chunk_of_the_paper_holds_the_tokens_of_the_design():
    config = Config.preset("mirasol-3b")
    assert (config.video_tokens, config.audio_tokens, config.combined_tokens) == (294, 96, 32)


@pytest.mark.parametrize("combiner", ["transformer", "ttm"])
def test_three_billion_parameters_half_of_them_audio_video(combiner):
    with torch.device("meta"):
        count = mirasol.Model.from_preset("mirasol-3b", combiner=combiner).num_parameters()
    assert 2.9e9 <= count["total"] <= 3.1e9
    assert 0.45 <= count["audio_video"] / count["total"] <= 0.55


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_heads": 5}, "encoder_dim must be a multiple of encoder_heads = 5, was 64"),
        (
            {"combiner": "lstm"},
            "combiner must be one of transformer, ttm, attention, perceiver, mean, none",
        ),
        ({"combined_tokens": 5, "combiner": "ttm"}, "combined_tokens must be at most ttm_read = 4, was 5"),
        ({"combiner": "ttm", "ttm_groups": 7}, "ttm_groups must divide the tokens of a chunk = 24, was 7"),
        ({"combined_tokens": 500}, "combined_tokens must be at most the tokens of a chunk"),
        ({"samples_per_chunk": 2561}, "samples_per_chunk must be a multiple of hop x mel_patch[1] = 1280, was 2561"),
        ({"n_mels": 33}, "n_mels must be a multiple of mel_patch[0] = 16, was 33"),
        ({"mask_ratio": 1.0}, "mask_ratio must be in [0, 1), was 1.0"),
        ({"eos_id": 259}, "eos_id must be in [0, vocab_size = 259), was 259"),
        ({"text_layers": 0}, "text_layers must be at least 1, was 0"),
        ({"combiner_window": 0}, "combiner_window must be at least 1, was 0"),
        ({"tubes": [((16, 4, 4), (6, 32, 32), (4, 8, 8))]}, "yields no token"),
        ({"depth": 3}, "config has unknown fields: depth"),
    ],
)
def test_refusals_name_the_field(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config.preset("tiny", **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_dim": "64"}, "text_dim must be of type int, was '64'"),
        ({"text_dim": 64.0}, "text_dim must be of type int, was 64.0"),
        ({"mask_ratio": None}, "mask_ratio must be of type int or float, was None"),
        ({"share_encoders": 1}, "share_encoders must be of type bool, was 1"),
        ({"av_window": "all"}, "av_window must be of type int or None, was 'all'"),
        ({"combiner_layers": True}, "combiner_layers must be of type int, was True"),
    ],
)
def test_kinds_are_checked(change, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        Config.preset("tiny", **change)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="tiny, small, base, mirasol-3b, was 'large'"):
        Config.preset("large")


def test_fields_are_set_once():
    config = Config.preset("tiny")
    with pytest.raises(FrozenInstanceError, match="text_dim"):
        config.text_dim = 32
    config.use_cache = False
    assert config == Config.preset("tiny")
    assert hash(config) == hash(Config.preset("tiny"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mel_std": 0.0}, "mel_std must be above 0, was 0.0"),
        ({"mel_std": -1.0}, "mel_std must be above 0"),
        ({"mel_mean": float("nan")}, "mel_mean must be finite"),
        ({"text_weight": -1.0}, "text_weight must be at least 0, was -1.0"),
        ({"video_weight": float("inf")}, "video_weight must be finite"),
        ({"mask_ratio": float("nan")}, "mask_ratio must be finite"),
        ({"pixel_std": (0, 0, 0)}, "pixel_std must be above 0, was (0, 0, 0)"),
        ({"pixel_std": (0.2, float("nan"), 0.2)}, "pixel_std must be finite"),
        ({"pixel_mean": (0.5, 0.5)}, "pixel_mean must hold a number for each of 3 colours"),
        ({"rotary_base": 0.0}, "rotary_base must be above 0"),
        ({"text_dim": 60}, "text_dim must give each of text_heads = 4 an even width, was 60"),
        ({"combiner": "ttm", "ttm_groups": 3}, "ttm_groups must divide ttm_memory = 16, was 3"),
        ({"combiner": "ttm", "ttm_groups": 8}, "ttm_groups must divide ttm_read = 4, was 8"),
    ],
)
def test_numbers_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config.preset("tiny", **change)


def test_a_loss_may_weigh_nothing():
    weights = {f"{name}_weight": 0 for name in ("latent", "video", "audio", "text")}
    assert Config.preset("tiny", **weights).text_weight == 0


def test_the_official_ttm_is_one_switch():
    config = Config.preset("tiny", combiner="ttm", ttm_official=True)
    assert (config.ttm_groups, config.ttm_time_stamps, config.ttm_initial_memory) == (1, False, "zeros")
    assert Config.from_dict(config.to_dict()) == config
