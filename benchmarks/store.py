"""Benchmark: processes read, write and remove adapters in one store of limited size, and are killed all along.

Every adapter is the one and only of its key, so whatever is read can be told right from wrong. Counted are reads that
gave an adapter, whole and right (hits), writes, removals for the size limit (evictions), kills, and what must be
nought: adapters that were wrong, entries that were damaged, and errors. At the end every entry that is left is read.

    python benchmarks/store.py [--processes 8] [--seconds 60] [--kills 4]
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import multiprocessing
import os
import random
import signal
import time
import traceback
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sizes import table

from video2lora.adapters import AdapterProvenance, Segment, VideoAdapter, VideoAdapterStore
from video2lora.modeling.lora import LoraWeights
from video2lora.modeling.targets import resolve_targets
from video2lora.testing import tiny_smolvlm

COUNTS = ("hits", "misses", "writes", "evictions", "removals", "wrong", "damaged", "errors")
ADAPTERS, KEPT, RANK, REMOVE = 12, 5, 8, 0.02
KEYS = [VideoAdapterStore.key({"video": number}) for number in range(ADAPTERS)]


def make_adapters(folder: Path) -> int:
    """Write different adapters of some 150 kB to `folder`; the bytes of one."""
    vlm, _ = tiny_smolvlm(seed=0, hidden_size=128, intermediate_size=1024)
    targets = resolve_targets(vlm, ("down_proj",))
    generator = torch.Generator().manual_seed(0)

    def draw(sizes: dict[str, int]) -> dict[str, torch.Tensor]:
        layers = len(targets.layer_indices)
        return {name: torch.randn(1, layers, RANK, size, generator=generator) for name, size in sizes.items()}

    for number in range(ADAPTERS):
        weights = LoraWeights(draw(targets.in_features), draw(targets.out_features), 1.0, (RANK,), 0)
        provenance = AdapterProvenance(segments=(Segment(source=f"{number}.mp4"),))
        adapter = VideoAdapter.from_weights(weights, vlm=vlm, targets=targets, provenance=provenance)
        adapter.save_pretrained(folder / str(number))
    return sum(file.stat().st_size for file in (folder / "0").iterdir())


class CountedStore(VideoAdapterStore):
    """A store that counts what happens to it in an array that its process's death does not take along."""

    def __init__(self, directory: Path, max_bytes: int, counts: Any):
        self.counts, self._mine = counts, False
        super().__init__(directory, max_bytes=max_bytes)
        damaged = logging.Handler(logging.WARNING)  # the store logs what it finds damaged, and nothing else
        damaged.emit = lambda record: self.count("damaged") or print(record.getMessage(), flush=True)  # type: ignore
        logging.getLogger("video2lora.adapters.store").addHandler(damaged)

    def count(self, name: str) -> None:
        self.counts[COUNTS.index(name)] += 1

    def remove(self, key: str) -> bool:
        removed = super().remove(key)
        if removed:
            self.count("removals" if self._mine else "evictions")
        return removed

    def remove_myself(self, key: str) -> None:
        self._mine = True
        self.remove(key)
        self._mine = False


def work(directory: Path, source: Path, limit: int, seed: int, counts: Any) -> None:
    """Read, write and remove for ever."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    store = CountedStore(directory, limit, counts)
    adapters = [VideoAdapter.from_pretrained(source / str(number)) for number in range(ADAPTERS)]
    while True:
        number = draw.randrange(ADAPTERS)
        try:
            found = store.get(KEYS[number])
            if found is None:
                store.count("misses")
                store.put(KEYS[number], adapters[number])
                store.count("writes")
            else:
                store.count("hits" if found.content_hash == adapters[number].content_hash else "wrong")
            if draw.random() < REMOVE:
                store.remove_myself(KEYS[number])
        except Exception:
            store.count("errors")
            traceback.print_exc()


def survey(directory: Path, source: Path) -> tuple[int, int, int]:
    """(entries, wrong or damaged ones, directories that the killed left behind) of a store at rest."""
    bad = 0
    found = sorted(directory.glob("[0-9a-f][0-9a-f]/[0-9a-f]*"))
    for entry in found:
        right = VideoAdapter.from_pretrained(source / str(KEYS.index(entry.name))).content_hash
        try:
            bad += VideoAdapter.from_pretrained(entry).content_hash != right
        except ValueError as error:
            bad += 1
            print(error)
    return len(found), bad, len(list(directory.glob("[0-9a-f][0-9a-f]/.*")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--kills", type=float, default=4, help="a second")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(0)
    kills = 0
    context = multiprocessing.get_context("fork")  # importing torch anew would take a new process seconds
    with TemporaryDirectory() as folder:
        source, directory = Path(folder) / "source", Path(folder) / "store"
        size = make_adapters(source)
        limit = KEPT * size + size // 2
        counts = [RawArray(ctypes.c_int64, len(COUNTS)) for _ in range(arguments.processes)]

        def start(place: int) -> Any:
            places = (directory, source, limit, draw.randrange(1 << 30), counts[place])
            process = context.Process(target=work, args=places, daemon=True)
            process.start()
            return process

        workers = [start(place) for place in range(arguments.processes)]
        end = time.monotonic() + arguments.seconds
        try:
            while time.monotonic() < end:
                time.sleep(draw.expovariate(arguments.kills))
                place = draw.randrange(arguments.processes)
                assert workers[place].exitcode is None, f"worker {place} ended by itself"
                os.kill(workers[place].pid, signal.SIGKILL)
                workers[place].join()
                kills += 1
                workers[place] = start(place)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()
        entries, bad, leftovers = survey(directory, source)
        store = VideoAdapterStore(directory, max_bytes=limit)
        store.put(KEYS[0], VideoAdapter.from_pretrained(source / "0"))
        total = {name: sum(column) for name, column in zip(COUNTS, zip(*counts, strict=True), strict=True)}
        over = store.nbytes > limit
    print(
        f"{arguments.processes} processes, {arguments.seconds:g} s, {ADAPTERS} adapters of {size / 1e3:.0f} kB, ",
        end="",
    )
    print(f"limit {limit / 1e6:.1f} MB")
    header = ["reads", *COUNTS, "kills", "left at the end", "of these bad", "leftovers of the killed"]
    row = [total["hits"] + total["misses"], *total.values(), kills, entries, bad, leftovers]
    print(table(header, [[str(value) for value in row]]))
    failed = bad + total["wrong"] + total["damaged"] + total["errors"] + over
    raise SystemExit("FAILED" if failed else 0)


if __name__ == "__main__":
    main()
