"""The store: found again by key, bounded in size, and whole however many processes write and are killed."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from video2lora.adapters import AdapterError, VideoAdapter, VideoAdapterStore, storage
from video2lora.adapters.errors import OutputExistsError

from ..processes import fork_server

KEYS = [VideoAdapterStore.key({"video": number}) for number in range(6)]


@pytest.fixture
def store(tmp_path):
    return VideoAdapterStore(tmp_path / "store")


def use(store: VideoAdapterStore, key: str, when: float) -> None:
    """Make an entry look as if it was used at this time."""
    os.utime(store.directory / key[:2] / key, (when, when))


def test_what_was_put_is_found_again(store, make_adapter):
    assert store.get(KEYS[0]) is None and KEYS[0] not in store
    adapter = make_adapter(1)
    entry = store.put(KEYS[0], adapter)
    found = VideoAdapterStore(store.directory).get(KEYS[0])
    assert found.content_hash == adapter.content_hash
    assert found.provenance == VideoAdapter.from_pretrained(entry).provenance
    assert list(store) == [KEYS[0]] and len(store) == 1 and KEYS[0] in store
    assert store.nbytes == sum(file.stat().st_size for file in entry.iterdir())
    assert repr(store) == f"VideoAdapterStore({store.directory}: 1 adapters, {store.nbytes} bytes)"
    assert store.remove(KEYS[0]) and not store.remove(KEYS[0])
    assert store.get(KEYS[0]) is None and len(store) == 0


def test_the_first_of_a_key_stays(store, make_adapter):
    store.put(KEYS[0], make_adapter(1))
    store.put(KEYS[0], make_adapter(2))
    assert store.get(KEYS[0]).content_hash == make_adapter(1).content_hash


def test_keys_follow_from_the_facts_alone():
    facts = {"video": "ab", "sampling": {"num_frames": 12, "fps": None}}
    assert VideoAdapterStore.key(facts) == VideoAdapterStore.key(dict(reversed(facts.items())))
    assert VideoAdapterStore.key(facts) != VideoAdapterStore.key(facts | {"video": "ac"})
    with pytest.raises(ValueError):
        VideoAdapterStore.key({"start": float("nan")})


def test_what_was_not_used_for_longest_goes_first(tmp_path, make_adapter):
    one = VideoAdapterStore(tmp_path / "measure")
    one.put(KEYS[0], make_adapter(0))
    store = VideoAdapterStore(tmp_path / "store", max_bytes=int(3.5 * one.nbytes))
    for number in range(3):
        store.put(KEYS[number], make_adapter(number))
        use(store, KEYS[number], 1000.0 + number)
    assert store.get(KEYS[0]) is not None  # used just now
    store.put(KEYS[3], make_adapter(3))
    assert set(store) == {KEYS[0], KEYS[2], KEYS[3]}
    assert store.nbytes <= store.max_bytes


def test_the_newest_stays_even_where_it_is_larger_than_the_limit(tmp_path, make_adapter):
    store = VideoAdapterStore(tmp_path / "store", max_bytes=1)
    for number in range(3):
        store.put(KEYS[number], make_adapter(number))
        assert list(store) == [KEYS[number]]


@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_entry_counts_as_not_there(store, make_adapter, damage, caplog):
    weights = store.put(KEYS[0], make_adapter(1)) / "adapter_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "changed":
        tensors = load_file(weights)
        name = next(iter(tensors))
        save_file(tensors | {name: tensors[name] + 1}, weights)
    else:
        weights.unlink()
    assert store.get(KEYS[0]) is None
    assert "is damaged and is removed" in caplog.text and KEYS[0] not in store
    store.put(KEYS[0], make_adapter(1))
    assert store.get(KEYS[0]).content_hash == make_adapter(1).content_hash


def test_what_others_replace_while_it_is_read_is_not_taken_for_damage(store, make_adapter, monkeypatch, caplog):
    store.put(KEYS[0], make_adapter(1))
    read, times = storage.read_directory, []

    def meddled_with(directory):
        times.append(directory)
        if len(times) <= 3:
            store.remove(KEYS[0])
            store.put(KEYS[0], make_adapter(1))
            raise AdapterError("one file from the old directory, one from the new")
        return read(directory)

    monkeypatch.setattr(storage, "read_directory", meddled_with)
    assert store.get(KEYS[0]).content_hash == make_adapter(1).content_hash
    assert len(times) == 4 and not caplog.records


def test_a_file_that_goes_while_the_others_are_read_is_no_error(store, make_adapter, monkeypatch):
    store.put(KEYS[0], make_adapter(1))
    open_file, times = storage.safe_open, []

    def gone(path, **options):
        times.append(path)
        if len(times) == 1:
            store.remove(KEYS[0])
        elif len(times) == 2:
            store.remove(KEYS[0])
            store.put(KEYS[0], make_adapter(1))
            raise RuntimeError("unable to open file in read-only mode: No such file or directory (2)")
        return open_file(path, **options)

    monkeypatch.setattr(storage, "safe_open", gone)
    assert store.get(KEYS[0]) is None
    store.put(KEYS[0], make_adapter(1))
    assert store.get(KEYS[0]).content_hash == make_adapter(1).content_hash
    assert len(times) == 3


@pytest.mark.parametrize("function", ["read_directory", "utime"])
def test_what_cannot_be_read_or_touched_now_is_kept(store, make_adapter, monkeypatch, function):
    def refuse(*_, **__):
        raise PermissionError("too many open files, or another user's")

    store.put(KEYS[0], make_adapter(1))
    with monkeypatch.context() as patched:
        patched.setattr(storage if function == "read_directory" else os, function, refuse)
        if function == "read_directory":
            with pytest.raises(PermissionError):
                store.get(KEYS[0])
        else:
            assert store.get(KEYS[0]).content_hash == make_adapter(1).content_hash
    assert store.get(KEYS[0]) is not None


@pytest.mark.parametrize("error", [OutputExistsError("there"), OSError(errno.ENOTEMPTY, "there")], ids=["seen", "hit"])
def test_another_process_was_faster_and_its_entry_is_gone_again(store, make_adapter, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(VideoAdapter, "save_pretrained", fail)
    store.put(KEYS[0], make_adapter(1))
    assert store.get(KEYS[0]) is None


def test_a_write_that_fails_says_so_and_leaves_nothing(store, make_adapter, monkeypatch):
    monkeypatch.setattr(
        "video2lora.adapters.storage.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match="full"):
        store.put(KEYS[0], make_adapter(1))
    assert len(store) == 0 and not list((store.directory / KEYS[0][:2]).iterdir())


@pytest.mark.parametrize("how", ["open", "put"])
def test_leftovers_of_the_dead_are_removed_but_not_work_under_way(store, make_adapter, how):
    store.put(KEYS[0], make_adapter(1))
    folder = store.directory / KEYS[0][:2]
    for name, age in (("old", 7200), ("new", 5)):
        path = folder / f".{KEYS[0]}.tmp-{name}"
        path.mkdir()
        (path / "file").write_text("x")
        os.utime(path, (time.time() - age,) * 2)
    if how == "open":
        VideoAdapterStore(store.directory)
    else:
        store.max_bytes = 1 << 30
        store.put(KEYS[0], make_adapter(1))
    assert {path.name for path in folder.iterdir()} == {KEYS[0], f".{KEYS[0]}.tmp-new"}


def test_bad_arguments(tmp_path, store, make_adapter):
    for limit in (0, -1, float("nan"), float("inf"), "10GB"):
        with pytest.raises(AdapterError, match=f"max_bytes must be a number of bytes above 0, or None, got {limit!r}"):
            VideoAdapterStore(tmp_path, max_bytes=limit)
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="is a file"):
        VideoAdapterStore(tmp_path / "file")
    for key in ("../../etc", "ab", "A" * 64):
        with pytest.raises(AdapterError, match="no key of a store"):
            store.get(key)


def _work(directory: str, source: str, seed: int, limit: int) -> None:
    """Read and write for ever; end with 3 at the first adapter that is not the key's own."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    adapters = [VideoAdapter.from_pretrained(Path(source) / str(number)) for number in range(len(KEYS))]
    store = VideoAdapterStore(directory, max_bytes=limit)
    while True:
        number = draw.randrange(len(KEYS))
        found = store.get(KEYS[number])
        if found is None:
            store.put(KEYS[number], adapters[number])
        elif found.content_hash != adapters[number].content_hash:
            os._exit(3)
        if draw.random() < 0.05:
            store.remove(KEYS[number])


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="processes are killed with SIGKILL")
def test_processes_that_write_and_are_killed_leave_nothing_wrong(tmp_path, make_adapter):
    for number in range(len(KEYS)):
        make_adapter(number).save_pretrained(tmp_path / "source" / str(number))
    size = sum(file.stat().st_size for file in (tmp_path / "source" / "0").iterdir())
    context = fork_server()
    store = VideoAdapterStore(tmp_path / "store")

    def start(seed: int) -> multiprocessing.process.BaseProcess:
        arguments = (str(store.directory), str(tmp_path / "source"), seed, 4 * size)
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        return process

    workers = [start(seed) for seed in range(3)]
    draw = random.Random(0)
    try:
        while len(store) < 2:  # they import for seconds
            time.sleep(0.05)
        for _ in range(40):  # stopping a process anywhere and going on shows it to the others half way
            worker = draw.choice(workers)
            os.kill(worker.pid, signal.SIGSTOP)
            time.sleep(0.02)
            os.kill(worker.pid, signal.SIGCONT)
            time.sleep(draw.random() * 0.05)
            assert all(worker.exitcode is None for worker in workers)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    for number, key in enumerate(KEYS):
        found = store.get(key)
        assert found is None or found.content_hash == make_adapter(number).content_hash
        store.put(key, make_adapter(number))
        assert store.get(key).content_hash == make_adapter(number).content_hash
