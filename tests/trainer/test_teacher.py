"""Teacher targets: what the base that sees the video says, whatever stops or splits the run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from video2lora.data import DatasetError, load_rows
from video2lora.modeling import Video2LoraProcessor
from video2lora.testing import tiny_clip, tiny_idefics3, tiny_qwen2_5_vl, tiny_smolvlm
from video2lora.trainer import teacher_files
from video2lora.trainer.losses import kl_per_token, kl_top_k_per_token
from video2lora.trainer.teacher import TeacherLogits, plan_units, teach
from video2lora.trainer.teacher_logits import LogitsWriter, top_k_targets
from video2lora.trainer.teacher_queries import Teacher

from ..processes import run_code

FAMILIES = {"smolvlm": tiny_smolvlm, "idefics3": tiny_idefics3, "qwen2_5_vl": tiny_qwen2_5_vl}
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "batch_size": 3, "num_workers": 2}

KILLED = """
import os, signal, sys
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from video2lora.data import load_rows
from video2lora.modeling import Video2LoraProcessor
from video2lora.trainer.teacher import teach
torch.set_num_threads(1)
base, rows, output, calls = sys.argv[1:]
vlm = AutoModelForImageTextToText.from_pretrained(base)
generate, left = vlm.generate, int(calls)
def dying(**kwargs):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return generate(**kwargs)
vlm.generate = dying
processor = Video2LoraProcessor(AutoProcessor.from_pretrained(base), num_frames=4, longest_edge=64)
teach(vlm, processor, load_rows(rows), output, max_new_tokens=8, batch_size=3, num_workers=2, top_k=5)
"""


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven rows with ten queries about three clips; one response is given."""
    folder = tmp_path_factory.mktemp("rows")
    for seed, name in enumerate("abc"):
        tiny_clip(folder / f"{name}.mp4", seed=seed)
    rows: list[dict[str, Any]] = [
        {"id": "r0", "video": "a.mp4", "queries": [_query("What moves?"), _query("Describe the scene in detail.")]},
        {"id": "r1", "video": "b.mp4", "start": 0.5, "end": 1.5, "prompt": "Summarize."},
        {"id": "r2", "video": "a.mp4", "prompt": "Which colour?", "response": "The square is blue."},
        {"video": "c.mp4", "queries": [_query("One?"), _query("And a second one, somewhat longer?"), _query("Third")]},
        {"id": "r4", "video": "c.mp4", "start": 1.0, "prompt": "What comes last?"},
        {"id": "r5", "video": "b.mp4", "prompt": "Ünïcode — 字?"},
        {"id": "r6", "video": "b.mp4", "prompt": "What moves?"},
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def _query(prompt: str, response: str | None = None) -> dict[str, str | None]:
    return {"prompt": prompt, "response": response}


@pytest.fixture(scope="module")
def model(tiny_vlm_dir: Path) -> tuple[Any, Video2LoraProcessor]:
    processor = Video2LoraProcessor(AutoProcessor.from_pretrained(tiny_vlm_dir), num_frames=4, longest_edge=64)
    return AutoModelForImageTextToText.from_pretrained(tiny_vlm_dir), processor


@pytest.fixture(scope="module")
def taught(model: Any, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run never stopped, with logits; read it, never write to it."""
    folder = tmp_path_factory.mktemp("taught") / "out"
    teach(*model, load_rows(rows_file), folder, top_k=5, **OPTIONS)
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def _plain_inputs(processor: Video2LoraProcessor, row: Any, prompt: str) -> dict[str, torch.Tensor]:
    frames = processor.load_video(row["video"], start=row["start"], end=row["end"])
    return processor.encode_video(frames, prompt, add_generation_prompt=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_responses_are_those_of_plain_generation_one_by_one(family: str, rows_file: Path, tmp_path: Path) -> None:
    vlm, vlm_processor = FAMILIES[family]()
    processor = Video2LoraProcessor(vlm_processor, num_frames=4, longest_edge=64)
    rows = load_rows(rows_file)
    summary = teach(vlm, processor, rows, tmp_path / "out", top_k=4, **OPTIONS)
    assert (summary.num_rows, summary.num_queries, summary.num_generated, summary.num_skipped) == (7, 10, 9, 0)
    for row, line in zip(rows, _manifest(tmp_path / "out"), strict=True):
        for query, answer in zip(row["queries"], line["queries"], strict=True):
            if query["response"] is not None:
                assert answer == query
                continue
            inputs = _plain_inputs(processor, row, query["prompt"])
            ids = vlm.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert answer["token_ids"] == ids.tolist()
            assert answer["truncated"] == (ids[-1] != processor.tokenizer.eos_token_id)
            text = processor.decode(ids, skip_special_tokens=True)
            assert answer["response"] == (text.rstrip("\ufffd") if answer["truncated"] else text).strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_whole_turn_with_the_video(family: str, rows_file: Path, tmp_path: Path) -> None:
    vlm, vlm_processor = FAMILIES[family]()
    processor = Video2LoraProcessor(vlm_processor, num_frames=4, longest_edge=64)
    rows = load_rows(rows_file)
    teach(vlm, processor, rows, tmp_path, top_k=7, **OPTIONS)
    answered = load_rows(tmp_path / "manifest.jsonl")
    stored = TeacherLogits(tmp_path)
    teacher = Teacher(vlm, processor, answered, max_new_tokens=8, batch_size=3, top_k=7, overwrite_responses=False)
    assert len(stored) == 10
    for index, row in enumerate(answered):
        queries = teacher.prepare(index)
        assert isinstance(queries, list)
        together, _ = teacher.label_logits(queries)
        expected = [_whole_turn(vlm, processor, row, query) for query in row["queries"]]
        torch.testing.assert_close(together, torch.cat([logits for logits, _ in expected]), rtol=1e-5, atol=1e-5)
        for number, (logits, labels) in enumerate(expected):
            found = stored[row["id"], number]
            assert found["labels"].tolist() == labels
            torch.testing.assert_close(found["logsumexp"], logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
            values = logits.gather(-1, found["token_ids"])
            torch.testing.assert_close(values, logits.topk(7).values, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found["logits"], values, rtol=1e-5, atol=1e-5)


def _whole_turn(vlm: Any, processor: Video2LoraProcessor, row: Any, query: Any) -> tuple[torch.Tensor, list[int]]:
    """Logits at the labels, from one forward over the turn as the template renders it, video and answer together."""
    inputs = _plain_inputs(processor, row, query["prompt"])
    _, labels = processor.encode_turn(query["prompt"], query["response"])
    answer = [token for token in labels if token != -100]
    head = processor.decode(inputs["input_ids"][0])
    turn = processor.render("P", query["response"])
    text = head + turn[len(processor.render("P")) :]
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    end = inputs["input_ids"].shape[1] + len(answer)
    assert ids[inputs["input_ids"].shape[1] : end] == answer
    inputs = dict(inputs)
    inputs["input_ids"] = torch.tensor([ids[:end]])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(answer)))
    with torch.no_grad():
        return vlm(**inputs).logits[0, -len(answer) - 1 : -1], answer


def test_labels_that_begin_before_the_prompt_ends(
    model: Any, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a tokenizer merges the last of the prompt with the first of the answer."""
    vlm, processor = model
    plain = processor.encode_turn

    def merged(prompt: str, response: str) -> tuple[list[int], list[int]]:
        ids, labels = plain(prompt, response)
        start = labels.index(ids[-1]) - len(response) - 1  # with the template's space
        assert labels[start - 1] == -100 != labels[start]
        return [*ids[: start - 1], 99, *ids[start + 1 :]], [*labels[: start - 1], 99, *labels[start + 1 :]]

    monkeypatch.setattr(processor, "encode_turn", merged)
    rows = load_rows([{"video": str(rows_file.parent / "a.mp4"), "prompt": "What?", "response": "red"}])
    teacher = Teacher(vlm, processor, rows, max_new_tokens=8, batch_size=3, top_k=7, overwrite_responses=False)
    (query,) = teacher.prepare(0)
    logits, (labels,) = teacher.label_logits([query])
    answer = [99, *plain("What?", "red")[0][-4:]]
    assert labels.tolist() == answer
    inputs = dict(_plain_inputs(processor, rows[0], "What?"))
    inputs["input_ids"] = torch.tensor([inputs["input_ids"][0, :-1].tolist() + answer])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        expected = vlm(**inputs).logits[0, -len(answer) - 1 : -1]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_the_manifest_is_training_rows_in_the_order_of_the_input(taught: Path, rows_file: Path) -> None:
    before, after = load_rows(rows_file), load_rows(taught / "manifest.jsonl")
    assert after["id"] == before["id"] and after["video"] == before["video"]
    assert after["start"] == before["start"] and after["end"] == before["end"]
    for old, new in zip(before["queries"], after["queries"], strict=True):
        assert [query["prompt"] for query in new] == [query["prompt"] for query in old]
        assert all(query["response"] is not None for query in new)
    assert after[2]["queries"] == before[2]["queries"]
    assert sorted(path.name for path in taught.iterdir()) == [
        "logits-00000.safetensors", "logits-index.json", "manifest.jsonl", "teach.json"
    ]  # fmt: skip
    state = json.loads((taught / "teach.json").read_text())
    assert state["settings"]["num_frames"] == 4 and state["settings"]["top_k"] == 5
    assert state["settings"]["dtype"] == "float32" and torch.__version__.startswith(state["versions"]["torch"])


def test_a_finished_run_is_not_done_again(taught: Path, model: Any, rows_file: Path, tmp_path: Path) -> None:
    shutil.copytree(taught, tmp_path / "out")
    before = _files(tmp_path / "out")
    vlm = AutoModelForImageTextToText.from_config(model[0].config)  # other weights would answer otherwise
    vlm.name_or_path, vlm.generation_config = model[0].name_or_path, model[0].generation_config
    summary = teach(vlm, model[1], load_rows(rows_file), tmp_path / "out", top_k=5, **OPTIONS)
    assert _files(tmp_path / "out") == before
    assert summary.num_generated == 9


@pytest.mark.parametrize("workers", [0, 3])
def test_threads_change_nothing(workers: int, taught: Path, model: Any, rows_file: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"num_workers": workers}
    teach(*model, load_rows(rows_file), tmp_path, top_k=5, **options)
    assert _files(tmp_path) == _files(taught)


def test_killed_and_started_again_equals_a_run_never_stopped(
    taught: Path, model: Any, rows_file: Path, tiny_vlm_dir: Path, tmp_path: Path
) -> None:
    killed = run_code(KILLED, tiny_vlm_dir, rows_file, tmp_path, 1)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "manifest.jsonl").exists()
    part = tmp_path / "parts" / "part-00000.jsonl"
    units = [json.loads(line)["unit"] for line in part.read_text().splitlines()]
    assert units == [0, 1]
    with part.open("ab") as file:
        file.write(part.read_bytes()[:50])  # killed while it wrote a line
    (tmp_path / "parts" / ".logits-00000002-0.safetensors.1.part").write_bytes(b"half")
    teach(*model, load_rows(rows_file), tmp_path, top_k=5, **OPTIONS)
    assert _files(tmp_path) == _files(taught)


@pytest.mark.parametrize("file", ["logits-00000.safetensors", "logits-index.json", "manifest.jsonl", "teach.json"])
def test_killed_while_merging(
    file: str, taught: Path, model: Any, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    replace = os.replace

    def dying(source: Any, target: Any) -> None:
        if Path(target).name == file and (file != "teach.json" or (tmp_path / "manifest.jsonl").exists()):
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(Killed):
            teach(*model, load_rows(rows_file), tmp_path, top_k=5, **OPTIONS)
    generate = model[0].generate
    monkeypatch.setattr(model[0], "generate", lambda **_: pytest.fail("nothing is answered twice"))
    teach(*model, load_rows(rows_file), tmp_path, top_k=5, **OPTIONS)
    monkeypatch.setattr(model[0], "generate", generate)
    assert _files(tmp_path) == _files(taught)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_new_tokens": 9}, "max_new_tokens=8, but 9"),
        ({"batch_size": 2}, "batch_size=3, but 2"),
        ({"top_k": None}, "top_k=5, but None"),
        ({"overwrite_responses": True}, "overwrite_responses=False, but True"),
    ],
)
def test_other_settings_are_refused(
    change: dict[str, Any], named: str, taught: Path, model: Any, rows_file: Path
) -> None:
    before = _files(taught)
    with pytest.raises(DatasetError, match=named):
        teach(*model, load_rows(rows_file), taught, **({"top_k": 5} | OPTIONS | change))
    assert _files(taught) == before


