"""Moving shapes: VLM and hypernetwork as one checkpoint in bfloat16 with a card, as a Hub repository would have it.

    python export.py runs/hypernetwork -o checkpoint
    python export.py runs/hypernetwork -o checkpoint --results runs/proof --overwrite    (proved: scores in the card)

The card is written from what the runs left behind: the hypernetwork's own card, `validation.jsonl` of the VLM.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from train_hypernetwork import HELD_OUT_TASKS, HISTORY, history

from video2lora import Video2LoraModel, Video2LoraProcessor
from video2lora.adapters.directories import check_target, new_directory
from video2lora.adapters.errors import OutputExistsError
from video2lora.evaluation.records import read_run, write_records
from video2lora.hub_cards.evaluation_card import add_to_card, model_index

NAME = "examples/moving_shapes/checkpoint"  # where the card's code finds it, from the repository's root
IN_INDEX = ("main", "phrasings", "combinations")  # runs of the proof that are the model's results on a Hub page
CURVE = "learning_curve.png"
FILES = {"config.json", "model.safetensors", "processor_config.json", "vlm_processor", "README.md", CURVE, HISTORY}
TEMPLATE = Path(__file__).with_name("card_template.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of stage 2")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--results", type=Path, help="folder of stage 3's runs")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    options = parser.parse_args()
    try:
        export(options.checkpoint, options.output, options.results, overwrite=options.overwrite)
    except OutputExistsError:
        told = f"{options.output} exists already: name a new folder, or pass --overwrite to replace a checkpoint."
        raise SystemExit(told) from None
    print(f"{options.output}: {folder_bytes(options.output) / 1e6:.1f} MB")


def export(checkpoint: Path, output: Path, proof: Path | None = None, overwrite: bool = False) -> None:
    """Write the checkpoint, all at once or not at all."""
    check_target(output, overwrite=overwrite, replaceable=is_checkpoint)
    processor = Video2LoraProcessor.from_pretrained(checkpoint)
    model = Video2LoraModel.from_pretrained(checkpoint, dtype=torch.bfloat16)
    vlm_run = Path(model.config.base_model_name_or_path or "")
    model.hypernetwork.to(torch.bfloat16)  # halves the file; it computes in float32 again when it is loaded
    model.config.base_model_name_or_path = None  # the base is in the file; where it was trained is nobody's business
    with new_directory(output, overwrite=overwrite, replaceable=is_checkpoint) as folder:
        model.save_pretrained(folder, bundle_base=True)
        processor.save_pretrained(folder)
        training = training_section(checkpoint)
        if training and CURVE in training:
            shutil.copyfile(checkpoint / CURVE, folder / CURVE)
        runs = history(checkpoint)
        if runs:
            shutil.copyfile(checkpoint / HISTORY, folder / HISTORY)
        facts = model_facts(model, folder) | vlm_facts(vlm_run) | {"training": training, "earlier": runs[:-1]}
        write_card(folder / "README.md", facts, proof)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds what `export` writes, and may be replaced by it."""
    names = {path.name for path in folder.iterdir()}
    return {"config.json", "model.safetensors"} <= names <= FILES


def write_card(path: Path, facts: dict[str, Any], proof: Path | None) -> None:
    """The card, with the scores of the proof as a table and in its metadata if there are any."""
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="video2lora",
        pipeline_tag="video-text-to-text",
        tags=["video2lora", "hypernetwork", "lora", "peft", "smolvlm", "trained-from-scratch", "synthetic"],
    )
    with tempfile.TemporaryDirectory() as scratch:
        runs = merged_runs(proof, Path(scratch)) if proof else []
        shown = main_scores(runs[0]) if runs else {"results": None}
        words = facts | shown | {"name": NAME, "held_out_tasks": " and ".join(HELD_OUT_TASKS)}
        card = ModelCard.from_template(data, template_path=str(TEMPLATE), **words)
        path.write_text(str(card).rstrip() + "\n", encoding="utf-8")
        if runs:
            add_to_card(path, model_index(runs, "video2lora-moving-shapes"))


