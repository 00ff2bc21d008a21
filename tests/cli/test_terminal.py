"""What a model, a file or a checkpoint says is printed, and does nothing else to a terminal."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from video2lora.cli import ask
from video2lora.cli._output import print_fields, print_table
from video2lora.cli._terminal import printable

NASTY = "red\x1b[31m\x1b]0;title\x07 \x9b2J up\x1b[1A back\b\b\rover\x7f\x00\n\tsecond line — ünï 字 🎬"
SPELT = (
    "red\\x1b[31m\\x1b]0;title\\x07 \\x9b2J up\\x1b[1A back\\x08\\x08\\x0dover\\x7f\\x00\n\tsecond line — ünï 字 🎬"
)


def controls_in(text: str) -> set[str]:
    return {character for character in text if unicodedata.category(character) == "Cc"} - {"\n", "\t"}


def test_no_control_character_is_left_and_nothing_else_changes() -> None:
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    assert controls_in(printable(everything)) == set()
    harmless = "".join(c for c in everything if unicodedata.category(c) != "Cc") + "\n\t"
    assert printable(harmless) == harmless
    assert printable(NASTY) == SPELT
    assert printable("one\r\ntwo") == "one\ntwo"


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(model: Any, processor: Any, question: str, max_new_tokens: int) -> dict[str, Any]:
        return {"question": question, "answer": NASTY, "ended": True}

    monkeypatch.setattr(ask, "generate_answer", answer)


@pytest.mark.parametrize("questions", [["One?"], ["One?", "Tw\x1b[1mo?"], ["-"]])
def test_an_answer_cannot_move_the_cursor(
    questions: list[str], answering: None, run: Callable[..., Any], adapter_dir: Path
) -> None:
    # with color, as on a terminal: elsewhere escape sequences are taken out of what is printed anyway
    done = run("ask", adapter_dir, *questions, color=True, input="From\x1b[2J stdin?\n")
    assert done.exit_code == 0, done.stderr
    assert controls_in(done.stdout) == set()
    assert done.stdout.count(SPELT) == len(questions)


def test_json_has_the_answer_as_it_is(answering: None, run: Callable[..., Any], adapter_dir: Path) -> None:
    done = run("ask", adapter_dir, "One?", "--json", color=True)
    assert json.loads(done.stdout)["answers"] == [{"question": "One?", "answer": NASTY, "ended": True}]
    assert "\x1b" not in done.stdout  # JSON escapes it


@pytest.mark.parametrize("terminal", [False, True])
def test_tables_hold_names_out_of_files(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")  # rich's own
    monkeypatch.setenv("TERM", "dumb")
    print_table(["video", "frames"], [("clip\x1b[31m\r.mp4", 12)], title="of \x9b2J")
    print_fields({"source": "clip\x07.mp4"})
    printed = capsys.readouterr().out
    assert controls_in(printed) == set()
    assert "clip\\x1b[31m\\x0d.mp4" in printed and "clip\\x07.mp4" in printed and "of \\x9b2J" in printed


def test_errors_and_warnings_too(run: Callable[..., Any], tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "no\x1b[31mthing", color=True)
    assert done.exit_code == 2 and controls_in(done.stderr) == set() and "no\\x1b[31mthing" in done.stderr
