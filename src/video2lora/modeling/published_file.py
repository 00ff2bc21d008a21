"""Modeling: reads the container of published checkpoints (zip and pickle of `torch.save`) without running any of it.

Three steps, none of which imports or calls what the file asks for: the pickle's opcodes are checked against what such
a file needs, an unpickler that knows only stand-ins turns it into inert values, and tensors are then made from the raw
storages with every bound checked. `torch.load(weights_only=True)` would need the stand-ins registered for the whole
process, would accept whatever else the process has registered, and allows far more globals than these files have.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterable, Sequence
from math import prod
from reprlib import repr as short_repr
from typing import Any, NamedTuple, NoReturn

import torch

MAX_PICKLE_BYTES = 4 * 2**20  # a real one has 12 to 40 KB

_OPCODES = frozenset(
    "PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_TUPLE EMPTY_LIST "
    "EMPTY_DICT TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS BINPUT LONG_BINPUT BINGET LONG_BINGET "
    "GLOBAL REDUCE NEWOBJ BUILD BINPERSID".split()
)


class PublishedCheckpointError(ValueError):
    """A published checkpoint that cannot be read, or must not be; the message says what was found and expected."""


class Storage(NamedTuple):
    """A raw storage, as the pickle declares it."""

    dtype: torch.dtype
    key: str
    numel: int


class DeclaredTensor(NamedTuple):
    """A view on a storage, as the pickle declares it; nothing is read or checked yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Entries(dict):
    """Stand-in for `OrderedDict`: a plain dict that drops the attributes a file sets on it (`_metadata`)."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"OrderedDict of {len(self)} entries"


class ConfigObject:
    """Stand-in for a config class: no behaviour, only the `fields` the file gives."""

    __slots__ = ("fields",)
    fields: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict or any(type(name) is not str for name in state):
            raise PublishedCheckpointError(f"the state of a {type(self).__name__} is not a dict of fields.")
        self.fields = state


def _allowed_globals() -> dict[str, Any]:
    """Stand-ins for every global of such a file, by `module name`; none of them is the real thing.

    Made anew for each file, so that nothing a pickle does to them outlasts it.
    """

    def rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> DeclaredTensor:
        numbers = (offset, *shape, *stride)
        if type(storage) is not Storage or any(type(n) is not int or n < 0 for n in numbers):
            raise PublishedCheckpointError("a tensor is not declared as a storage, an offset, a shape and strides.")
        return DeclaredTensor(storage, offset, tuple(shape), tuple(stride))

    def enum_value(value: Any) -> str:
        if type(value) is not str:
            raise PublishedCheckpointError(f"an enum's value is {short_repr(value)}, not a string.")
        return value

    def set_of_strings(values: Any) -> frozenset[str]:
        if type(values) is not list or any(type(value) is not str for value in values):
            raise PublishedCheckpointError(f"a set holds {short_repr(values)}, expected strings.")
        return frozenset(values)

    def config(name: str) -> type:
        return type(name, (ConfigObject,), {"__slots__": ()})

    return {
        "collections OrderedDict": Entries,
        "torch FloatStorage": torch.float32,
        "torch LongStorage": torch.int64,
        "torch._utils _rebuild_tensor_v2": rebuild_tensor,
        "ctx_to_lora.modeling.hypernet HypernetConfig": config("HypernetConfig"),
        "ctx_to_lora.modeling.aggregator AggregatorConfig": config("AggregatorConfig"),
        "ctx_to_lora.configs CtxEncoderArguments": config("CtxEncoderArguments"),
        "peft.tuners.lora.config LoraConfig": config("LoraConfig"),
        "peft.tuners.lora.config LoraRuntimeConfig": config("LoraRuntimeConfig"),
        "peft.utils.peft_types PeftType": enum_value,
        "peft.utils.peft_types TaskType": enum_value,
        "__builtin__ set": set_of_strings,
        "builtins set": set_of_strings,
    }


class _Unpickler(pickle.Unpickler):
    """Knows the stand-ins and nothing else; a persistent id becomes a `Storage`."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._globals = _allowed_globals()

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name} {global_name}"
        if name not in self._globals:
            _refuse_globals([name])
        return self._globals[name]

    def persistent_load(self, pid: Any) -> Storage:
        if type(pid) is tuple and len(pid) == 5 and type(pid[0]) is str and pid[0] == "storage":
            _, dtype, key, _, numel = pid  # the location (cpu, cuda:0) does not matter: everything goes to the CPU
            if isinstance(dtype, torch.dtype) and type(key) is str and type(numel) is int and numel > 0:
                return Storage(dtype, key, numel)
        raise PublishedCheckpointError(f"{short_repr(pid)} is not the id of a storage.")


def _refuse_globals(names: Sequence[str]) -> NoReturn:
    listed = ", ".join(name.replace(" ", ".") for name in names[:8])
    raise PublishedCheckpointError(
        f"its pickle asks for {listed}, which such a checkpoint does not need. Nothing in it was run. "
        "Do not open this file with a reader that would run it unless you trust where it comes from."
    )


