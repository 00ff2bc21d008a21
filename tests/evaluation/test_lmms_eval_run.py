"""lmms-eval itself runs tasks of its own format on our model; where it is installed (docs/lmms_eval.md)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from video2lora import VideoAdapterStore
from video2lora.evaluation.lmms_eval_answers import Answerer, Generation, Query
from video2lora.evaluation.lmms_eval_requests import as_video, key_of

from .test_lmms_eval import CONDITIONS, pipeline_of, setup_of, write_clips

pytestmark = pytest.mark.skipif(
    find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed; it has an environment of its own (docs/lmms_eval.md)",
)

CHOICES = ["a", "b", "k"]
QUESTIONS = ["What moves?", "Which colour is it?", "Why?", "Describe the scene in detail."]
ROUNDS = ["First?", "Then, after 1?", "Then, after 2?"]

UTILS = """
import numpy as np
from PIL import Image

def video(doc):
    return [doc["video"]]

def pictures(doc):
    frames = np.random.default_rng(doc["seed"]).integers(0, 256, (4, 48, 64, 3), np.uint8)
    return [Image.fromarray(frame) for frame in frames]

def match(doc, results):
    return {"match": float(results[0] == doc["answer"])}

def likelihood(doc, results):
    value, greedy = results[0]
    return {"value": value, "greedy": float(greedy)}

def rounds(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return "First?"
    over = round_idx == 3
    return None if over else video(doc), f"Then, after {round_idx}?", over, previous_output, None

def match_rounds(doc, results):
    return {"match": float(results[0] == doc["answers"])}
"""

HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
GREEDY = "generation_kwargs: {max_new_tokens: 12, temperature: 0, do_sample: false, until: ['#']}"
MEAN = "metric_list: [{metric: match, aggregation: mean, higher_is_better: true}]"
TASKS = {
    "tiny_open": f"""
output_type: generate_until
doc_to_visual: !function utils.video
doc_to_text: question
doc_to_target: answer
process_results: !function utils.match
{GREEDY}
{MEAN}
""",
    "tiny_pictures": f"""
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: question
doc_to_target: answer
process_results: !function utils.match
{GREEDY}
{MEAN}
""",
    "tiny_rounds": f"""
output_type: generate_until_multi_round
doc_to_visual: !function utils.video
doc_to_text: !function utils.rounds
doc_to_target: question
process_results: !function utils.match_rounds
{GREEDY}
{MEAN}
""",
    "tiny_choice": """
output_type: multiple_choice
doc_to_visual: !function utils.video
doc_to_text: question
doc_to_choice: choices
doc_to_target: likeliest
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "tiny_likelihood": """
output_type: loglikelihood
doc_to_visual: !function utils.video
doc_to_text: question
doc_to_target: continuation
process_results: !function utils.likelihood
metric_list:
  - {metric: value, aggregation: mean, higher_is_better: true}
  - {metric: greedy, aggregation: mean, higher_is_better: true}
""",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    setup = setup_of("smolvlm")
    setup.model.save_pretrained(folder, bundle_base=True)
    setup.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_clips(tmp_path_factory.mktemp("clips"))


def pictures(seed: int) -> Any:
    scope: dict[str, Any] = {}
    exec(UTILS, scope)
    return scope["pictures"]({"seed": seed})


def write_tasks(folder: Path, clips: list[str], condition: str) -> list[dict[str, Any]]:
    """Tasks whose right answers are what our own model says when it is asked directly."""
    answerer = Answerer(pipeline_of("smolvlm"), condition)
    how = Generation(12, ("#",))

    def ask(prompt: str, video: Any) -> str:
        return answerer.generate([Query(prompt, key_of(video), lambda: video, how)])[0].text

    def score(prompt: str, video: Any, text: str) -> float:
        return answerer.score([Query(prompt, key_of(video), lambda: video, continuation=text)])[0][0]

    asked = [(question, clip) for question in QUESTIONS for clip in clips]
    rows: dict[str, list[dict[str, Any]]] = {
        "tiny_open": [{"question": q, "video": clip, "answer": ask(q, clip)} for q, clip in asked],
        "tiny_pictures": [
            {"question": q, "seed": seed, "answer": ask(q, as_video(pictures(seed)))}
            for q in QUESTIONS
            for seed in (5, 6)
        ],
        "tiny_rounds": [
            {"question": ROUNDS[0], "video": clip, "answers": [ask(text, clip) for text in ROUNDS]} for clip in clips
        ],
        "tiny_choice": [],
        "tiny_likelihood": [],
    }
    for question, clip in asked:
        values = [score(question, clip, f" {choice}") for choice in CHOICES]
        row = {"question": question, "video": clip, "choices": CHOICES}
        rows["tiny_choice"].append(row | {"likeliest": values.index(max(values)), "values": values})
        value = score(question, clip, "Yes.")
        rows["tiny_likelihood"].append({"question": question, "video": clip, "continuation": "Yes.", "value": value})
    if condition != "no_adapter":  # or it would not be seen which video a question was about
        answers = {row["answer"] for row in rows["tiny_open"]}
        assert len(answers) > len(QUESTIONS)
    if condition == "adapter":
        assert len({row["likeliest"] for row in rows["tiny_choice"]}) > 1
    (folder / "utils.py").write_text(UTILS)
    for name, body in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, data=data) + body)
    return rows["tiny_choice"] + rows["tiny_likelihood"]


