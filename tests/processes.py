"""New processes that start at once: forks of a server that has imported the libraries, and nothing of ours.

A fresh interpreter takes 5 seconds to import torch and transformers. What such an import says or does has tests of
its own (cli/test_process.py); those that kill a process, or need several, start it here.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

LIBRARIES = [
    "accelerate", "av", "datasets", "matplotlib.figure", "peft", "scipy.stats", "torch", "torchvision",
    "transformers.pipelines", "transformers.trainer", "transformers.models.auto.modeling_auto",
    "transformers.models.smolvlm.modeling_smolvlm", "transformers.models.smolvlm.processing_smolvlm",
]  # fmt: skip


COMMAND = "from _video2lora_cli import main; main()"  # for `run_code`: the command line


def fork_server() -> ForkServerContext:
    """The context of such processes, for `multiprocessing`'s own interface."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context


def launch(target: Callable[..., None], *arguments: Any, processes: int = 1, timeout: float = 120) -> list[int | None]:
    """Run `target(rank, *arguments)` in new processes; their exit codes (-9: killed, None: it hung and was ended).

    Several see the variables that torch's launcher sets. Once one was killed or failed, the others wait for it in vain
    and are ended too, as a launcher does.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = fork_server()
    children = [
        context.Process(target=_child, args=(rank, processes, port, target, arguments)) for rank in range(processes)
    ]
    for child in children:
        child.start()
    try:
        for _ in range(int(timeout * 20)):
            for child in children:
                child.join(0.05 / processes)
            codes = [child.exitcode for child in children]
            if None not in codes or any(codes):
                break
        if any(codes):
            for child in children:
                child.join(5)
        return [child.exitcode for child in children]
    finally:
        for child in children:  # also when the test runs out of time: pytest would wait for them for ever
            child.kill()
            child.join()


def _child(rank: int, processes: int, port: int, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch

    gc.freeze()
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
    multiprocessing.set_start_method("fork", force=True)  # of the data loader's workers, as on any Linux
    target(rank, *arguments)


def output_to(path: Path) -> None:
    """What this process writes to both streams goes to a file."""
    log = open(path, "w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)


def run_code(
    code: str, *arguments: object, processes: int = 1, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """What `python -c code arguments` does, in one process or by torch's launcher in several.

    Returns:
        The exit code, that of the first to fail if there are several, and what all wrote. One that hung is an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = [str(argument) for argument in arguments]
        codes = launch(_run_code, folder, code, given, processes=processes, timeout=timeout)
        written = ["".join(path.read_text() for path in sorted(Path(folder).glob(f"*.{fd}"))) for fd in (1, 2)]
    if None in codes and not any(codes):
        raise subprocess.TimeoutExpired(code, timeout, *written)
    return subprocess.CompletedProcess(given, next(filter(None, codes), 0), *written)


def _run_code(rank: int, folder: str, code: str, arguments: list[str]) -> None:
    for fd in (1, 2):
        os.dup2(os.open(f"{folder}/{rank}.{fd}", os.O_WRONLY | os.O_CREAT), fd)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
