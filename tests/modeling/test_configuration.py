"""The configuration: it constructs, survives JSON, and refuses what makes no sense by name."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, SmolVLMConfig

from video2lora.modeling import Video2LoraConfig


def test_the_default_is_the_released_recipe():
    config = Video2LoraConfig()
    assert (config.rank, config.lora_scaling) == (16, 128.0)
    assert (config.latent_size, config.num_latents, config.num_blocks) == (512, 8, 9)
    assert list(config.target_modules) == ["down_proj"] and config.layers_to_transform is None
    assert config.num_frames == 12 and config.internalization_prompt == "Internalize this video for later captioning."
    assert config.prompt_timestamps == "span" and not config.bundle_base
    assert config.get_text_config() is config


@pytest.mark.parametrize("name", ["smolvlm", "idefics3", "qwen2_5_vl"])
def test_round_trip(tmp_path, families, name):
    base = families(name).vlm.config
    config = Video2LoraConfig(
        vlm_config=base,
        base_model_name_or_path="user/base",
        base_model_revision="ab" * 20,
        rank=4,
        target_modules=["o_proj", "down_proj"],
        layers_to_transform=[3, 1],
        longest_edge=None,
        prompt_timestamps="file",
    )
    assert config.target_modules == ["down_proj", "o_proj"] and config.layers_to_transform == [1, 3]
    config.save_pretrained(tmp_path)
    for loaded in (Video2LoraConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is Video2LoraConfig
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
        assert type(loaded.vlm_config) is type(base)
        assert loaded.get_text_config().to_dict() == base.get_text_config().to_dict()
    assert Video2LoraConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_a_live_models_config_is_copied(smolvlm):
    config = Video2LoraConfig(vlm_config=smolvlm.vlm.config)
    config.vlm_config.text_config.hidden_size = 1
    assert smolvlm.vlm.config.text_config.hidden_size != 1


def test_a_scale_of_ones_own_is_kept(tmp_path):
    Video2LoraConfig(rank=4, lora_scaling=3.0).save_pretrained(tmp_path)
    assert Video2LoraConfig.from_pretrained(tmp_path).lora_scaling == 3.0
    assert Video2LoraConfig(rank=4).lora_scaling == 16.0


def test_unknown_fields_are_tolerated_and_a_newer_format_refused(tmp_path):
    Video2LoraConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | {"field_of_tomorrow": {"a": 1}}))
    assert Video2LoraConfig.from_pretrained(tmp_path).rank == 16
    file.write_text(json.dumps(document | {"format_version": 2}))
    with pytest.raises(ValueError, match="format_version 2.*upgrade"):
        Video2LoraConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"num_latents": 0}, "num_latents must be at least 1"),
        ({"num_blocks": -1}, "num_blocks"),
        ({"num_frames": 0}, "num_frames"),
        ({"num_self_attn_per_block": -1}, "num_self_attn_per_block"),
        ({"num_pre_head_layers": -1}, "num_pre_head_layers"),
        ({"perceiver_num_heads": 6, "perceiver_num_key_value_heads": 4}, "multiple of"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["mlp.down_proj"]}, "without dots"),
        ({"layers_to_transform": []}, "layers_to_transform"),
        ({"layers_to_transform": [-1]}, "layers_to_transform"),
        ({"longest_edge": 0}, "longest_edge"),
        ({"prompt_timestamps": "clock"}, "'span' or 'file', got 'clock'"),
        ({"vlm_config": {"model_type": "nobody_knows"}}, "'nobody_knows'"),
        ({"vlm_config": {}}, "model_type 'None'"),
    ],
)
def test_a_field_out_of_range_is_named(fields, words):
    with pytest.raises(ValueError, match=words):
        Video2LoraConfig(**fields)


def test_the_place_a_base_was_loaded_from_is_not_written_into_its_part(tmp_path):
    vlm_config = SmolVLMConfig()
    vlm_config._name_or_path = "/home/somebody/base"
    config = Video2LoraConfig(vlm_config=vlm_config)
    config.save_pretrained(tmp_path)
    assert "somebody" not in (tmp_path / "config.json").read_text()
    assert "somebody" not in str(config.to_dict()) + str(config.to_diff_dict())
    assert vlm_config._name_or_path == "/home/somebody/base"