def run_lmms_eval(tmp_path: Path, model_args: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "lmms_eval", "--model", "video2lora", "--model_args", model_args]
    command += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"), "--log_samples"]
    command += ["--device", "cpu", "--verbosity", "DEBUG", *options]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_tasks_run_unchanged_and_score_what_the_model_says(
    condition: str, checkpoint: Path, clips: list[str], tmp_path: Path
) -> None:
    (tmp_path / "tasks").mkdir()
    scored = write_tasks(tmp_path / "tasks", clips, condition)
    store = tmp_path / "store"
    arguments = f"pretrained={checkpoint},num_frames=4,condition={condition}"
    if condition == "adapter":
        arguments += f",store={store}"
    done = run_lmms_eval(tmp_path, arguments, "--tasks", ",".join(TASKS), "--batch_size", "3")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    (results,) = (tmp_path / "out").rglob("*_results.json")
    found = json.loads(results.read_text())["results"]
    for name in ("tiny_open", "tiny_pictures", "tiny_rounds"):
        assert found[name]["match,none"] == 1.0, (name, found[name], done.stdout[-3000:])
    assert found["tiny_choice"]["acc,none"] == 1.0, found["tiny_choice"]
    values = [row["value"] for row in scored if "value" in row]
    assert found["tiny_likelihood"]["value,none"] == pytest.approx(sum(values) / len(values), abs=1e-4)
    check_samples(tmp_path / "out", condition)
    if condition == "adapter":
        assert len(VideoAdapterStore(store)) == 4  # two files and two lists of pictures, whatever task they are in


def check_samples(folder: Path, condition: str) -> None:
    """The tokens of each context are logged: with an adapter there is no visual one among them."""
    (file,) = folder.rglob("*samples_tiny_open.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    processor = setup_of("smolvlm").processor
    for sample in samples:
        tokens = processor(text=QUESTIONS[sample["doc_id"] // 2])["input_ids"].shape[1]
        counted = sample["token_counts"][0]["input_tokens"]
        assert counted > tokens if condition == "video" else counted == tokens


def test_the_model_is_found_by_its_name() -> None:
    from lmms_eval.models import get_model, list_available_models

    (entry,) = (entry for entry in entry_points(group="lmms_eval.models") if entry.name == "video2lora")
    assert entry.load()().model_id == "video2lora"
    assert "video2lora" in list_available_models()
    assert get_model("video2lora").__name__ == "Video2Lora"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("condition=adapter", "which checkpoint"),
        ("pretrained=x,condition=video,store=s", "a store holds adapters"),
        ("pretrained=x,batch_size=auto", "expected a positive number"),
        ("pretrained=/not/there", "/not/there"),
    ],
)
def test_wrong_arguments_are_told(arguments: str, message: str) -> None:
    from video2lora.evaluation.lmms_eval_model import Video2Lora

    with pytest.raises((ValueError, OSError), match=message):
        Video2Lora.create_from_arg_string(arguments)


def test_sampling_is_refused_by_name(checkpoint: Path, clips: list[str], tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    write_tasks(tmp_path / "tasks", clips, "no_adapter")
    arguments = f"pretrained={checkpoint},condition=no_adapter"
    done = run_lmms_eval(tmp_path, arguments, "--tasks", "tiny_open", "--gen_kwargs", "temperature=0.7,do_sample=True")
    assert done.returncode != 0 and "answers are greedy" in done.stdout + done.stderr


def test_the_model_can_be_let_go(checkpoint: Path) -> None:
    from video2lora.evaluation.lmms_eval_model import Video2Lora

    model = Video2Lora.create_from_arg_string(f"pretrained={checkpoint},dtype=bfloat16", {"device": "cpu"})
    assert str(model._loaded().model.dtype) == "torch.bfloat16" and str(model.device) == "cpu"
    model.clean()
    with pytest.raises(RuntimeError, match="let go"):
        model.generate_until([])
