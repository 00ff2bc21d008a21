"""Runs of an evaluation: whatever stops or splits one, its records are those of a run never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from video2lora.cli.demo import _random_checkpoint
from video2lora.evaluation import runner, scoring
from video2lora.evaluation.benchmarks import Benchmark, load_benchmark
from video2lora.evaluation.comparison import compare_runs
from video2lora.evaluation.conditions import CONDITIONS, Condition, Decoding, PreparedSample
from video2lora.evaluation.judge import JudgeError, Judgment
from video2lora.evaluation.records import RECORD_FIELDS, TIMES, EvaluationError, EvaluationRun, read_run
from video2lora.evaluation.report_numbers import RunNumbers
from video2lora.evaluation.runner import evaluate_model
from video2lora.evaluation.samples import Answer
from video2lora.evaluation.scoring import score_run, verdicts
from video2lora.evaluation.work import plan_groups
from video2lora.modeling import Video2LoraModel, Video2LoraProcessor
from video2lora.testing import tiny_clip

from ..processes import run_code

CONDITION_NAMES = ["video", "adapter", "no_adapter", "other_adapter"]
DECODING = Decoding(max_new_tokens=6, batch_size=3)

RUN = """
import os, signal, sys
import torch
from video2lora.evaluation.benchmarks import load_benchmark
from video2lora.evaluation.conditions import CONDITIONS, Decoding
from video2lora.evaluation.journal import RunFolder
from video2lora.evaluation.report_numbers import RunNumbers
from video2lora.evaluation.runner import evaluate_model
from video2lora.modeling import Video2LoraModel, Video2LoraProcessor
torch.set_num_threads(1)
checkpoint, rows, output, units, *conditions = sys.argv[1:]
append, left = RunFolder.append, int(units)
def dying(self, *args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, *args)
RunFolder.append = dying
model = Video2LoraModel.from_pretrained(checkpoint)
processor = Video2LoraProcessor.from_pretrained(checkpoint)
evaluate_model(model, processor, load_benchmark(rows), conditions, output,
               decoding=Decoding(max_new_tokens=6, batch_size=3), num_workers=2)
