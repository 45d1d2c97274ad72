"""Commands on a single model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .shared import AsJson, command, result

if TYPE_CHECKING:
    from torch import nn


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(app, "outline", outline)


def outline(
    model: Annotated[
        str, typer.Argument(help="A model folder, a config.json, or the name of a model on the Hugging Face hub.")
    ],
    pattern: Annotated[
        str | None, typer.Option(help="Only modules that this address names, as in 'encoder.layer.0.**'.")
    ] = None,
    inputs: Annotated[bool, typer.Option("--inputs", help="List what modules are called with as well.")] = False,
    as_json: AsJson = False,
) -> None:
    """List every address that a transformers model offers: what to write into a Match.

    The model is built from its configuration alone, with random weights, and run once on a small made-up input.

        hookdistill outline ./my-bert --pattern 'encoder.layer.{0,11}'
    """
    from ..survey import survey

    built = _from_config(model)
    found = survey(built, _made_up_inputs(built), pattern=pattern, inputs=inputs)
    result(lambda: str(found), found.as_dict(), as_json=as_json)


def _from_config(name: str) -> nn.Module:
    import transformers

    from ..errors import HookDistillError

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        there = "" if Path(name).exists() else " There is no file or folder of that name."
        reason = str(error).strip().splitlines()[0]
        raise HookDistillError(f"cannot read a model configuration from {name!r}: {reason}{there}") from error
    architecture = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if architecture is None:
        return transformers.AutoModel.from_config(config)  # type: ignore[no-any-return, no-untyped-call]
    built: nn.Module = architecture(config)
    return built


def _made_up_inputs(model: Any) -> dict[str, Any]:
    import torch

    from ..errors import HookDistillError

    config, main_input = model.config, getattr(model, "main_input_name", "input_ids")
    if main_input == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), height, width)}
    if main_input != "input_ids":
        raise HookDistillError(
            f"no example input can be made up for {type(model).__name__}, whose input is {main_input!r}. "
            "Call hookdistill.outline(model, inputs) from Python"
        )
    ids = torch.arange(1, 9).remainder(config.get_text_config().vocab_size).unsqueeze(0)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}
