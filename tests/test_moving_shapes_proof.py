"""The moving-shapes proof: every run can be run, in processes that are killed and go on; the page says the records."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow.parquet import read_schema

from video2lora.evaluation.records import TIMES, make_records, read_run, with_scores, write_records

RECIPE = Path(__file__).parents[1] / "examples" / "moving_shapes"
NAMES = ["small_vlm", "batches", "train_hypernetwork", "proof_runs", "proof_numbers", "proof_plots", "results_text",
         "results_main", "results_sweeps", "results", "prove"]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(recipe_module):
    return SimpleNamespace(**{name: recipe_module(name) for name in NAMES})


@pytest.fixture(scope="module")
def checkpoint(recipe, tmp_path_factory) -> Path:
    """A model of the recipe's form, but tiny and untrained, with adapters that do something."""
    from transformers import GenerationConfig, SmolVLMForConditionalGeneration

    from video2lora import Video2LoraModel, Video2LoraProcessor
    from video2lora.data.moving_shapes import vocabulary_texts

    folder = tmp_path_factory.mktemp("proof")
    tokenizer = recipe.small_vlm.build_tokenizer(vocabulary_texts())
    config = recipe.small_vlm.build_vlm(tokenizer).config
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    for name, value in sizes.items():
        setattr(config.text_config, name, value)
        setattr(config.vision_config, name, value)
    config.text_config.num_key_value_heads, config.text_config.head_dim = 2, 16
    torch.manual_seed(0)
    vlm = SmolVLMForConditionalGeneration(config)
    vlm.generation_config = GenerationConfig(**ids)
    processor = recipe.small_vlm.build_processor(tokenizer)
    vlm.save_pretrained(folder / "vlm")
    processor.save_pretrained(folder / "vlm")
    model = Video2LoraModel.from_vlm(
        folder / "vlm", rank=2, target_modules=["down_proj"], latent_size=32, num_latents=2, num_blocks=1,
        perceiver_num_heads=2, perceiver_num_key_value_heads=2, perceiver_head_dim=16, num_frames=12, longest_edge=64,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.hypernetwork.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder / "checkpoint", bundle_base=True)
    Video2LoraProcessor.from_config(model.config, vlm_processor=processor).save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


def prove(recipe, monkeypatch, *arguments: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["prove", *map(str, arguments)])
    recipe.prove.main()


def answers(folder: Path) -> Any:
    records = read_run(folder).records
    return records.drop_columns(list(TIMES)).to_pylist()


# --- what is run ----------------------------------------------------------------------------------------------------


def test_a_turn_is_the_ordinary_processors(recipe, checkpoint):
    from video2lora import Video2LoraProcessor

    runs = recipe.proof_runs
    for run in (runs.Run(), runs.Run(num_frames=5, clip_frames=36), runs.Run(longest_edge=128)):
        ordinary = runs.processor_of(checkpoint, run)
        faster = runs.processor_of(checkpoint, run)
        (sample,) = runs.benchmark_of(run, range(7, 8))
        frames = ordinary.load_video(sample.video)
        faster.encode_video(frames)
        for question in sample.questions:
            expected = Video2LoraProcessor.encode_video(ordinary, frames, question.prompt, True, ordinary.pictures)
            found = faster.encode_video(frames, question.prompt, add_generation_prompt=True)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name


def test_shards_are_the_run_in_parts(recipe):
    for name, run in recipe.proof_runs.RUNS.items():
        clips = [clip for shard in run.shards for clip in shard]
        assert clips == list(range(run.clips)), name
        assert min(map(len, run.shards)) > 1 and max(map(len, run.shards)) <= run.group
    runs = recipe.proof_runs
    whole = runs.benchmark_of(runs.Run(clips=6))
    parts = [sample.id for clips in (range(4), range(4, 6)) for sample in runs.benchmark_of(runs.Run(clips=6), clips)]
    assert [sample.id for sample in whole] == parts
    run = replace(runs.across(8), clips=30)
    apart = [{sample.id for sample in runs.benchmark_of(run, clips)} for clips in (range(15), range(15, 30))]
    assert len(apart[0]) == len(apart[1]) == 15 and not apart[0] & apart[1]


