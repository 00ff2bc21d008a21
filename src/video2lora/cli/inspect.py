"""Command line: `video2lora inspect`, what is in an adapter or a checkpoint."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._errors import CommandError, about, check_is_there
from ._options import Json
from ._output import directory_bytes, human_bytes, print_fields, print_json, print_table, sparkline

if TYPE_CHECKING:
    from ..adapters import VideoAdapter


def inspect(
    name: Annotated[str, typer.Argument(metavar="ADAPTER_OR_MODEL", help="Directory or Hub id.", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag on the Hub.")] = None,
    json: Json = False,
) -> None:
    """Show what an adapter or a checkpoint holds; every file of an adapter is checked."""
    check_is_there(name)
    directory = _adapter_directory(name, revision)
    if directory is not None:
        from ..adapters import VideoAdapter

        document = _describe_adapter(directory, VideoAdapter.from_pretrained(directory)) | {"name": name}
        print_json(document) if json else _show_adapter(document)
        return
    document = _describe_model(name, revision)
    print_json(document) if json else _show_model(document)


def _adapter_directory(name: str, revision: str | None) -> Path | None:
    """Where the adapter of this name is; `None` for what may be a model."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from ..adapters import AdapterNotFoundError
    from ..adapters.storage import CONFIG_FILE, locate

    path = Path(name)
    if path.is_dir():
        if (path / CONFIG_FILE).exists():
            return path
        if (path / "config.json").exists():
            return None
        raise CommandError(f"{name} holds neither an adapter (adapter_config.json) nor a model (config.json).")
    try:
        return locate(name, revision=revision)
    except AdapterNotFoundError as error:
        # the repository, or where that cannot be reached the cache, holds no adapter: it may hold a model
        unreachable = isinstance(error.__cause__, LocalEntryNotFoundError)
        if not isinstance(error.__cause__, EntryNotFoundError):
            raise
        if unreachable and not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            raise
        return None


def _describe_adapter(directory: Path, adapter: VideoAdapter) -> dict[str, Any]:
    stored = jsonlib.loads((directory / "video2lora.json").read_text(encoding="utf-8"))
    provenance = adapter.provenance.to_dict()
    return {
        "kind": "adapter",
        "base_model": adapter.provenance.base_model,
        **{key: provenance[key] for key in ("base_revision", "hypernetwork", "hypernetwork_revision")},
        "hypernetwork_sha256": provenance["hypernetwork_sha256"],
        "layout": stored["layout"],
        "dtype": stored["dtype"],
        "rank": adapter.rank,
        "static_rank": adapter.static_rank,
        "static_part_folded": adapter.provenance.static_part_folded,
        "num_parameters": adapter.num_parameters,
        "bytes": directory_bytes(directory),
        "target_modules": list(adapter.targets.module_names),
        "layers": list(adapter.targets.layer_indices),
        "norms": _norms(adapter),
        "segments": provenance["segments"],
        "truncations": provenance["truncations"],
        "library_versions": provenance["library_versions"],
        "content_hash": adapter.content_hash,
    }


def _norms(adapter: VideoAdapter) -> dict[str, list[float]]:
    """Frobenius norm of the change of each module, layer by layer, from the factors' Gram matrices."""
    norms = {}
    for module in adapter.targets.module_names:
        a, b = adapter.weights.lora_A[module][0].double(), adapter.weights.lora_B[module][0].double()
        squares = ((a @ a.mT) * (b @ b.mT)).sum(dim=(1, 2))
        norms[module] = squares.clamp_min(0).sqrt().tolist()
    return norms


def _show_adapter(document: dict[str, Any]) -> None:
    static = f", {document['static_rank']} of it static" if document["static_rank"] else ""
    hypernetwork_at = document["hypernetwork_revision"] or (document["hypernetwork_sha256"] or "")[:12]
    print_fields(
        {
            "adapter": document["name"],
            "base": _with_revision(document["base_model"], document["base_revision"]) or _unnamed_base(document),
            "hypernetwork": _with_revision(document["hypernetwork"], hypernetwork_at),
            "rank": f"{document['rank']}{static}",
            "changes": f"{', '.join(document['target_modules'])} of {len(document['layers'])} layers",
            "parameters": f"{document['num_parameters']:,}",
            "size": f"{human_bytes(document['bytes'])} ({document['dtype']}, layout {document['layout']})",
            "truncated": _truncations(document["truncations"]),
            "made with": ", ".join(f"{name} {number}" for name, number in document["library_versions"].items()),
            "content hash": document["content_hash"],
        }
    )
    typer.echo()
    _show_segments(document["segments"])
    typer.echo()
    rows = [
        (module, f"{min(norms):.3g}", f"{sum(norms) / len(norms):.3g}", f"{max(norms):.3g}", sparkline(norms))
        for module, norms in document["norms"].items()
    ]
    print_table(["norm of the change", "least", "mean", "most", "layer by layer"], rows)


