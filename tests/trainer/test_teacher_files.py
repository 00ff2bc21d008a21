"""The folder of `teach`: parts that earlier versions wrote are gone on with, and still written byte by byte so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from video2lora.data import DatasetError
from video2lora.trainer.teacher_files import TeachFolder

SETTINGS: dict[str, Any] = {"rows_sha256": "0", "top_k": None}
# as version 0.1 wrote them: two processes, a second attempt at unit 0, and a line that a kill tore
PARTS = {
    "part-00000.jsonl": (
        '{"unit": 0, "attempt": 0, "rows": {}, "skipped": {"0": "a.mp4: no"}}\n'
        '{"unit": 0, "attempt": 1, "rows": {"0": [{"query": 0, "result": {"response": "ünï 字"}}]}, "skipped": {}}\n'
        '{"unit": 2, "attempt": 0, "ro'
    ),
    "part-00001.jsonl": '{"unit": 1, "attempt": 0, "rows": {}, "skipped": {"3": "d.mp4: no"}}\n',
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    TeachFolder(tmp_path, SETTINGS, 0).open(2)
    for name, text in PARTS.items():
        (tmp_path / "parts" / name).write_bytes(text.encode())
    (tmp_path / "parts" / "bad-00001").write_bytes(b"xx")
    return tmp_path


def test_a_folder_of_an_earlier_version_is_gone_on_with(folder: Path) -> None:
    teach = TeachFolder(folder, SETTINGS, 0)
    done = teach.open(1)
    assert set(done) == {0, 1} and teach.count_bad(0) == 0
    assert done[0]["rows"] == {"0": [{"query": 0, "result": {"response": "ünï 字"}}]} and done[0]["attempt"] == 1
    assert teach.first_error([{"id": f"r{i}"} for i in range(4)]) == "row 'r3': d.mp4: no"  # type: ignore[arg-type]
    teach.append({"unit": 2, "attempt": 0, "rows": {"5": [{"query": 1, "text": "字"}]}, "skipped": {}}, None)
    teach.close()
    kept = PARTS["part-00000.jsonl"].rpartition("\n")[0]
    new = '{"unit": 2, "attempt": 0, "rows": {"5": [{"query": 1, "text": "字"}]}, "skipped": {}}'
    assert (folder / "parts" / "part-00000.jsonl").read_bytes() == f"{kept}\n{new}\n".encode()
    assert TeachFolder(folder, SETTINGS, 1).open(2)[2]["rows"] == {"5": [{"query": 1, "text": "字"}]}


def test_parts_without_their_settings_are_refused_but_not_empty_files(folder: Path) -> None:
    (folder / "teach.json").unlink()
    with pytest.raises(DatasetError, match=r"part-0000\d.jsonl is there but no teach.json"):
        TeachFolder(folder, SETTINGS, 0)
    for name in PARTS:
        (folder / "parts" / name).write_bytes(b"")
    assert TeachFolder(folder, SETTINGS, 0).open(1) == {}