def test_every_claim_has_at_least_2000_clips_but_where_it_is_said(recipe):
    few = {name: run.clips for name, run in recipe.proof_runs.RUNS.items() if run.clips < 4000}
    assert few == {"frames_256": 2000, "frames_1024": 1000}


def test_every_run_runs_and_goes_on(recipe, checkpoint, tmp_path, monkeypatch):
    """Those with hundreds of frames apart, which take long without a GPU."""
    monkeypatch.setattr(recipe.proof_runs, "GROUP", 2)  # so that four clips are two shards
    names = [name for name in recipe.proof_runs.RUNS if name not in ("frames_96", "frames_256", "frames_1024")]
    declared = recipe.proof_runs.RUNS
    shorter = {name: replace(declared[name], clips=2) for name in names} | {"main": replace(declared["main"], clips=4)}
    monkeypatch.setattr(recipe.prove, "RUNS", shorter)
    monkeypatch.setattr(recipe.prove, "Decoding", lambda **given: decoding(**given | {"max_new_tokens": 4}))
    from video2lora.evaluation.conditions import Decoding as decoding

    prove(recipe, monkeypatch, "run", checkpoint, "-o", tmp_path / "proof", "--processes", 1)
    shards = sorted(path.parent.relative_to(tmp_path / "proof") for path in tmp_path.rglob("records.parquet"))
    assert len(shards) == len(names) + 1 and {shard.parts[0] for shard in shards} == set(names)
    assert {len(set(row["sample_id"] for row in answers(tmp_path / "proof" / shard))) for shard in shards} == {2}

    def never(job: Any) -> float:
        raise AssertionError(f"{job} is done")

    monkeypatch.setattr(recipe.prove, "answer", never)
    prove(recipe, monkeypatch, "run", checkpoint, "-o", tmp_path / "proof", "--processes", 1)
    monkeypatch.setattr(recipe.prove, "RUNS", shorter | {"main": replace(declared["main"], clips=3)})
    with pytest.raises(SystemExit, match="declares other runs"):
        prove(recipe, monkeypatch, "run", checkpoint, "-o", tmp_path / "proof")
    monkeypatch.setattr(recipe.prove, "RUNS", shorter)
    monkeypatch.setattr(recipe.prove, "GROUP", 7)  # other shards with the same names
    with pytest.raises(SystemExit, match="declares other runs"):
        prove(recipe, monkeypatch, "run", checkpoint, "-o", tmp_path / "proof")
    prove(recipe, monkeypatch, "report", tmp_path / "proof", "-o", tmp_path / "results.md")
    with pytest.raises(SystemExit, match="results.md is there already.*--overwrite"):
        prove(recipe, monkeypatch, "report", tmp_path / "proof", "-o", tmp_path / "results.md")
    page = (tmp_path / "results.md").read_text()
    assert "| main | test | 12 of 12 | video, 64 | 4 |" in page and "Not run" not in page
    assert {path.name for path in tmp_path.glob("*.png")} >= {"main_accuracy.png", "frames_accuracy.png"}


def test_processes_killed_go_on_and_answer_the_same(recipe, checkpoint, tmp_path, monkeypatch, capsys):
    arguments = ["run", checkpoint, "--clips", 1, "--only", "across_2", "frames_8", "frames_4", "-o"]
    killed = [sys.executable, RECIPE / "prove.py", *arguments, tmp_path / "killed", "--processes", 2]
    killed, environment = list(map(str, killed)), os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(killed, stdout=subprocess.PIPE, text=True, env=environment) as process:
        lines = iter(process.stdout)
        assert next(lines) == "3 of 3 shards to do, 2 processes\n"
        assert next(lines).startswith("1/3")
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()  # ends when its workers, which hold the pipe, are gone too
    records = (tmp_path / "killed").rglob("records.parquet")  # one that is not scored yet is not finished
    finished = [path for path in records if set(recipe.prove.METRICS) <= set(read_schema(path).names)]
    assert 1 <= len(finished) < 3, rest
    capsys.readouterr()
    prove(recipe, monkeypatch, *arguments, tmp_path / "killed", "--processes", 1)  # by one process what two began
    assert capsys.readouterr().out.startswith(f"{3 - len(finished)} of 3 shards to do")
    prove(recipe, monkeypatch, *arguments, tmp_path / "whole", "--processes", 1)
    for path in (tmp_path / "whole").rglob("records.parquet"):
        assert answers(path.parent) == answers(tmp_path / "killed" / path.parent.relative_to(tmp_path / "whole"))