def _unnamed_base(document: dict[str, Any]) -> str | None:
    """Where the base is that an adapter does not name; `None` where nobody can tell."""
    made_by = document["hypernetwork"] or document["hypernetwork_sha256"]
    return "in the checkpoint that made it (`ask` takes that as --base)" if made_by else None


def _show_segments(segments: list[dict[str, Any]]) -> None:
    columns = ["segment", "video", "span", "frames", "visual tokens", "ranks", "weight", "sha256"]
    rows = [_segment(i, segment) for i, segment in enumerate(segments)]
    if any(segment["num_decode_errors"] for segment in segments):
        columns.append("not decoded")
        rows = [[*row, segment["num_decode_errors"]] for row, segment in zip(rows, segments, strict=True)]
    print_table(columns, rows)


def _segment(index: int, segment: dict[str, Any]) -> list[object]:
    known = segment["start"] is not None and segment["end"] is not None
    span = f"{segment['start']:.2f}-{segment['end']:.2f} s" if known else None
    ranks = f"{segment['ranks'][0]}-{segment['ranks'][1] - 1}" if segment["ranks"] else None
    sha256 = (segment["sha256"] or "")[:12]
    row = [index, segment["source"] or "unnamed", span, segment["num_frames"], segment["num_visual_tokens"], ranks]
    return [*row, f"{segment['weight']:g}", sha256]


def _truncations(truncations: list[dict[str, Any]]) -> str | None:
    steps = [f"{t['from_rank']} to {t['to_rank']} (relative error {t['relative_error']:.3g})" for t in truncations]
    return ", then ".join(steps) or None


def _with_revision(name: str | None, revision: str | None) -> str | None:
    return f"{name} @ {revision}" if name and revision else name


def _describe_model(name: str, revision: str | None) -> dict[str, Any]:
    import torch

    from ..modeling import Video2LoraModel
    from ._models import load_config, model_bytes

    config = load_config(name, revision)
    with about(name), torch.device("meta"):  # sizes without weights
        model = Video2LoraModel(config)
    parts = model.hypernetwork.named_children()
    directory = Path(name)
    return {
        "kind": "model",
        "name": name,
        "base_model": config.base_model_name_or_path,
        "base_revision": config.base_model_revision,
        "base_class": type(model.vlm).__name__,
        "bundled": config.bundle_base,
        "hypernetwork_parameters": {part: sum(p.numel() for p in module.parameters()) for part, module in parts},
        "base_parameters": sum(p.numel() for p in model.vlm.parameters()),
        "bytes": model_bytes(directory) if directory.is_dir() else None,
        **{key: getattr(config, key) for key in ("rank", "lora_scaling", "target_modules", "layers_to_transform")},
        **{key: getattr(config, key) for key in ("use_static_lora", "latent_size", "num_latents", "num_blocks")},
        **{key: getattr(config, key) for key in ("num_frames", "longest_edge", "internalization_prompt")},
        **{key: getattr(config, key) for key in ("prompt_timestamps", "format_version")},
    }


def _show_model(document: dict[str, Any]) -> None:
    parts = document["hypernetwork_parameters"]
    print_fields(
        {
            "model": document["name"],
            "base": _with_revision(document["base_model"], document["base_revision"]),
            "base class": document["base_class"],
            "base weights": "in this checkpoint" if document["bundled"] else "loaded from the base",
            "hypernetwork": f"{sum(parts.values()):,} parameters",
            **{f"  {part}": f"{count:,}" for part, count in parts.items()},
            "base parameters": f"{document['base_parameters']:,}",
            "size": None if document["bytes"] is None else human_bytes(document["bytes"]),
            "rank": f"{document['rank']}{' and a static part of as much' if document['use_static_lora'] else ''}",
            "scaling": document["lora_scaling"],
            "changes": f"{', '.join(document['target_modules'])} of {_layers(document['layers_to_transform'])}",
            "latents": f"{document['num_latents']} x {document['latent_size']}, {document['num_blocks']} blocks",
            "frames": f"{document['num_frames']}, longest edge {document['longest_edge'] or 'as it is'}",
            "prompt": repr(document["internalization_prompt"]),
        }
    )


def _layers(layers: list[int] | None) -> str:
    return "every layer" if layers is None else f"layers {', '.join(map(str, layers))}"
