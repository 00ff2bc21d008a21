"""Ablations on moving shapes: prepared clips are the collator's, runs go on, nothing below the noise is claimed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

RECIPE = Path(__file__).parents[1] / "examples" / "moving_shapes"
NAMES = ["small_vlm", "batches", "train_vlm", "train_hypernetwork", "results_text"]
NAMES += ["ablate_data", "ablate_answers", "ablate_table", "ablate"]
STEPS, CLIPS = 3, 4


@pytest.fixture(scope="module")
def modules(recipe_module):
    return SimpleNamespace(**{name: recipe_module(name) for name in NAMES})


def call(module: Any, *arguments: Any) -> None:
    given, sys.argv = sys.argv, [module.__file__, *map(str, arguments)]
    try:
        module.main()
    finally:
        sys.argv = given


@pytest.fixture(scope="module")
def vlm_folder(modules, tmp_path_factory):
    """An untrained base in the form in which stage 1 leaves it."""
    from video2lora.data.moving_shapes import vocabulary_texts

    folder = tmp_path_factory.mktemp("vlm")
    tokenizer = modules.small_vlm.build_tokenizer(vocabulary_texts())
    modules.small_vlm.build_processor(tokenizer).save_pretrained(folder)
    modules.small_vlm.build_vlm(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(modules, vlm_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablations")
    small = ("--steps", STEPS, "--clips", CLIPS, "--queries", 2, "--validation", 5, "--workers", 0)
    call(modules.ablate, "prepare", vlm_folder, "-o", folder, *small)
    return folder


@pytest.fixture(scope="module")
def model(modules, vlm_folder):
    options = modules.ablate.recipe_options(vlm_folder, vlm_folder, modules.ablate.DEFAULT)
    model, processor = modules.train_hypernetwork.build(options)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.hypernetwork.parameters():  # an adapter that changes something
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval(), processor


def rows_of(modules, number: int) -> list[dict[str, Any]]:
    """The same clips from the library's dataset."""
    from video2lora.data.moving_shapes import MovingShapes

    tasks = modules.train_hypernetwork.TRAINED_TASKS
    data = MovingShapes("train", 10**9, num_frames=48, queries_per_video=2, tasks=tasks)
    return [data[number * CLIPS + i] for i in range(CLIPS)]


@torch.no_grad()
def run(model: Any, batch: dict[str, Any]) -> Any:
    names = ("input_ids", "attention_mask", "labels", "video_inputs", "teacher_inputs")
    given = {name: batch[name] for name in (*names, "queries_per_video", "segments_per_adapter") if name in batch}
    return model(**given)