# --- what is said of it --------------------------------------------------------------------------------------------

SKILL = {"video": 1.0, "adapter": 1.0, "caption": 0.9, "no_adapter": 0.0, "other_adapter": 0.1}


def skill(condition: str, task: str, run: Any) -> float:
    """How often a condition is right in made-up records."""
    value = SKILL.get(condition, 0.97)
    if condition.startswith("adapter_segment_1") or condition.startswith("adapter_segment_2_of"):
        value = 0.6
    if condition == "adapter" and task == "position":
        value = 0.8  # so that something fails
    if condition == "video" and run.num_frames != 12:
        value -= 0.25
    return value


def make_run(recipe, name: str, run: Any, folder: Path, seed: int = 0) -> None:
    """Records of a run, as `evaluate_model` leaves them, of answers that are right as often as they should be."""
    draw = random.Random(f"{name}/{seed}")
    for job in recipe.prove.Job.all_of(name, run, folder):
        samples = recipe.proof_runs.benchmark_of(run, job.clips).samples
        rows = []
        for place, sample in enumerate(samples):
            for question in sample.questions:
                for condition in run.conditions:
                    right = draw.random() < skill(condition, question.task, run)
                    said = question.references[0] if right else "two objects. a red star at top left stays still."
                    rows.append(
                        {"condition": condition, "sample_id": sample.id, "video_id": sample.id, "answer": said,
                         "question_id": question.id, "task": question.task, "prompt": question.prompt,
                         "references": list(question.references), "num_tokens": 3, "ended": True,
                         "context_tokens": 9, "visual_tokens": 0, "num_frames": run.num_frames,
                         "prepare_seconds": 0.0, "answer_seconds": 0.0,
                         "extra": samples[(place + 1) % len(samples)].id if condition == "other_adapter" else None}
                    )  # fmt: skip
        records = make_records(rows)
        right = [float(row["answer"] in row["references"]) for row in rows]
        for metric in recipe.proof_runs.METRICS:
            records = with_scores(records, metric, right if metric == "exact_match" else [0.0] * len(rows))
        job.output.mkdir(parents=True)
        environment = {"versions": {"video2lora": "0"}, "device_name": "made up", "date": "2026-01-01T00:00:00"}
        settings = {name: {} for name in recipe.proof_numbers.SAME} | {
            "format_version": 1, "environment": environment, "decoding": {"batch_size": 8},
            "conditions": [{"name": condition, "settings": {}} for condition in run.conditions],
        }  # fmt: skip
        (job.output / "run.json").write_text(json.dumps(settings))
        write_records(job.output, records)


@pytest.fixture(scope="module")
def made_up(recipe, tmp_path_factory) -> Path:
    """All runs of a proof, with made-up answers about few clips."""
    folder = tmp_path_factory.mktemp("made-up") / "proof"
    for name, run in recipe.prove.declare(folder, 150).items():
        make_run(recipe, name, run, folder)
    return folder


def rows_of(folder: Path, run: str) -> list[dict[str, Any]]:
    return [row for path in sorted((folder / run).iterdir()) for row in read_run(path).records.to_pylist()]


def accuracy(rows: list[dict[str, Any]], condition: str, task: str | None = None, ids: Any = None) -> float:
    found = [row["exact_match"] for row in rows if row["condition"] == condition and task in (None, row["task"])
             and (ids is None or row["question_id"] in ids)]  # fmt: skip
    return sum(found) / len(found)


