"""The models that a recipe names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..addresses import parse
from ..errors import RecipeError, did_you_mean, listing
from ..export import WEIGHTS
from ..paths import resolve
from .importing import call
from .schema import Model

_NUMBERS_OF_LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers")


def build_model(spec: Model, folder: Path, *, seed: int) -> nn.Module:
    """The module; initial weights depend on ``seed`` alone.

    Raises:
        RecipeError: it cannot be made as the recipe says.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _made(spec, folder)
    if not isinstance(model, nn.Module):
        raise RecipeError(f"{spec.factory} returned a {type(model).__name__}, not a torch.nn.Module")
    for path, positions in spec.keep_layers.items():
        _keep(model, path, positions)
    if spec.weights is not None:
        load_weights(model, resolved(spec.weights, folder))
    if spec.dtype is not None or spec.factory is None:
        model.to(_dtype(spec))
    for address in spec.freeze:
        for found in resolve(model, parse(address)):
            found.module.requires_grad_(False)
    return model


def resolved(path: str, folder: Path) -> Path:
    """A path of the recipe, which starts at the recipe's folder unless it is absolute."""
    return folder / Path(path).expanduser()


def local_or_id(name: str, folder: Path) -> str:
    """A folder or file beside the recipe or below the working directory, else what is taken for an id on the hub."""
    for place in (resolved(name, folder), Path(name).expanduser()):
        if place.exists():
            return str(place)
    if name.startswith((".", "/", "~")):
        raise RecipeError(f"there is no file or folder {name!r}; relative paths start at the folder of the recipe, {folder}")
    return name


def _dtype(spec: Model) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, spec.dtype or "float32")
    return dtype


def _made(spec: Model, folder: Path) -> Any:
    if spec.factory is not None:
        return call(spec.factory, folder, spec.arguments)
    import transformers

    config = _configuration(spec, folder)
    kind = _architecture(spec, config)
    options: dict[str, Any] = {"attn_implementation": spec.attention} if spec.attention is not None else {}
    try:
        if spec.pretrained is None:
            if issubclass(kind, transformers.PreTrainedModel):
                config._attn_implementation = spec.attention
                return kind(config)
            return kind.from_config(config, trust_remote_code=spec.trust_remote_code, **options)
        source = local_or_id(spec.pretrained, folder)
        return kind.from_pretrained(
            source,
            config=config,
            dtype=_dtype(spec),
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            use_safetensors=True,
            **options,
        )
    except Exception as error:
        raise RecipeError(f"{kind.__name__} cannot be made: {type(error).__name__}: {_brief(error)}") from error


def _configuration(spec: Model, folder: Path) -> Any:
    import transformers

    name = spec.pretrained or spec.config
    assert name is not None
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if spec.revision is not None:
        options["revision"] = spec.revision
    try:
        if spec.pretrained is None and name in transformers.CONFIG_MAPPING and not (folder / name).exists():
            default = transformers.AutoConfig.for_model(name)
        else:
            default = transformers.AutoConfig.from_pretrained(local_or_id(name, folder), **options)
    except RecipeError:
        raise
    except Exception as error:
        types = list(transformers.CONFIG_MAPPING)
        hint = did_you_mean(name, types) if spec.pretrained is None else ""
        raise RecipeError(f"there is no model configuration {name!r}.{hint} {_brief(error)}") from error
    if unknown := [key for key in spec.arguments if not hasattr(default, key)]:
        keys = [key for key in default.to_dict() if not key.startswith("_")]
        raise RecipeError(
            f"{type(default).__name__} has no setting {unknown[0]!r}.{did_you_mean(unknown[0], keys)} "
            f"It has {listing(keys, most=30)}"
        )
    try:
        return type(default).from_dict({**default.to_dict(), **spec.arguments})
    except Exception as error:
        raise RecipeError(f"arguments {spec.arguments} do not fit {type(default).__name__}: {_brief(error)}") from error


def _architecture(spec: Model, config: Any) -> Any:
    import transformers

    name = spec.architecture or next(iter(getattr(config, "architectures", None) or ()), "AutoModel")
    kind = getattr(transformers, name, None)
    if kind is None and spec.architecture is None:
        return transformers.AutoModel  # of a repository with code of its own
    if kind is None or not (hasattr(kind, "from_pretrained") and (hasattr(kind, "from_config") or hasattr(kind, "forward"))):
        known = [each for each in dir(transformers) if each.startswith("AutoModel") or each.endswith(("Model", "For"))]
        raise RecipeError(f"transformers has no model class {name!r}.{did_you_mean(name, [*known, *_siblings(config)])}")
    return kind


def _siblings(config: Any) -> list[str]:
    import transformers

    family = type(config).__name__.removesuffix("Config")
    return [each for each in dir(transformers) if each.startswith(family)]


def _keep(model: nn.Module, path: str, positions: list[int]) -> None:
    modules = dict(model.named_modules())
    lists = [name for name, module in modules.items() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    if path not in lists:
        kind = f"is a {type(modules[path]).__name__}, not a list of layers" if path in modules else "is no module"
        raise RecipeError(f"keep_layers: {path!r} {kind}.{did_you_mean(path, lists)} Lists of layers are {listing(lists)}")
    layers: Any = modules[path]
    count = len(layers)
    if not positions or max(positions) >= count or len(set(positions)) < len(positions):
        raise RecipeError(f"keep_layers: {path!r} has the layers 0 to {count - 1}; {positions} must be some of them, each once")
    kept = [layers[position] for position in positions]
    del layers[:]
    layers.extend(kept)
    for position, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
    config = getattr(model, "config", None)
    for name in _NUMBERS_OF_LAYERS:
        if getattr(config, name, None) == count:
            setattr(config, name, len(kept))
            break
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and len(kinds) == count:
        config.layer_types = [kinds[position] for position in positions]  # type: ignore[union-attr]


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill the whole state of ``model`` from a .safetensors file, or from a folder that a student was saved to.

    Raises:
        RecipeError: there is no such file, or it is not the state of this model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, load_model

    file = path / WEIGHTS if path.is_dir() else path
    shards = sorted(path.glob("model-*-of-*.safetensors")) if path.is_dir() and not file.exists() else []
    if not shards and not file.exists():
        raise RecipeError(f"there is no file {str(file)!r} with weights{_others(file.parent)}")
    try:
        if shards:
            model.load_state_dict({name: value for shard in shards for name, value in load_file(shard).items()})
        else:
            load_model(model, str(file))
    except (RuntimeError, SafetensorError) as error:
        raise RecipeError(f"{file} does not hold the weights of {type(model).__name__}: {_brief(error, lines=6)}") from error


def _others(folder: Path) -> str:
    there = sorted(each.name for each in folder.glob("*.safetensors")) if folder.is_dir() else []
    return f"; in that folder there are {listing(there)}" if there else ""


def _brief(error: BaseException, *, lines: int = 3) -> str:
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(text[:lines])[:600] or type(error).__name__


def first_source(models: Iterable[Model | None]) -> str | None:
    """Where a tokenizer or image processor is looked for: the first of the models that has a folder or an id."""
    for spec in models:
        if spec is not None and (spec.pretrained or spec.config):
            return spec.pretrained or spec.config
    return None
