"""Hostile and damaged files: one kind of error, nothing executed, nothing allocated, no wrong weights."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import sys
import threading
import zipfile
from collections import Counter, OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from video2lora.modeling.published import PublishedCheckpointError, read_published_checkpoint

from .published_files import Draft, assert_same, published_draft, rewrite_member


@pytest.fixture
def draft(parity_dir: Path) -> Draft:
    return published_draft(parity_dir)


class _Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("place", ["whole", "entry", "field", "in an allowed call"])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.mkdir, f"{os.mkdir.__module__}.mkdir"), (eval, "eval"), (Counter, "collections.Counter")],
)
def test_foreign_globals_are_named_and_never_run(
    draft: Draft, tmp_path: Path, place: str, function: Any, name: str
) -> None:
    victim = tmp_path / "victim"
    arguments = {os.mkdir: [str(victim)], eval: [f"__import__('os').mkdir({str(victim)!r})"], Counter: []}[function]
    call = _Call(function, *arguments)
    path = tmp_path / "a.pt"
    if place == "whole":
        torch.save(call, path)
    elif place == "entry":
        draft.extra["a"] = call
    elif place == "field":
        draft.lora["a"] = call
    else:
        draft.extra["a"] = _Call(torch._utils._rebuild_tensor_v2, call, 0, (1,), (1,), False, OrderedDict())
    if place != "whole":
        draft.save(path)
    with pytest.raises(PublishedCheckpointError, match=rf"asks for \S*{name}.*Nothing in it was run"):
        read_published_checkpoint(path)
    assert not victim.exists()


def test_an_object_of_a_foreign_class_is_refused(draft: Draft, tmp_path: Path) -> None:
    draft.hypernet["thread"] = replace(LoraConfig(), r=1)  # an allowed class, which is fine, ...
    read_published_checkpoint(draft.save(tmp_path / "fine.pt"))
    draft.hypernet["thread"] = torch.nn.Identity()  # ... and one that is not
    with pytest.raises(PublishedCheckpointError, match="torch.nn.modules.linear.Identity"):
        read_published_checkpoint(draft.save(tmp_path / "foreign.pt"))


def test_real_classes_and_torch_registrations_stay_out(
    draft: Draft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = draft.save(tmp_path / "a.pt")
    before = torch.serialization.get_safe_globals()
    for name in ("peft", "peft.tuners.lora.config", "peft.utils.peft_types", "torch._utils"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it, or looking anything up in it, now raises
    read_published_checkpoint(path)
    assert torch.serialization.get_safe_globals() == before
    assert "ctx_to_lora" not in sys.modules


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_other_pickle_protocols_hide_nothing(tmp_path: Path, protocol: int) -> None:
    victim = tmp_path / "victim"
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(_Call(os.mkdir, str(victim)), protocol=protocol))
    with pytest.raises(PublishedCheckpointError, match="opcode|asks for"):
        read_published_checkpoint(path)
    assert not victim.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        pickle.dumps({"a": 1}),
        b"PK\x05\x06" + bytes(18),
    ],
    ids=["empty", "lfs pointer", "bare pickle", "empty zip"],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(data)
    with pytest.raises(PublishedCheckpointError, match="cannot read .*a.pt"):
        read_published_checkpoint(path)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(PublishedCheckpointError, match="not a file"):
        read_published_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing.pt"):
        read_published_checkpoint(tmp_path / "missing.pt")


def test_the_format_before_torch_1_6_and_a_trainer_state_are_refused(draft: Draft, tmp_path: Path) -> None:
    torch.save(draft.tensors, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(PublishedCheckpointError, match="before 1.6"):
        read_published_checkpoint(tmp_path / "legacy.pt")
    torch.save({"optimizer": {"state": {}}, "global_step": 3}, tmp_path / "a.trainer.pt")
    with pytest.raises(PublishedCheckpointError, match="trainer.pt"):
        read_published_checkpoint(tmp_path / "a.trainer.pt")


def test_damage_of_the_zip(draft: Draft, tmp_path: Path) -> None:
    whole = draft.save(tmp_path / "whole.pt").read_bytes()

    def damaged(change: Any, member: str, match: str, **kwargs: Any) -> None:
        path = tmp_path / "a.pt"
        path.write_bytes(whole)
        rewrite_member(path, change, member, **kwargs)
        with pytest.raises(PublishedCheckpointError, match=match):
            read_published_checkpoint(path)

    damaged(lambda _: None, "data/3", "no member 'whole/data/3'")
    damaged(lambda data: data[:-4], "data/3", "data/3' has .* bytes, expected")
    damaged(lambda data: data + b"1234", "data/3", "data/3' has .* bytes, expected")
    damaged(lambda _: None, "data.pkl", "0 members data.pkl")
    damaged(lambda _: b"big", "byteorder", "big-endian")
    damaged(lambda data: data, "data.pkl", "compressed", compression=zipfile.ZIP_DEFLATED)
    damaged(lambda _: b"\x80\x02" + b"0" * 2**23, "data.pkl", "at most")


def test_a_file_cut_short_or_with_flipped_bytes_never_gives_wrong_weights(draft: Draft, tmp_path: Path) -> None:
    whole = draft.save(tmp_path / "whole.pt")
    good, data = read_published_checkpoint(whole), whole.read_bytes()
    path = tmp_path / "a.pt"
    for length in (10, 100, len(data) // 2, len(data) - 30, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(PublishedCheckpointError):
            read_published_checkpoint(path)
    rng = random.Random(0)
    for _ in range(150):
        changed = bytearray(data)
        # Most of the file is numbers: half of the hits go to the directory at its end and the pickle at its start.
        where = rng.choice([rng.randrange(len(data)), rng.randrange(20_000), len(data) - 1 - rng.randrange(6_000)])
        changed[where] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            checkpoint = read_published_checkpoint(path)
        except PublishedCheckpointError:
            continue
        assert_same(checkpoint.state_dict, good.state_dict)  # padding, a date, an ignored member
        assert checkpoint.config == good.config


def test_changed_pickles_end_in_one_kind_of_error(draft: Draft, tmp_path: Path) -> None:
    """A checksum protects from accidents only: here the pickle changes and the checksum with it."""
    path = draft.save(tmp_path / "a.pt")
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("a/data.pkl")
    rng = random.Random(0)
    refused = 0
    for _ in range(200):
        changed = bytearray(pickled)
        for _ in range(rng.choice([1, 1, 4])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        rewrite_member(path, lambda _, changed=changed: bytes(changed))
        try:
            read_published_checkpoint(path)
        except PublishedCheckpointError:
            refused += 1
    assert refused > 100


def _pickle_with(path: Path, body: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + body + b".")


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu%stQ"
CONFIG = b"cctx_to_lora.configs\nCtxEncoderArguments\n"


@pytest.mark.parametrize(
    "body",
    [
        b"]r\xff\xff\xff\xff",  # a memo index that would allocate 64 GB
        b"X\xff\xff\xff\xffabc",  # a string longer than the file
        CONFIG + b"}X\x08\x00\x00\x00__init__Nsb",  # attributes set on a stand-in class
        CONFIG + b"N}X\x08\x00\x00\x00__init__Ns\x86b",
        b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b",
        CONFIG + b")\x81K\x01b",  # a state that is no dict
        b"c__builtin__\nset\n]]a\x85R",  # sets of anything but strings
        b"cpeft.utils.peft_types\nPeftType\n]\x85R",
        b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00)))tR",
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE % b"K\x01" + b"J\xff\xff\xff\xff)))tR",
        STORAGE % b"J\xff\xff\xff\xff",
        b"K\x01Q",
        b"ctorch\nFloatStorage\n)R",
        b"h\x05",
        b"",
        b"t",
    ],
)
def test_hostile_pickles(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "a.pt"
    _pickle_with(path, body)
    with pytest.raises(PublishedCheckpointError):
        read_published_checkpoint(path)


def test_a_huge_declared_tensor_allocates_nothing(draft: Draft, tmp_path: Path) -> None:
    path = draft.save(tmp_path / "a.pt")
    whole = path.read_bytes()
    terabyte = b"\x8a\x06" + (2**38).to_bytes(6, "little")
    count = b"M" + struct.pack("<H", 4 * 16 * 128)  # of bias_A: its storage claims to be huge
    rewrite_member(path, lambda data: data.replace(count, terabyte))
    with pytest.raises(PublishedCheckpointError, match="has 32768 bytes, expected"):
        read_published_checkpoint(path)
    path.write_bytes(whole)
    shape = b"K\x04K\x10K\x80\x87"  # its shape (4, 16, 128) does
    rewrite_member(path, lambda data: data.replace(shape, b"K\x04K\x10" + terabyte + b"\x87"))
    with pytest.raises(PublishedCheckpointError, match="bias_A.down_proj' has shape"):
        read_published_checkpoint(path)


def test_a_hostile_file_leaves_the_next_one_alone(draft: Draft, tmp_path: Path) -> None:
    good = draft.save(tmp_path / "good.pt")
    expected = read_published_checkpoint(good)
    errors: list[BaseException] = []
    bad = tmp_path / "bad.pt"
    _pickle_with(bad, b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b")

    def read() -> None:
        try:
            for _ in range(5):
                with pytest.raises(PublishedCheckpointError):
                    read_published_checkpoint(bad)
                assert_same(read_published_checkpoint(good).state_dict, expected.state_dict)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_zip_directory_that_lies_about_sizes_allocates_nothing(draft: Draft, tmp_path: Path) -> None:
    path = draft.save(tmp_path / "a.pt")
    data = bytearray(path.read_bytes())
    at = data.rindex(b"a/data.pkl") - 46  # the member's entry in the central directory
    assert data[at : at + 4] == b"PK\x01\x02"
    data[at + 20 : at + 28] = struct.pack("<II", 2**31 - 1, 2**31 - 1)
    path.write_bytes(data)
    with pytest.raises(PublishedCheckpointError, match="end"):
        read_published_checkpoint(path)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("b/data.pkl", b"N.")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(PublishedCheckpointError, match="2 members data.pkl"):
        read_published_checkpoint(path)