def embedded(modules: Any, model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """A prepared batch as its trainer gives it to the model."""
    videos = {name: inputs for name, inputs in batch.items() if isinstance(inputs, dict)}
    return batch | {name: modules.ablate_data.embed(model.vlm, inputs) for name, inputs in videos.items()}


def test_a_prepared_batch_is_the_collators(modules, prepared, model):
    from video2lora.trainer.collator import Video2LoraCollator

    model, processor = model
    data = modules.ablate_data
    view = data.PreparedBatches(prepared, STEPS, processor, composition=False, teacher=True)
    mine, theirs = view[1], Video2LoraCollator(processor, training=False, online_teacher=True)(rows_of(modules, 1))
    assert set(theirs) == set(mine)
    for name in ("input_ids", "attention_mask", "labels", "query_weights"):
        assert torch.equal(mine[name], theirs[name]), name
    for name in ("queries_per_video", "segments_per_adapter", "num_videos", "kept", "skipped"):
        assert mine[name] == theirs[name], name
    ours, wanted = run(model, embedded(modules, model, mine)), run(model, theirs)
    torch.testing.assert_close(ours.label_logits, wanted.label_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.teacher_logits, wanted.teacher_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.lora.lora_A["down_proj"], wanted.lora.lora_A["down_proj"], rtol=1e-4, atol=1e-5)


def test_clips_that_were_cut_are_given_as_their_segments(modules, prepared, model):
    from video2lora.trainer.collator import Video2LoraCollator

    model, processor = model
    data = modules.ablate_data
    view = data.PreparedBatches(prepared, STEPS, processor)
    batches = [view[i] for i in range(STEPS)]
    counts = [count for batch in batches for count in batch["segments_per_adapter"]]
    assert 1 in counts and max(counts) > 1 and max(counts) <= 4
    cut = Video2LoraCollator(processor, composition_probability=1.0, max_segments=4)
    whole = Video2LoraCollator(processor, training=False)
    for number, batch in enumerate(batches):
        ours, at = run(model, embedded(modules, model, batch)).query_losses, 0
        for row, count in zip(rows_of(modules, number), batch["segments_per_adapter"], strict=True):
            alone = (cut if count > 1 else whole)([row])
            assert alone["segments_per_adapter"] == [count]
            wanted = run(model, alone).query_losses
            torch.testing.assert_close(ours[at : at + len(wanted)], wanted, rtol=1e-4, atol=1e-5)
            at += len(wanted)


def test_captions_are_a_further_question_about_each_clip(modules, prepared, model):
    from video2lora.data.moving_shapes import MovingShapes, caption

    processor = model[1]
    data = modules.ablate_data
    batch = data.PreparedBatches(prepared, STEPS, processor, answers="captions")[2]
    assert batch["queries_per_video"] == [1] * CLIPS
    scenes = MovingShapes("train", 10**9)
    for i, labels in enumerate(batch["labels"]):
        text = processor.decode(labels[labels != -100], skip_special_tokens=True)
        assert text.strip() == caption(scenes.scene(2 * CLIPS + i))


def test_own_answers_are_what_the_base_says_to_the_clip(modules, prepared, model):
    model, processor = model
    data = modules.ablate_data
    batch = data.PreparedBatches(prepared, STEPS, processor, answers="own")[0]
    answers = iter(batch["labels"])
    for row in rows_of(modules, 0):
        frames = processor.load_video(row["video"])
        for query in row["queries"]:
            inputs = processor.encode_video(frames, query["prompt"], add_generation_prompt=True)
            options = {"max_new_tokens": modules.ablate_answers.MAX_NEW_TOKENS, "do_sample": False}
            said = model.vlm.generate(**inputs, **options, pad_token_id=processor.pad_token_id)[0]
            labels = next(answers)
            assert labels[labels != -100].tolist() == said[inputs["input_ids"].shape[1] :].tolist()


def test_a_true_answer_that_the_base_gives_is_not_generated(modules, prepared, model, tmp_path, monkeypatch):
    answers, data = modules.ablate_answers, modules.ablate_data
    asked, seven = [], torch.tensor([7])
    monkeypatch.setattr(answers, "generate", lambda *args: asked.append(len(args[-1])) or [seven] * len(args[-1]))
    (tmp_path / "train").symlink_to(prepared / "train")
    (tmp_path / "answers").mkdir()
    answers.write_answers(model[0].vlm, model[1], tmp_path, {0: [True] * 7 + [False]})
    written = data.unpack(load_file(tmp_path / "answers" / "00000.safetensors"), "answers")
    turns = [turn for several in data.Clips(data.batch_file(prepared, "train", 0)).turns for turn in several]
    wanted = [*(turn.answer.tolist() for turn in turns[:7]), [7]]
    assert asked == [1] and [answer.tolist() for answer in written] == wanted


def test_an_answer_is_right_if_all_its_tokens_are(modules):
    labels = torch.tensor([[-100, 1, 2], [-100, -100, 3], [-100, 4, 0]])
    logits = torch.nn.functional.one_hot(torch.tensor([1, 2, 3, 4, 1]), 5).float()
    assert modules.ablate_answers.exact(logits, labels) == [True, True, False]


def test_runs_stop_go_on_and_make_a_table(modules, vlm_folder, prepared, tmp_path):
    """Killed in the middle, runs leave checkpoints, and another start goes on from them."""
    run = ["run", str(vlm_folder), "-o", str(prepared), "--only", "kl", "--parallel", "1", "--workers", "0"]
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen([sys.executable, modules.ablate.__file__, *run], stdout=log, stderr=log)
    lock = prepared / "runs" / "kl" / "lock"
    deadline = time.monotonic() + 120
    while not lock.exists():
        assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    call(modules.ablate, *run)
    text = (prepared / "runs" / "kl.log").read_text()
    assert "stopped at step" in text and "done in" in text, text
    result = json.loads((prepared / "results" / "kl.json").read_text())
    assert result["steps"] == STEPS and len(result["loss"]) >= 1
    assert list(result["accuracy"]) == ["whole", "2 segments", "4 segments"]
    assert result["accuracy"]["whole"]["caption"][1] == 2 * CLIPS
    assert result["adapter_rank"] == 16 and result["adapter_parameters"] == 6 * 16 * (768 + 256)
    assert not (prepared / "runs" / "kl").exists()

    call(modules.ablate, "table", prepared, "-o", tmp_path / "ablations.md")
    page = (tmp_path / "ablations.md").read_text()
    assert "3 steps of 4 clips, 2 questions" in page and "8 validation clips" in page
    assert "Not run yet: seed_0" in page and "Nothing can be claimed" in page
    assert "| video in context |" in page and "| kl | target (cross-entropy) |" in page
    assert (tmp_path / "ablations.png").exists()
    with pytest.raises(SystemExit, match="ablations.md is there already.*--overwrite"):
        call(modules.ablate, "table", prepared, "-o", tmp_path / "ablations.md")
    call(modules.ablate, "table", prepared, "-o", tmp_path / "ablations.md", "--overwrite")
    assert (tmp_path / "ablations.md").read_text() == page
    # a result of a variant that is another one now is not mixed with the others
    file = prepared / "results" / "kl.json"
    file.write_text(json.dumps(result | {"variant": result["variant"] | {"answers": "own"}}))
    with pytest.raises(SystemExit, match="kl.json is of .*'own'.*choose another folder"):
        call(modules.ablate, *run)
    file.write_text(json.dumps(result))


def test_other_settings_or_another_base_are_refused(modules, vlm_folder, prepared, tmp_path):
    with pytest.raises(SystemExit, match="prepared otherwise"):
        call(modules.ablate, "prepare", vlm_folder, "-o", prepared, "--steps", 7, "--workers", 0)
    other = tmp_path / "vlm"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"another")
    with pytest.raises(SystemExit, match="prepared otherwise"):
        call(modules.ablate, "run", other, "-o", prepared)
    for command in ("prepare", "run"):
        with pytest.raises(SystemExit, match="nowhere has no model.safetensors: expected the folder of stage 1"):
            call(modules.ablate, command, tmp_path / "nowhere", "-o", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit, match="prepare"):
        call(modules.ablate, "run", vlm_folder, "-o", tmp_path / "nothing")