def model_facts(model: Video2LoraModel, folder: Path) -> dict[str, Any]:
    """Sizes, from the models themselves."""
    config, vlm = model.config, model.config.vlm_config
    vision, text = vlm.vision_config, vlm.get_text_config()
    static_rank = config.rank if config.use_static_lora else 0
    modules = [
        module for name, module in model.vlm.get_decoder().named_modules() if name.endswith(target_ends(config))
    ]
    per_rank = sum(module.in_features + module.out_features for module in modules)
    return {
        "config": config,
        "vision": vision,
        "text": text,
        "vlm_parameters": millions(model.vlm),
        "hypernetwork_parameters": millions(model.hypernetwork),
        "visual_tokens": (vision.image_size // vision.patch_size // vlm.scale_factor) ** 2,
        "adapter_rank": config.rank + static_rank,
        "static_rank": static_rank,
        "adapter_parameters": f"{per_rank * (config.rank + static_rank):,}",
        "modules": " and ".join(f"`{name}`" for name in config.target_modules),
        "megabytes": f"{folder_bytes(folder) / 1e6:.1f}",
    }


def target_ends(config: Any) -> tuple[str, ...]:
    return tuple(f".{name}" for name in config.target_modules)


def vlm_facts(run: Path) -> dict[str, Any]:
    """What stage 1 left behind: steps, settings and accuracy of its last validation; nothing if it is elsewhere."""
    log = run / "validation.jsonl"
    if not log.is_file():
        return {"vlm_steps": None, "vlm_settings": None, "vlm_validation": None}
    last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    rows = last.pop("exact_match")
    return {
        "vlm_steps": f"{last.pop('step'):,}",
        "vlm_settings": ", ".join(
            f"{name} {value}" for name, value in last.items() if isinstance(value, (int, float))
        ),
        "vlm_validation": [(task, f"{row['accuracy']:.3f}", f"{row['n']:,}") for task, row in rows.items()],
    }


def training_section(run: Path) -> str | None:
    """The training run as its own card tells it; without the samples, which stay where they are."""
    card = run / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    found = re.search(r"^## Training\n(.*?)(?=^## |^Method: |\Z)", text, re.DOTALL | re.MULTILINE)
    if found is None:
        return None
    return re.sub(r"^Questions, targets and what the model answered.*\n\n?", "", found[1], flags=re.MULTILINE).strip()


def merged_runs(proof: Path, folder: Path) -> list[Path]:
    """Those of the proof's runs that the card tells and that are finished, each put together from its shards.

    Raises:
        SystemExit: the main run is not finished.
    """
    from prove import Job, read_declared

    _, runs = read_declared(proof)
    merged = []
    for name in IN_INDEX:
        jobs = Job.all_of(name, runs[name], proof)
        if all(job.finished for job in jobs):
            merged.append(merge([job.output for job in jobs], folder / name))
        elif name == IN_INDEX[0]:
            raise SystemExit(f"{proof / name} is not finished: `prove.py run` goes on with it.")
    return merged


def merge(shards: Sequence[Path], folder: Path) -> Path:
    """Write the shards of a run as one run."""
    parts = [read_run(shard) for shard in shards]
    settings = json.loads((shards[0] / "run.json").read_text(encoding="utf-8"))
    for count in ("num_samples", "num_questions"):
        settings["benchmark"][count] = sum(part.settings["benchmark"][count] for part in parts)
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(settings), encoding="utf-8")
    write_records(folder, pa.concat_tables([part.records for part in parts]))
    return folder


def main_scores(folder: Path) -> dict[str, Any]:
    """Exact match by task of the proof's main run."""
    run = read_run(folder)
    rows = []
    for task in run.tasks:
        known = {name: [s for s in run.scores("exact_match", name, task) if s is not None] for name in run.conditions}
        means = [known.get(name, []) for name in ("video", "adapter", "no_adapter")]
        shown = task + (" (never trained on)" if task in HELD_OUT_TASKS else "")
        rows.append([shown, f"{run.num_questions(task):,}", *(f"{sum(m) / len(m):.3f}" if m else "-" for m in means)])
    return {"results": rows, "num_frames": run.settings["sampling"]["num_frames"]}


def millions(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f} million"


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
