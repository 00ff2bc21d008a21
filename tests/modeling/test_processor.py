"""The processor: true timestamps in the prompt, labels as the template renders them, batches, and round trips."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from video2lora.modeling import Video2LoraConfig, Video2LoraModel, Video2LoraProcessor
from video2lora.testing import tiny_clip
from video2lora.video import VideoError, load_video

from .helpers import SMALL

FAMILIES = ["smolvlm", "idefics3", "qwen2_5_vl"]
PROMPT = "Internalize this video for later captioning."


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    """80 seconds at one frame a second, whose frames show times of more than a minute."""
    return tiny_clip(tmp_path_factory.mktemp("long") / "long.mp4", seconds=80, fps=1)


def prompt_of(processor, inputs, row=0):
    return processor.decode(inputs["input_ids"][row][inputs["attention_mask"][row].bool()])


# Videos


@pytest.mark.parametrize(
    "rule, times, duration",
    [("span", ["00:00", "00:02", "00:05"], "0:00:06"), ("file", ["01:02", "01:04", "01:07"], "0:01:20")],
)
def test_the_prompt_tells_the_true_times(smolvlm, make_processor, long_clip, rule, times, duration):
    processor = make_processor(smolvlm, prompt_timestamps=rule)
    frames = processor.load_video(long_clip, start=62, end=68)
    assert frames.timestamps == (62, 64, 67)
    prompt = prompt_of(processor, processor(videos=frames))
    visual = "<fake_token_around_image><global-img>" + "<image>" * 4 + "<fake_token_around_image>"
    assert prompt == (
        "<|im_start|>User: You are provided the following series of three frames from a "
        + f"{duration} [H:MM:SS] video.\n"
        + "".join(f"\nFrame from {time}:{visual}" for time in times)
        + f"\n\n{PROMPT}<end_of_utterance>\n"
    )
    # the processor's own sampling gives the same as frames that were loaded before
    assert torch.equal(
        processor(videos=long_clip, start=62, end=68)["input_ids"], processor(videos=frames)["input_ids"]
    )


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
def test_large_frames_given_as_pictures_are_cut_into_tiles(families, make_processor, name):
    processor = make_processor(families(name))
    frames = processor.load_video(np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8))
    inputs = processor.encode_video(frames, image_splitting=True)
    # 64 pixels are 2 x 2 tiles of 32, and the whole picture as one more; 4 tokens each
    assert inputs["pixel_values"].shape == (1, 3 * 5, 3, 32, 32)
    assert processor.count_visual_tokens(inputs["input_ids"]) == 3 * 5 * 4
    assert [f"Frame from 00:0{second}:" in prompt_of(processor, inputs) for second in range(4)] == [True] * 3 + [False]
    assert torch.isfinite(families(name).vlm(**inputs).logits).all()
    plain = processor.encode_video(frames)
    assert processor.count_visual_tokens(plain["input_ids"]) == 3 * 4


@pytest.mark.parametrize("rule, first", [("span", "00:00"), ("file", "01:02")])
def test_images_carry_the_times_where_there_is_no_video_input(families, make_processor, long_clip, rule, first):
    processor = make_processor(families("idefics3"), prompt_timestamps=rule)
    inputs = processor(videos=long_clip, start=62, end=68)
    prompt = prompt_of(processor, inputs)
    assert prompt.count("<image>") == 12 and prompt.count("Frame from") == 3 and f"Frame from {first}:" in prompt
    assert prompt.endswith(f"\n\n{PROMPT}<end_of_utterance>\n") and "row_1" not in prompt, "frames were split"
    assert inputs["pixel_values"].shape[1] == 3


def test_qwens_grid_steps_are_the_true_seconds(qwen, make_processor, long_clip):
    processor = make_processor(qwen, num_frames=4)
    inputs = processor(videos=[processor.load_video(long_clip, fps=rate, end=8) for rate in (0.5, 1)])
    assert inputs["video_grid_thw"][:, 0].tolist() == [2, 4]  # two frames a step
    torch.testing.assert_close(inputs["second_per_grid_ts"], torch.tensor([4.0, 2.0]))


@pytest.mark.parametrize("name", FAMILIES)
def test_visual_tokens_are_counted(families, make_processor, long_clip, name):
    processor = make_processor(families(name))
    inputs = processor(videos=[long_clip, long_clip], num_frames=4)
    per_video = {
        "smolvlm": 16,
        "idefics3": 16,
        "qwen2_5_vl": int(inputs.get("video_grid_thw", torch.zeros(1, 3))[0].prod()) // 4,
    }
    assert per_video[name] > 0
    assert processor.count_visual_tokens(inputs["input_ids"]) == 2 * per_video[name]
    assert processor.count_visual_tokens(inputs["input_ids"][0]) == per_video[name]
    assert processor.count_visual_tokens(processor(text="What happens?")["input_ids"]) == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_its_videos_padded_on_the_right(families, make_processor, clips, name):
    processor = make_processor(families(name), num_frames=12)
    batch = processor(videos=clips)
    lengths = batch["attention_mask"].sum(1)
    assert lengths.unique().numel() == 3
    for row, clip in enumerate(clips):
        alone = processor(videos=clip)
        n = int(lengths[row])
        assert torch.equal(batch["input_ids"][row, :n], alone["input_ids"][0])
        assert (batch["input_ids"][row, n:] == processor.pad_token_id).all()
        assert (batch["attention_mask"][row] == (torch.arange(batch["attention_mask"].shape[1]) < n)).all()
    assert batch.keys() == alone.keys()
    padded = processor.pad([processor(videos=clip) for clip in clips])
    assert all(torch.equal(padded[key], batch[key]) for key in batch)


def test_what_counts_as_one_video(smolvlm, make_processor, clips):
    processor = make_processor(smolvlm)
    frames = load_video(clips[1], num_frames=3).frames
    one = processor(videos=frames)["input_ids"]
    assert one.shape[0] == 1
    same = [[Image.fromarray(frame) for frame in frames], list(frames), torch.from_numpy(frames)]
    for video in [*same, [frames], [same[0]], tuple(same[0])]:
        assert torch.equal(processor(videos=video)["input_ids"], one)
    for videos in (clips, [str(clip) for clip in clips], tuple(clips), [clip.read_bytes() for clip in clips]):
        assert processor(videos=videos)["input_ids"].shape[0] == 3
    assert processor(videos=[same[0], same[0], clips[0]])["input_ids"].shape[0] == 3
    assert processor(videos={"path": str(clips[0]), "bytes": None})["input_ids"].shape[0] == 1


def test_sampling_settings(smolvlm, make_processor, clips):
    processor = make_processor(smolvlm, num_frames=2, longest_edge=32)
    assert processor.load_video(clips[1]).frames.shape == (2, 24, 32, 3)
    assert len(processor.load_video(clips[1], num_frames=4).timestamps) == 4
    assert len(processor.load_video(clips[1], fps=1).timestamps) == 5
    assert processor.load_video(clips[1], longest_edge=16).frames.shape[2] == 16


def test_bad_input(smolvlm, make_processor, clips, tmp_path):
    processor = make_processor(smolvlm)
    (tmp_path / "text.mp4").write_text("no video")
    for arguments in ({"videos": tmp_path / "text.mp4"}, {"videos": tmp_path / "gone.mp4"}):
        with pytest.raises(VideoError, match="mp4"):
            processor(**arguments)
    with pytest.raises(VideoError):
        processor(videos=clips[0], num_frames=0)
    with pytest.raises(VideoError):
        processor(videos=clips[0], start=5, end=1)
    with pytest.raises(ValueError, match="neither"):
        processor()
    with pytest.raises(ValueError, match="at least one video"):
        processor(videos=[])
    with pytest.raises(ValueError, match="at least one query"):
        processor(text=[])
    with pytest.raises(ValueError, match="one response for each of 2 queries, got 1"):
        processor(text=["a", "b"], responses=["c"])
    with pytest.raises(ValueError, match="base model's processor"):
        Video2LoraProcessor()


# Text

RESPONSES = ["A square.", " leading space", "", "Ünïcode 日本 🎬", "two\nlines\n", "ends with a space "]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("response", RESPONSES)
def test_labels_are_what_the_template_renders(families, make_processor, name, response):
    """Prompt and answer side by side are the rendered turn; labels are its answer, end of turn included."""
    processor = make_processor(families(name))
    tokenizer = families(name).processor.tokenizer
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What happens?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": response}]},
    ]
    whole = families(name).processor.apply_chat_template(messages, tokenize=False)
    head = families(name).processor.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    ids, labels = processor.encode_turn("What happens?", response)
    end = {"smolvlm": "<end_of_utterance>", "idefics3": "<end_of_utterance>", "qwen2_5_vl": "<|im_end|>"}[name]
    space = "" if name == "qwen2_5_vl" else " "
    assert tokenizer.decode(ids) == whole.removesuffix("\n") and whole.endswith(end + "\n")
    labelled = [token for token in labels if token != -100]
    assert tokenizer.decode(labelled) == space + response + end
    assert tokenizer.decode(ids[: len(ids) - len(labelled)]) == head
    assert labels == [-100] * (len(ids) - len(labelled)) + ids[len(ids) - len(labelled) :]


@pytest.mark.parametrize("name", FAMILIES)
def test_text_batches(families, make_processor, name):
    processor = make_processor(families(name))
    prompts = ["What?", "What happens at the end of the clip?"]
    queries = processor(text=prompts)
    assert queries.keys() == {"input_ids", "attention_mask"}
    pad = processor.pad_token_id
    assert 0 <= pad < len(processor.tokenizer)
    for row, prompt in enumerate(prompts):
        ids = processor.tokenizer(processor.render(prompt), add_special_tokens=False)["input_ids"]
        gap = queries["input_ids"].shape[1] - len(ids)
        assert queries["input_ids"][row].tolist() == [pad] * gap + ids
        assert queries["attention_mask"][row].tolist() == [0] * gap + [1] * len(ids)
    training = processor(text=prompts, responses=["A square moves.", "No."])
    for row, response in enumerate(["A square moves.", "No."]):
        ids, labels = processor.encode_turn(prompts[row], response)
        gap = training["input_ids"].shape[1] - len(ids)
        assert training["input_ids"][row].tolist() == ids + [pad] * gap
        assert training["labels"][row].tolist() == labels + [-100] * gap
        assert training["attention_mask"][row].tolist() == [1] * len(ids) + [0] * gap
    assert processor(text="What?")["input_ids"].shape[0] == 1
    assert processor(text="What?", responses="That.")["labels"].shape[0] == 1


def test_videos_and_text_together(smolvlm, make_processor, clips):
    processor = make_processor(smolvlm)
    inputs = processor(videos=clips[:2], text=["a", "b"], responses=["c", "d"])
    assert inputs.keys() == {"input_ids", "attention_mask", "labels", "video_inputs"}
    alone = processor(videos=clips[:2])
    assert all(torch.equal(inputs["video_inputs"][name], alone[name]) for name in alone)
    moved = inputs.to("cpu")
    assert moved["input_ids"].device.type == "cpu"


def test_decoding(smolvlm, make_processor):
    processor = make_processor(smolvlm)
    ids = processor(text=["one"])["input_ids"]
    assert "one" in processor.decode(ids[0]) and processor.batch_decode(ids) == [processor.decode(ids[0])]
    assert "<|im_start|>" not in processor.batch_decode(ids, skip_special_tokens=True)[0]


# Files

FIELDS = {"num_frames": 5, "longest_edge": None, "internalization_prompt": "Read.", "prompt_timestamps": "file"}


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(families, clips, tmp_path, name):
    processor = Video2LoraProcessor(families(name).processor, **FIELDS)
    processor.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "processor_config.json").read_text())
    assert document == {"processor_class": "Video2LoraProcessor"} | FIELDS
    Video2LoraConfig(vlm_config=families(name).vlm.config).save_pretrained(tmp_path)  # what AutoProcessor goes by
    for load in (Video2LoraProcessor.from_pretrained, AutoProcessor.from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded) is Video2LoraProcessor and type(loaded.vlm_processor) is type(processor.vlm_processor)
        assert {key: getattr(loaded, key) for key in FIELDS} == FIELDS
        ours, theirs = (p(videos=clips, text=["a", "b", "c"]) for p in (loaded, processor))
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        assert ours["video_inputs"].keys() == theirs["video_inputs"].keys()
        assert all(torch.equal(ours["video_inputs"][key], theirs["video_inputs"][key]) for key in ours["video_inputs"])
    assert AutoProcessor.from_pretrained(tmp_path, num_frames=9).num_frames == 9


@pytest.mark.parametrize("bundle", [False, True], ids=["light", "bundled"])
def test_the_processor_of_a_model_that_was_saved_alone(smolvlm, tmp_path, bundle):
    """It is the base's, with the model's settings."""
    model = Video2LoraModel.from_vlm(smolvlm.path, **SMALL | FIELDS)
    model.save_pretrained(tmp_path, bundle_base=bundle)
    for load in (Video2LoraProcessor.from_pretrained, AutoProcessor.from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded) is Video2LoraProcessor
        assert {key: getattr(loaded, key) for key in FIELDS} == FIELDS
    assert Video2LoraProcessor.from_pretrained(tmp_path, num_frames=9).num_frames == 9
    direct = Video2LoraProcessor.from_config(model.config, smolvlm.processor)
    assert direct.vlm_processor is smolvlm.processor and direct.num_frames == 5


def test_nothing_there(tmp_path):
    with pytest.raises(OSError):
        Video2LoraProcessor.from_pretrained(tmp_path)
    with pytest.raises(OSError):
        Video2LoraProcessor.from_pretrained("owner/not-cached")
    with pytest.raises(OSError, match="names no base model"):
        Video2LoraProcessor.from_config(Video2LoraConfig())


# The real files


@pytest.fixture(scope="module")
def real(shared_dir):
    return Video2LoraProcessor(AutoProcessor.from_pretrained(shared_dir / "smolvlm2" / "SmolVLM2-500M-Video-Instruct"))


def test_real_tokenizer(real):
    vector = [1, 11126, 42, 1812, 314, 216, 35, 1232, 216, 33, 36, 47, 49279, 198, 9519, 9531, 42]
    assert real(text="What is 3 + 14?")["input_ids"][0].tolist() == vector
    ids, labels = real.encode_turn("What is 3 + 14?", "17")
    assert ids[: len(vector)] == vector and labels[: len(vector)] == [-100] * len(vector)
    assert real.decode([token for token in labels if token != -100]) == " 17<end_of_utterance>"
    assert real.pad_token_id == 2
    for response in RESPONSES:
        labels = [token for token in real.encode_turn("Why?", response)[1] if token != -100]
        assert real.decode(labels) == f" {response}<end_of_utterance>"


def test_real_prompt_of_a_clip(real, clips):
    inputs = real(videos=real.load_video(clips[1], num_frames=3))
    prompt = prompt_of(real, inputs)
    visual = "<fake_token_around_image><global-img>" + "<image>" * 64 + "<fake_token_around_image>"
    assert prompt == (
        "<|im_start|>User: You are provided the following series of three frames from a 0:00:05 [H:MM:SS] video.\n"
        + "".join(f"\nFrame from 00:0{second}:{visual}" for second in (0, 2, 4))
        + f"\n\n{PROMPT}<end_of_utterance>\n"
    )
    assert real.count_visual_tokens(inputs["input_ids"]) == 192
    assert inputs["pixel_values"].shape == (1, 3, 3, 512, 512)
    assert np.isfinite(inputs["pixel_values"].numpy()).all() and inputs["pixel_values"].abs().max() <= 1.001


@pytest.mark.parametrize("family", FAMILIES)
def test_preparing_says_nothing(families, make_processor, family):
    """A data loader's workers do it a thousand times a second: not a warning at each."""
    processor = make_processor(families(family))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        for _ in range(3):
            known = len(said)
            processor.encode_turn("What happens?", "Nothing.")
            processor.encode_video(processor.load_video(torch.zeros(4, 32, 32, 3, dtype=torch.uint8)))
    finally:
        logger.removeHandler(handler)
    assert said[known:] == []  # some things may be said once


def test_frames_that_are_sampled_are_not_sampled_again(smolvlm, make_processor, clips):
    from video2lora.video import VideoError

    processor = make_processor(smolvlm)
    frames = processor.load_video(clips[0], fps=1)
    assert processor.load_video(frames) is frames and processor(videos=[frames])["pixel_values"].shape[0] == 1
    for options, told in (({"num_frames": 2, "end": 1.0}, "num_frames, end"), ({"longest_edge": 8}, "longest_edge")):
        with pytest.raises(VideoError, match=f"sampled already, so {told} cannot be applied"):
            processor(videos=[frames], **options)
