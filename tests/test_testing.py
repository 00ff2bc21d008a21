"""The tiny models and the tiny clip: they run as their big sisters do, offline, and follow from the seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

from video2lora.testing import save_tiny_vlm, tiny_clip, tiny_idefics3, tiny_qwen2_5_vl, tiny_smolvlm

FAMILIES = {"smolvlm": tiny_smolvlm, "idefics3": tiny_idefics3, "qwen2_5_vl": tiny_qwen2_5_vl}
VISUAL_TOKENS = {"smolvlm": 6 * 4, "idefics3": 6 * 4, "qwen2_5_vl": 3 * 4 * 3}  # 6 frames of 64 x 48
NUM_FRAMES = 6


def frames(seed: int) -> torch.Tensor:
    """Random frames [frames, 3, height, width], uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (NUM_FRAMES, 3, 48, 64), generator=generator, dtype=torch.uint8)


def visual_inputs(family: str, processor: Any, video: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model takes for a video and a question, through the family's own chat template."""
    question = {"type": "text", "text": "What happens?"}
    if family == "idefics3":
        conversation = [{"role": "user", "content": [{"type": "image"}] * len(video) + [question]}]
        prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
        return processor(text=prompt, images=[list(video)], do_image_splitting=False, return_tensors="pt")
    conversation = [{"role": "user", "content": [{"type": "video", "video": video}, question]}]
    seconds = [index / 2 for index in range(len(video))]
    metadata = VideoMetadata(total_num_frames=len(video), fps=1.0, frames_indices=seconds, duration=3.0)
    return processor.apply_chat_template(
        conversation,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"video_metadata": [metadata], "do_sample_frames": False},
    )


def text_inputs(processor: Any, text: str) -> dict[str, torch.Tensor]:
    conversation = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    return processor(text=prompt, return_tensors="pt")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def vlm(family: str) -> tuple[Any, Any]:
    return FAMILIES[family]()


@torch.no_grad()
def test_logits_depend_on_the_frames(family: str, vlm: tuple[Any, Any]) -> None:
    model, processor = vlm
    first, second = (visual_inputs(family, processor, frames(seed)) for seed in (1, 2))
    token_id = getattr(model.config, "video_token_id", model.config.image_token_id)
    assert (first["input_ids"] == token_id).sum() == VISUAL_TOKENS[family]
    assert torch.equal(first["input_ids"], second["input_ids"])
    difference = model(**first).logits[0, -1] - model(**second).logits[0, -1]
    assert difference.std() > 0.05


@torch.no_grad()
def test_logits_depend_on_the_text(vlm: tuple[Any, Any]) -> None:
    model, processor = vlm
    logits = [model(**text_inputs(processor, text)).logits[0, -1] for text in ("What is red?", "Who is late?")]
    assert (logits[0] - logits[1]).std() > 0.1


def test_generates_from_video_and_from_text_alone(family: str, vlm: tuple[Any, Any]) -> None:
    model, processor = vlm
    for inputs in (visual_inputs(family, processor, frames(1)), text_inputs(processor, "Hello?")):
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        prompt_length = inputs["input_ids"].shape[1]
        assert prompt_length < output.shape[1] <= prompt_length + 5
        assert torch.equal(output[:, :prompt_length], inputs["input_ids"])


@torch.no_grad()
def test_attention_is_far_from_uniform(family: str) -> None:
    model, processor = FAMILIES[family]()
    model.set_attn_implementation("eager")
    inputs = visual_inputs(family, processor, frames(1))
    for weights in model(**inputs, output_attentions=True).attentions:
        last = weights[0, :, -1].clamp_min(1e-9)  # the last token sees all
        tokens_in_effect = torch.exp(-(last * last.log()).sum(-1)).mean()
        assert tokens_in_effect < 0.5 * last.shape[-1]


