"""Command line: `video2lora compose`, several adapters in one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._errors import CommandError, check_is_there
from ._options import Dtype, DtypeOption, Json, Layout, LayoutOption, Output, Overwrite, torch_dtype
from ._output import check_output, directory_bytes, human_bytes, print_fields, print_json


def compose(
    adapters: Annotated[
        list[str], typer.Argument(help="Adapters, in order: directories or Hub ids.", show_default=False)
    ],
    output: Output,
    weights: Annotated[
        str | None, typer.Option(help="A factor for each, such as 1,0.5; 1 by default.", show_default=False)
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Truncate the result to this rank, as well as possible.", show_default=False)
    ] = None,
    layout: LayoutOption = Layout.vlm,
    dtype: DtypeOption = Dtype.float32,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Put several adapters of one base and one hypernetwork into one, the static part counted once."""
    factors = None if weights is None else _factors(weights)
    for name in adapters:
        check_is_there(name, "the adapter ")

    def replaceable(directory: Path) -> bool:
        from ..adapters.storage import is_replaceable

        return is_replaceable(directory)

    check_output(output, overwrite=overwrite, replaceable=replaceable, kind="a video2lora adapter")
    from ..adapters import VideoAdapter, compose_adapters

    composed = compose_adapters([VideoAdapter.from_pretrained(name) for name in adapters], weights=factors)
    full_rank, error = composed.rank, 0.0
    if rank is not None:
        composed, error = composed.truncate(rank)
    composed.save_pretrained(output, layout=layout.value, dtype=torch_dtype(dtype), overwrite=overwrite)
    size = directory_bytes(output)
    if json:
        document = {
            "adapter": str(output),
            "segments": len(composed.segments),
            "rank": composed.rank,
            "rank_before_truncation": full_rank,
            "relative_error": error,
            "bytes": size,
            "content_hash": composed.content_hash,
        }
        print_json(document)
        return
    cut = composed.rank < full_rank
    print_fields(
        {
            "adapter": output,
            "segments": len(composed.segments),
            "rank": f"{composed.rank} (truncated from {full_rank})" if cut else composed.rank,
            "relative error": f"{error:.3g} of the whole change, Frobenius norm" if cut else None,
            "size": human_bytes(size),
        }
    )


def _factors(weights: str) -> list[float]:
    try:
        return [float(part) for part in weights.split(",")]
    except ValueError:
        raise CommandError(f"--weights {weights}: expected numbers with commas between, such as 1,0.5.") from None
