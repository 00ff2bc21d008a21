"""The journal of a run: folders that earlier versions wrote are gone on with, and still written byte by byte so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from video2lora.evaluation.journal import Attempt, RunFolder
from video2lora.evaluation.records import EvaluationError

SETTINGS: dict[str, Any] = {"format_version": 1, "conditions": []}
# as version 0.1 wrote them: two processes, a second attempt at group 0, and a line that a kill tore
PARTS = {
    "part-00000.jsonl": (
        '{"group": 0, "attempt": 0, "condition": "video", "errors": {"1": "b.mp4: no"}, "partners": {"0": "c"}, '
        '"answers": {"0": [{"text": "ünï 字", "num_tokens": 2}]}}\n'
        '{"group": 0, "attempt": 1, "condition": "video", "errors": {}, "partners": {"0": "b"}, '
        '"answers": {"0": [{"text": "new", "num_tokens": 1}], "1": []}}\n'
        '{"group": 2, "attempt": 0, "condi'
    ),
    "part-00001.jsonl": (
        '{"group": 1, "attempt": 0, "condition": "adapter", "errors": {}, "partners": {}, "answers": {"2": []}}\n'
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "answers").mkdir()
    (tmp_path / "run.json").write_text(json.dumps(SETTINGS))
    for name, text in PARTS.items():
        (tmp_path / "answers" / name).write_bytes(text.encode())
    (tmp_path / "answers" / "bad-00001").write_bytes(b"xx")
    return tmp_path


def test_a_folder_of_an_earlier_version_is_gone_on_with(folder: Path) -> None:
    run = RunFolder(folder, SETTINGS, 0)
    done = run.open(1)
    assert set(done) == {0, 1} and run.count_bad(0) == 0
    assert (done[0].number, done[0].errors, done[0].partners) == (1, {}, {0: "b"})
    assert done[0].answers == {"video": {0: [{"text": "new", "num_tokens": 1}], 1: []}}
    assert done[1].answers == {"adapter": {2: []}}
    run.append(2, "video", Attempt(0, {4: "d.mp4: no"}, {3: "a"}, {"video": {3: [{"text": "字"}]}}))
    run.close()
    kept = PARTS["part-00000.jsonl"].rpartition("\n")[0]
    new = (
        '{"group": 2, "attempt": 0, "condition": "video", "errors": {"4": "d.mp4: no"}, "partners": {"3": "a"}, '
        '"answers": {"3": [{"text": "字"}]}}'
    )
    assert (folder / "answers" / "part-00000.jsonl").read_bytes() == f"{kept}\n{new}\n".encode()
    assert run.attempts()[2].errors == {4: "d.mp4: no"}
    run.drop_counts()
    assert sorted(path.name for path in (folder / "answers").iterdir()) == list(PARTS)


def test_answers_without_their_settings_are_refused_but_not_empty_files(folder: Path, tmp_path: Path) -> None:
    (folder / "run.json").unlink()
    with pytest.raises(EvaluationError, match=r"part-0000\d.jsonl is there but no run.json"):
        RunFolder(folder, SETTINGS, 0)
    for name in PARTS:
        (folder / "answers" / name).write_bytes(b"")
    assert RunFolder(folder, SETTINGS, 0).open(1) == {}
    (folder / "run.json").unlink()
    (folder / "records.parquet").touch()
    with pytest.raises(EvaluationError, match="records.parquet is there but no run.json"):
        RunFolder(folder, SETTINGS, 0)
