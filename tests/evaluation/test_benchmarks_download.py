"""Fetching a benchmark: through the real Hub client and a local Hub, sizes first; archives of every kind unpacked."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from tests.hub.fixtures import Hub, hub, patched_hub  # noqa: F401
from tests.hub.server import ROUTES, STRANGER_TOKEN
from tests.hub.store import GITATTRIBUTES, Repo, StoredFile

from video2lora.evaluation.benchmarks import BENCHMARKS, BenchmarkError, download, load_benchmark, unpack

NEXTQA = "lmms-eval/NExTQA"


@pytest.fixture(autouse=True)
def _datasets_are_served() -> Iterator[None]:
    """The local Hub's answers about models, for datasets too: they have the same form."""
    routes = []
    for method, pattern, handler in ROUTES:
        text = pattern.pattern
        if text.startswith("/api/models/"):
            routes.append((method, re.compile(text.replace("/api/models/", "/api/datasets/")), handler))
        elif "/resolve/" in text:
            routes.append((method, re.compile("/datasets" + text), handler))
    before = len(ROUTES)
    ROUTES[:0] = routes
    yield
    del ROUTES[: len(ROUTES) - before]


@pytest.fixture
def repository(patched_hub: Hub, clip: Path) -> Repo:  # noqa: F811
    """NExT-QA as the repository has it: Parquet by configuration, all videos in one zip."""
    rows = [
        {"video": i, "question": "why", "answer": "fun", "qid": 0, "type": "CW", "additional_ref_answer": None}
        for i in range(3)
    ]
    table, archive = io.BytesIO(), io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), table)
    with zipfile.ZipFile(archive, "w") as file:
        for i in range(3):
            file.write(clip, f"NExTVideo/{i}.mp4")
        file.writestr("NExTVideo/readme.txt", "no video")
        file.writestr("__MACOSX/NExTVideo/._0.mp4", "no video either")
    files = {
        ".gitattributes": StoredFile(GITATTRIBUTES),
        "OE/test-00000-of-00001.parquet": StoredFile(table.getvalue(), lfs=True),
        "MC/test-00000-of-00001.parquet": StoredFile(b"not asked for", lfs=True),
        "videos.zip": StoredFile(archive.getvalue(), lfs=True),
    }
    repo = patched_hub.server.repos[NEXTQA] = Repo(NEXTQA)
    repo.commit("main", "data", files)
    return repo


def test_a_benchmark_is_fetched_unpacked_and_loaded(tmp_path: Path, repository: Repo, patched_hub: Hub) -> None:  # noqa: F811
    lines: list[str] = []

    def tell(line: str) -> None:
        if not lines:
            assert patched_hub.server.count("GET", "/resolve/") == 0  # sizes come before anything is fetched
        lines.append(line)

    folder = download("nextqa", tmp_path / "data", tell=tell)
    assert lines[0].startswith("NExT-QA (open-ended), annotations: 1 files of lmms-eval/NExTQA, about ")
    assert re.search(r"videos: 1 files of lmms-eval/NExTQA, about [\d.]+ kB", lines[1])
    assert "Licence:" in lines[2] and lines[-1] == "videos.zip: 3 videos unpacked."
    assert not (folder / "MC").exists()
    benchmark = load_benchmark("nextqa", data_dir=folder)
    assert (len(benchmark), benchmark.missing) == (3, ())

    fetched = patched_hub.server.count("GET", "/resolve/")
    (folder / "videos" / "NExTVideo" / "1.mp4").unlink()
    download("nextqa", folder, tell=lines.append)
    assert patched_hub.server.count("GET", "/resolve/") == fetched
    assert lines[-1] == "videos.zip: 1 videos unpacked." and load_benchmark("nextqa", data_dir=folder).missing == ()


def test_annotations_alone(tmp_path: Path, repository: Repo) -> None:
    download("nextqa", tmp_path, videos=False, tell=lambda line: None)
    assert not (tmp_path / "videos.zip").exists() and (tmp_path / "OE").is_dir()
    with pytest.raises(BenchmarkError, match="no video file below"):
        load_benchmark("nextqa", data_dir=tmp_path)


