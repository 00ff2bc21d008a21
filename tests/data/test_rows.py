"""Rows: every form comes to the same one, lazily where it streams, and nothing is lost, reordered or decoded."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, Video, load_dataset

from video2lora.data import DatasetError, group_queries, load_rows

COLUMNS = ["id", "video", "start", "end", "queries"]
PAIRS = [("What?", "A dog."), ("Where?", "At home.")]
QUERIES = [{"prompt": prompt, "response": response} for prompt, response in PAIRS]


def chat(content=lambda text: text) -> list[dict[str, Any]]:
    turns = []
    for prompt, response in PAIRS:
        turns += [{"role": "user", "content": content(prompt)}, {"role": "assistant", "content": content(response)}]
    return turns


FORMS = {
    "pairs": {"conversations": QUERIES},
    "chat": {"conversations": chat()},
    "chat with parts": {"conversations": chat(lambda text: [{"type": "video"}, {"type": "text", "text": text}])},
    "chat with string parts": {"messages": chat(lambda text: [text])},
    "from and value": {
        "conversations": [
            {"from": "human", "value": "<video>\nWhat?"},
            {"from": "gpt", "value": "A dog."},
            {"from": "human", "value": "Where?\n<image>"},
            {"from": "gpt", "value": "At home."},
        ]
    },
    "the one form": {"queries": QUERIES},
}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("container", ["list", "jsonl", "json", "dataset", "stream", "untyped stream"])
def test_every_form_from_every_container_is_the_same_row(form: str, container: str, tmp_path: Path) -> None:
    rows = [{"id": "a", "video": "/v/clip.mp4", "start": 1, "end": 2.5, **FORMS[form]}]
    source: Any = rows
    if container == "jsonl":
        source = write_jsonl(tmp_path / "rows.jsonl", rows)
    elif container == "json":
        source = tmp_path / "rows.json"
        source.write_text(json.dumps(rows), encoding="utf-8")
    elif container == "dataset":
        source = Dataset.from_list(rows)
    elif container == "stream":
        source = Dataset.from_list(rows).to_iterable_dataset()
    elif container == "untyped stream":
        source = IterableDataset.from_generator(lambda: iter(rows))
    loaded = load_rows(source)
    assert isinstance(loaded, IterableDataset if "stream" in container else Dataset)
    assert list(loaded) == [{"id": "a", "video": "/v/clip.mp4", "start": 1.0, "end": 2.5, "queries": QUERIES}]


def test_plain_rows_and_absent_values() -> None:
    rows = [
        {"video": "a.mp4", "prompt": "What?", "response": "A dog."},
        {"video": Path("b.mp4"), "prompt": "What?"},
        {"video": "c.mp4", "conversations": [{"role": "user", "content": "What?"}]},
        {"id": 7, "video": "c.mp4", "prompt": "", "response": None, "start": None},
    ]
    loaded = load_rows(rows)
    assert loaded.column_names == COLUMNS
    assert loaded["video"][:] == ["a.mp4", "b.mp4", "c.mp4", "c.mp4"]
    assert loaded["start"][:] == loaded["end"][:] == [None] * 4
    assert [row["queries"][0]["response"] for row in loaded] == ["A dog.", None, None, None]
    assert loaded["id"][3] == "7"
    assert list(load_rows(loaded)) == list(loaded), "loading twice changes nothing"


def test_an_answer_may_be_null_for_a_teacher_to_fill() -> None:
    turns = chat()
    turns[1]["content"] = None
    assert load_rows([{"video": "a.mp4", "messages": turns}])[0]["queries"] == [
        {"prompt": "What?", "response": None},
        {"prompt": "Where?", "response": "At home."},
    ]


def test_streams_can_be_sent_to_dataloader_workers_and_split_among_them() -> None:
    rows = [{"id": str(i), "video": "a.mp4", "prompt": "What?"} for i in range(8)]
    loaded = pickle.loads(pickle.dumps(load_rows(Dataset.from_list(rows).to_iterable_dataset(num_shards=2))))
    parts = [[row["id"] for row in loaded.shard(2, index)] for index in range(2)]
    assert parts == [["0", "1", "2", "3"], ["4", "5", "6", "7"]]


def test_published_manifest_rows_are_read_unchanged(tmp_path: Path) -> None:
    published = {
        "id": "fv-1",
        "video_path": "clips/1.mp4",
        "task_type": "scene",
        "prompt": "Describe what is happening in this scene.",
        "target_text": "A dog runs.",
        "dataset": "finevideo",
        "split": "train",
        "metadata": {"start_time": "00:01:02.500", "end": 70, "title": "x"},
    }
    path = write_jsonl(
        tmp_path / "m.jsonl", [published, {**published, "id": "fv-2", "split": "val", "metadata": None}]
    )
    query = {"prompt": published["prompt"], "response": "A dog runs."}
    video = str(tmp_path / "clips" / "1.mp4")
    expected = {"id": "fv-1", "video": video, "start": 62.5, "end": 70.0, "queries": [query]}
    assert list(load_rows(path, split="train")) == [expected]
    assert load_rows(path)["id"][:] == ["fv-1", "fv-2"]
    with_text = {**published, "metadata": json.dumps(published["metadata"])}
    assert load_rows([with_text])[0]["start"] == 62.5
    with pytest.raises(DatasetError, match=r"split='test'.*'train', 'val'"):
        load_rows(path, split="test")


def test_paths_start_at_the_jsonl_file_or_at_video_root(tmp_path: Path) -> None:
    names = ["a.mp4", "../b.mp4", "/abs/c.mp4", "https://host/d.mp4", "hf://datasets/x/e.mp4"]
    rows = [{"video": name, "prompt": "What?"} for name in names]
    path = write_jsonl(tmp_path / "set" / "rows.jsonl", rows)
    beside = [str(tmp_path / "set" / "a.mp4"), str(tmp_path / "b.mp4"), *names[2:]]
    assert load_rows(path)["video"][:] == beside
    rooted = [str(tmp_path / "elsewhere" / "a.mp4"), str(tmp_path / "b.mp4"), *names[2:]]
    for source in (path, rows, Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        loaded = load_rows(source, video_root=tmp_path / "elsewhere")
        assert [row["video"] for row in loaded] == rooted
    assert load_rows(rows)["video"][:] == names, "without a root, rows in memory keep what they say"
    both = load_rows([path, write_jsonl(tmp_path / "other" / "rows.jsonl", rows[:1])])
    assert both["video"][:] == [*beside, str(tmp_path / "other" / "a.mp4")]


def test_a_hashed_id_depends_on_the_content_and_not_on_the_place(tmp_path: Path) -> None:
    rows = [{"video": "a.mp4", "start": 1, "prompt": "What?"}, {"video": "a.mp4", "start": 2, "prompt": "What?"}]
    one = load_rows(write_jsonl(tmp_path / "x" / "rows.jsonl", rows))["id"][:]
    two = load_rows(write_jsonl(tmp_path / "y" / "rows.jsonl", rows[::-1]))["id"][:]
    assert one == two[::-1] and len(set(one)) == 2
    assert [row["id"] for row in load_rows(Dataset.from_list(rows).to_iterable_dataset())] == one
    assert load_rows(rows + rows)["id"][:] == [*one, *(f"{name}-1" for name in one)], "never twice in a dataset"


def test_order_and_number_survive_many_rows() -> None:
    count = 25_001  # more than two chunks
    rows = ({"id": f"r{i}", "video": f"{i % 7}.mp4", "prompt": "What?"} for i in range(count))
    loaded = load_rows(list(rows))
    assert loaded.num_rows == count
    assert loaded["id"][:] == [f"r{i}" for i in range(count)]


@pytest.mark.parametrize("typed", [False, True])
def test_streaming_reads_only_what_is_asked_for(typed: bool) -> None:
    def generate():
        for i in range(3):
            yield {"id": f"r{i}", "video": {"path": f"{i}.mp4", "bytes": b"x"}, "prompt": "What?", "more": i}
        raise AssertionError("read too far")

    features = {"id": Value("string"), "video": Video(), "prompt": Value("string"), "more": Value("int64")}
    source = IterableDataset.from_generator(generate, features=Features(features) if typed else None)
    loaded = load_rows(source)
    assert isinstance(loaded, IterableDataset)
    rows = iter(loaded)
    assert [next(rows)["id"] for _ in range(3)] == ["r0", "r1", "r2"]
    first = next(iter(loaded))
    assert sorted(first) == sorted(COLUMNS) and first["video"] == {"path": "0.mp4", "bytes": b"x"}
    with pytest.raises(AssertionError, match="read too far"):
        list(loaded)


def test_videos_in_parquet_pass_through_undecoded(clip: Path, tmp_path: Path) -> None:
    data = clip.read_bytes()
    rows = [{"video": {"path": f"{i}.mp4", "bytes": data + b"\0" * i}, "prompt": f"What {i}?"} for i in range(3)]
    features = Features({"video": Video(), "prompt": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train.parquet")
    stored = load_dataset("parquet", data_files=str(tmp_path / "train.parquet"), split="train")
    streamed = load_dataset("parquet", data_files=str(tmp_path / "train.parquet"), split="train", streaming=True)
    assert stored.features["video"].decode and streamed.features["video"].decode
    for source in (stored, streamed, str(tmp_path), DatasetDict(train=stored), stored.cast_column("video", Video())):
        loaded = load_rows(source)
        assert list(loaded.features) == COLUMNS and loaded.features["video"] == Video(decode=False)
        assert [row["video"] for row in loaded] == [row["video"] for row in rows]
        assert [row["queries"][0]["prompt"] for row in loaded] == [row["prompt"] for row in rows]
        assert len({row["id"] for row in loaded}) == 3
    loaded = load_rows(stored)
    loaded.to_parquet(tmp_path / "again.parquet")
    again = load_rows(load_dataset("parquet", data_files=str(tmp_path / "again.parquet"), split="train"))
    assert list(again) == list(loaded)


def test_bytes_and_pairs_without_the_video_feature(tmp_path: Path) -> None:
    plain = Dataset.from_dict({"video": [b"one", b"two"], "prompt": ["a", "b"]})
    pairs = Dataset.from_dict({"video": [{"path": "1.mp4", "bytes": b"one"}], "prompt": ["a"]})
    assert [row["video"]["bytes"] for row in load_rows(plain)] == [b"one", b"two"]
    assert [row["video"]["bytes"] for row in load_rows(plain.to_iterable_dataset())] == [b"one", b"two"]
    assert load_rows(pairs)[0]["video"] == {"path": "1.mp4", "bytes": b"one"}
    mixed = load_rows([{"video": "a.mp4", "prompt": "a"}, {"video": b"one", "prompt": "b"}], video_root=tmp_path)
    assert mixed["video"][:] == [
        {"path": str(tmp_path / "a.mp4"), "bytes": None},
        {"path": None, "bytes": b"one"},
    ]


def test_selected_and_shuffled_videos_keep_their_rows() -> None:
    features = Features({"video": Video(decode=False), "prompt": Value("string")})
    rows = [{"video": {"path": f"{i}.mp4", "bytes": b"%d" % i}, "prompt": str(i)} for i in range(20)]
    shuffled = Dataset.from_list(rows, features=features).shuffle(seed=1).select(range(3, 17))
    loaded = load_rows(shuffled)
    assert [row["video"]["bytes"].decode() for row in loaded] == shuffled["prompt"][:]
    assert [row["queries"][0]["prompt"] for row in loaded] == shuffled["prompt"][:]


BAD = {
    "no video": ({"prompt": "What?"}, "no video"),
    "no prompt": ({"video": "a.mp4"}, "no prompt"),
    "number as prompt": ({"video": "a.mp4", "prompt": 5}, "prompt is int 5, expected a string"),
    "number as response": ({"video": "a.mp4", "prompt": "x", "response": 1.5}, "response is float 1.5"),
    "number as video": ({"video": 3, "prompt": "x"}, "video is int 3"),
    "text as start": ({"video": "a.mp4", "prompt": "x", "start": "1"}, "start is str '1'"),
    "not a number": ({"video": "a.mp4", "prompt": "x", "end": float("nan")}, "end is float nan"),
    "two forms": ({"video": "a.mp4", "prompt": "x", "messages": QUERIES}, "messages, prompt; give one"),
    "empty conversation": ({"video": "a.mp4", "conversations": []}, "conversations is empty"),
    "system turn": (
        {"video": "a.mp4", "messages": [{"role": "system", "content": "Be brief."}]},
        r"messages\[0\] is a turn of 'system'.*into the prompt",
    ),
    "answer first": ({"video": "a.mp4", "messages": [{"role": "assistant", "content": "Hm."}]}, "one of a user"),
    "two questions": ({"video": "a.mp4", "messages": [{"role": "user", "content": "?"}] * 2}, "one of an assistant"),
    "an image in a turn": (
        {"video": "a.mp4", "messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        "neither text nor the video",
    ),
    "not an object": (["video"], "the row is list"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_in_no_form_is_named(name: str, tmp_path: Path) -> None:
    bad, message = BAD[name]
    good = {"video": "a.mp4", "prompt": "What?"}
    with pytest.raises(DatasetError, match=rf"row 1: .*{message}.*check_rows"):
        load_rows([good, bad])
    path = write_jsonl(tmp_path / "rows.jsonl", [good, bad])
    with pytest.raises(DatasetError, match=rf"rows.jsonl:2: .*{message}"):
        load_rows(path)


def test_bad_sources_are_refused_clearly(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"video": "a.mp4", "prompt": "What?"}])
    path.write_text(path.read_text() + '\n{"video": ')
    with pytest.raises(DatasetError, match=r"rows.jsonl:3: not JSON"):
        load_rows(path)
    with pytest.raises(DatasetError, match="no such file"):
        load_rows(tmp_path / "absent.jsonl")
    with pytest.raises(DatasetError, match="'nobody/nothing' cannot be loaded"):
        load_rows("nobody/nothing")
    with pytest.raises(DatasetError, match="cannot read rows from list_iterator"):
        load_rows(iter([{"video": "a.mp4", "prompt": "x"}]))
    with pytest.raises(DatasetError, match="is one split already"):
        load_rows(Dataset.from_list([{"video": "a.mp4", "prompt": "x"}]), split="train")
    both = DatasetDict({name: Dataset.from_list([{"video": name, "prompt": "x"}]) for name in ("train", "test")})
    with pytest.raises(DatasetError, match=r"split=None.*'test', 'train'"):
        load_rows(both)
    assert load_rows(both, split="test")["video"][:] == ["test"]


def test_a_streamed_bad_row_raises_when_it_is_reached() -> None:
    rows = [{"id": "good", "video": "a.mp4", "prompt": "x"}, {"id": "bad", "video": None, "prompt": "x"}]
    loaded = iter(load_rows(Dataset.from_list(rows).to_iterable_dataset()))
    assert next(loaded)["id"] == "good"
    with pytest.raises(DatasetError, match="row 'bad': there is no video"):
        next(loaded)


def test_grouping_merges_queries_of_the_same_span_in_order() -> None:
    rows = [
        {"id": "a", "video": "a.mp4", "start": 0, "end": 2, "prompt": "1", "response": "x"},
        {"id": "b", "video": "b.mp4", "prompt": "2"},
        {"id": "c", "video": "a.mp4", "start": 0.0, "end": 2.0, "queries": QUERIES},
        {"id": "d", "video": "a.mp4", "start": 0, "end": 3, "prompt": "3"},
        {"id": "e", "video": "b.mp4", "prompt": "4", "response": "y"},
    ]
    loaded = load_rows(rows)
    grouped = group_queries(loaded)
    assert grouped["id"][:] == ["a", "b", "d"]
    prompts = [[query["prompt"] for query in row["queries"]] for row in grouped]
    assert prompts == [["1", "What?", "Where?"], ["2", "4"], ["3"]]
    assert grouped[1]["queries"] == [{"prompt": "2", "response": None}, {"prompt": "4", "response": "y"}]
    assert grouped.features == loaded.features
    assert list(group_queries(grouped)) == list(grouped)


def test_grouping_tells_videos_in_bytes_apart_by_content() -> None:
    videos = [{"path": "same.mp4", "bytes": data} for data in (b"one", b"two", b"one")]
    rows = [{"id": str(i), "video": video, "prompt": str(i)} for i, video in enumerate(videos)]
    grouped = group_queries(load_rows(rows))
    assert [row["video"]["bytes"] for row in grouped] == [b"one", b"two"]
    assert [[query["prompt"] for query in row["queries"]] for row in grouped] == [["0", "2"], ["1"]]
    with pytest.raises(DatasetError, match="IterableDataset"):
        group_queries(load_rows(load_rows(rows).to_iterable_dataset()))
