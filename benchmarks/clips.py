"""Benchmark: every clip of a folder through pipeline, adapter file, PEFT and one answer, at a real model's sizes.

The base is built from a real configuration with random weights and the real tokenizer and processor files: nothing is
downloaded and answers are noise; what is shown is that every clip gets through, with which frames and tokens, and how
long it takes.

    python benchmarks/clips.py --base DIRECTORY_WITH_CONFIG_AND_PROCESSOR --videos FOLDER [--num-frames 12]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from video2lora import Video2LoraConfig, Video2LoraModel, Video2LoraProcessor, VideoError, VideoToLoraPipeline

QUESTION = "What happens in this video?"


def build(base: Path) -> VideoToLoraPipeline:
    """A pipeline with random weights at the sizes of `base`, whose adapters change something."""
    torch.manual_seed(0)
    vlm = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(base), dtype=torch.float32).eval()
    config = Video2LoraConfig(vlm_config=vlm.config, base_model_name_or_path=str(base))
    model = Video2LoraModel(config, vlm=vlm).eval()
    for scaler in model.hypernetwork.scaler_B.values():
        torch.nn.init.normal_(scaler, std=0.05)
    processor = Video2LoraProcessor.from_config(config, AutoProcessor.from_pretrained(base))
    return VideoToLoraPipeline(model=model, processor=processor, device="cpu")


@torch.no_grad()
def run_clip(pipe: VideoToLoraPipeline, clip: Path, num_frames: int, folder: Path) -> list[str]:
    """One row of the table."""
    start = time.perf_counter()
    try:
        adapter = pipe(str(clip), num_frames=num_frames)
    except VideoError as error:
        return [clip.name, "", "", "", "", f"{type(error).__name__}: {error}"]
    internalized = time.perf_counter()
    adapter.save_pretrained(folder / clip.stem, overwrite=True)
    segment = adapter.segments[0]
    questions = pipe.processor(text=[QUESTION])
    in_memory = pipe.model(**questions, adapters=adapter).logits
    peft_model = PeftModel.from_pretrained(pipe.model.vlm, folder / clip.stem)
    difference = (peft_model(**questions).logits - in_memory).abs().max().item()
    before = time.perf_counter()
    output = peft_model.generate(**questions, max_new_tokens=8, do_sample=False)
    answered = time.perf_counter()
    peft_model.unload()
    answer = pipe.processor.decode(output[0, questions["input_ids"].shape[1] :], skip_special_tokens=True)
    scale = in_memory.abs().max().item()
    return [
        clip.name,
        str(segment.num_frames),
        str(segment.num_visual_tokens),
        f"{internalized - start:.1f}",
        f"{answered - before:.1f}",
        f"PEFT equals memory to {difference / scale:.0e}; {len(answer)} characters answered",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--videos", type=Path, required=True)
    parser.add_argument("--num-frames", type=int, default=12)
    arguments = parser.parse_args()
    pipe = build(arguments.base)
    clips = sorted(p for p in arguments.videos.iterdir() if p.suffix.lower() not in (".md", ".txt", ".json"))
    header = ["clip", "frames used", "visual tokens", "video to adapter s", "8 tokens through PEFT s", "result"]
    with TemporaryDirectory() as folder:
        rows = [run_clip(pipe, clip, arguments.num_frames, Path(folder)) for clip in tqdm(clips, disable=None)]
    for row in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
