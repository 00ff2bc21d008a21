"""The command line as a process of its own: what it imports, what it prints where, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ENTRY = "from _video2lora_cli import main; main()"

HELP = """
import sys
from _video2lora_cli import main
for arguments in (["--help"], *([command, "--help"] for command in sys.argv[1:]), ["--version"]):
    sys.argv = ["video2lora", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
heavy = {"torch", "transformers", "peft", "av", "numpy", "huggingface_hub"}
heavy |= {"datasets", "evaluate", "scipy", "matplotlib", "pyarrow"}
heavy &= set(sys.modules)
assert not heavy, heavy
"""
COMMANDS = ["internalize", "ask", "inspect", "compose", "import-checkpoint", "env", "demo", "teach", "train"]
COMMANDS += ["evaluate", "report", "benchmark"]


def _process(*command: object) -> Any:
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"}
    env = {name: value for name, value in os.environ.items() if name not in quiet}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=env)


def test_help_imports_nothing_heavy() -> None:
    done = _process("-c", HELP, *COMMANDS)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"video2lora {command}" in done.stdout


def test_json_is_all_there_is_on_stdout_and_stderr_is_silent(adapter_dir: Path) -> None:
    done = _process("-c", ENTRY, "ask", adapter_dir, "What moves?", "--max-new-tokens", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answers"][0]["new_tokens"] == 2
    assert done.stderr == ""


def test_an_error_is_one_line_without_noise(clip: Path, tmp_path: Path) -> None:
    done = _process("-c", ENTRY, "internalize", clip, "-m", "somebody/model", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "somebody/model" in line
    assert list(tmp_path.iterdir()) == []


def test_the_package_runs_as_a_module() -> None:
    done = _process("-m", "video2lora", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("video2lora ")
    imported = _process("-X", "importtime", "-m", "video2lora", "internalize", "--help").stderr
    assert "video2lora.cli" in imported and "torch" not in imported and "transformers" not in imported