def test_what_cannot_be_had_says_why(tmp_path: Path, repository: Repo, patched_hub: Hub) -> None:  # noqa: F811
    def failing(match: str, name: str = "nextqa") -> None:
        with pytest.raises(BenchmarkError, match=match):
            download(name, tmp_path, tell=lambda line: None)

    failing("no benchmark 'nextq'", "nextq")
    failing("wchai/Video-Detailed-Caption cannot be had .*still exists", "vdc")
    repository.gated = True
    with patched_hub.patch(token=STRANGER_TOKEN):
        failing("accept its terms at https://huggingface.co/datasets/lmms-eval/NExTQA and log in")
    repository.gated = False
    with patched_hub.patch(offline=True):
        failing("unset HF_HUB_OFFLINE")
    repository.commit("main", "moved", {"elsewhere.txt": StoredFile(b"")})
    failing(r"none of the files expected \(OE/\*\); it has \['elsewhere.txt'\]")


def test_a_full_disk_is_seen_before(tmp_path: Path, repository: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BenchmarkError, match=r"kB are needed \(archives and their videos\), but .* about 1 kB free"):
        download("nextqa", tmp_path, tell=lambda line: None)
    assert not (tmp_path / "videos.zip").exists()


def test_what_only_a_person_can_fetch_is_said(tmp_path: Path, patched_hub: Hub) -> None:  # noqa: F811
    repo = patched_hub.server.repos["facebook/PLM-VideoBench"] = Repo("facebook/PLM-VideoBench")
    repo.commit("main", "data", {"rcap/plm_rcap_test.parquet": StoredFile(b"x", lfs=True)})
    lines: list[str] = []
    download("plm_rcap", tmp_path, tell=lines.append)
    assert any("by hand from https://ai.meta.com" in line and "videos_fps_6.tar" in line for line in lines)


# Archives


def make_tar(clip: Path, mode: str = "w") -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:  # type: ignore[call-overload]
        archive.add(clip, "Activity_Videos/v_a.mp4")
        archive.add(clip, "../outside.mp4")
        link = tarfile.TarInfo("link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        archive.add(clip, "Activity_Videos/v_b.mp4")
    return data.getvalue()


def test_archives_of_every_kind(tmp_path: Path, clip: Path) -> None:
    whole = make_tar(clip)
    third = len(whole) // 3
    for index, part in enumerate((whole[:third], whole[third : 2 * third], whole[2 * third :])):
        (tmp_path / f"ActivityNet_Videos.tar.part-00{index}").write_bytes(part)
    assert unpack(tmp_path, tell=lambda line: None) == 2
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.mp4"))
    assert found == ["videos/Activity_Videos/v_a.mp4", "videos/Activity_Videos/v_b.mp4"]
    assert all(path.read_bytes() == clip.read_bytes() for path in tmp_path.rglob("*.mp4"))
    assert not (tmp_path.parent / "outside.mp4").exists()
    assert unpack(tmp_path, tell=lambda line: None) == 0
    (tmp_path / "more.tar.gz").write_bytes(make_tar(clip, "w:gz"))
    shutil.rmtree(tmp_path / "videos")
    assert unpack(tmp_path, tell=lambda line: None) == 2  # the same two videos in both archives


def test_broken_archives_are_named_and_leave_no_half_file(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "a.tar.part-000").write_bytes(make_tar(clip)[:2000])
    with pytest.raises(BenchmarkError, match="a.tar: the archive is broken or a part is missing"):
        unpack(tmp_path, tell=lambda line: None)
    (tmp_path / "a.tar.part-000").unlink()
    (tmp_path / "b.zip").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(BenchmarkError, match="b.zip: the archive is broken"):
        unpack(tmp_path, tell=lambda line: None)
    assert not list(tmp_path.rglob("*.mp4")) and not list(tmp_path.rglob("*.part"))


def test_every_download_names_a_place() -> None:
    for spec in BENCHMARKS.values():
        for one in spec.downloads:
            assert (one.repo is None) != (one.url is None) and bool(one.files) == bool(one.repo)
