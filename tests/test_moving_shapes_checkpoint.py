"""The trained moving-shapes checkpoint: complete, small, and right. Without it, an untrained one tests these tests."""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from tests.evaluation.report_runs import write_run
from typer.testing import CliRunner

from video2lora.adapters.errors import OutputExistsError
from video2lora.data.moving_shapes import MovingShapes, make_queries, make_scene
from video2lora.evaluation.metrics_text import exact_match

REPOSITORY = Path(__file__).parents[1]
RECIPE = REPOSITORY / "examples" / "moving_shapes"
NAMES = ["small_vlm", "train_hypernetwork", "export", "prove"]
TASKS = ("colour", "shape", "count", "motion", "position", "order", "how_often")  # short, and trained on
CLIPS, SEED = 40, 2026
MOST_BYTES = 30e6
A_PATH = re.compile(rb"(?<![\w.:/])/(?:home|root|tmp|work|mnt|var|private|Users|opt|srv|data)/|[A-Z]:\\")


@dataclass(frozen=True)
class Box:
    """A checkpoint, and the share of short questions that it has to get right; None: it was never trained."""

    path: Path
    accuracy: float | None


@pytest.fixture(scope="module")
def recipe(recipe_module: Callable[[str], Any]) -> dict[str, Any]:
    return {name: recipe_module(name) for name in NAMES}


