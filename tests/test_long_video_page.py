"""The page on long and live videos: its code, run as it stands on a small random model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from video2lora import Video2LoraModel, Video2LoraProcessor
from video2lora.testing import tiny_clip

PAGE = Path(__file__).parents[1] / "docs" / "long_video.md"


@pytest.fixture
def folder(tmp_path, tiny_vlm_dir, monkeypatch) -> Path:
    """A working directory with the files that the page's code names."""
    import av

    torch.manual_seed(0)
    sizes = {"rank": 8, "latent_size": 16, "num_latents": 4, "num_blocks": 2}
    model = Video2LoraModel.from_vlm(tiny_vlm_dir, dtype=torch.float32, **sizes)
    for scaler in model.hypernetwork.scaler_B.values():
        torch.nn.init.normal_(scaler)
    model.save_pretrained(tmp_path / "user/video2lora-smolvlm2-500m")
    Video2LoraProcessor.from_config(model.config).save_pretrained(tmp_path / "user/video2lora-smolvlm2-500m")
    tiny_clip(tmp_path / "lecture.mp4", seconds=4)
    with av.open(str(tmp_path / "lecture.mp4")) as source, av.open(str(tmp_path / "recording.ts"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_code_runs_in_order_and_does_what_it_says(folder):
    seen: dict = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(code, "docs/long_video.md", "exec"), seen)
        if "middle" in code:
            assert [(s.start, s.end) for s in seen["middle"].segments] == [(1.0, 2.0)]
        if "small" in code:
            assert seen["small"].rank == 32 and len(seen["small"].segments) == 4
        if "camera" in code:
            assert [s.start for s in seen["adapter"].segments] == [1.0, 2.0]
            assert [s.start for s in seen["newest"].segments] == [2.0]
    assert len(seen["store"]) == 1
    assert (folder / "so-far-lora" / "adapter_model.safetensors").is_file()
