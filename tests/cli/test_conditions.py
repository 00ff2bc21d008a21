"""`video2lora evaluate --condition`: conditions with options, read strictly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from video2lora.cli._conditions import read_conditions
from video2lora.cli._errors import CommandError
from video2lora.evaluation.records import read_run


@pytest.fixture
def rows_file(clip: Path, tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"video": str(clip), "prompt": "What moves?", "response": "A square."}) + "\n")
    return file


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no_adapter", ("no_adapter", {})),
        ("lora_from_zero:steps=5", ("lora_from_zero", {"steps": 5})),
        ("lora_from_zero:steps=0,learning_rate=1e-3", ("lora_from_zero", {"steps": 0, "learning_rate": 0.001})),
        ("lora_from_zero:steps=5, seed = 3", ("lora_from_zero", {"steps": 5, "seed": 3})),
        ("lora_from_zero: learning_rate = 1", ("lora_from_zero", {"learning_rate": 1.0})),
        (
            'lora_from_zero:prompts=["What, then?", x],seed=3',
            ("lora_from_zero", {"prompts": ["What, then?", "x"], "seed": 3}),
        ),
        ("adapter:segments=3,keep_segments=[0, 2]", ("adapter", {"segments": 3, "keep_segments": [0, 2]})),
        (
            "caption:prompt=First: who, where? Then: what=when?,max_new_tokens=9",
            ("caption", {"prompt": "First: who, where? Then: what=when?", "max_new_tokens": 9}),
        ),
        ("caption:prompt=12", ("caption", {"prompt": "12"})),
    ],
)
def test_what_is_written_is_meant(text: str, expected: Any) -> None:
    assert read_conditions([text]) == [expected]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adaptor:segments=2", "no condition 'adaptor'; did you mean 'adapter'"),
        ("lora_from_zero:step=2", "no option 'step'; did you mean 'steps'"),
        ("lora_from_zero:model=2", "no option 'model'"),
        ("lora_from_zero:steps", "expected NAME:KEY=VALUE"),
        ("lora_from_zero:steps=2.5", "steps is 2.5, expected int"),
        ("lora_from_zero:steps=many", "steps is 'many', expected int"),
        ("lora_from_zero:prompts=[", "no YAML"),
        ("lora_from_zero:steps=2,seed=1,steps=3", "steps stands twice"),
        ("lora_from_zero:steps=", "steps has no value; leave it out"),
        ("caption:prompt= ,max_new_tokens=2", "prompt has no value"),
        ("no_adapter:steps=3", "no_adapter has no options"),
    ],
)
def test_what_makes_no_sense_is_named(text: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        read_conditions(["video", text])


def test_options_reach_the_run_and_its_record(
    run: Callable[..., Any], model_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    arguments = ["evaluate", model_dir, "-b", rows_file, "-o", tmp_path / "run", "--num-frames", 4, "--device", "cpu"]
    arguments += ["--max-new-tokens", 4, "--conditions", "video", "--condition", "adapter:segments=2", "--condition"]
    arguments += ['lora_from_adapter:steps=1,learning_rate=1e-3,prompts=["What?"],max_new_tokens=4']
    done = run(*arguments)
    assert done.exit_code == 0, done.stderr
    evaluated = read_run(tmp_path / "run")
    assert evaluated.conditions == ["video", "adapter_2_segments", "lora_from_adapter_1_steps"]
    declared = evaluated.settings["conditions"][2]["settings"]
    assert (declared["steps"], declared["learning_rate"], declared["prompts"]) == (1, 0.001, ["What?"])
    other = run(*arguments[:-1], "lora_from_adapter:steps=1")
    assert other.exit_code == 2 and "was declared" in other.stderr


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("lora_from_zero:steps=-1", "steps=-1"),
        ("lora_from_zero:steps=null", "--condition lora_from_zero"),
        ("adapter:keep_segments=3", "--condition adapter"),
        ("lora_from_zero:prompts=[Name it: a colour]", "a list of prompts (texts)"),  # YAML reads a mapping
        ("video", "each once, got video, video"),
        ("videos", "there is no condition 'videos'"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    option: str, message: str, run: Callable[..., Any], model_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    arguments = ["evaluate", model_dir, "-b", rows_file, "-o", tmp_path / "run", "--device", "cpu"]
    done = run(*arguments, "--conditions", "video", "--condition", option)
    assert done.exit_code == 2, done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line and not (tmp_path / "run").exists()