@torch.no_grad()
def test_saved_model_and_processor_load_to_the_same(family: str, vlm: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = vlm
    directory = save_tiny_vlm(family, tmp_path / family)
    loaded = AutoModelForImageTextToText.from_pretrained(directory)
    loaded_processor = AutoProcessor.from_pretrained(directory)
    assert type(loaded) is type(model) and type(loaded_processor) is type(processor)
    assert loaded.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    inputs, again = (visual_inputs(family, p, frames(1)) for p in (processor, loaded_processor))
    for key in inputs:
        assert torch.equal(torch.as_tensor(inputs[key]), torch.as_tensor(again[key])), key
    assert torch.equal(loaded(**again).logits, model(**inputs).logits)


def test_weights_follow_from_the_seed_alone(family: str) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, other = FAMILIES[family](seed=3)[0], FAMILIES[family](seed=4)[0]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    again = FAMILIES[family](seed=3)[0].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.state_dict().items())
    assert not any(torch.equal(tensor, other.get_parameter(name)) for name, tensor in first.named_parameters())


def test_every_text_round_trips_through_the_tokenizer(vlm: tuple[Any, Any]) -> None:
    tokenizer = vlm[1].tokenizer
    text = "Was läuft? 走った。 12 o'clock\n\t"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == vlm[0].config.get_text_config().vocab_size


def test_smolvlm_prompt_is_that_of_the_real_checkpoint(shared_dir: Path) -> None:
    _, processor = tiny_smolvlm()
    real = AutoProcessor.from_pretrained(shared_dir / "smolvlm2" / "SmolVLM2-500M-Video-Instruct")
    prompts = [p.tokenizer.decode(visual_inputs("smolvlm", p, frames(1))["input_ids"][0]) for p in (processor, real)]
    assert prompts[0].replace("<image>" * 4, "<image>") == prompts[1].replace("<image>" * 64, "<image>")
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "image_token", "end_of_utterance_token"):
        assert getattr(processor.tokenizer, name) == getattr(real.tokenizer, name)


def test_qwen_vision_blocks_share_leaf_names_with_the_decoder() -> None:
    model, _ = tiny_qwen2_5_vl()
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        owners = {name.split(".")[1] for name, _ in model.named_modules() if name.endswith(f".{leaf}")}
        assert owners == {"visual", "language_model"}


def test_overrides_reach_the_text_config_and_typos_do_not_pass() -> None:
    model, _ = tiny_smolvlm(num_hidden_layers=2, intermediate_size=96)
    layers = model.model.text_model.layers
    assert len(layers) == 2 and layers[0].mlp.down_proj.weight.shape == (64, 96)
    with pytest.raises(ValueError, match="num_layers"):
        tiny_smolvlm(num_layers=2)


def test_save_refuses_an_unknown_family_and_a_used_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'llava'.*smolvlm"):
        save_tiny_vlm("llava", tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        save_tiny_vlm("smolvlm", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_clip_is_h264_with_the_length_and_size_asked_for(tmp_path: Path) -> None:
    path = tiny_clip(tmp_path / "clip.mp4", seconds=1.5, fps=10, size=(96, 64))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoded = list(container.decode(stream))
    assert stream.codec_context.name == "h264"
    assert [frame.time for frame in decoded] == pytest.approx([index / 10 for index in range(15)])
    pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded]).astype(int)
    assert pictures.shape == (15, 64, 96, 3)
    assert (np.abs(np.diff(pictures, axis=0)).max(axis=(1, 2, 3)) > 32).all()  # the square moves in every frame


def test_clip_follows_from_the_seed(tmp_path: Path) -> None:
    first, again, other = (tiny_clip(tmp_path / f"{n}.mp4", seed=seed) for n, seed in enumerate((1, 1, 2)))
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


@pytest.mark.parametrize(("arguments", "message"), [({"size": (63, 48)}, "63 x 48"), ({"seconds": 0}, "no frame")])
def test_clip_refuses_what_cannot_be_encoded(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_clip(tmp_path / "clip.mp4", **arguments)
    assert not list(tmp_path.iterdir())


def test_clip_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        tiny_clip(tmp_path / "clip.mp4")
    assert (tmp_path / "clip.mp4").read_bytes() == b"mine"
