"""Command line: `video2lora env`, what belongs into a bug report."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from ._options import Json
from ._output import print_fields, print_json

PACKAGES: tuple[str, ...] = (
    "video2lora",
    "torch",
    "torchvision",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "huggingface_hub",
)
PACKAGES += ("safetensors", "tokenizers", "av")


def env(json: Json = False) -> None:
    """Show versions and devices, to paste into a bug report."""
    import av
    import torch
    from huggingface_hub import constants

    cuda = torch.cuda.is_available()
    document: dict[str, object] = {"python": platform.python_version(), "platform": platform.platform()}
    document |= {name: _version(name) for name in PACKAGES}
    document["ffmpeg"] = {name: ".".join(map(str, parts)) for name, parts in sorted(av.library_versions.items())}
    document["cuda"] = torch.version.cuda if cuda else None
    document["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    document["threads"] = torch.get_num_threads()
    document["offline"] = bool(constants.HF_HUB_OFFLINE)
    document["hub_endpoint"] = constants.ENDPOINT
    if json:
        print_json(document)
        return
    ffmpeg, devices = document["ffmpeg"], document["devices"]
    assert isinstance(ffmpeg, dict) and isinstance(devices, list)
    shown = document | {
        "ffmpeg": ", ".join(f"{name} {number}" for name, number in ffmpeg.items()),
        "cuda": document["cuda"] or "no",
        "devices": ", ".join(devices) or "cpu",
        "offline": "yes" if document["offline"] else "no",
    }
    print_fields({name: "not installed" if value is None else value for name, value in shown.items()})


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