def test_no_difference_below_the_noise_is_claimed(modules):
    noise = modules.ablate_table.Noise((0.90, 0.92, 0.94))
    assert noise.mean == pytest.approx(0.92) and noise.deviation == pytest.approx(0.02)
    assert noise.bound == pytest.approx(4.3027 * 0.02 * (4 / 3) ** 0.5, rel=1e-4)  # Student's t, 2 degrees of freedom
    assert not noise.differs(0.85) and noise.differs(0.80) and noise.in_deviations(0.85) == "-3.5 σ"
    assert not modules.ablate_table.Noise((0.90, 0.92)).differs(0.0)  # two seeds tell nothing
    assert not modules.ablate_table.Noise((1.0, 1.0, 1.0)).differs(0.999)  # nor do seeds that are alike by chance
    rng = torch.Generator().manual_seed(0)
    draws = torch.randn(4000, 6, generator=rng).tolist()
    claimed = [modules.ablate_table.Noise(tuple(seeds)).differs(one) for one, *seeds in draws]
    assert sum(claimed) / len(claimed) == pytest.approx(0.05, abs=0.01)


def test_the_table_claims_what_is_above_the_noise_and_no_more(modules, tmp_path):
    tasks = [task for kind in modules.ablate_table.KINDS.values() for task in kind]
    forms = ("whole", "2 segments", "4 segments")

    def counts(right: int, forms: tuple[str, ...] = forms) -> dict[str, Any]:
        return {form: {task: [right, 1000] for task in tasks} for form in forms}

    rest = {"beside": 6, "learning_rate": 5e-4, "device": "GPU", "seconds": 90.0, "adapter_rank": 16}
    rest |= {"adapter_parameters": 98304, "hypernetwork_parameters": 6_900_000}
    measured = {"seed_0": 900, "seed_1": 904, "seed_2": 896, "rank_2": 700, "latents_2": 890}
    results = tmp_path / "results"
    results.mkdir()
    for name, right in measured.items():
        (results / f"{name}.json").write_text(json.dumps({"accuracy": counts(right), **rest}))
    base = {"video in context": counts(950, ("whole",)), "no adapter": counts(100, ("whole",))}
    (results / "base.json").write_text(json.dumps(base))
    (tmp_path / "prepared.json").write_text(json.dumps({"budget": {"steps": 800}}))
    modules.ablate_table.write_table(tmp_path, modules.ablate.VARIANTS, tmp_path / "ablations.md")
    page = (tmp_path / "ablations.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("- ")]
    assert line.startswith("- rank_2: whole, trained -0.200 (-50.0 σ); whole, never trained -0.200")
    assert "Not told apart from the default anywhere: latents_2." in page
    assert (
        "| rank_2 | rank (8) | **0.700** (-50.0 σ) |" in page
        and "| latents_2 | latents (8) | 0.890 (-2.5 σ) |" in page
    )
    assert "| default, 3 seeds |  | 0.900 ± 0.004 |" in page and "98,304 (197 kB)" in page
    assert "Of 12 comparisons 0.6 would do so by chance" in page
    assert "hardly learnt" not in page
    base["no adapter"]["whole"]["order"] = [851, 1000]
    (told,) = modules.ablate_table.hardly_learnt([counts(900), counts(898)], base)
    assert "hardly learnt order (0.899): less than 0.05 above" in told
    assert modules.ablate_table.hardly_learnt([], base) == []


def test_what_is_run_is_what_the_issue_asks_for(modules):
    """Every variant changes one thing of the recipe, and the default has seeds enough for the noise."""
    variants = modules.ablate.VARIANTS
    parse = modules.ablate.recipe_options
    default = vars(parse(Path("v"), Path("o"), modules.ablate.DEFAULT))
    assert default["rank"] == 8 and default["latents"] == 8 and default["target_modules"] == ["down_proj"]
    assert sum(not variant.subject for variant in variants.values()) >= 3
    for name, variant in variants.items():
        options = vars(parse(Path("v"), Path("o"), (*modules.ablate.DEFAULT, *variant.options)))
        changed = {key for key, value in options.items() if value != default[key]}
        changed |= {"composition"} - ({"composition"} if variant.composition else set())
        changed |= {"answers"} - ({"answers"} if variant.answers == "true" else set())
        assert len(changed - {"kl"}) == (0 if name == "seed_0" else 1), (name, changed)


def test_the_page_is_what_the_records_say_of_the_vlm_in_the_box(modules, tmp_path):
    records = RECIPE / "ablations"
    modules.ablate_table.write_table(records, modules.ablate.VARIANTS, tmp_path / "ablations.md")
    page = (RECIPE / "ablations.md").read_text(encoding="utf-8")
    assert (tmp_path / "ablations.md").read_text(encoding="utf-8") == page and "Not run" not in page
    prepared = json.loads((records / "prepared.json").read_text())
    assert prepared["vlm_sha256"] == hashlib.sha256((RECIPE / "vlm" / "model.safetensors").read_bytes()).hexdigest()


def test_the_readme_quotes_the_page():
    page = (RECIPE / "ablations.md").read_text(encoding="utf-8")
    readme = (RECIPE / "README.md").read_text(encoding="utf-8")
    default = re.search(r"default, 5 seeds \|  \| ([\d.]+ ± [\d.]+)", page)
    assert default and default[1] in readme
    claims = dict(re.findall(r"^- (\w+): (.*)$", page, re.MULTILINE))
    quoted = dict(re.findall(r"^\| `(\w+)` \([^|]*\| ([^|]*) \|", readme, re.MULTILINE))
    assert quoted.keys() == claims.keys()  # every claim and no other
    for name, text in quoted.items():
        for number, form in re.findall(r"([+-][\d.]+) (?:in )?(whole|\d segments)", text):
            assert f"{form}, trained {number} " in claims[name], (name, form)
    for name, task in (("captions_only", "caption"), ("captions_only", "colour"), ("captions_only", "count")):
        rows = [line.strip("| ").split(" | ") for line in page.partition("## By task: whole")[2].splitlines()]
        head = next(row for row in rows if row[0] == "run")
        assert next(row for row in rows if row[0] == name)[head.index(task)] in readme
