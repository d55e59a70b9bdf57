"""`prcl data synth|check|split|convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prcl_fast.cli import data_check, data_split
from prcl_fast.console import say
from prcl_fast.errors import InputError

app = typer.Typer(help="Generate, check, split and convert data sets.", no_args_is_help=True)
app.add_typer(data_split.app, name="split")
app.command("check")(data_check.check)


@app.command("synth")
def synth(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write, new or empty.")],
    labeled: Annotated[int, typer.Option(help="Labeled images.")] = 5,
    unlabeled: Annotated[int, typer.Option(help="Unlabeled images.")] = 200,
    val: Annotated[int, typer.Option(help="Validation images.")] = 96,
    size: Annotated[
        tuple[int, int], typer.Option(metavar="H W", help="Height and width in pixels, 64 to 128.")
    ] = (64, 64),
    seed: Annotated[int, typer.Option(help="Seed of the generated images.")] = 0,
) -> None:
    """Write a generated data set, with splits and a configuration.

    The folder has VOC's layout, and DIR/config.yaml is ready to train.
    """
    from prcl_fast.data.sources.synthetic import write_synthetic

    write_synthetic(
        folder, _synthetic_config(size=list(size), labeled=labeled, unlabeled=unlabeled, val=val, seed=seed)
    )
    say(f"{folder}: {labeled} labeled, {unlabeled} unlabeled and {val} validation images")
    say(f"to train on them: prcl train {folder / 'config.yaml'}")


@app.command("convert")
def convert(
    masks: Annotated[Path, typer.Argument(help="Folder of masks, searched with its subfolders.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, new or empty.")],
    palette: Annotated[
        str | None,
        typer.Option(
            help="Ids of the colours of RGB and palette masks: voc, cityscapes, or a file of lines "
            "R G B [ID] [NAME]."
        ),
    ] = None,
    label_map: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="FROM=TO", help="Replace an id; may be repeated."),
    ] = None,
    other: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=255,
            help="Id for colours that the palette lacks; they are errors by default.",
        ),
    ] = None,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Largest number of pixels of one mask, as data.max_pixels.")
    ] = 89_478_485,
) -> None:
    """Make masks of ids from masks of colours, or change their ids.

    OUT is complete or not there at all. Example: prcl data convert masks ids --palette voc
    """
    from prcl_fast.console import counting
    from prcl_fast.data.tools.mask_convert import convert_masks, parse_label_map, read_colour_code

    if palette is None and not label_map:
        raise InputError("nothing to convert: give --palette, --map or both")
    code = None if palette is None else read_colour_code(palette)
    with counting("convert") as progress:
        count = convert_masks(
            masks,
            out,
            code=code,
            label_map=parse_label_map(label_map or ()),
            other=other,
            max_pixels=max_pixels,
            progress=progress,
        )
    say(f"{out}: {count} masks")


def _synthetic_config(**values: Any) -> Any:
    from pydantic import ValidationError

    from prcl_fast.config import SyntheticConfig

    try:
        return SyntheticConfig(**values)
    except ValidationError as error:
        mistake = error.errors()[0]
        raise InputError(f"--{mistake['loc'][0]}: {mistake['msg'].lower()}, got {mistake['input']}") from None
