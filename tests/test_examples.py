"""The examples and the training tutorial: recipes to the number, and every line of code run on small models."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from video2lora import Video2LoraModel, Video2LoraProcessor
from video2lora.cli import app
from video2lora.cli._run_file import read_run_file
from video2lora.modeling import Video2LoraConfig
from video2lora.testing import save_tiny_vlm, tiny_clip
from video2lora.trainer import Video2LoraTrainingArguments

ROOT = Path(__file__).parents[1]
EXAMPLES, TUTORIAL = ROOT / "examples", ROOT / "docs" / "training.md"
BASE = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
SIZES: dict[str, Any] = {"rank": 2, "latent_size": 8, "num_latents": 2, "num_blocks": 1, "num_frames": 3}
TINY = {
    "training.max_steps": 2,
    "training.per_device_train_batch_size": 2,
    "training.dataloader_num_workers": 0,
    "training.use_cpu": "true",
    "training.bf16": "false",
    "training.logging_steps": 1,
    "training.eval_steps": 1,
    "training.save_steps": 1,
    "training.eval_max_new_tokens": 2,
    "data.eval_rows": 1,
    "model.latent_size": 8,
    "model.num_latents": 2,
    "model.num_blocks": 1,
    "model.num_frames": 3,
}

# --- the published recipe: Table 6 of the paper, and its text --------------------------------------------------------

RECIPES = {
    "train_smolvlm2_500m.yaml": {"base": BASE, "steps": 9000, "batch": (48, 2, 4), "global": 384},
    "train_smolvlm2_2_2b.yaml": {
        "base": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        "steps": 7000,
        "batch": (8, 5, 6),
        "global": 240,
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_yaml_is_the_published_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe: dict[str, Any] = RECIPES[name]
    run = read_run_file(EXAMPLES / name, ["training.use_cpu=true", "training.bf16=false"])
    assert read_run_file(EXAMPLES / name).training["bf16"] is True  # which a machine without a GPU refuses
    monkeypatch.chdir(tmp_path)
    args = Video2LoraTrainingArguments(**run.training)
    (gpus,) = map(int, re.findall(r"--num_processes (\d+) -m video2lora train", (EXAMPLES / name).read_text()))
    batch = (args.per_device_train_batch_size, args.gradient_accumulation_steps, gpus)
    assert batch == recipe["batch"]
    assert batch[0] * batch[1] * batch[2] == recipe["global"]
    assert (args.max_steps, args.seed, run.model["base"]) == (recipe["steps"], 42, recipe["base"])
    assert (args.learning_rate, args.lr_scheduler_type, args.weight_decay) == (1e-4, "cosine", 0.01)
    assert (args.max_grad_norm, args.ce_weight, args.kl_weight) == (1.0, 1.0, 0.0)
    assert args.get_warmup_steps(args.max_steps) == round(0.03 * recipe["steps"])
    assert args.optim.value.startswith("adamw") and (args.composition_probability, args.teacher) == (0.0, None)
    config = Video2LoraConfig(**run.config_fields)
    for field, value in {"rank": 16, "latent_size": 512, "num_latents": 8, "num_blocks": 9, "num_frames": 12}.items():
        assert run.model[field] == value == getattr(config, field)
    assert (config.longest_edge, config.target_modules, config.lora_scaling) == (384, ["down_proj"], 128)
    released = Video2LoraConfig()
    assert {k: v for k, v in config.to_dict().items()} == released.to_dict()


# --- examples and tutorial, run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the base and the clips that the tutorial names."""
    folder = tmp_path_factory.mktemp("tutorial")
    save_tiny_vlm("smolvlm", folder / BASE)
    for seed, name in enumerate(("kitchen", "garden")):
        tiny_clip(folder / f"{name}.mp4", seed=seed)
    (rows,) = _blocks("json")
    (folder / "clips.jsonl").write_text(rows, encoding="utf-8")
    (run,) = _blocks("yaml")
    (folder / "run.yaml").write_text(run, encoding="utf-8")
    (folder / "examples").symlink_to(EXAMPLES)
    return folder


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TUTORIAL.read_text(encoding="utf-8"), re.DOTALL)


def _in_order() -> Iterator[tuple[str, str]]:
    """The tutorial's code, as (language, text): a command a line, Python a block."""
    for language, text in re.findall(r"```(bash|python)\n(.*?)```", TUTORIAL.read_text(encoding="utf-8"), re.DOTALL):
        yield from ((language, part) for part in (text.splitlines() if language == "bash" else [text]))


