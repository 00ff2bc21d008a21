"""Journals of several processes: what was appended is there whatever was killed, and nothing else is."""

from __future__ import annotations

import json
import signal
import textwrap
from pathlib import Path
from typing import Any

import pytest

from video2lora.data.journal import Journal

from ..processes import run_code


def _records(journal: Journal) -> list[Any]:
    return [json.loads(line) for _, _, line in journal.lines()]


def _opened(folder: Path, rank: int = 0, num_processes: int = 2) -> Journal:
    journal = Journal(folder, rank)
    journal.open(num_processes)
    return journal


def test_every_process_reads_what_all_have_appended(tmp_path: Path) -> None:
    first, second = _opened(tmp_path / "parts"), _opened(tmp_path / "parts", 1)
    second.append({"unit": 1, "text": "Ünï\r\n\u2028字"})
    first.append({"unit": 0})
    first.append({"unit": 2})
    for journal in (first, second, Journal(tmp_path / "parts", 7)):
        assert _records(journal) == [{"unit": 0}, {"unit": 2}, {"unit": 1, "text": "Ünï\r\n\u2028字"}]
        places = [(path.name, number) for path, number, _ in journal.lines()]
        assert places == [("part-00000.jsonl", 1), ("part-00000.jsonl", 2), ("part-00001.jsonl", 1)]
    first.close()
    again = _opened(tmp_path / "parts")  # appends, and begins nothing anew
    again.append({"unit": 3})
    assert [record["unit"] for record in _records(again)] == [0, 2, 3, 1]


def test_the_bytes_of_a_line(tmp_path: Path) -> None:
    journal = _opened(tmp_path)
    journal.append({"unit": 0, "text": "Ü\n", "rows": {"3": None}})
    assert (
        tmp_path / "part-00000.jsonl"
    ).read_bytes() == '{"unit": 0, "text": "Ü\\n", "rows": {"3": null}}\n'.encode()


@pytest.mark.parametrize("torn", [b'{"unit": 1, "te', '{"unit": 1, "text": "字'.encode()[:-1], b"\0\0\0", b""])
def test_a_torn_last_line_is_not_read_and_cut_off(torn: bytes, tmp_path: Path) -> None:
    whole = b'{"unit": 0}\n'
    for rank in (0, 1):
        (tmp_path / f"part-{rank:05d}.jsonl").write_bytes(whole + torn)
    journal = _opened(tmp_path, 1)
    assert _records(journal) == [{"unit": 0}] * 2
    assert (tmp_path / "part-00001.jsonl").read_bytes() == whole
    assert (tmp_path / "part-00000.jsonl").read_bytes() == whole + torn  # another process may be writing it
    journal.append({"unit": 2})
    assert _records(journal) == [{"unit": 0}, {"unit": 0}, {"unit": 2}]


def test_a_killed_process_leaves_all_it_has_appended(tmp_path: Path) -> None:
    code = """
    import os, signal, sys
    from pathlib import Path
    from video2lora.data.journal import Journal
    journal = Journal(Path(sys.argv[1]), 0)
    journal.open(1)
    for unit in range(5):
        journal.append({"unit": unit})
    journal._file.write(b'{"unit": 5, "te')
    journal._file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
    """
    done = run_code(textwrap.dedent(code), tmp_path)
    assert done.returncode == -signal.SIGKILL
    journal = _opened(tmp_path)
    journal.append({"unit": 5})
    assert [record["unit"] for record in _records(journal)] == [0, 1, 2, 3, 4, 5]


def test_counts_are_of_this_run_and_all_its_processes(tmp_path: Path) -> None:
    for rank in range(4):
        (tmp_path / f"bad-{rank:05d}").write_bytes(b"xxx")  # of an earlier run with more processes
    journals = [_opened(tmp_path, rank) for rank in (0, 1)]
    assert journals[0].count_bad(0) == 0
    assert journals[1].count_bad(2) == 2 and journals[0].count_bad(1) == 3 and journals[1].count_bad(0) == 3
    journals[0].drop_counts()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-00000.jsonl", "part-00001.jsonl"]


def test_what_was_written_is_told_from_files_just_made(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "parts", 0)
    assert journal.written() is None and list(journal.lines()) == []
    journal.close()  # before it was opened
    journal.open(1)
    assert journal.written() is None
    journal.append({})
    assert journal.written() == tmp_path / "parts" / "part-00000.jsonl"
