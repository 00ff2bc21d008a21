"""Pytest fixtures: a local Hub and the two ways to point the real client at it, in this process or in a new one.

`hub` starts the server; `with hub.patch():` (or the fixture `patched_hub`) redirects this process, `hub.run(source)`
runs a snippet in a fresh interpreter with `hub.env`. Another room imports both fixtures in its `conftest.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .server import OWNER_TOKEN, HubServer

# Packages that copy huggingface_hub's constants, or hold an HfApi, at import.
CLIENT_PACKAGES = ("huggingface_hub", "transformers", "peft", "video2lora")
CLIENT_PREFIXES = ("HF_", "HUGGING", "TRANSFORMERS_", "PYTORCH_TRANSFORMERS")
PROXIES = {"http_proxy", "https_proxy", "all_proxy", "no_proxy"}


class Hub:
    """A running local Hub and a client home of its own: an empty cache, no stored token."""

    def __init__(self, server: HubServer, home: Path) -> None:
        self.server, self.url, self.home, self.cache = server, server.url, home, home / "hub"

    @property
    def env(self) -> dict[str, str]:
        """The environment of a process whose Hub is this one, with `owner`'s token."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(CLIENT_PREFIXES) and k.lower() not in PROXIES}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_TOKEN": OWNER_TOKEN,
            "HF_HUB_OFFLINE": "0",
            # hf_xet would take uploads to a protocol of its own as soon as it is installed.
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1",
        }

    @property
    def offline_env(self) -> dict[str, str]:
        """The same with HF_HUB_OFFLINE: only what is cached can be had."""
        return self.env | {"HF_HUB_OFFLINE": "1"}

    def run(self, source: str, *args: str, env: dict[str, str] | None = None) -> Any:
        """Run Python source in a new process (`args` are its `sys.argv[1:]`) and return its stdout, parsed as JSON.

        Raises AssertionError with the process's stderr when it fails or prints something else.
        """
        command = [sys.executable, "-c", source, *args]
        done = subprocess.run(command, env=self.env if env is None else env, capture_output=True, text=True)
        if done.returncode != 0:
            raise AssertionError(f"the process ended with {done.returncode}:\n{done.stderr}")
        try:
            return json.loads(done.stdout)
        except json.JSONDecodeError:
            raise AssertionError(f"stdout is not JSON:\n{done.stdout}\nstderr:\n{done.stderr}") from None

    @contextmanager
    def patch(self, token: str | None = OWNER_TOKEN, offline: bool = False) -> Iterator[None]:
        """Make this Hub the one of the current process: its endpoint, cache, token and offline switch.

        huggingface_hub reads its environment once, at import. So the values are exchanged wherever a loaded module
        holds them, and exchanged back in every module loaded by then, those first imported inside included.
        """
        from huggingface_hub import close_session, constants

        new = self._constants(offline)
        old = {name: getattr(constants, name) for name in new}
        with pytest.MonkeyPatch.context() as environment:
            for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE"):
                environment.delenv(name, raising=False)
            if token is not None:
                environment.setenv("HF_TOKEN", token)  # the token and this switch (PEFT) are read at every call
            environment.setenv("HF_HUB_OFFLINE", str(int(offline)))
            for name in ("NO_PROXY", "no_proxy"):
                environment.setenv(name, "127.0.0.1")
            close_session()  # the shared HTTP client has read the proxies
            _exchange(old, new)
            try:
                yield
            finally:
                _exchange(new, old)
                close_session()

    def _constants(self, offline: bool) -> dict[str, Any]:
        return {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(self.home),
            "HF_HUB_CACHE": str(self.cache),
            "HUGGINGFACE_HUB_CACHE": str(self.cache),
            "HF_ASSETS_CACHE": str(self.home / "assets"),
            "HF_TOKEN_PATH": str(self.home / "token"),
            "HF_STORED_TOKENS_PATH": str(self.home / "stored_tokens"),
            "AGENT_HARNESSES_PATH": str(self.home / "agent_harnesses.json"),
            "HF_HUB_OFFLINE": offline,
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_DISABLE_XET": True,
        }


def _exchange(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Replace the constants' old values by the new ones in every loaded client module, and in its HfApi instances."""
    from huggingface_hub import HfApi

    modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] in CLIENT_PACKAGES]
    for module in modules:
        names = vars(module)
        for name in new.keys() & names.keys():
            if names[name] == old[name]:
                names[name] = new[name]
        for api in [value for value in names.values() if isinstance(value, HfApi)]:
            if api.endpoint == old["ENDPOINT"]:
                api.endpoint = new["ENDPOINT"]
                api._whoami_cache.clear()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A local Hub with no repositories; the process itself still talks to the real one."""
    with HubServer() as server:
        yield Hub(server, tmp_path / "hub_client_home")


@pytest.fixture
def patched_hub(hub: Hub) -> Iterator[Hub]:
    """A local Hub that is this process's Hub for the whole test, with `owner`'s token."""
    with hub.patch():
        yield hub