def test_the_tutorial_runs_from_top_to_bottom(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    namespace: dict[str, Any] = {}
    ran = []
    for language, text in _in_order():
        if language == "python":
            _python(text, namespace)
        else:
            ran.append(_command(shlex.split(text)))
    assert ran == ["teach", "train", "launch", "train", "teach", "train", "train", "internalize", "ask", "example"]
    report = namespace["report"]
    assert report.ok and (report.num_rows, report.num_queries, report.num_missing_responses) == (3, 4, 1)
    for model in ("my-model", "my-model-4", "my-model-kl", "my-model-composed", "my-own", "my-tuned-model"):
        assert Video2LoraConfig.from_pretrained(folder / model).rank == 16
        assert (folder / model / "README.md").is_file() and (folder / model / "samples").is_dir()
    card = (folder / "my-model-kl" / "README.md").read_text(encoding="utf-8")
    assert "1 x cross-entropy + 0.05 x KL divergence" in card and "| `teacher` | taught-logits |" in card
    assert "with probability 0.3 a video is cut into up to 4 segments" in (
        folder / "my-model-composed" / "README.md"
    ).read_text(encoding="utf-8")
    assert (folder / "kitchen-lora" / "adapter_model.safetensors").is_file()


def _python(text: str, namespace: dict[str, Any]) -> None:
    """Run a block, with the small sizes where the tutorial has the recipe's."""
    small = ", ".join(f"{name}={value}" for name, value in SIZES.items() if name != "rank")
    text = text.replace("rank=16)", f"rank=16, {small})").replace("max_steps=2,", "max_steps=2, use_cpu=True,")
    exec(compile(text, "docs/training.md", "exec"), namespace)


def _command(words: list[str]) -> str:
    """Run a command of the tutorial with small sizes; return its name."""
    small = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    if words[0] == "python":
        _example(words[1:])
        return "example"
    if words[0] == "accelerate":
        at = words.index("-m")
        assert words[1:at] == ["launch", "--multi_gpu", "--num_processes", "4"]
        _launch(words[at:], small)
        return "launch"
    extra = {
        "teach": ["--num-frames", "3", "--longest-edge", "48", "--max-new-tokens", "4", "--device", "cpu"],
        "train": small,
        "internalize": ["--device", "cpu"],
        "ask": ["--max-new-tokens", "2", "--device", "cpu"],
    }[words[1]]
    done = CliRunner().invoke(app, [*words[1:], *extra])
    assert done.exit_code == 0, f"{shlex.join(words)}: {done.output}{done.stderr}{done.exception!r}"
    return words[1]


def _launch(module: list[str], small: list[str]) -> None:
    """Two processes of the same launcher, without GPUs."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run([*launcher, *module, *small], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("learning curve") == 1  # the main process alone tells
    assert "4 videos: 2 a device, 1 accumulated, 2 processes" in Path("my-model-4", "README.md").read_text()


def _example(words: list[str]) -> None:
    extra = ["--max-steps", "2", "--batch-size", "2", "--workers", "0"]
    sys_argv, sys.argv = sys.argv, [*words, *extra]
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.argv = sys_argv


def test_fine_tuning_starts_from_the_checkpoint(
    tiny_vlm_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = Video2LoraModel.from_vlm(tiny_vlm_dir, **SIZES)
    for scaler in model.hypernetwork.scaler_B.values():
        torch.nn.init.normal_(scaler)
    model.save_pretrained(tmp_path / "released")
    Video2LoraProcessor.from_config(model.config).save_pretrained(tmp_path / "released")
    rows = []
    for seed in range(3):
        tiny_clip(tmp_path / f"{seed}.mp4", seed=seed)
        rows += [{"video": f"{seed}.mp4", "prompt": f"Question {i}?", "response": "yes"} for i in range(2)]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [str(EXAMPLES / "fine_tune.py"), str(tmp_path / "released"), str(tmp_path / "clips.jsonl")]
    _example([*words, "-o", str(tmp_path / "mine"), "--learning-rate", "1e-3"])
    assert "is trained" in capsys.readouterr().out
    tuned = Video2LoraModel.from_pretrained(tmp_path / "mine")
    moved = [
        (name, (tensor - tuned.hypernetwork.state_dict()[name]).abs().max().item())
        for name, tensor in model.hypernetwork.state_dict().items()
    ]
    assert max(change for _, change in moved) < 0.01  # two small steps away from where it started
    # the first step's learning rate is 0, and bias_A has no gradient while bias_B is 0
    assert {name for name, change in moved if change == 0} <= {"bias_A.down_proj"}
    card = (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
    assert "2 rows, 4 queries" in card and "1 row, 2 queries" in card  # one row a video
    assert len(list((tmp_path / "mine" / "samples").iterdir())) >= 1
