"""Moving shapes: VLM and hypernetwork as one checkpoint in bfloat16, as a Hub repository would have it.

    python export.py runs/hypernetwork -o checkpoint
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from video2lora import Video2LoraModel, Video2LoraProcessor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of stage 2")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new folder")
    options = parser.parse_args()
    if options.output.exists():
        raise SystemExit(f"{options.output} exists already: name a new folder.")
    processor = Video2LoraProcessor.from_pretrained(options.checkpoint)
    model = Video2LoraModel.from_pretrained(options.checkpoint, dtype=torch.bfloat16)
    model.hypernetwork.to(torch.bfloat16)  # halves the file; it computes in float32 again when it is loaded
    model.config.base_model_name_or_path = None  # the base is in the file; where it was trained is nobody's business
    model.save_pretrained(options.output, bundle_base=True)
    processor.save_pretrained(options.output)
    size = sum(file.stat().st_size for file in options.output.rglob("*") if file.is_file())
    print(f"{options.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
