"""`video2lora demo` without trained models, and where it looks for them."""

from __future__ import annotations

import json
import runpy
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import pytest
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from video2lora.cli import demo

QUESTION = "What moves in the video?"
REPOSITORY = Path(__file__).parents[2]
PLACE = "video2lora/data/moving_shapes/checkpoint"

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def _nothing_trained(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(demo, "REPEATS", 1)
    if "looks" not in request.node.name:
        monkeypatch.setattr(demo, "_trained_example", lambda: None)


def test_it_keeps_an_adapter_that_peft_loads(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = run("demo", "-o", out, "--question", QUESTION, "--json", "--max-new-tokens", 16)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["random_weights"]
    assert document["visual_tokens"]["before"] == 4 * document["frames"] > document["visual_tokens"]["now"] == 0
    assert document["context_tokens"]["before"] > document["context_tokens"]["now"] > 0
    (answer,) = document["answers"]
    assert answer["adapter"] != answer["neither"] and "right" not in answer
    base = AutoModelForImageTextToText.from_pretrained(out / "base")
    assert PeftModel.from_pretrained(base, str(out / "adapter")).peft_config["default"].r == document["adapter_rank"]
    asked = run("ask", out / "adapter", QUESTION, "--max-new-tokens", 16, "--json")
    assert json.loads(asked.stdout)["answers"][0]["answer"] == answer["adapter"]


def test_what_it_says_next_can_be_pasted(run: Run, tmp_path: Path) -> None:
    out, question = tmp_path / "my demo", 'What is "it", and does it move?'
    result = run("demo", "-o", out, "--question", question, "--max-new-tokens", 2)
    assert result.exit_code == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("Ask it more: "))
    assert shlex.split(line)[3:] == ["video2lora", "ask", str(out / "adapter"), question]
    again = run("demo", "-o", out)
    assert again.exit_code == 2 and "exists already: choose another --output." in again.stderr
    assert "--overwrite" not in again.stderr  # which it does not have


def test_it_takes_a_video_and_a_model_and_says_what_is_noise(run: Run, clip: Path, model_dir: Path) -> None:
    given = run("demo", clip, "-m", model_dir, "--max-new-tokens", 2)
    assert given.exit_code == 0, given.stderr
    assert clip.name in given.stdout and "noise" not in given.stdout and "right answer" not in given.stdout
    assert "time to first token" in given.stdout
    noise = run("demo", clip, "--max-new-tokens", 2).stdout
    assert "the answers are noise" in noise and "✗" not in noise


def test_the_model_in_the_box_is_asked_in_words_that_it_knows(
    run: Run, clip: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from video2lora.data.moving_shapes.phrasings import TEMPLATES

    known = [
        template.format(things="objects") for task in ("caption", "count") for template in TEMPLATES[task]["train"]
    ]
    assert set(demo.SHAPES_QUESTIONS) <= set(known)
    monkeypatch.setattr(demo, "_trained_example", lambda: str(model_dir))
    result = run("demo", clip, "--max-new-tokens", 2)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{demo.ONLY_SHAPES}\n") and "This model knows only moving shapes" in result.stdout
    assert all(f"\n{question}\n" in result.stdout for question in demo.SHAPES_QUESTIONS)
    assert demo.QUESTIONS[0] not in result.stdout
    asked = run("demo", clip, "--max-new-tokens", 2, "--question", QUESTION)
    assert QUESTION in asked.stdout and demo.SHAPES_QUESTIONS[0] not in asked.stdout
    named = run("demo", clip, "-m", model_dir, "--max-new-tokens", 2)  # the very same
    assert demo.SHAPES_QUESTIONS[0] in named.stdout and demo.ONLY_SHAPES in named.stdout
    monkeypatch.setattr(demo, "_trained_example", lambda: str(model_dir.parent))
    own = run("demo", clip, "-m", model_dir, "--max-new-tokens", 2)
    assert demo.QUESTIONS[0] in own.stdout and demo.ONLY_SHAPES not in own.stdout


def test_a_given_models_answers_about_the_clip_of_shapes_are_marked(run: Run, model_dir: Path) -> None:
    result = run("demo", "-m", model_dir, "--max-new-tokens", 2)
    assert result.exit_code == 0, result.stderr
    assert "right answer" in result.stdout and "✗" in result.stdout and "0 of 6" in result.stdout


def test_the_clip_has_time_in_it(tmp_path: Path) -> None:
    """What is asked about it needs all its frames, and every task is there."""
    from video2lora.data.moving_shapes import MovingShapes, answerable
    from video2lora.video import probe_video

    path, asked = demo._moving_shapes(tmp_path / "shapes")
    assert tuple(one.task for one in asked) == demo.SHAPES_TASKS
    scene = MovingShapes("test", 1, seed=demo.SHAPES_SEED).scene(0)
    assert len(scene.objects) == 3 and len(scene.events) == 3
    queries = MovingShapes("test", 1, seed=demo.SHAPES_SEED, tasks=demo.SHAPES_TASKS).queries(scene)
    undecided = {query.task for query in queries if not answerable(scene, query, 4, 96)}
    assert {"order", "how_often", "caption"} <= undecided
    assert probe_video(path).duration == pytest.approx(12, abs=0.2)


def test_it_looks_in_the_package_first_then_in_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "src" / "video2lora" / "cli" / "demo.py"))
    assert demo._trained_example() is None
    places = [tmp_path / "examples" / "moving_shapes" / "checkpoint", tmp_path / "src" / PLACE]
    for place in places:
        place.mkdir(parents=True)
        assert demo._trained_example() != str(place)  # nothing in it
        (place / "config.json").write_text("{}")
        assert demo._trained_example() == str(place)


@pytest.mark.parametrize("there", [True, False])
def test_a_wheel_brings_the_checkpoint_along(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = pytest.importorskip("hatchling.build", reason="hatchling builds the wheel: pip install -e '.[dev]'")
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "src/_video2lora_cli.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "src" / "video2lora").mkdir()
    (tmp_path / "src" / "video2lora" / "__init__.py").write_text("")
    if there:
        source = tmp_path / "examples" / "moving_shapes" / "checkpoint" / "vlm_processor"
        source.mkdir(parents=True)
        for file in (source.parent / "config.json", source / "tokenizer.json"):
            file.write_text("{}")
    monkeypatch.chdir(tmp_path)
    names = ZipFile(tmp_path / backend.build_wheel(str(tmp_path))).namelist()
    expected = {f"{PLACE}/config.json", f"{PLACE}/vlm_processor/tokenizer.json"} if there else set()
    assert {name for name in names if "checkpoint" in name} == expected
    assert "video2lora/__init__.py" in names


def test_an_editable_install_copies_nothing(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling builds the wheel: pip install -e '.[dev]'")
    hook = runpy.run_path(str(REPOSITORY / "hatch_build.py"))
    checkpoint = tmp_path / hook["SOURCE"]
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    for version, expected in (("standard", {hook["SOURCE"]: PLACE}), ("editable", {})):
        data: dict[str, Any] = {"force_include": {}}
        hook["CheckpointHook"].initialize(SimpleNamespace(root=str(tmp_path)), version, data)
        assert data["force_include"] == expected
