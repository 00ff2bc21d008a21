"""Trainer: a teacher's top-k logits on disk, written in shards and read one query at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..data.errors import DatasetError
from ..data.files import write_atomically

INDEX = "logits-index.json"
SHARD_BYTES = 512 * 1024**2
NAMES = ("token_ids", "logits", "logsumexp", "labels")


def top_k_targets(logits: Tensor, labels: Tensor, top_k: int) -> dict[str, Tensor]:
    """What is stored of a teacher's logits.

    They keep the number format they come in (bfloat16 of a bfloat16 base, two bytes each). Rounding them, even to
    float16, would be worse than it looks: the probability left for the rest of the vocabulary is 1 minus that of the
    k, and that difference would be mostly rounding where the k hold nearly all.

    Args:
        logits: `[tokens, vocabulary]`.
        labels: `[tokens]`, the tokens they predict.
        top_k: how many of the largest to keep.

    Returns:
        `token_ids` `[tokens, k]` int32, largest first; `logits` `[tokens, k]`; `logsumexp` `[tokens]` float32, over
        the whole vocabulary; `labels` `[tokens]` int32. On the CPU.
    """
    values, token_ids = logits.topk(top_k, dim=-1)
    return {
        "token_ids": token_ids.to("cpu", torch.int32),
        "logits": values.cpu(),
        "logsumexp": logits.float().logsumexp(-1).cpu(),
        "labels": labels.to("cpu", torch.int32),
    }


class LogitsWriter:
    """Writes targets of queries, in the order given, into shards `logits-NNNNN.safetensors`, and their index."""

    def __init__(self, folder: Path, top_k: int, vocab_size: int, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.top_k, self.vocab_size, self.shard_bytes = folder, top_k, vocab_size, shard_bytes
        self._queries: dict[str, list[list[int]]] = {}
        self._shards: list[str] = []
        self._pending: list[Mapping[str, Tensor]] = []
        self._tokens = self._bytes = 0

    def add(self, row_id: str, targets: Mapping[str, Tensor]) -> None:
        """Append the targets of a row's next query."""
        length = len(targets["labels"])
        self._queries.setdefault(row_id, []).append([len(self._shards), self._tokens, length])
        # a copy: slices of a file would keep all of it in memory
        self._pending.append({name: targets[name].clone() for name in NAMES})
        self._tokens += length
        self._bytes += sum(targets[name].nbytes for name in NAMES)
        if self._bytes >= self.shard_bytes:
            self._flush()

    def close(self) -> None:
        """Write the last shard, and the index behind all shards."""
        self._flush()
        index = {"top_k": self.top_k, "vocab_size": self.vocab_size, "shards": self._shards, "queries": self._queries}
        write_atomically(self.folder / INDEX, json.dumps(index, ensure_ascii=False).encode() + b"\n")

    def _flush(self) -> None:
        if not self._pending:
            return
        name = f"logits-{len(self._shards):05d}.safetensors"
        tensors = {field: torch.cat([targets[field] for targets in self._pending]) for field in NAMES}
        write_atomically(self.folder / name, save(tensors))
        self._shards.append(name)
        self._pending, self._tokens, self._bytes = [], 0, 0


class TeacherLogits:
    """The top-k logits that `teach` wrote, read lazily: `logits[row_id, query]`.

    Can be sent to the workers of a data loader; each opens the shards by itself.

    Args:
        output_dir: the folder `teach` wrote with `top_k`.

    Raises:
        DatasetError: there are no logits in the folder.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.folder = Path(output_dir)
        try:
            index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DatasetError(
                f"{self.folder} has no {INDEX}: run `video2lora teach` with --top-k to its end, or train without KL."
            ) from None
        self.top_k: int = index["top_k"]
        self.vocab_size: int = index["vocab_size"]
        self._shards: list[str] = index["shards"]
        self._queries: dict[str, list[list[int]]] = index["queries"]
        self._open: dict[int, Any] = {}

    def __getitem__(self, key: tuple[str, int]) -> dict[str, Tensor]:
        """Targets of one query.

        Args:
            key: the row's id and the number of the query in its `queries`, from 0.

        Returns:
            `token_ids` `[tokens, k]` int64, the teacher's likeliest first; `logits` `[tokens, k]` float32; `logsumexp`
            `[tokens]` float32, over the whole vocabulary; `labels` `[tokens]` int64, the tokens they predict: the
            labelled ones of `processor.encode_turn(prompt, response)`, to be compared with.

        Raises:
            KeyError: there is no such row or query.
        """
        row_id, number = key
        places = self._queries.get(row_id, [])
        if not 0 <= number < len(places):
            raise KeyError(f"{self.folder} has no logits of row {row_id!r}, query {number}.")
        shard, start, length = places[number]
        stored = {name: self._file(shard).get_slice(name)[start : start + length] for name in NAMES}
        return {
            "token_ids": stored["token_ids"].long(),
            "logits": stored["logits"].float(),
            "logsumexp": stored["logsumexp"],
            "labels": stored["labels"].long(),
        }

    def __contains__(self, key: tuple[str, int]) -> bool:
        return 0 <= key[1] < len(self._queries.get(key[0], []))

    def __len__(self) -> int:
        """Number of queries."""
        return sum(map(len, self._queries.values()))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def _file(self, shard: int) -> Any:
        if shard not in self._open:
            self._open[shard] = safe_open(self.folder / self._shards[shard], framework="pt")
        return self._open[shard]
