"""`video2lora train`: from a YAML file to a model, and what it says when something is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from transformers import pipeline

from video2lora.cli._errors import CommandError
from video2lora.cli._run_file import read_run_file
from video2lora.cli.train import hold_out
from video2lora.data import load_rows
from video2lora.modeling import Video2LoraConfig
from video2lora.testing import tiny_clip

HELP = """
import sys
from _video2lora_cli import main
sys.argv = ["video2lora", "train", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
heavy = {"torch", "transformers", "accelerate", "datasets", "av", "numpy", "yaml"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips and a JSONL file with two rows about each; read it, never write to it."""
    folder = tmp_path_factory.mktemp("train")
    rows = []
    for seed in range(3):
        tiny_clip(folder / f"{seed}.mp4", seed=seed)
        for i in range(2):
            rows.append(
                {"id": f"r{seed}{i}", "video": f"{seed}.mp4", "prompt": f"Question {i}?", "response": "x" * seed}
            )
            rows[-1]["response"] += "yes"
    _write(folder / "rows.jsonl", rows)
    return folder


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def config(folder: Path, base_dir: Path, tmp_path: Path) -> Path:
    """A run of two steps, evaluated, with a checkpoint at each step."""
    sizes = {"rank": 2, "latent_size": 8, "num_latents": 2, "num_blocks": 1, "num_frames": 3, "longest_edge": 48}
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True}
    training |= {"lr_scheduler_type": "constant", "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    training |= {"save_steps": 1, "num_eval_samples": 1, "eval_max_new_tokens": 3, "output_dir": str(tmp_path / "out")}
    document = {
        "model": {"base": str(base_dir), "dtype": "float32", **sizes},
        "data": {"train": str(folder / "rows.jsonl"), "eval_rows": 1},
        "training": training,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--resume" in done.stdout and "--set" in done.stdout


def test_the_whole_way(run: Callable[..., Any], config: Path, folder: Path, tmp_path: Path) -> None:
    done = run("train", config)
    assert done.exit_code == 0, done.stderr
    out = tmp_path / "out"
    summary = dict(line.split("  ", 1) for line in done.stdout.splitlines() if not line.startswith("{"))
    assert summary["steps"].strip() == "2" and summary["card"].strip() == str(out / "README.md")
    assert "best" in summary["evaluation loss"]
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "`rows.jsonl`: 4 rows, 4 queries" in card and "`rows.jsonl, held out`: 2 rows, 2 queries" in card
    assert card.startswith("---\n") and "type: loss" in card
    with Image.open(out / "learning_curve.png") as picture:
        assert picture.format == "PNG"
    assert {path.name for path in (out / "samples").iterdir()} == {"step-1.md", "step-2.md"}
    assert not list(out.rglob("training_args.bin"))
    adapter = pipeline("video-to-lora", model=str(out))(str(folder / "0.mp4"))
    assert adapter.rank == 4
    assert Video2LoraConfig.from_pretrained(out).num_frames == 3


def test_resuming_ends_where_a_run_never_stopped_does(run: Callable[..., Any], config: Path, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert run("train", config, "--set", f"training.output_dir={straight}").exit_code == 0
    shutil.copytree(straight / "checkpoint-1", stopped / "checkpoint-1")
    shutil.copytree(straight / "checkpoint-2", stopped / "checkpoint-2")
    (stopped / "checkpoint-2" / "checkpoint_complete.json").unlink()  # cut short by a kill
    arguments = ["train", config, "--set", f"training.output_dir={stopped}"]

    refused = run(*arguments)
    assert refused.exit_code == 2 and "--resume" in refused.stderr and str(stopped) in refused.stderr
    other = run(*arguments, "--resume", "--set", "model.rank=3")
    assert other.exit_code == 2 and "rank 2 (now 3)" in other.stderr

    resumed = run(*arguments, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert "going on from" in resumed.stderr and "checkpoint-1" in resumed.stderr
    assert (stopped / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    assert "from step 1 on" in (stopped / "README.md").read_text(encoding="utf-8")
    again = run("train", config, "--resume", "--set", f"training.output_dir={tmp_path / 'new'}", "--no-check")
    assert again.exit_code == 0 and "no checkpoint" in again.stderr


def test_a_checkpoint_that_a_kill_cut_short_is_no_earlier_run(
    run: Callable[..., Any], config: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    done = run("train", config, "--set", "training.eval_strategy=no")
    assert done.exit_code == 0, done.stderr
    assert "out holds checkpoint-1, not written to the end" in done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
    again = run("train", config)
    assert again.exit_code == 2 and "out holds an earlier run (checkpoint-2)" in again.stderr


def test_a_checkpoint_is_trained_further(
    run: Callable[..., Any], config: Path, model_dir: Path, tmp_path: Path
) -> None:
    source = yaml.safe_load(config.read_text())
    source["model"] = {"checkpoint": str(model_dir), "num_frames": 2}
    source["training"] |= {"eval_strategy": "no", "max_steps": 1}
    config.write_text(yaml.safe_dump(source))
    done = run("train", config)
    assert done.exit_code == 0, done.stderr
    assert "evaluation loss" in done.stdout  # at the end, since no strategy asked for it before
    before, after = (Video2LoraConfig.from_pretrained(path) for path in (model_dir, tmp_path / "out"))
    assert (after.num_frames, after.rank, after.latent_size) == (2, before.rank, before.latent_size)
    settings = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert settings["num_frames"] == 2
    refused = run("train", config, "--set", f"training.output_dir={tmp_path / 'o'}", "--set", "model.rank=3")
    assert refused.exit_code == 2 and f"was made with {before.rank}" in refused.stderr


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["training.learning_rat=1"], "did you mean 'learning_rate'?"),
        (["model.latent_sise=3"], "did you mean 'latent_size'?"),
        (["data.trian=x"], "did you mean 'train'?"),
        (["trainng.seed=1"], "did you mean 'training'?"),
        (["training.max_steps=1.5"], "training.max_steps is 1.5, expected int"),
        (["training.learning_rate=fast"], "training.learning_rate is 'fast', expected float"),
        (["training.bf16=1"], "training.bf16 is 1, expected bool"),
        (["model.rank=0"], "rank must be at least 1"),
        (["model.dtype=int8"], "model.dtype is 'int8'"),
        (["model.checkpoint=x"], "either `base`"),
        (["model.base=null"], "either `base`"),
        (["model.base=./nowhere"], "./nowhere"),
        (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["data.eval_rows=6"], "leaves nothing"),
        (["data.eval_split=x"], "data.eval, which is missing"),
        (["training.output_dir=null"], "output_dir is missing"),
        (["training.lr_scheduler_type=bend"], "bend"),
        (["training.kl_weight=0.5"], "there is no teacher"),
        (["training.seed"], "expected section.key=value"),
        (["training.seed=[1"], "no YAML"),
    ],
)
def test_what_is_wrong_is_one_line(settings: list[str], named: str, run: Callable[..., Any], config: Path) -> None:
    done = run("train", config, "--no-check", *[part for setting in settings for part in ("--set", setting)])
    assert done.exit_code == 2, done.stderr or done.exception
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert named in line
    assert {path.name for path in config.parent.iterdir()} <= {"run.yaml", "out"}
    assert not (config.parent / "out").exists() or not any((config.parent / "out").iterdir())


def test_data_are_checked_first(run: Callable[..., Any], config: Path, folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["video"] = str(folder / row["video"])
    data = tmp_path / "data.jsonl"
    arguments = ["train", config, "--set", f"data.train={data}"]

    _write(data, [*rows, {**rows[0], "id": "new", "response": None}])
    done = run(*arguments)
    assert done.exit_code == 2 and "1 of 7 queries have no response" in done.stderr and "teach" in done.stderr

    _write(data, [*rows, rows[0]])
    done = run(*arguments)
    assert done.exit_code == 2 and "duplicate_id" in done.stderr and "1 of 7 rows cannot be trained on" in done.stderr

    _write(data, [*rows, {**rows[0], "id": "gone", "video": "gone.mp4"}])
    done = run(*arguments)
    assert done.exit_code == 2 and "missing_file" in done.stderr and "gone.mp4" in done.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()
    # few enough: told, left out, and the training goes on
    evaluation = ("--set", f"data.eval={folder / 'rows.jsonl'}")
    done = run(*arguments, *evaluation, "--set", "training.max_bad_fraction=0.2", "--set", "training.max_steps=4")
    assert done.exit_code == 0, done.stderr
    assert "missing_file" in done.stderr
    assert "1 of 7 videos taken could not be read" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_whole_videos_are_held_out(folder: Path) -> None:
    rows = load_rows(folder / "rows.jsonl")
    splits = set()
    for seed in range(8):
        train, held_out = hold_out(rows, 1, seed)
        assert (len(train), len(held_out)) == (4, 2)
        assert not set(train["video"]) & set(held_out["video"])
        assert sorted([*train["id"], *held_out["id"]]) == sorted(rows["id"])
        assert list(hold_out(rows, 1, seed)[1]["id"]) == list(held_out["id"])
        splits.add(tuple(held_out["id"]))
    assert len(splits) > 1
    assert len(hold_out(rows, 3, 0)[1]) == 4
    with pytest.raises(CommandError, match="leaves nothing"):
        hold_out(rows, 5, 0)


def test_scalars_mean_what_people_write(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    text = "model: {base: b, target_modules: [up_proj, down_proj], layers_to_transform: [1, 2]}\ndata: {train: t}\n"
    path.write_text(
        text + "training: {output_dir: o, learning_rate: 1e-4, save_strategy: no, weight_decay: 0, bf16: true}"
    )
    run = read_run_file(path, ["training.max_steps=5", "training.warmup_steps=.03", "data.train=[a.jsonl, b.jsonl]"])
    training = run.training
    assert training["learning_rate"] == 1e-4 and training["warmup_steps"] == 0.03
    assert training["save_strategy"] == "no" and training["bf16"] is True
    assert training["weight_decay"] == 0.0 and isinstance(training["weight_decay"], float)
    assert training["max_steps"] == 5 and isinstance(training["max_steps"], int)
    assert run.data["train"] == ["a.jsonl", "b.jsonl"]
    assert run.config_fields == {"target_modules": ["up_proj", "down_proj"], "layers_to_transform": [1, 2]}
    path.write_text(text + "training: {output_dir: o, fsdp: true}")  # annotated as str, takes true all the same
    assert read_run_file(path).training["fsdp"] is True
    assert read_run_file(path, ["training.fsdp=full_shard"]).training["fsdp"] == "full_shard"
    with pytest.raises(CommandError, match="training.run_name is True"):
        read_run_file(path, ["training.run_name=true"])
    path.write_text(text + "training: {output_dir: o, seed: 1, seed: 2}")
    with pytest.raises(CommandError, match="'seed' stands twice"):
        read_run_file(path)
    path.write_text("- a\n")
    with pytest.raises(CommandError, match="expected the sections"):
        read_run_file(path)
    path.write_text("model: 3\n")
    with pytest.raises(CommandError, match="model is 3"):
        read_run_file(path)