def unpickle(data: bytes) -> Any:
    """The pickled object as inert values, after all its opcodes and globals have been checked."""
    allowed = _allowed_globals()
    foreign: dict[str, None] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in _OPCODES:
                raise PublishedCheckpointError(
                    f"its pickle uses the opcode {opcode.name}, which torch.save does not write for such a checkpoint."
                )
            if opcode.name == "GLOBAL" and argument not in allowed:
                foreign[str(argument)] = None
            if opcode.name in ("BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):  # could allocate 64 GB
                raise PublishedCheckpointError(f"its pickle is damaged: memo index {argument}.")
        if foreign:
            _refuse_globals(list(foreign))
        return _Unpickler(data).load()
    except PublishedCheckpointError:
        raise
    except Exception as error:  # damaged pickles raise nearly anything, as the documentation of pickle says
        raise PublishedCheckpointError(f"its pickle is damaged ({type(error).__name__}: {error}).") from error


class PublishedArchive:
    """The zip of `torch.save`: uncompressed members below one root folder, which is found by its `data.pkl`.

    Raises:
        PublishedCheckpointError: it is not one, or damaged.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self._size = os.fstat(file.fileno()).st_size
        try:
            self._zip = zipfile.ZipFile(file)
        except Exception as error:  # a damaged directory raises BadZipFile, struct.error, ValueError, ...
            raise PublishedCheckpointError(
                f"it is not a complete zip file of torch.save ({error}). A download cut short, a Git LFS pointer, "
                "a bare pickle and the format of torch before 1.6 all look like this."
            ) from error
        names = self._zip.namelist()
        roots = [name.removesuffix("data.pkl") for name in names if re.fullmatch(r"([^/]+/)?data\.pkl", name)]
        if len(roots) != 1 or len(set(names)) != len(names):
            raise PublishedCheckpointError(
                f"its zip has {len(roots)} members data.pkl, expected one, and no name twice."
            )
        self._root = roots[0]
        self._storages: dict[Storage, torch.Tensor] = {}
        if f"{self._root}byteorder" in names and self._member("byteorder", 16).strip() != b"little":
            raise PublishedCheckpointError("its numbers are big-endian; only little-endian files are supported.")

    def load(self) -> Any:
        """The pickled object; tensors in it are `DeclaredTensor`."""
        return unpickle(self._member("data.pkl", MAX_PICKLE_BYTES))

    def check_total(self, tensors: Iterable[DeclaredTensor]) -> None:
        """Raise if the tensors have more numbers than their storages: views of one another would swell when copied."""
        tensors = list(tensors)
        declared = sum(prod(tensor.shape) for tensor in tensors)
        stored = sum(storage.numel for storage in {tensor.storage for tensor in tensors})
        if declared > stored:
            raise PublishedCheckpointError(
                f"its tensors declare {declared} numbers, but their storages have {stored}: tensors that share memory "
                "(shared weights) are not supported."
            )

    def tensor(self, name: str, declared: DeclaredTensor) -> torch.Tensor:
        """The declared view, after a check that it lies inside its storage and is not larger than it."""
        storage, offset, shape, stride = declared
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=False))
        fits = len(shape) == len(stride) and 0 < prod(shape) <= storage.numel and last < storage.numel
        if not fits or max(stride, default=0) > storage.numel:
            raise PublishedCheckpointError(
                f"tensor {name!r} declares shape {short_repr(shape)}, strides {short_repr(stride)}, offset {offset}; "
                f"these do not fit its storage of {storage.numel} numbers."
            )
        if storage not in self._storages:
            data = self._member(f"data/{storage.key}", storage.numel * storage.dtype.itemsize, exact=True)
            self._storages[storage] = torch.frombuffer(bytearray(data), dtype=storage.dtype)
        return self._storages[storage].as_strided(shape, stride, offset)

    def _member(self, name: str, size: int, exact: bool = False) -> bytes:
        """Bytes of a member; `size` is compared with the zip's directory before anything is allocated."""
        try:
            info = self._zip.getinfo(self._root + name)
        except KeyError:
            raise PublishedCheckpointError(f"its zip has no member {self._root + name!r}.") from None
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if not stored or info.header_offset + info.file_size > self._size:
            raise PublishedCheckpointError(f"member {info.filename!r} is compressed or reaches past the file's end.")
        if info.file_size > size or (exact and info.file_size != size):
            raise PublishedCheckpointError(
                f"member {info.filename!r} has {info.file_size} bytes, expected {'' if exact else 'at most '}{size}."
            )
        try:
            return self._zip.read(info)
        except Exception as error:  # wrong checksum or local header, encryption
            raise PublishedCheckpointError(f"member {info.filename!r} is damaged ({error}).") from error