def cells(page: str, *begin: str) -> list[str]:
    """The cells of the first line of a table that begins so."""
    (line, *_) = [line for line in page.splitlines() if line.startswith("| " + " | ".join(begin) + " |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def page(recipe, made_up) -> str:
    other = made_up.with_name("captions_only")
    runs = recipe.prove.declare(other, 150)
    make_run(recipe, "main", runs["main"], other, seed=1)
    recipe.results.write_results(made_up, made_up.with_name("results.md"), other)
    return made_up.with_name("results.md").read_text()


def test_numbers_are_those_of_the_records(recipe, made_up, page):
    rows = rows_of(made_up, "main")
    for task in ("caption", "order", "position"):
        shown = cells(page, task)[2:7]
        names = ("video", "adapter", "no_adapter", "other_adapter", "caption")
        assert shown == [f"{accuracy(rows, name, task):.3f}" for name in names]
    composed = rows_of(made_up, "composition")
    kept = accuracy(composed, "adapter_4_segments") / accuracy(composed, "adapter")
    (line,) = [line for line in page.splitlines() if line.startswith("| Composition, questions of all tasks: 4 seg")]
    assert f"keeps {kept:.1%}" in line and ("PASS" in line) == (kept >= 0.97)


def test_frames_that_decide_nothing_are_apart(recipe, made_up, page):
    from video2lora.data.moving_shapes import answerable, make_queries, make_scene

    rows, base = rows_of(made_up, "frames_4"), rows_of(made_up, "main")
    assert len({row["question_id"] for row in rows}) == len({row["question_id"] for row in base})
    ids = set()
    for row in rows:
        *_, split, seed, number = row["sample_id"].split("-")
        scene = make_scene(int(number), split, seed=int(seed))
        if answerable(scene, make_queries(scene)[int(row["question_id"].split("/")[1])], 4):
            ids.add(row["question_id"])
    decided = page[page.index("### Questions that the frames decide") :]
    assert cells(decided, "motion", "adapter")[2] == f"{accuracy(rows, 'adapter', 'motion', ids):.3f}"
    change = page[page.index("### Change from 12 frames of video") :]
    expected = accuracy(rows, "adapter", "motion", ids) - accuracy(base, "adapter", "motion", ids)
    assert cells(change, "motion", "adapter")[2].startswith(f"{expected:+.3f} [")


def test_claims_fail_where_they_do_and_say_it(recipe, made_up, page):
    told = "| 12 frames: adapter non-inferior to video in context at 0.02 on every task it was"
    assert f"{told} trained on | **FAIL** |" in page and f"{told} never trained on | " in page
    fails = page[page.index("## What fails") : page.index("## 12 frames")]
    assert "  - position: " in fails and "  - shape: -" not in fails
    assert "a red star at top left" in fails  # a wrong answer
    for what in ("no adapter not better than the answer prior", "segments keep 97%", "Pairs of colour and shape"):
        assert what in page
    assert "Not run" not in page and "## Trained on captions only" in page and "### Exactness of order" in page
    for plot in ("main_accuracy", "frames_accuracy", "pixels_accuracy", "composition"):
        assert f"({plot}.png)" in page and made_up.with_name(f"{plot}.png").exists()


def test_what_is_not_shown_is_no_failure(recipe):
    claim = recipe.proof_numbers.Claim
    assert claim("", True, "").verdict == "PASS" and claim("", None, "").verdict == "open"
    assert claim("", False, "", ["a"]).verdict == "**FAIL**"
    assert claim("", False, "", ["a"], refuted=False).verdict == "not shown"


def test_the_prior_is_what_the_best_guess_gets(recipe):
    numbers = recipe.proof_numbers
    assert numbers.kind("how many red stars are there?") == "how many COLOUR SHAPE are there?"
    guess = numbers.guesser()
    assert guess["is there a COLOUR SHAPE?"] in ("yes", "no")
    assert numbers.unname("which appears first, the red star or the blue cross?", "#1") == "the blue cross"


def test_shards_of_two_models_are_no_run(recipe, made_up, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe.proof_runs, "GROUP", 30)
    run = replace(recipe.proof_runs.RUNS["across_2"], clips=60)
    make_run(recipe, "across_2", run, tmp_path)
    folders = [job.output for job in recipe.prove.Job.all_of("across_2", run, tmp_path)]
    assert len(folders) > 1
    settings = json.loads((folders[1] / "run.json").read_text())
    (folders[1] / "run.json").write_text(json.dumps(settings | {"model": {"hypernetwork_sha256": "other"}}))
    with pytest.raises(ValueError, match="their model differs"):
        recipe.proof_numbers.Numbers("across_2", run, folders)


def test_what_is_not_finished_is_said(recipe, made_up, tmp_path):
    folder = tmp_path / "proof"
    runs = recipe.prove.declare(folder, 4)
    make_run(recipe, "phrasings", runs["phrasings"], folder)
    recipe.results.write_results(folder, tmp_path / "results.md")
    page = (tmp_path / "results.md").read_text()
    assert "Not run, or not finished: main, combinations" in page and "| 12 frames | not run | - |" in page


def test_what_is_half_finished_or_was_cut_otherwise_is_said(recipe, tmp_path, monkeypatch):
    """Nothing is told of half a run: not where shards are missing, and not where they are half as large."""
    monkeypatch.setattr(recipe.proof_runs, "GROUP", 2)
    runs = recipe.prove.declare(tmp_path, 8)
    for name in ("phrasings", "pixels_32", "frames_24"):
        make_run(recipe, name, runs[name], tmp_path)
    (tmp_path / "phrasings" / "clips_00002" / "records.parquet").unlink()  # begun
    shutil.rmtree(tmp_path / "phrasings" / "clips_00006")
    unscored = tmp_path / "frames_24" / "clips_00004"
    records = read_run(unscored).records
    write_records(unscored, records.drop_columns(["unended"]))
    recipe.results.write_results(tmp_path, tmp_path / "results.md")
    page = (tmp_path / "results.md").read_text()
    assert "phrasings (2 of 4 shards)" in page and "frames_24 (3 of 4 shards)" in page
    assert "| pixels_32 | test | 12 of 12 | pictures of 32 | 8 |" in page
    monkeypatch.setattr(recipe.proof_runs, "GROUP", 4)
    found, missing = recipe.proof_numbers.read_runs(tmp_path, runs, recipe.prove.Job.all_of)
    assert not found and "pixels_32 (its shards have 4 clips, not 8)" in missing
    records = tmp_path / "pixels_32" / "clips_00000" / "records.parquet"
    records.write_bytes(records.read_bytes()[:-9])
    with pytest.raises(SystemExit, match="clips_00000 and run it again"):
        recipe.proof_numbers.read_runs(tmp_path, runs, recipe.prove.Job.all_of)


def test_facts_are_those_of_the_scenes(recipe, made_up):
    """The records say what a clip's own caption is, so no scene is drawn for it; in all splits and phrasings."""
    from video2lora.data.moving_shapes import facts_right

    for name in ("main", "phrasings", "combinations"):
        rows = [row for row in rows_of(made_up, name) if row["task"] == "caption" and row["condition"] == "adapter"]
        scores = [facts_right(row["answer"], recipe.proof_numbers.scene_of(row["sample_id"])) for row in rows]
        _, runs = recipe.prove.read_declared(made_up)
        found, _ = recipe.proof_numbers.read_runs(made_up, {name: runs[name]}, recipe.prove.Job.all_of)
        expected = np.array(scores, dtype=float).mean(axis=0)
        np.testing.assert_allclose(list(found[name].facts("adapter").values()), expected, rtol=1e-12)


def test_intervals_of_shares(recipe):
    from statsmodels.stats.proportion import proportion_confint

    for right, number in ((0, 10), (97, 100), (10, 10)):
        expected = proportion_confint(right, number, method="wilson")
        np.testing.assert_allclose(recipe.proof_numbers.wilson(right / number, number), expected, atol=1e-4)