def test_another_base_processor_or_rows_are_refused(taught: Path, model: Any, rows_file: Path) -> None:
    other, vlm_processor = tiny_smolvlm()
    with pytest.raises(DatasetError, match="base="):
        teach(other, model[1], load_rows(rows_file), taught, top_k=5, **OPTIONS)
    processor = Video2LoraProcessor(vlm_processor, num_frames=5, longest_edge=64)
    with pytest.raises(DatasetError, match="num_frames=4, but 5"):
        teach(model[0], processor, load_rows(rows_file), taught, top_k=5, **OPTIONS)
    with pytest.raises(DatasetError, match="num_rows=7, but 6"):
        teach(*model, load_rows(rows_file).select(range(6)), taught, top_k=5, **OPTIONS)
    with pytest.raises(DatasetError, match="rows_sha256"):
        teach(*model, load_rows(rows_file).select([1, 0, 2, 3, 4, 5, 6]), taught, top_k=5, **OPTIONS)


def test_a_manifest_of_somebody_else_is_not_overwritten(model: Any, rows_file: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    shutil.copy(rows_file, manifest)
    with pytest.raises(DatasetError, match="teach.json"):
        teach(*model, load_rows(rows_file), tmp_path, **OPTIONS)
    assert _files(tmp_path) == {"manifest.jsonl": rows_file.read_bytes()}


def test_bad_videos_are_skipped_and_tried_again(model: Any, rows_file: Path, tmp_path: Path) -> None:
    clips = shutil.copytree(rows_file.parent, tmp_path / "clips")
    good = (clips / "c.mp4").read_bytes()
    (clips / "c.mp4").write_bytes(b"this is no video")
    rows = load_rows(clips / "rows.jsonl")
    with pytest.raises(DatasetError, match=r"1 of 6 videos .*max_bad_fraction=0.1.*c.mp4"):
        teach(*model, rows, tmp_path / "out", max_bad_fraction=0.1, **OPTIONS)
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
    summary = teach(*model, rows, tmp_path / "out", max_bad_fraction=0.4, **OPTIONS)
    assert (summary.num_rows, summary.num_skipped, summary.num_generated) == (5, 2, 5)
    assert [line["id"] for line in _manifest(tmp_path / "out")] == ["r0", "r1", "r2", "r5", "r6"]
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [row["id"] for row in skipped] == [rows[3]["id"], "r4"]
    assert all("c.mp4" in row["error"] for row in skipped)
    assert load_rows(tmp_path / "out" / "skipped.jsonl")[:] == rows.select([3, 4])[:]  # to be taught by itself

    with pytest.raises(DatasetError, match="max_bad_fraction"):
        teach(*model, rows, tmp_path / "again", **OPTIONS)
    (clips / "c.mp4").write_bytes(good)
    teach(*model, rows, tmp_path / "again", **OPTIONS)
    teach(*model, rows, tmp_path / "never-bad", **OPTIONS)
    assert _files(tmp_path / "again") == _files(tmp_path / "never-bad")


def test_a_changed_number_of_processes_redoes_units_with_skipped_rows_once(
    model: Any, rows_file: Path, tmp_path: Path
) -> None:
    """A later attempt at a unit counts, whichever process's file it stands in."""
    teach(*model, load_rows(rows_file), tmp_path / "whole", top_k=5, **OPTIONS)
    stop = OPTIONS | {"max_bad_fraction": 0.0}
    clips = shutil.copytree(rows_file.parent, tmp_path / "clips")
    good = (clips / "a.mp4").read_bytes()
    (clips / "a.mp4").write_bytes(b"")
    rows = load_rows(clips / "rows.jsonl")
    with pytest.raises(DatasetError, match="max_bad_fraction"):
        teach(*model, rows, tmp_path / "out", top_k=5, **stop)
    parts = tmp_path / "out" / "parts"
    (parts / "part-00000.jsonl").rename(parts / "part-00003.jsonl")  # of a process there is no more
    (parts / "bad-00003").write_bytes(b"xxxxxxx")
    (clips / "a.mp4").write_bytes(good)
    teach(*model, rows, tmp_path / "out", top_k=5, **stop)
    for name in ("logits-00000.safetensors", "logits-index.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_given_responses_are_answered_anew_only_if_asked(model: Any, rows_file: Path, tmp_path: Path) -> None:
    rows = load_rows(rows_file).select([2])
    summary = teach(*model, rows, tmp_path / "kept", **OPTIONS)
    assert summary.num_generated == 0 and _manifest(tmp_path / "kept")[0]["queries"] == rows[0]["queries"]
    summary = teach(*model, rows, tmp_path / "new", overwrite_responses=True, **OPTIONS)
    assert summary.num_generated == 1
    assert _manifest(tmp_path / "new")[0]["queries"][0]["response"] != rows[0]["queries"][0]["response"]


def test_videos_that_rows_carry_become_files(model: Any, rows_file: Path, tmp_path: Path) -> None:
    data = (rows_file.parent / "a.mp4").read_bytes()
    rows = load_rows([{"video": {"path": "x.mp4", "bytes": data}, "prompt": f"Number {i}?"} for i in range(2)])
    teach(*model, rows, tmp_path, **OPTIONS)
    (video,) = (tmp_path / "videos").iterdir()
    assert video.read_bytes() == data
    after = load_rows(tmp_path / "manifest.jsonl")
    assert after["video"] == [str(video)] * 2 and after["id"] == rows["id"]


def test_text_that_spells_a_special_token_does_not_become_one(
    model: Any, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, processor = model
    spelled = processor.tokenizer(" the <ima", add_special_tokens=False)["input_ids"]
    spelled += processor.tokenizer("ge> is <image", add_special_tokens=False)["input_ids"]
    spelled += processor.tokenizer("> red", add_special_tokens=False)["input_ids"]

    def spells(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([[*spelled, *processor.end_token_ids]] * len(input_ids))], dim=1)

    monkeypatch.setattr(vlm, "generate", spells)
    summary = teach(vlm, processor, load_rows(rows_file).select([0]), tmp_path, top_k=3, **OPTIONS)
    (row,) = load_rows(tmp_path / "manifest.jsonl")
    assert [query["response"] for query in row["queries"]] == ["the  is  red"] * 2
    assert summary.num_retokenized == 2 and summary.num_truncated == 0
    _, labels = processor.encode_turn(row["queries"][1]["prompt"], row["queries"][1]["response"])
    assert TeacherLogits(tmp_path)["r0", 1]["labels"].tolist() == [token for token in labels if token != -100]


def test_rows_that_would_fail_in_the_middle_are_refused_at_the_start(model: Any, clip: Path, tmp_path: Path) -> None:
    row = {"id": "x", "video": str(clip), "prompt": "What?"}
    with pytest.raises(DatasetError, match="'x' has <video>"):
        teach(*model, [row | {"prompt": "in <video> here"}], tmp_path)
    with pytest.raises(DatasetError, match="'x' has <image>"):
        teach(*model, [row | {"response": "an <image>."}], tmp_path, top_k=2)
    with pytest.raises(DatasetError, match="two rows have the id 'x'"):
        teach(*model, [row, row], tmp_path, top_k=2)
    with pytest.raises(DatasetError, match="IterableDataset"):
        teach(*model, load_rows([row]).to_iterable_dataset(), tmp_path)
    for wrong in ({"batch_size": 0}, {"top_k": 300}, {"max_bad_fraction": 2.0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            teach(*model, [row], tmp_path, **wrong)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_units_depend_on_rows_alone() -> None:
    assert plan_units([2, 1, 0, 3, 1, 1, 1], 3) == [[0, 1], [3], [4, 5, 6]]
    assert plan_units([7, 1], 3) == [[0], [1]]
    assert plan_units([0, 0], 3) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_and_the_rest_tell_nearly_the_exact_divergence(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = (3 * torch.randn(20, 500, generator=generator)).to(dtype)
    student = teacher.float() + 0.5 * torch.randn(20, 500, generator=generator)
    exact = kl_per_token(student, teacher)
    errors = []
    for top_k in (4, 32, 128, 499):
        stored = top_k_targets(teacher, torch.zeros(20), top_k)
        assert stored["logits"].dtype == dtype
        found = kl_top_k_per_token(student, stored["token_ids"].long(), stored["logits"], stored["logsumexp"])
        assert (found <= exact + 1e-5).all()
        errors.append(float((found - exact).abs().mean() / exact.mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.02 and errors[3] < 1e-4


def test_logits_of_many_shards_are_found_from_any_process(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    writer, expected = LogitsWriter(tmp_path, 4, 50, shard_bytes=200), {}
    for row in range(5):
        for number in range(row % 3 + 1):
            tokens = row + number + 1
            logits = torch.randn(tokens, 50, generator=generator)
            expected[f"r{row}", number] = logits
            writer.add(f"r{row}", top_k_targets(logits, torch.arange(tokens), 4))
    writer.close()
    assert len(list(tmp_path.glob("logits-*.safetensors"))) > 2
    stored = TeacherLogits(tmp_path)
    _ = stored["r4", 1]
    for reader in (stored, pickle.loads(pickle.dumps(stored))):
        assert len(reader) == len(expected) and reader.top_k == 4 and reader.vocab_size == 50
        for key, logits in expected.items():
            values, token_ids = logits.topk(4)
            torch.testing.assert_close(reader[key]["logits"], values)
            assert reader[key]["token_ids"].tolist() == token_ids.tolist()
            assert reader[key]["labels"].tolist() == list(range(len(logits)))
    assert ("r0", 1) not in stored and ("r0", 0) in stored
    with pytest.raises(KeyError, match="r0"):
        stored["r0", 1]
    with pytest.raises(DatasetError, match="--top-k"):
        TeacherLogits(tmp_path / "nothing")


def test_a_summary_reads_well(taught: Path) -> None:
    state = json.loads((taught / "teach.json").read_text())
    text = str(teacher_files.TeachSummary(taught / "manifest.jsonl", **state["counts"]))
    assert "7 rows, 10 queries, 9 responses generated" in text and str(taught) in text
