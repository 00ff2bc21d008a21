"""Command line: `video2lora import-checkpoint`, from a published `.pt` to a checkpoint of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._errors import CommandError, about, check_is_there
from ._options import Json, Output, Overwrite
from ._output import check_output, directory_bytes, human_bytes, note, print_fields, print_json


def import_checkpoint(
    file: Annotated[Path, typer.Argument(help="Checkpoint of the published implementation.", show_default=False)],
    output: Output,
    base: Annotated[
        str | None, typer.Option(help="Its base: Hub id or directory; by default the name in the file.")
    ] = None,
    base_revision: Annotated[str | None, typer.Option(help="Commit, branch or tag of the base.")] = None,
    bundle_base: Annotated[bool, typer.Option("--bundle-base", help="Write the base's weights too.")] = False,
    num_frames: Annotated[int | None, typer.Option(help="Frames of a video by default.")] = None,
    longest_edge: Annotated[int | None, typer.Option(help="Pixels to which frames are shrunk by default.")] = None,
    internalization_prompt: Annotated[
        str | None, typer.Option(help="The text behind the video; by default the paper's.")
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Turn a checkpoint (`.pt`) of the published implementation into one that `from_pretrained` loads.

    The file is a pickle: it is read by a reader that runs nothing in it and refuses what such files do not hold.
    """

    def replaceable(directory: Path) -> bool:
        from ._models import is_model_directory

        return is_model_directory(directory)

    check_output(output, overwrite=overwrite, replaceable=replaceable, kind="a video2lora checkpoint")
    if not file.exists():
        raise CommandError(f"{file} is not there: give the `.pt` file of a hypernetwork.")
    if base is not None:
        check_is_there(base, "the base model ")
    from ..adapters.directories import new_directory
    from ..modeling import Video2LoraModel, Video2LoraProcessor

    sampling = {
        "num_frames": num_frames,
        "longest_edge": longest_edge,
        "internalization_prompt": internalization_prompt,
    }
    note(f"reading {file}")
    with about(str(file)):
        given = {name: value for name, value in sampling.items() if value is not None}
        model = Video2LoraModel.from_frames2lora(file, base=base, revision=base_revision, **given)
    with about(model.config.base_model_name_or_path):
        processor = Video2LoraProcessor.from_config(model.config)
    with new_directory(output, overwrite=overwrite, replaceable=replaceable) as temporary:
        model.save_pretrained(temporary, bundle_base=bundle_base)
        processor.save_pretrained(temporary)
    config, hypernetwork = model.config, model.hypernetwork
    document = {
        "checkpoint": str(output),
        "base": config.base_model_name_or_path,
        "base_revision": config.base_model_revision,
        "bundled": bundle_base,
        "hypernetwork_parameters": sum(parameter.numel() for parameter in hypernetwork.parameters()),
        "rank": config.rank,
        "lora_scaling": config.lora_scaling,
        "target_modules": list(config.target_modules),
        "layers": hypernetwork.num_layers,
        "latent_size": config.latent_size,
        "num_latents": config.num_latents,
        "num_blocks": config.num_blocks,
        "num_frames": config.num_frames,
        "longest_edge": config.longest_edge,
        "internalization_prompt": config.internalization_prompt,
        "bytes": directory_bytes(output),
    }
    if json:
        print_json(document)
        return
    shown = document | {
        "bytes": human_bytes(directory_bytes(output)),
        "hypernetwork_parameters": f"{document['hypernetwork_parameters']:,}",
        "target_modules": ", ".join(config.target_modules),
    }
    print_fields({name.replace("_", " "): value for name, value in shown.items()})
