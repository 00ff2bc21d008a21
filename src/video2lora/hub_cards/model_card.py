"""Hub cards: the card of a hypernetwork's checkpoint."""

from __future__ import annotations

import os
from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .training_card import GENERATED, TrainingFacts, eval_results, training_section


def model_card(
    name: str,
    config: Any,
    *,
    results: str | None = None,
    facts: TrainingFacts | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: list[str] | None = None,
) -> str:
    """Write the `README.md` of a [`Video2LoraModel`]'s repository.

    Args:
        name: Hub id of the repository.
        config: its [`Video2LoraConfig`].
        results: Markdown on scores, if there is any to tell.
        facts: the run that trained it; its evaluation losses become metadata too.
        language, license, tags: metadata of the card; the tags are added to our own.
    """
    base = config.base_model_name_or_path
    # a directory of this machine is nobody else's base
    base_on_hub = base is not None and base.count("/") <= 1 and not base.startswith((".", "/", "~"))
    base_on_hub = base_on_hub and not os.path.isdir(base)
    shown = base if base_on_hub or base is None else base.rstrip("/").rpartition("/")[2]
    data = ModelCardData(
        base_model=base if base_on_hub else None,
        library_name="video2lora",
        pipeline_tag="video-text-to-text",
        tags=list(dict.fromkeys(["video2lora", "hypernetwork", "lora", *(tags or [])])),
        language=language,
        license=license,
        datasets=(facts.hub_datasets or None) if facts else None,
        # metadata holds results only under a model's name
        eval_results=(eval_results(facts) or None) if facts else None,
        model_name=name.rpartition("/")[2] if facts and facts.evaluations else None,
    )
    static_rank = config.rank if config.use_static_lora else 0
    layers = config.layers_to_transform
    card = ModelCard.from_template(
        data,
        template_str=(files("video2lora.hub_cards") / "templates" / "model_card.md").read_text(encoding="utf-8"),
        name=name,
        base=shown or "its base model",
        revision=config.base_model_revision,
        bundled=config.bundle_base,
        adapter_rank=config.rank + static_rank,
        rank=config.rank,
        static_rank=static_rank,
        modules=", ".join(f"`{module}`" for module in config.target_modules),
        layers="all decoder layers" if layers is None else f"decoder layers {', '.join(map(str, layers))}",
        config=config,
        prompt=config.internalization_prompt.replace("|", "/"),
        results=results,
        training=training_section(facts) if facts else None,
        generated=GENERATED if facts else None,
    )
    return str(card).rstrip() + "\n"
