"""Hub cards: the card of a hypernetwork's checkpoint."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


def model_card(name: str, config: Any, *, results: str | None = None) -> str:
    """Write the `README.md` of a [`Video2LoraModel`]'s repository.

    Args:
        name: Hub id of the repository.
        config: its [`Video2LoraConfig`].
        results: Markdown on training and scores, if there is any to tell.
    """
    base = config.base_model_name_or_path
    # a directory of this machine is nobody else's base
    base_on_hub = base is not None and base.count("/") <= 1 and not base.startswith((".", "/", "~"))
    shown = base if base_on_hub or base is None else base.rstrip("/").rpartition("/")[2]
    data = ModelCardData(
        base_model=base if base_on_hub else None,
        library_name="video2lora",
        pipeline_tag="video-text-to-text",
        tags=["video2lora", "hypernetwork", "lora"],
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
    )
    return str(card)
