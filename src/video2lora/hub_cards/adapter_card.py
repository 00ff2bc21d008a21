"""Hub cards: the card of one video's adapter."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_PIPELINE_TAGS = {"vlm": "video-text-to-text", "text": "text-generation"}


def adapter_card(document: Mapping[str, Any], *, name: str, base_on_hub: bool) -> str:
    """Write the `README.md` of an adapter.

    Args:
        document: content of its `video2lora.json`.
        name: Hub id or directory name under which the quick start loads it.
        base_on_hub: whether the base is a Hub id, which the card's metadata may then name.
    """
    provenance, layout = document["provenance"], document["layout"]
    base_model = provenance["base_model"]
    modules = document["targets"]["modules"]
    layers = document["targets"]["layer_indices"]
    per_rank = sum(module["in_features"] + module["out_features"] for module in modules.values())
    num_parameters = per_rank * document["rank"] * len(layers)
    data = ModelCardData(
        base_model=base_model if base_on_hub else None,
        library_name="peft",
        pipeline_tag=_PIPELINE_TAGS[layout],
        tags=["lora", "video2lora"],
    )
    if base_on_hub:
        data["base_model_relation"] = "adapter"
    static = document["static_ranks"]
    card = ModelCard.from_template(
        data,
        template_str=(files("video2lora.hub_cards") / "templates" / "adapter_card.md").read_text(encoding="utf-8"),
        name=_inline(name),
        layout=layout,
        base=_inline(base_model or "the base model"),
        # of a directory only the last part is told: somebody else's path is elsewhere
        base_path=_inline(base_model if base_on_hub else f"path/to/{base_model or 'base'}"),
        base_named=base_model is not None,
        revision=provenance["base_revision"],
        model_class=document["base"]["model_class"],
        segments=[_segment_row(segment) for segment in provenance["segments"]],
        prompts=sorted({_inline(s["prompt"]) for s in provenance["segments"] if s["prompt"]}),
        modules=", ".join(f"`{module}`" for module in modules),
        num_layers=len(layers),
        total_layers=document["base"]["num_layers"],
        rank=document["rank"],
        composable=not any(record["static_part_folded"] for record in provenance["truncations"]),
        static_rank=static[1] - static[0] if static else 0,
        dtype=document["dtype"],
        num_parameters=f"{num_parameters:,}",
        megabytes=f"{num_parameters * _BYTES[document['dtype']] / 1e6:.2f}",
        hypernetwork=_inline(provenance["hypernetwork"] or provenance["hypernetwork_sha256"] or ""),
        hypernetwork_revision=provenance["hypernetwork_revision"],
        truncations=[
            (record["from_rank"], record["to_rank"], f"{100 * record['relative_error']:.3g}")
            for record in provenance["truncations"]
        ],
        versions=", ".join(f"{library} {number}" for library, number in provenance["library_versions"].items()),
        content_hash=document["content_hash"],
    )
    return str(card).rstrip() + "\n"


def _segment_row(segment: Mapping[str, Any]) -> list[str]:
    """The cells of one segment: video, span, frames, visual tokens, ranks."""
    start, end, ranks = segment["start"], segment["end"], segment["ranks"]
    span = "" if start is None and end is None else f"{_seconds(start)} to {_seconds(end)}"
    return [
        f"`{_inline(segment['source'])}`" if segment["source"] else "unnamed video",
        span,
        _frames(segment),
        "" if segment["num_visual_tokens"] is None else f"{segment['num_visual_tokens']:,}",
        "mixed" if ranks is None else f"{ranks[0]} to {ranks[1] - 1}",
        "" if segment["weight"] == 1 else f"{segment['weight']:g}",
    ]


def _frames(segment: Mapping[str, Any]) -> str:
    """How many frames were used, and what of a damaged file was not."""
    used = "" if segment["num_frames"] is None else str(segment["num_frames"])
    lost = segment["num_decode_errors"]
    return f"{used} ({lost} packets or frames do not decode)".lstrip() if lost else used


def _seconds(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f} s"


def _inline(text: str | None) -> str:
    """Text that cannot break out of a table cell, a code span or a string in the quick start."""
    cleaned = "".join(c if c.isprintable() else " " for c in text or "")
    return cleaned.replace("`", "'").replace('"', "'").replace("|", "/").replace("\\", "/")
