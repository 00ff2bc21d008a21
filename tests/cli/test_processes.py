"""Commands of several processes: which device each takes, and that commands share by modules made for it."""

from __future__ import annotations

import ast
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import video2lora.cli
from video2lora.cli._errors import CommandError
from video2lora.cli._processes import process_state

COMMANDS = {
    "teach": ["rows.jsonl", "--base", "base", "-o", "out"],
    "evaluate": ["checkpoint", "-b", "rows.jsonl", "-o", "out"],
    "internalize": [".", "-m", "checkpoint", "-o", "out"],
}


class State:
    """What accelerate says of a launch."""

    num_processes, is_main_process = 2, True
    device = "cuda:1"

    def __init__(self, **asked: Any) -> None:
        self.asked = asked


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.PartialState", State)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


@pytest.mark.parametrize(("device", "variable", "cpu"), [(None, "", False), ("cpu", "", True), (None, "true", True)])
def test_the_cpu_is_taken_if_asked_for(
    device: str | None, variable: str, cpu: bool, launched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv("ACCELERATE_USE_CPU", variable)
    state: Any = process_state(device)
    assert state.asked["cpu"] == cpu


def test_processes_wait_for_each_other_for_hours(launched: None) -> None:
    state: Any = process_state(None)
    assert state.asked["timeout"] >= timedelta(days=1)  # torch's own half hour ends a run whose shards are unequal


def test_one_device_for_several_processes_is_refused(launched: None) -> None:
    with pytest.raises(CommandError, match="--device cuda:1 with 2 processes: .* leave it out"):
        process_state("cuda:1")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_several_processes_refuses_it(
    command: str, launched: None, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.mp4").touch()
    done = run(command, *COMMANDS[command], "--device", "cuda:1")
    assert done.exit_code == 2 and "--device cuda:1 with 2 processes" in done.stderr
    assert not (tmp_path / "out").exists()


def test_no_command_imports_what_is_private_to_another() -> None:
    folder = Path(video2lora.cli.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not names, f"{path.name} imports {names} from {node.module}"
