"""lmms-eval's requests are answered by adapters; what only lmms-eval itself can show is in test_lmms_eval_run.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from video2lora import VideoAdapterStore, VideoToLoraPipeline
from video2lora.evaluation.lmms_eval_answers import Answerer, Generation, Query
from video2lora.evaluation.lmms_eval_requests import (
    MAX_NEW_TOKENS,
    answer_rounds,
    as_video,
    generation_queries,
    key_of,
    make_query,
    parse_generation_kwargs,
    scoring_queries,
)
from video2lora.modeling import Video2LoraModel, Video2LoraProcessor
from video2lora.testing import tiny_clip
from video2lora.video import VideoError

from ..modeling.helpers import SMALL, awaken
from .conditions_setup import FAMILIES, Setup, by_itself

CONDITIONS = ["adapter", "video", "no_adapter"]
GREEDY = {"max_new_tokens": 12, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
PICTURES = [Image.fromarray(frame) for frame in np.random.default_rng(0).integers(0, 256, (5, 48, 64, 3), np.uint8)]


def write_clips(folder: Path) -> list[str]:
    """Two videos that no model takes for each other: a square on a dark ground, and noise."""
    tiny_clip(folder / "1.mp4", seconds=2, fps=4, seed=1)
    frames = np.random.default_rng(1).integers(0, 256, (8, 48, 64, 3), np.uint8)
    with av.open(str(folder / "2.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=4, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return [str(folder / "1.mp4"), str(folder / "2.mp4")]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_clips(tmp_path_factory.mktemp("clips"))


@lru_cache
def setup_of(family: str) -> Setup:
    """A model that is the same in every run."""
    vlm, vlm_processor = FAMILIES[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Video2LoraModel.from_vlm(vlm, **SMALL).eval()
    awaken(model.hypernetwork)
    return Setup(family, model, Video2LoraProcessor(vlm_processor, num_frames=4, longest_edge=64))


@lru_cache
def pipeline_of(family: str) -> VideoToLoraPipeline:
    setup = setup_of(family)
    return VideoToLoraPipeline(model=setup.model, processor=setup.processor)


def answerer_of(setup: Setup, condition: str = "adapter", **options: Any) -> Answerer:
    return Answerer(pipeline_of(setup.family), condition, **({"batch_size": 3, "num_workers": 2} | options))


class Task:
    """A task's data, and requests about its rows as lmms-eval builds them."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows
        self.task_dict = {"task": {"test": rows}}

    def visuals(self, row: dict[str, Any]) -> Any:
        return row["visuals"]

    def generation(self, **kwargs: Any) -> list[Any]:
        return [
            SimpleNamespace(args=(row["text"], GREEDY | kwargs, self.visuals, place, "task", "test"))
            for place, row in enumerate(self.rows)
        ]

    def choices(self, choices: Sequence[str]) -> list[Any]:
        return [
            SimpleNamespace(args=(row["text"], choice, self.visuals, place, "task", "test"))
            for place, row in enumerate(self.rows)
            for choice in choices
        ]


def mixed_task(clips: Sequence[str]) -> Task:
    """Videos in no order, as a path and as pictures, and a text without any."""
    videos = [[clips[0]], PICTURES, [clips[1]], [clips[0]], None, [PICTURES], [clips[1]]]
    texts = ["What moves?", "Ünïcode — 字?", "What moves?", "Why?", "Hello", "Why?", "Why?"]
    return Task([{"text": text, "visuals": video} for text, video in zip(texts, videos, strict=True)])