@pytest.fixture(scope="module")
def run_folder(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stages 1 and 2 leave behind, of models that were never trained but change something."""
    from video2lora.data.moving_shapes import vocabulary_texts

    folder = tmp_path_factory.mktemp("runs")
    small_vlm, train_hypernetwork = recipe["small_vlm"], recipe["train_hypernetwork"]
    tokenizer = small_vlm.build_tokenizer(vocabulary_texts())
    small_vlm.build_vlm(tokenizer).save_pretrained(folder / "vlm")
    small_vlm.build_processor(tokenizer).save_pretrained(folder / "vlm")
    log = [{"step": n, "exact_match": {"colour": {"accuracy": 0.5, "n": 64}}, "tokens": 900} for n in (1000, 2000)]
    (folder / "vlm" / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_hypernetwork", str(folder / "vlm"), "-o", str(folder / "hypernetwork")])
        model, processor = train_hypernetwork.build(train_hypernetwork.parse())
    for scaler in model.hypernetwork.scaler_B.values():
        torch.nn.init.constant_(scaler, 1.0)  # a fresh one is 0, and its adapters change nothing
    model.save_pretrained(folder / "hypernetwork")
    processor.save_pretrained(folder / "hypernetwork")
    return folder


@pytest.fixture(scope="module", params=["untrained", "trained"])
def box(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Box:
    if request.param == "trained":
        if not (RECIPE / "checkpoint" / "config.json").is_file():
            pytest.skip("examples/moving_shapes/checkpoint is not there: no trained models to test")
        return Box(RECIPE / "checkpoint", 0.9)
    recipe, run_folder = request.getfixturevalue("recipe"), request.getfixturevalue("run_folder")
    path = tmp_path_factory.mktemp("box") / "checkpoint"
    recipe["export"].export(run_folder / "hypernetwork", path)
    return Box(path, None)


@pytest.fixture(scope="module")
def pipeline(box: Box) -> Any:
    """Offline: the conftest sees to that."""
    from transformers import pipeline as make_pipeline

    import video2lora  # noqa: F401 - registers the task

    made = make_pipeline("video-to-lora", model=str(box.path), device="cpu")
    made.model.vlm.float()
    return made


def test_it_is_small_and_holds_tensors_and_json_only(box: Box) -> None:
    files = [file for file in box.path.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MOST_BYTES
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja", ".md", ".png"}
    assert {"config.json", "model.safetensors", "processor_config.json", "README.md"} <= {file.name for file in files}
    header = json.loads(header_of(box.path / "model.safetensors"))
    header.pop("__metadata__", None)
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    assert {name.split(".")[0] for name in header} == {"vlm", "hypernetwork"}


def test_it_names_no_machine(box: Box) -> None:
    for file in box.path.rglob("*"):
        if not file.is_file() or file.suffix == ".png":
            continue
        content = header_of(file) if file.suffix == ".safetensors" else file.read_bytes()
        assert not A_PATH.search(content), (file.name, A_PATH.search(content))
        for name in (str(REPOSITORY), str(Path.home()), str(box.path), sys.prefix):
            assert name.encode() not in content, (file.name, name)


def test_the_cards_metadata(box: Box) -> None:
    card = ModelCard.load(box.path / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("video2lora", "video-text-to-text")
    assert data["license"] == "apache-2.0" and "base_model" not in data  # trained from scratch
    assert {"video2lora", "trained-from-scratch"} <= set(data["tags"])
    assert "moving shapes and nothing else" in card.text.replace("\n", " ")
    if box.accuracy is not None:
        assert "model-index" in data and "No record of the run" not in card.text and "Not written" not in card.text


def test_the_cards_code_runs(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples" / "moving_shapes").mkdir(parents=True)
    (tmp_path / "examples" / "moving_shapes" / "checkpoint").symlink_to(box.path)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (box.path / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    capsys.readouterr()
    namespace: dict[str, Any] = {}
    for code in blocks:
        exec(compile(code, "README.md", "exec"), namespace)
    said = capsys.readouterr().out.strip().splitlines()
    if box.accuracy is not None:
        scene = make_scene(0, "test")
        (count,) = (query.response for query in make_queries(scene, tasks=["summary"]))
        number = count.split()[0]
        assert said[0] == said[-1] == number and said[1].startswith(f"{number} object"), (said, number)
    assert (
        isinstance(namespace["model"], PeftModel) and (tmp_path / "clip-lora" / "adapter_model.safetensors").exists()
    )


def test_adapters_answer_held_out_clips(box: Box, pipeline: Any) -> None:
    number = 6 if box.accuracy is None else CLIPS  # noise takes long: it does not end
    shapes = MovingShapes("test", number, seed=SEED)
    scenes = [shapes.scene(i) for i in range(number)]
    adapters = pipeline([shapes.video(scene) for scene in scenes], batch_size=20)
    asked = [(i, query) for i, scene in enumerate(scenes) for query in make_queries(scene, tasks=TASKS)]
    prompts = [query.prompt for _, query in asked]
    by_adapter = answer(pipeline, prompts, [adapters[i] for i, _ in asked])
    by_nothing = answer(pipeline, prompts)
    right = [exact_match(said, [query.response]) for said, (_, query) in zip(by_adapter, asked, strict=True)]
    guessed = [exact_match(said, [query.response]) for said, (_, query) in zip(by_nothing, asked, strict=True)]
    assert len(asked) > 6 * number and by_adapter != by_nothing
    if box.accuracy is not None:
        tasks = {task: [r for r, (_, q) in zip(right, asked, strict=True) if q.task == task] for task in TASKS}
        shown = {task: f"{sum(hits)} of {len(hits)}" for task, hits in tasks.items()}
        assert sum(right) / len(right) >= box.accuracy, shown
        assert sum(guessed) / len(guessed) <= 0.6, "the answers are in the questions"


def test_peft_gives_what_memory_gives(pipeline: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    model, processor = pipeline.model, pipeline.processor
    adapter = pipeline(MovingShapes("test", 1, seed=SEED).video(make_scene(0, "test", seed=SEED)))
    adapter.save_pretrained(tmp_path / "adapter")
    model.vlm.save_pretrained(tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.float32)
    through_peft = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    inputs = processor(text=["describe the video."])
    options = {"max_new_tokens": 60, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.inference_mode():
        ours = model.generate(**inputs, adapters=[adapter], **options)
        theirs = through_peft.generate(**inputs, **options, pad_token_id=processor.pad_token_id)
        plain = model.vlm.generate(**inputs, **options, pad_token_id=processor.pad_token_id)
    torch.testing.assert_close(ours.logits[0], theirs.logits[0], rtol=1e-4, atol=1e-4)
    assert ours.sequences.tolist() == theirs.sequences.tolist() != plain.sequences.tolist()


def test_the_demo_answers_from_the_adapter(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForImageTextToText

    from video2lora.cli import app, demo

    monkeypatch.setattr(demo, "REPEATS", 1)
    monkeypatch.setattr(demo, "_trained_example", lambda: str(box.path))
    longest = [] if box.accuracy is not None else ["--max-new-tokens", "4"]  # noise does not end
    result = CliRunner().invoke(app, ["demo", "--json", "--device", "cpu", "-o", str(tmp_path / "out"), *longest])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert not document["random_weights"] and document["frames"] == 12
    assert document["visual_tokens"] == {"before": 48, "now": 0}
    assert document["context_tokens"]["before"] > 48 > document["context_tokens"]["now"]
    assert [entry["task"] for entry in document["answers"]] == list(demo.SHAPES_TASKS)
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "base")
    assert PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).peft_config["default"].r > 0
    asked = CliRunner().invoke(
        app, ["ask", str(tmp_path / "out" / "adapter"), document["answers"][0]["question"], "--json", *longest]
    )
    assert json.loads(asked.stdout)["answers"][0]["answer"] == document["answers"][0]["adapter"]
    if box.accuracy is not None:
        wrong = [entry for entry in document["answers"] if not entry["right"]["adapter"]]
        assert wrong == []
        (described,) = [e for e in document["answers"] if e["question"] == "describe the video."]
        shown = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
        assert f"✓ {described['adapter']}" in shown  # what the README shows of the demo
        assert not all(entry["right"]["neither"] for entry in document["answers"])


def test_results_go_into_the_card_and_its_metadata(recipe: dict[str, Any], run_folder: Path, tmp_path: Path) -> None:
    """Only the untrained one: what the proof found, whatever that was, is what the card says."""
    prove, proof = recipe["prove"], tmp_path / "proof"
    runs = prove.declare(proof, None)
    with pytest.raises(SystemExit, match="not finished"):
        recipe["export"].export(run_folder / "hypernetwork", tmp_path / "box", proof)
    shards = {}
    for name, split in (("main", "test"), ("phrasings", "phrasings")):
        jobs = prove.Job.all_of(name, runs[name], proof)
        shards[split] = len(jobs)
        assert len(jobs) > 1
        shapes = {"benchmark__name": "moving_shapes", "benchmark__title": "Moving shapes", "benchmark__dataset": None}
        for seed, job in enumerate(jobs):
            few = {"num_samples": 2, "per_sample": 2, "tasks": ("colour", "size"), "seed": seed}
            scored = {"metrics": list(prove.METRICS), "margins": {"exact_match": 0.02}}
            scored["change"] = lambda row: row["scores"].update(unended=0.0)
            write_run(job.output, benchmark__split=split, **few, **shapes, **scored)
    recipe["export"].export(run_folder / "hypernetwork", tmp_path / "box", proof)
    card = ModelCard.load(tmp_path / "box" / "README.md")
    results = card.data.eval_results or []
    assert {result.dataset_split for result in results} == {"test", "phrasings"}
    assert {"exact_match"} <= {result.metric_type for result in results}
    for result in results:
        assert result.metric_args["num_answers"] == 4 * shards[result.dataset_split]
    assert re.search(r"^\| colour \| \d+ \| 0\.\d{3} \| 0\.\d{3} \| 0\.\d{3} \|$", card.text, re.MULTILINE)
    assert "| size (never trained on) |" in card.text and "2,000 steps. tokens 900." in card.text
    assert "| colour | 0.500 | 64 |" in card.text and str(tmp_path) not in card.content
    before = (tmp_path / "box" / "model.safetensors").read_bytes()
    with pytest.raises(OutputExistsError, match="exists already"):
        recipe["export"].export(run_folder / "hypernetwork", tmp_path / "box")
    recipe["export"].export(run_folder / "hypernetwork", tmp_path / "box", overwrite=True)
    assert (tmp_path / "box" / "model.safetensors").read_bytes() == before  # a card alone changes nothing else
    assert "Not written into this card yet" in (tmp_path / "box" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "box" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="would delete"):
        recipe["export"].export(run_folder / "hypernetwork", tmp_path / "box", overwrite=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_tests_see_a_path(tmp_path: Path) -> None:
    for text in ('"/home/somebody/models"', "'/tmp/x'", " C:\\models", "(/srv/run/vlm)"):
        assert A_PATH.search(text.encode())
    for text in ("https://host/data/x", "runs/tmp/x", "and/or"):
        assert not A_PATH.search(text.encode())


def answer(pipeline: Any, prompts: list[str], adapters: list[Any] | None = None) -> list[str]:
    """Greedy answers without any clip in the context."""
    inputs = pipeline.processor(text=prompts)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    with torch.inference_mode():
        if adapters is None:
            output = pipeline.model.vlm.generate(**inputs, **options, pad_token_id=pipeline.processor.pad_token_id)
        else:
            output = pipeline.model.generate(**inputs, **options, adapters=adapters)
    said = pipeline.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


def header_of(file: Path) -> bytes:
    """The JSON at the beginning of a safetensors file."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return stream.read(length)