"""


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six samples with nine questions about four clips: four groups of at most three questions."""
    folder = tmp_path_factory.mktemp("benchmark")
    for seed, name in enumerate("abcd"):
        tiny_clip(folder / f"{name}.mp4", seed=seed)
    videos = [("a", {}, 2), ("b", {"start": 0.5, "end": 1.5}, 1), ("b", {}, 1), ("c", {}, 3), ("d", {}, 1)]
    rows = [
        {
            "video": f"{name}.mp4",
            **span,
            "id": f"{name}{i}-{q}",
            "prompt": f"Question {q} — ünï 字?",
            "response": "a b",
        }
        for i, (name, span, count) in enumerate(videos)
        for q in range(count)
    ]
    rows.append({"video": "d.mp4", "start": 1.0, "id": "d9", "prompt": "What?", "response": "c", "task": "other"})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _random_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> tuple[Video2LoraModel, Video2LoraProcessor]:
    return Video2LoraModel.from_pretrained(checkpoint), Video2LoraProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def finished(model: Any, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run never stopped; read it, never write to it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    evaluate(model, rows_file, folder)
    return folder


def evaluate(model: Any, rows: Path | Benchmark, folder: Path, **options: Any) -> EvaluationRun:
    benchmark = load_benchmark(rows) if isinstance(rows, Path) else rows
    settings: dict[str, Any] = {"conditions": CONDITION_NAMES, "decoding": DECODING, "num_workers": 2} | options
    return evaluate_model(*model, benchmark, settings.pop("conditions"), folder, **settings)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _without_times(run: EvaluationRun | Path) -> list[dict[str, Any]]:
    run = read_run(run) if isinstance(run, Path) else run
    return run.records.drop_columns(TIMES).to_pylist()


class Echo(Condition):
    """A condition that needs no model: it repeats the prompt, and counts how often it was asked."""

    name = "video"

    def __init__(self, name: str = "video", text: str | None = None) -> None:
        self.name, self.text, self.batches = name, text, list[list[str]]()

    def settings(self) -> dict[str, Any]:
        return {"text": self.text}

    def answer(self, batch: Sequence[PreparedSample], decoding: Decoding) -> list[list[Answer]]:
        self.batches.append([prepared.sample.id for prepared in batch])
        return [
            [Answer(q.prompt if self.text is None else self.text, 3, True, 9, 4, prepared.num_frames)
             for q in prepared.sample.questions]
            for prepared in batch
        ]  # fmt: skip


# --- records -----------------------------------------------------------------------------------------------------


def test_there_is_a_row_for_each_question_and_condition(finished: Path, rows_file: Path) -> None:
    run, benchmark = read_run(finished), load_benchmark(rows_file)
    assert run.records.column_names == [*RECORD_FIELDS, "token_f1", "repetition", "empty", "unended"]
    asked = [(s.id, q.id, q.prompt, q.task) for s in benchmark for q in s.questions for _ in CONDITION_NAMES]
    rows = run.records.to_pylist()
    assert [(row["sample_id"], row["question_id"], row["prompt"], row["task"]) for row in rows] == asked
    assert [row["condition"] for row in rows] == CONDITION_NAMES * 9
    assert run.conditions == CONDITION_NAMES and run.tasks == ["", "other"] or run.tasks == ["other", ""]
    assert run.num_samples == len(benchmark) == 6 and run.errors == {}
    for row in rows:
        assert (row["visual_tokens"] > 0) == (row["condition"] == "video")
        assert row["answer_seconds"] > 0 and row["context_tokens"] > row["visual_tokens"]
        assert row["error"] is None and row["references"] in (["a b"], ["c"])
        assert row["unended"] == (not row["ended"])


def test_answers_are_those_of_the_conditions_by_themselves(finished: Path, model: Any, rows_file: Path) -> None:
    from video2lora.evaluation.conditions import prepare_samples

    answers = {}
    for name in CONDITION_NAMES:
        condition = CONDITIONS[name](*model)
        for prepared in prepare_samples(load_benchmark(rows_file), model[1], [condition], 0):
            assert isinstance(prepared, PreparedSample)
            (given,) = condition.answer([prepared], DECODING)
            for question, answer in zip(prepared.sample.questions, given, strict=True):
                answers[name, question.id] = answer.text
    rows = read_run(finished).records.to_pylist()
    assert {(row["condition"], row["question_id"]): row["answer"] for row in rows} == answers
    for name in CONDITION_NAMES[1:]:
        assert any(answers[name, q] != answers["video", q] for _, q in answers)


def test_spans_of_one_video_are_resampled_together(finished: Path, tmp_path: Path) -> None:
    run = read_run(finished)
    rows = [row for row in run.records.to_pylist() if row["condition"] == "video"]
    videos: dict[str, set[str]] = {}
    for row in rows:
        videos.setdefault(row["question_id"][0], set()).add(row["video_id"])
    assert [len(ids) for ids in videos.values()] == [1, 1, 1, 1] and len(set.union(*videos.values())) == 4
    assert len({row["sample_id"] for row in rows}) == 6
    assert not any("/" in row["video_id"] for row in rows)  # no place of this machine
    numbers = RunNumbers(run, 200)
    assert {verdict.comparison.num_clusters for verdict in verdicts(run)} == {4}
    assert {effect.comparison.num_clusters for effect in numbers.effects("token_f1") if effect.task is None} == {4}
    assert numbers.mean("token_f1", "video").num_clusters == 4
    found = compare_runs(finished, finished, metric="token_f1", resamples=200)
    assert found.comparison.num_clusters == 4


def test_what_is_declared_tells_the_run(finished: Path, model: Any, rows_file: Path) -> None:
    declared = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    assert declared == read_run(finished).settings
    assert declared["format_version"] == 1
    assert declared["benchmark"]["name"] == "rows" and declared["benchmark"]["num_questions"] == 9
    assert declared["benchmark"]["digest"] == load_benchmark(rows_file).digest
    assert declared["model"]["hypernetwork_sha256"] == model[0].hypernetwork_identity()["hypernetwork_sha256"]
    assert declared["base"]["id"] == model[0].config.base_model_name_or_path
    assert [condition["name"] for condition in declared["conditions"]] == CONDITION_NAMES
    assert declared["decoding"] == {"strategy": "greedy", "max_new_tokens": 6, "batch_size": 3}
    assert declared["sampling"]["num_frames"] == 8 and declared["sampling"]["longest_edge"] == 64
    assert declared["margins"] == {"token_f1": 0.05} and declared["alpha"] == 0.025
    assert declared["baseline"] == "video" and declared["judge"] is None
    assert {"versions", "device_name", "date"} == set(declared["environment"])
    assert sorted(path.name for path in finished.iterdir()) == ["answers", "records.parquet", "run.json"]
    assert [path.name for path in (finished / "answers").iterdir()] == ["part-00000.jsonl"]


def test_what_is_declared_is_there_before_the_first_answer(model: Any, rows_file: Path, tmp_path: Path) -> None:
    class Failing(Echo):
        def answer(self, batch: Sequence[PreparedSample], decoding: Decoding) -> list[list[Answer]]:
            declared = json.loads((tmp_path / "run.json").read_text())
            assert declared["margins"] == {"token_f1": 0.1} and declared["metrics"] == ["token_f1"]
            raise ZeroDivisionError("of the model")

    options: dict[str, Any] = {"metrics": ["token_f1"], "margins": {"token_f1": 0.1}}
    with pytest.raises(ZeroDivisionError, match="of the model"):
        evaluate(model, rows_file, tmp_path, conditions=[Echo("echo"), Failing()], **options)
    lines = (tmp_path / "answers" / "part-00000.jsonl").read_text().splitlines()
    assert [json.loads(line)["condition"] for line in lines] == ["echo"]  # what came before is kept
    with pytest.raises(EvaluationError, match="not finished"):
        read_run(tmp_path)


# --- going on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [1, 6])
def test_killed_and_started_again_equals_a_run_never_stopped(
    units: int, finished: Path, model: Any, checkpoint: Path, rows_file: Path, tmp_path: Path
) -> None:
    killed = _run(checkpoint, rows_file, tmp_path, units, CONDITION_NAMES)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    declared = (tmp_path / "run.json").read_bytes()
    part = tmp_path / "answers" / "part-00000.jsonl"
    assert len(part.read_bytes().splitlines()) == units
    with part.open("ab") as file:
        file.write(b'{"group": 0, "attempt": 0, "cond')  # killed while it wrote a line
    (tmp_path / ".records.parquet.1.part").write_bytes(b"half")
    before = [json.loads(line) for line in part.read_bytes().splitlines()[:units]]
    evaluate(model, rows_file, tmp_path)
    assert [json.loads(line) for line in part.read_bytes().splitlines()[:units]] == before  # not answered again
    assert _without_times(tmp_path) == _without_times(finished)
    assert (tmp_path / "run.json").read_bytes() == declared
    assert set(_files(tmp_path)) == set(_files(finished))


def test_killed_while_conditions_learn(model: Any, checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    """Conditions that draw and train go on as they would have, too."""
    few = {"caption": {"max_new_tokens": 16}, "lora_from_zero": {"max_new_tokens": 16, "steps": 2}}
    names = ["video", "kv_cache", "caption", "lora_from_zero"]
    options = [CONDITIONS[name](*model, **few.get(name, {})) for name in names]
    evaluate(model, rows_file, tmp_path / "whole", conditions=options)
    append, left = runner.RunFolder.append, 3

    class Killed(BaseException):
        pass

    def dying(self: Any, *args: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        append(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.RunFolder, "append", dying)
        with pytest.raises(Killed):
            evaluate(model, rows_file, tmp_path / "again", conditions=options)
    options = [CONDITIONS[name](*model, **few.get(name, {})) for name in names]
    evaluate(model, rows_file, tmp_path / "again", conditions=options)
    assert _without_times(tmp_path / "again") == _without_times(tmp_path / "whole")


def _run(checkpoint: Path, rows: Path, output: Path, units: int, conditions: Sequence[str]) -> Any:
    return run_code(RUN, checkpoint, rows, output, units, *conditions)


@pytest.mark.parametrize("step", ["run.json", "records.parquet", "scores"])
def test_killed_at_the_start_or_the_end(
    step: str, finished: Path, model: Any, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    replace_file = os.replace

    def dying(source: Any, target: Any) -> None:
        target = Path(target)
        if target.name == step or (step == "scores" and target.name == "records.parquet" and target.exists()):
            raise Killed
        replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(Killed):
            evaluate(model, rows_file, tmp_path)
    assert (step == "scores") == (tmp_path / "records.parquet").exists()
    if step != "run.json":
        for name in CONDITION_NAMES:
            monkeypatch.setattr(CONDITIONS[name], "answer", lambda *_: pytest.fail("nothing is answered twice"))
    evaluate(model, rows_file, tmp_path)
    assert _without_times(tmp_path) == _without_times(finished)
    if step == "scores":
        once = (tmp_path / "records.parquet").read_bytes()
        score_run(tmp_path)
        assert (tmp_path / "records.parquet").read_bytes() == once


def test_a_finished_run_is_returned_as_it_is(finished: Path, model: Any, rows_file: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    before = _files(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        for name in CONDITION_NAMES:
            patch.setattr(CONDITIONS[name], "answer", lambda *_: pytest.fail("nothing is answered twice"))
        run = evaluate(model, rows_file, tmp_path / "run")
    assert _files(tmp_path / "run") == before
    assert run.records.equals(read_run(finished).records)


@pytest.mark.parametrize("workers", [0, 3])
def test_threads_change_nothing(workers: int, finished: Path, model: Any, rows_file: Path, tmp_path: Path) -> None:
    run = evaluate(model, rows_file, tmp_path, num_workers=workers)
    assert _without_times(run) == _without_times(finished)


def test_each_group_is_answered_by_all_conditions_before_the_next_is_decoded_twice(
    model: Any, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from video2lora.evaluation import prepare

    opened: list[str] = []

    class Counting(prepare.VideoReader):
        def __init__(self, video: Any, **options: Any) -> None:
            opened.append(Path(video).name)
            super().__init__(video, **options)

    monkeypatch.setattr(prepare, "VideoReader", Counting)
    first, second = Echo("first"), Echo("second")
    benchmark = load_benchmark(rows_file)
    evaluate(model, benchmark, tmp_path, conditions=[first, second])
    assert opened == [Path(sample.video).name for sample in benchmark]
    groups = plan_groups([len(sample.questions) for sample in benchmark], 3)
    assert first.batches == second.batches == [[benchmark[i].id for i in group] for group in groups]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"decoding": Decoding(max_new_tokens=7, batch_size=3)}, "decoding.max_new_tokens=6, but 7"),
        ({"decoding": Decoding(max_new_tokens=6, batch_size=2)}, "decoding.batch_size=3, but 2"),
        ({"metrics": ["token_f1"]}, r"metrics=.*, but \['token_f1'\] .*score_run"),
        ({"margins": {"token_f1": 0.06}}, "margins.token_f1=0.05, but 0.06"),
        ({"margins": {}}, "margins.token_f1=0.05, but None"),
        ({"alpha": 0.05}, "alpha=0.025, but 0.05"),
        ({"baseline": "adapter"}, "baseline='video', but 'adapter'"),
        ({"seed": 1}, "seed=0, but 1"),
        ({"conditions": ["video", "adapter"]}, "conditions="),
    ],
)
@pytest.mark.parametrize("state", ["finished", "begun"])
def test_other_settings_are_refused(
    state: str, change: dict[str, Any], named: str, finished: Path, model: Any, rows_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    if state == "begun":
        (tmp_path / "run" / "records.parquet").unlink()
    before = _files(tmp_path / "run")
    with pytest.raises(EvaluationError, match=named):
        evaluate(model, rows_file, tmp_path / "run", **change)
    assert _files(tmp_path / "run") == before


def test_another_model_processor_or_benchmark_is_refused(finished: Path, model: Any, rows_file: Path) -> None:
    before = _files(finished)
    processor = Video2LoraProcessor(model[1].vlm_processor, num_frames=5, longest_edge=64)
    with pytest.raises(EvaluationError, match="sampling.num_frames=8, but 5"):
        evaluate((model[0], processor), rows_file, finished)
    benchmark = load_benchmark(rows_file)
    with pytest.raises(EvaluationError, match="as many, but others, or in another order.*another folder"):
        evaluate(model, replace(benchmark, samples=tuple(reversed(benchmark.samples))), finished)
    few = replace(benchmark, samples=benchmark.samples[:2], num_available=4)
    told = "9 questions about 6 videos in 8 frames, and 4 questions about 2 videos in 8 frames were asked for"
    with pytest.raises(EvaluationError, match=f"{told}. .*--num-samples"):
        evaluate(model, few, finished)
    other = Video2LoraModel.from_pretrained(model[0].name_or_path)
    next(iter(other.hypernetwork.scaler_B.values())).data.fill_(2.0)
    with pytest.raises(EvaluationError, match="model.hypernetwork_sha256"):
        evaluate((other, model[1]), rows_file, finished)
    assert _files(finished) == before


def test_answers_of_somebody_else_are_not_overwritten(model: Any, rows_file: Path, tmp_path: Path) -> None:
    (tmp_path / "records.parquet").write_bytes(b"mine")
    with pytest.raises(EvaluationError, match="run.json"):
        evaluate(model, rows_file, tmp_path)
    assert _files(tmp_path) == {"records.parquet": b"mine"}


def test_a_damaged_line_is_named(model: Any, rows_file: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "records.parquet").unlink()
    part = tmp_path / "run" / "answers" / "part-00000.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join([*lines[:2], b"\0" * 40 + b"\n", *lines[3:]]))
    with pytest.raises(EvaluationError, match="part-00000.jsonl, line 3 is damaged"):
        evaluate(model, rows_file, tmp_path / "run")
    part.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    evaluate(model, rows_file, tmp_path / "run")
    assert _without_times(tmp_path / "run") == _without_times(finished)


# --- videos that cannot be read ----------------------------------------------------------------------------------


def test_bad_videos_are_rows_with_an_error(model: Any, rows_file: Path, tmp_path: Path) -> None:
    rows, good = _with_bad(rows_file, tmp_path, "c.mp4")
    with pytest.raises(EvaluationError, match=r"1 of 6 videos .*max_bad_fraction=0.1.*c.mp4"):
        evaluate(model, rows, tmp_path / "out", max_bad_fraction=0.1)
    assert not (tmp_path / "out" / "records.parquet").exists()
    run = evaluate(model, rows, tmp_path / "out", max_bad_fraction=0.2)
    bad = [row for row in run.records.to_pylist() if row["error"] is not None]
    assert [row["condition"] for row in bad] == CONDITION_NAMES * 3
    assert list(run.errors) == [bad[0]["sample_id"]] and "c.mp4" in next(iter(run.errors.values()))
    for row in bad:
        assert row["answer"] is None and row["num_tokens"] is None and row["token_f1"] is None
    assert len(run.records) == 36 and run.unscored("token_f1") == 0
    first, second, samples = run.paired_scores("token_f1", "adapter", "video")
    assert len(first) == len(second) == len(samples) == 6 and bad[0]["sample_id"] not in samples


def test_bad_videos_are_tried_again_by_a_run_that_goes_on(model: Any, rows_file: Path, tmp_path: Path) -> None:
    rows, good = _with_bad(rows_file, tmp_path, "c.mp4")
    with pytest.raises(EvaluationError, match="max_bad_fraction"):
        evaluate(model, rows, tmp_path / "out")
    (tmp_path / "clips" / "c.mp4").write_bytes(good)
    evaluate(model, rows, tmp_path / "out")
    evaluate(model, rows, tmp_path / "never-bad")
    assert _without_times(tmp_path / "out") == _without_times(tmp_path / "never-bad")


def test_a_video_that_goes_bad_in_the_middle_of_a_group(model: Any, rows_file: Path, tmp_path: Path) -> None:
    """All conditions see the same videos in the end, however the run was stopped."""
    rows, good = _with_bad(rows_file, tmp_path, None)
    benchmark = load_benchmark(rows)
    append, left = runner.RunFolder.append, 2

    def dying(self: Any, *args: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        append(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.RunFolder, "append", dying)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, rows, tmp_path / "out")
    first = plan_groups([len(sample.questions) for sample in benchmark], 3)[0][0]
    Path(benchmark[first].video).write_bytes(b"")
    options = {"max_bad_fraction": 0.5}
    evaluate(model, rows, tmp_path / "out", **options)
    evaluate(model, rows, tmp_path / "always-bad", **options)
    assert _without_times(tmp_path / "out") == _without_times(tmp_path / "always-bad")
    assert benchmark[first].id in read_run(tmp_path / "out").errors


def _with_bad(rows_file: Path, folder: Path, name: str | None) -> tuple[Path, bytes]:
    clips = shutil.copytree(rows_file.parent, folder / "clips")
    if name is None:
        return clips / "rows.jsonl", b""
    good = (clips / name).read_bytes()
    (clips / name).write_bytes(b"this is no video")
    return clips / "rows.jsonl", good


# --- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"conditions": []}, "conditions"),
        ({"conditions": [Echo("a"), Echo("a")]}, "a, a"),
        ({"conditions": ["video", "adaptor"]}, "'adaptor'"),
        ({"baseline": "vidio"}, "baseline='vidio'"),
        ({"metrics": ["f1"]}, "'f1'"),
        ({"metrics": ["judge"]}, "judge="),
        ({"margins": {"rouge_l": 0.1}}, "rouge_l"),
        ({"margins": {"token_f1": 0.0}}, "more than 0"),
        ({"alpha": 0.5}, "alpha"),
        ({"num_workers": -1}, "num_workers"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction"),
    ],
)
def test_wrong_arguments_leave_nothing_behind(
    wrong: dict[str, Any], named: str, model: Any, rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(EvaluationError, match=named):
        evaluate(model, rows_file, tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


def test_samples_that_would_fail_in_the_middle_are_refused_at_the_start(
    model: Any, rows_file: Path, tmp_path: Path
) -> None:
    benchmark = load_benchmark(rows_file)
    first = benchmark[0]
    for samples, named in (
        ((), "no samples"),
        ((first, first), "two samples"),
        ((first, replace(benchmark[1], questions=first.questions)), "two questions"),
        ((replace(first, questions=()),), "has no question"),
        ((first,), "one video.*other_adapter"),
        ((replace(first, questions=(replace(first.questions[0], prompt="in <video>"),)),), "<video>"),
    ):
        with pytest.raises(EvaluationError, match=named):
            evaluate(model, replace(benchmark, samples=samples), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_condition_with_too_few_answers_is_an_error(model: Any, rows_file: Path, tmp_path: Path) -> None:
    class Forgetful(Echo):
        def answer(self, batch: Sequence[PreparedSample], decoding: Decoding) -> list[list[Answer]]:
            return [[] for _ in batch]

    with pytest.raises(RuntimeError, match="forgetful gave 0 answers"):
        evaluate(model, rows_file, tmp_path, conditions=[Forgetful("forgetful")])


def test_groups_depend_on_the_samples_alone() -> None:
    assert plan_groups([2, 1, 3, 1, 1, 1], 3) == [[0, 1], [2], [3, 4, 5]]
    assert plan_groups([7, 1], 3) == [[0], [1]]
    assert plan_groups([], 3) == []


# --- scores ------------------------------------------------------------------------------------------------------


@dataclass
class FakeJudge:
    """Grades by the answer's length; out of order after so many of them."""

    left: int = 10**6
    asked: int = 0
    model: str = "fake"

    def settings(self) -> dict[str, Any]:
        return {"model": self.model}

    def score(self, predictions: Sequence[str], references: Any, questions: Any) -> list[float | None]:
        scores: list[float | None] = []
        self.asked += len(predictions)
        for number, text in enumerate(predictions):
            if number >= self.left:
                raise JudgeError("it is dead.", [Judgment(s) for s in scores] + [None] * (len(predictions) - number))
            scores.append(None if text == "unreadable" else len(text) % 5 / 4)
        return scores


def test_a_judge_that_dies_loses_nothing(model: Any, rows_file: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"conditions": [Echo(), Echo("adapter", "short")]}
    options["metrics"], options["margins"] = ["judge", "token_f1"], {"judge": 0.1}
    whole = evaluate(model, rows_file, tmp_path / "whole", judge=FakeJudge(), **options)
    run = evaluate(model, rows_file, tmp_path / "run", judge=FakeJudge(left=5), **options)
    assert run.unscored("judge") == 13 and run.unscored("token_f1") == 0
    assert run.records["judge"].to_pylist()[:5] == whole.records["judge"].to_pylist()[:5]
    assert run.settings["judge"] == {"model": "fake"}
    run = score_run(tmp_path / "run", ["judge"], judge=FakeJudge(left=2))  # what there is stays
    assert run.unscored("judge") == 13
    run = evaluate(model, rows_file, tmp_path / "run", judge=FakeJudge(), **options)  # the same call again
    assert run.unscored("judge") == 0 and run.records.equals(whole.records)
    assert len({verdict.metric for verdict in verdicts(run)}) == 1


def test_grades_of_two_judges_are_never_mixed(model: Any, rows_file: Path, tmp_path: Path) -> None:
    conditions = [Echo(), Echo("adapter", "short")]
    runs = [tmp_path / name for name in "ab"]
    for run in runs:  # nobody declared a judge
        evaluate(model, rows_file, run, conditions=conditions, metrics=["token_f1"], margins={})
    a, b = (score_run(run, ["judge"], judge=FakeJudge(model=run.name)) for run in runs)
    assert (a.judge, b.judge, read_run(runs[0]).judge) == ({"model": "a"}, {"model": "b"}, {"model": "a"})
    assert a.settings["judge"] is None
    with pytest.raises(EvaluationError, match="graded by different judges .*'a'.*'b'"):
        compare_runs(*runs, metric="judge", resamples=200)
    kept = score_run(runs[0], ["judge"], judge=FakeJudge(model="b", left=0))  # it is dead: nothing is lost
    assert kept.judge == {"model": "a"} and kept.unscored("judge") == 0
    part = score_run(runs[0], ["judge"], judge=FakeJudge(model="b", left=5))
    assert part.judge == {"model": "b"} and part.unscored("judge") == 13  # none of a's grades among them
    again = score_run(runs[0], ["judge"], judge=FakeJudge(model="b"))
    assert again.unscored("judge") == 0 and read_run(runs[0]).judge == {"model": "b"}
    before = (runs[0] / "records.parquet").read_bytes()
    score_run(runs[0], ["token_f1", "judge"], judge=FakeJudge(model="b"))
    assert (runs[0] / "records.parquet").read_bytes() == before
    assert compare_runs(*runs, metric="judge", resamples=200).comparison.effect == 0


def test_grades_that_are_missing_are_counted(model: Any, rows_file: Path, tmp_path: Path) -> None:
    conditions = [Echo(), Echo("adapter", "unreadable")]
    run = evaluate(model, rows_file, tmp_path, conditions=conditions, metrics=["judge"], judge=FakeJudge(), margins={})
    assert run.unscored("judge") == 9 and run.scores("judge", "adapter") == [None] * 9
    assert run.paired_scores("judge", "adapter", "video") == ([], [], [])


def test_other_metrics_later_without_answering_again(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    run = score_run(tmp_path / "run", ["exact_match", "token_f1"])
    assert run.metrics == ["token_f1", "repetition", "empty", "unended", "exact_match"]
    assert run.settings == read_run(finished).settings
    assert run.records.drop_columns("exact_match").equals(read_run(finished).records)
    assert read_run(tmp_path / "run").records.equals(run.records)
    with pytest.raises(EvaluationError, match="'bertscore'"):
        score_run(tmp_path / "run", ["bertscore"])


def test_scores_are_those_of_the_metric(model: Any, rows_file: Path, tmp_path: Path) -> None:
    perfect = [Echo("video", "a b"), Echo("adapter", "c"), Echo("no_adapter", "a c")]
    run = evaluate(model, rows_file, tmp_path, conditions=perfect, metrics=["token_f1"])
    truth = [row["references"] == ["a b"] for row in run.records.to_pylist() if row["condition"] == "video"]
    assert sum(truth) == 8
    # "a" is an article
    assert run.scores("token_f1", "video") == [float(right) for right in truth]
    assert run.scores("token_f1", "adapter") == [float(not right) for right in truth]
    assert run.scores("token_f1", "video", "other") == [0.0]
    with pytest.raises(EvaluationError, match="no metric 'judge'"):
        run.scores("judge", "video")
    with pytest.raises(EvaluationError, match="no condition 'caption'"):
        run.scores("token_f1", "caption")
    found = verdicts(run)
    assert [verdict.condition for verdict in found] == ["adapter", "no_adapter"]
    assert found[0].comparison.n == 9 and found[0].comparison.num_clusters == 4
    assert found[0].comparison.effect == pytest.approx(-7 / 9) and not found[0].comparison.non_inferior
    for verdict in found:  # the report says the same
        effect = RunNumbers(run).effect(verdict.metric, verdict.condition)
        assert effect is not None and effect.comparison == verdict.comparison


def test_a_run_without_its_baseline_has_no_verdicts(model: Any, rows_file: Path, tmp_path: Path) -> None:
    assert verdicts(evaluate(model, rows_file, tmp_path, conditions=[Echo("adapter")])) == []


def test_a_metric_that_is_missing_is_told_before_anything_is_answered(
    model: Any, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from video2lora.evaluation import metrics

    def absent(*_: Any, **__: Any) -> Any:
        raise ImportError('rouge_l needs rouge-score: pip install "video2lora[evaluation]"')

    monkeypatch.setattr(metrics, "score", absent)
    with pytest.raises(EvaluationError, match="pip install"):
        scoring.check_metrics(["rouge_l"], None)