def expected_inputs(setup: Setup, condition: str, row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs of the base for a row, and what else `generate` takes, made by the plain parts of the library."""
    video = as_video(row["visuals"])
    if condition == "video" and video is not None:
        frames = setup.processor.load_video(video)
        return setup.processor.encode_video(frames, row["text"], add_generation_prompt=True), {}
    adapter = None if condition == "no_adapter" or video is None else pipeline_of(setup.family)(video)
    return dict(setup.processor(text=row["text"])), {} if adapter is None else {"adapters": adapter}


@pytest.mark.parametrize("family", ["smolvlm", "idefics3", "qwen2_5_vl"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_answers_are_those_of_plain_generation_in_order(family: str, condition: str, clips: list[str]) -> None:
    setup, task = setup_of(family), mixed_task(clips)
    expected = []
    for row in task.rows:
        inputs, options = expected_inputs(setup, condition, row)
        expected.append(by_itself(setup, inputs, max_new_tokens=12, **options))
    num_texts = len({row["text"] for row in task.rows})
    assert (len(set(expected)) > num_texts) == (condition != "no_adapter")  # else the video would not be seen
    queries = generation_queries(task.generation(until=[]), task.task_dict)
    for batch_size in (1, 4):
        answers = answerer_of(setup, condition, batch_size=batch_size).generate(queries)
        assert [answer.text for answer in answers] == expected
        text_tokens = [setup.processor(text=row["text"])["input_ids"].shape[1] for row in task.rows]
        sees = [condition == "video" and row["visuals"] is not None for row in task.rows]
        assert [a.context_tokens > n for a, n in zip(answers, text_tokens, strict=True)] == sees


def test_a_video_is_read_once_for_all_its_requests(clips: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    setup, task = setup_of("smolvlm"), mixed_task(clips)
    read: list[int] = []
    original = setup.model.generate_segments

    def counted(**inputs: Any) -> Any:
        read.append(len(inputs["input_ids"]))
        return original(**inputs)

    monkeypatch.setattr(setup.model, "generate_segments", counted)
    requests = task.generation() + task.generation(max_new_tokens=2)
    answerer = answerer_of(setup, batch_size=2)
    answers = answerer.generate(generation_queries(requests, task.task_dict))
    assert sum(read) == 3 and len(answers) == 14
    read.clear()
    answerer.score(scoring_queries(task.choices([" yes", " no", " perhaps"]), task.task_dict))
    assert sum(read) == 3


def test_a_store_keeps_adapters_for_the_next_run(
    clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, task = setup_of("smolvlm"), mixed_task(clips)
    queries = generation_queries(task.generation(), task.task_dict)
    store = VideoAdapterStore(tmp_path / "store")
    first = answerer_of(setup, store=store).generate(queries)
    assert len(store) == 3 and first == answerer_of(setup).generate(queries)
    monkeypatch.setattr(setup.model, "generate_segments", None)
    assert answerer_of(setup, store=store).generate(queries) == first


@pytest.mark.parametrize("condition", CONDITIONS)
def test_an_answer_ends_before_the_first_of_the_stop_strings(condition: str, clips: list[str]) -> None:
    setup, task = setup_of("smolvlm"), mixed_task(clips)
    answerer = answerer_of(setup, condition)

    def answers(**kwargs: Any) -> list[Any]:
        return answerer.generate(generation_queries(task.generation(max_new_tokens=24, **kwargs), task.task_dict))

    whole = answers(until=[])
    stops = sorted({char for answer in whole for char in answer.text[1:] if char.isalnum() and char.isascii()})[:3]
    assert stops
    cut = answers(until=[*stops, ""])
    shortened = 0
    for before, after in zip(whole, cut, strict=True):
        first = min([len(before.text), *(before.text.index(stop) for stop in stops if stop in before.text)])
        assert after.text == before.text[:first].strip()
        shortened += first < len(before.text)
        assert (after.num_tokens < before.num_tokens) or first >= len(before.text) - 1
    assert shortened


def test_the_prompt_does_not_stop_its_answer(clips: list[str]) -> None:
    setup = setup_of("smolvlm")
    task = Task([{"text": "Assistant: ASSISTANT: stop", "visuals": [clips[0]]}])
    answerer = answerer_of(setup)
    whole = answerer.generate(generation_queries(task.generation(until=[]), task.task_dict))
    assert answerer.generate(generation_queries(task.generation(until="Assistant"), task.task_dict)) == whole


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, Generation(MAX_NEW_TOKENS)),
        ({"max_new_tokens": 16, "until": ["\n\n", ""], "temperature": 0.0}, Generation(16, ("\n\n",))),
        ({"until": "Q:", "do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": 5}, Generation(1024, ("Q:",))),
        ({"max_new_tokens": 8, "until": None, "num_beams": 1, "repetition_penalty": 1.0}, Generation(8)),
        ({"max_new_tokens": 8, "image_aspect_ratio": "pad", "seed": 3, "temperature": None}, Generation(8)),
    ],
)
def test_generation_kwargs_that_are_greedy(kwargs: dict[str, Any], expected: Generation) -> None:
    assert parse_generation_kwargs(kwargs) == expected


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        ({"do_sample": True}, ["do_sample"]),
        ({"temperature": 0.2}, ["temperature"]),
        ({"num_beams": 4, "repetition_penalty": 1.2, "max_new_tokens": 3}, ["num_beams", "repetition_penalty"]),
        ({"stop_sequences": ["x"]}, ["stop_sequences"]),
        ({"max_new_tokens": 0}, ["max_new_tokens"]),
    ],
)
def test_generation_kwargs_that_are_not_done_are_named(kwargs: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        parse_generation_kwargs(kwargs)
    assert all(name in str(error.value) for name in names)


# --- likelihoods -----------------------------------------------------------------------------------------------------


def by_hand(setup: Setup, condition: str, row: dict[str, Any], continuation: str) -> tuple[float, bool]:
    """Token after token: what plain forward passes say about the next one."""
    inputs, options = expected_inputs(setup, condition, row)
    ids = setup.processor.tokenizer(continuation, add_special_tokens=False)["input_ids"]
    total, greedy = 0.0, True
    with torch.no_grad():
        for token in ids:
            if condition == "video" and row["visuals"] is not None:
                logits = setup.model.vlm(**inputs).logits[0, -1]
            else:
                logits = setup.model(**inputs, **options).logits[0, -1]
            total += float(logits.double().log_softmax(-1)[token])
            greedy = greedy and int(logits.argmax()) == token
            length = inputs["input_ids"].shape[1]
            for name in [name for name, value in inputs.items() if tuple(value.shape) == (1, length)]:
                tail = token if name == "input_ids" else int(name == "attention_mask")
                inputs[name] = torch.cat([inputs[name], torch.tensor([[tail]])], dim=1)
    return total, greedy


@pytest.mark.parametrize("family", ["smolvlm", "idefics3", "qwen2_5_vl"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_continuations_likelihood_is_the_sum_over_its_tokens(family: str, condition: str, clips: list[str]) -> None:
    setup, task = setup_of(family), mixed_task(clips)
    choices = [" A", " a longer choice, 字", "", " B"]
    requests = task.choices(choices)
    scores = answerer_of(setup, condition).score(scoring_queries(requests, task.task_dict))
    for request, (value, greedy) in zip(requests, scores, strict=True):
        expected = by_hand(setup, condition, task.rows[request.args[3]], request.args[1])
        assert value == pytest.approx(expected[0], abs=2e-4) and greedy == expected[1]
    assert all(pair == (0.0, True) for pair in scores[2::4])


def test_greedy_is_what_greedy_decoding_gives() -> None:
    setup = setup_of("smolvlm")
    answerer = answerer_of(setup)
    prompts = [f"{letter}?" for letter in "abcdefghijklmnopqrstuvwxyz"]
    answers = answerer.generate([Query(prompt, generation=Generation(1)) for prompt in prompts])
    told = [(prompt, answer.text) for prompt, answer in zip(prompts, answers, strict=True) if answer.text.isalpha()]
    told = [(prompt, text) for prompt, text in told if text.isascii()]
    assert told
    right = answerer.score([Query(prompt, continuation=text) for prompt, text in told])
    wrong = answerer.score([Query(prompt, continuation=text + "#!") for prompt, text in told])
    assert all(greedy for _, greedy in right) and not any(greedy for _, greedy in wrong)
    assert all(worse < better for (better, _), (worse, _) in zip(right, wrong, strict=True))


def test_continuations_may_be_called_for_and_contexts_may_be_missing(clips: list[str]) -> None:
    task = mixed_task(clips)
    place = (0, "task", "test")
    requests = [
        SimpleNamespace(args=("What?", lambda row: row["text"], task.visuals, *place)),
        SimpleNamespace(args=("", " yes")),
    ]
    first, second = scoring_queries(requests, task.task_dict)
    assert first.continuation == task.rows[0]["text"] and first.key is not None
    assert second == Query("", continuation=" yes")
    scores = answerer_of(setup_of("smolvlm")).score([first, second])
    assert all(value < 0 for value, _ in scores)


# --- several rounds --------------------------------------------------------------------------------------------------


def test_rounds_are_answered_until_each_request_is_over(clips: list[str]) -> None:
    setup = setup_of("smolvlm")
    task = Task([{"text": f"Round 0 of {n}", "visuals": [clips[n % 2]], "rounds": n} for n in (1, 3, 2)])
    seen: list[tuple[int, int, int]] = []

    def doc_to_text(row: dict[str, Any], previous_output: Any, round_idx: int, previous_round_info: Any) -> Any:
        seen.append((row["rounds"], round_idx, previous_round_info or 0))
        if round_idx == row["rounds"]:
            return None, None, True, [*previous_output, "over"], None
        video = None if round_idx == 1 else [clips[1]]
        return video, f"Before: {len(previous_output)}", False, previous_output, round_idx * 10

    requests = [
        SimpleNamespace(args=(row["text"], GREEDY, task.visuals, doc_to_text, place, "task", "test"))
        for place, row in enumerate(task.rows)
    ]
    answerer = answerer_of(setup)
    outputs = answer_rounds(answerer, requests, task.task_dict)
    assert [len(several) for several in outputs] == [2, 4, 3] and all(several[-1] == "over" for several in outputs)
    assert seen == [(1, 1, 0), (3, 1, 0), (2, 1, 0), (3, 2, 10), (2, 2, 10), (3, 3, 20)]

    def alone(text: str, video: Any) -> str:
        query = make_query(text, lambda: video, generation=parse_generation_kwargs(GREEDY))
        return answerer.generate([query])[0].text

    assert outputs[1][:3] == [alone("Round 0 of 3", clips[1]), alone("Before: 1", None), alone("Before: 2", clips[1])]


# --- visuals ---------------------------------------------------------------------------------------------------------


def test_what_visuals_come_as() -> None:
    array = np.zeros((2, 8, 8, 3), np.uint8)
    assert as_video(None) is None and as_video([]) is None and as_video([[], None]) is None
    assert as_video("a.mp4") == as_video(["a.mp4"]) == as_video([["a.mp4"]]) == "a.mp4"
    assert as_video(PICTURES) == as_video([PICTURES]) == PICTURES and as_video([PICTURES[0]]) == [PICTURES[0]]
    assert as_video(array) is array
    for wrong in (["a.mp4", "b.mp4"], ["a.mp4", PICTURES[0]], [{"array": array, "sampling_rate": 16000}]):
        with pytest.raises(ValueError, match="expected one video"):
            as_video(wrong)


def test_a_videos_key_is_its_place_or_its_pixels(clips: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(clips[0]).parent
    monkeypatch.chdir(folder)
    assert key_of("1.mp4") == key_of(clips[0]) == key_of(f"{folder}/../{folder.name}/1.mp4") != key_of(clips[1])
    assert key_of("https://host/a.mp4") == "https://host/a.mp4"
    copied = [picture.copy() for picture in PICTURES]
    assert key_of(copied) == key_of(PICTURES) == key_of([np.asarray(picture) for picture in PICTURES])
    copied[-1].putpixel((3, 4), (1, 2, 3))
    assert len({key_of(copied), key_of(PICTURES), key_of(PICTURES[:-1])}) == 3


def test_placeholders_at_an_end_are_dropped_and_others_refused() -> None:
    assert make_query("<image> <image>\nWhat?", None).prompt == "What?"
    assert make_query("What?\n<video>", None).prompt == "What?"
    assert make_query(" a <imagine> ", None).prompt == " a <imagine> "
    with pytest.raises(ValueError, match="in the middle"):
        make_query("Is <image> or that?", None)


def test_missing_files_are_told_before_anything_is_read(
    clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_of("smolvlm")
    task = Task([{"text": "?", "visuals": [video]} for video in (clips[0], str(tmp_path / "gone.mp4"))])
    monkeypatch.setattr(setup.model, "generate_segments", None)
    with pytest.raises(VideoError, match=r"1 of 2 videos are not there: .*gone.mp4"):
        answerer_of(setup).generate(generation_queries(task.generation(), task.task_dict))


@pytest.mark.parametrize("condition", ["adapter", "video"])
def test_a_file_that_is_no_video_is_an_error(condition: str, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    task = Task([{"text": "?", "visuals": [str(tmp_path / "text.mp4")]}])
    with pytest.raises(VideoError, match="text.mp4"):
        answerer_of(setup_of("smolvlm"), condition).generate(generation_queries(task.generation(), task.task_dict))


def test_conditions_are_named() -> None:
    with pytest.raises(ValueError, match="condition=caption: expected one of adapter, video, no_adapter"):
        answerer_of(setup_of("smolvlm"), "caption")
