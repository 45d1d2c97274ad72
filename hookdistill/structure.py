"""Where a model keeps its parts, read off its modules without running it: repeated blocks, attention, stages, head, logits.

Blocks are found through the attention inside them, stages of a conv net through its strides. Class names play no part; names of
submodules do, where nothing else tells a query from a key.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from .addresses import parse
from .errors import StructureError, listing
from .paths import has_forward, module_paths, resolve, unwrap

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.Identity)

_PROJECTION = r"(?:w_?|to_|c_)?(?:{})(?:_?(?:proj|lin|linear|layer))?"
_APART = [re.compile(_PROJECTION.format(words)) for words in ("q|query", "k|key", "v|value")]
_FUSED = re.compile(_PROJECTION.format("qkv|query_key_value|pack|attn"))
_ATTENTION = re.compile(r"(?:self_?)?att(?:entio)?n")
_CROSS = re.compile(r"cross|enc(?:oder)?_?(?:dec|attn)|multihead_attn")


Predicts = typing.Literal["item", "token", "next token"]


@dataclasses.dataclass(frozen=True, slots=True)
class Stack:
    """The repeated blocks of a transformer, in the order in which they lie in their list."""

    path: str
    """Of the list, as in ``encoder.layer``."""
    names: tuple[str, ...]
    """Of the blocks in the list."""
    attention: str | None
    """Path of the self-attention inside each block; ``None`` where the blocks differ in it."""
    cross: bool
    """Whether the blocks also attend to another stack, as a decoder's do."""
    whole: bool
    """Whether the list holds nothing but the blocks."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def blocks(self) -> list[str]:
        """The path of each block."""
        return [_join(self.path, name) for name in self.names]

    def address(self, inside: str = "", *, names: Sequence[str] | None = None) -> str:
        """The address of all blocks, or of those with these ``names``, or of the module ``inside`` each."""
        chosen = self.names if names is None else tuple(names)
        middle = "*" if self.whole and chosen == self.names else f"{{{','.join(chosen)}}}"
        return _join(_join(self.path, middle), inside)


def stacks(model: nn.Module) -> list[Stack]:
    """The lists of transformer blocks in the order of the model: one, or encoder and decoder, or one for each stage.

    A block is the largest item of a ``ModuleList`` or ``Sequential`` that holds no more than one self-attention; items without
    any count as blocks in a ``ModuleList`` only, since there all items are alike.
    """
    paths = module_paths(model)
    attentions = list(_attentions(paths))
    own = [path for path in attentions if not _is_cross(path)]
    found: list[Stack] = []
    for path, module in paths.items():
        if any(_inside(path, stack.path) for stack in found):
            continue
        items = _items(unwrap(module))
        held = {name: [each for each in own if _inside(each, _join(path, name))] for name in items}
        if not any(held.values()) or any(len(each) > 1 for each in held.values()):
            continue
        names = tuple(items) if isinstance(unwrap(module), nn.ModuleList) else tuple(name for name in items if held[name])
        suffixes = {each.removeprefix(_join(path, name)).removeprefix(".") for name in names for each in held[name]}
        everywhere = len(suffixes) == 1 and all(held[name] for name in names)
        cross = any(_is_cross(each) and _inside(each, path) for each in attentions)
        found.append(Stack(path, names, suffixes.pop() if everywhere else None, cross, whole=len(names) == len(items)))
    return found


def stack_at(model: nn.Module, address: str) -> Stack:
    """The blocks that an address without a selector names, as in ``encoder.layer.{0..5}``.

    Raises:
        AddressError: it does not parse or names nothing.
        StructureError: the modules it names are not items of one list.
    """
    paths = module_paths(model)
    named = [found.path for found in resolve(model, parse(address))]
    parents = {path.rpartition(".")[0] for path in named}
    if len(parents) > 1:
        raise StructureError(
            f"{address!r} names modules of several parents, {listing(sorted(parents))}; blocks are items of one"
        )
    attentions = list(_attentions(paths))
    held = {path: [each for each in attentions if _inside(each, path)] for path in named}
    own = {path: [each for each in inside if not _is_cross(each)] for path, inside in held.items()}
    suffixes = {each.removeprefix(path).removeprefix(".") for path, inside in own.items() for each in inside}
    one_each = len(suffixes) == 1 and all(len(inside) == 1 for inside in own.values())
    cross = any(_is_cross(each) for inside in held.values() for each in inside)
    names = tuple(path.rpartition(".")[2] for path in named)
    return Stack(parents.pop(), names, suffixes.pop() if one_each else None, cross, whole=False)


def attention_widths(model: nn.Module, path: str) -> list[int] | None:
    """The widths of query, key and value of an attention, all heads together, where its projections tell them."""
    module = unwrap(module_paths(model)[path])
    if isinstance(module, nn.MultiheadAttention):
        return [module.embed_dim] * 3
    children = {name.lower(): child for name, child in module._modules.items() if child is not None}
    apart = [next((child for name, child in children.items() if kind.fullmatch(name)), None) for kind in _APART]
    if all(child is not None for child in apart):
        widths = [_width(child) for child in apart if child is not None]
        return None if None in widths else [width for width in widths if width is not None]
    fused = next((child for name, child in children.items() if _FUSED.fullmatch(name)), None)
    weight = getattr(fused, "weight", None)
    if weight is None or weight.dim() != 2 or max(weight.shape) != 3 * min(weight.shape):
        return None  # grouped heads in one projection
    return [min(weight.shape)] * 3


def _width(projection: nn.Module) -> int | None:
    width = getattr(projection, "out_features", getattr(projection, "nf", None))
    return int(width) if width is not None else None


def stages(model: nn.Module) -> list[str]:
    """The paths whose outputs end the stages of a conv net: the last module before each step down in resolution.

    Looked at are the children of one module, that under which the resolution steps down most often. A stem of bare layers
    before stages that are made of blocks is no stage.
    """
    paths = {path: unwrap(module) for path, module in module_paths(model).items()}
    found = [(_stage_ends(path, module), module) for path, module in paths.items() if _holds_convolution(module)]
    # As often in two modules, such as [stem, body] and the list of stages in the body: the list.
    return max(found, key=lambda each: (len(each[0]), bool(_items(each[1]))), default=([], model))[0]


def layers(model: nn.Module) -> list[str]:
    """The paths between which two models are naturally compared: all transformer blocks, else stages, else repeated modules.

    Raises:
        StructureError: none of these is there.
    """
    blocks = [path for stack in stacks(model) for path in stack.blocks]
    steps = stages(model)
    found = blocks or (steps if len(steps) > 1 else _repeated(model) or steps)
    if not found:
        raise StructureError(f"no layers were found: {described(model)}")
    return found


def heads(model: nn.Module) -> list[str]:
    """The paths of the linear maps behind the blocks or stages; the one that makes the logits comes last."""
    bodies = [block for stack in stacks(model) for block in stack.blocks] or stages(model)
    order = list(paths := module_paths(model))
    linears = [path for path in order if isinstance(unwrap(paths[path]), nn.Linear)]
    outside = [path for path in linears if not any(_inside(path, body) for body in bodies)]
    last = max((order.index(body) for body in bodies), default=-1)
    return [path for path in outside if order.index(path) > last] or outside


def logits(model: nn.Module) -> list[str]:
    """The addresses of the model's logits: fields of its output by the annotation of ``forward``, else the output as it is.

    Empty where the annotated output has no logits, as that of a base model.
    """
    kind = _output_kind(unwrap(model))
    if kind is None:
        return [":output"]
    fields = [field.name for field in dataclasses.fields(kind)]
    return [":logits"] if "logits" in fields else [f":{field}" for field in fields if "logits" in field]


def output_fields(model: nn.Module) -> list[str]:
    """The fields of the model's output where ``forward`` is annotated with a dataclass; else empty."""
    kind = _output_kind(unwrap(model))
    return [] if kind is None else [field.name for field in dataclasses.fields(kind)]


def predicts(model: nn.Module) -> Predicts:
    """What the logits are about: each item of the batch, each of its tokens, or the token after each.

    Read off the name of the output's class: ``MaskedLMOutput`` is about tokens, ``CausalLMOutput`` about the next ones.
    """
    inner = unwrap(model)
    name = getattr(_output_kind(inner), "__name__", "")
    if "CausalLM" in name and getattr(inner, "main_input_name", "input_ids") == "input_ids":
        return "next token"
    return "token" if "LM" in name or "Token" in name else "item"


def described(model: nn.Module) -> str:
    """What the model is made of, for a message."""
    inner = unwrap(model)
    while len(inner._modules) == 1 and isinstance(only := next(iter(inner._modules.values())), nn.Module):
        inner = unwrap(only)
    children = [f"{name} ({type(unwrap(child)).__name__})" for name, child in inner.named_children()]
    return f"{type(unwrap(model)).__name__} has {listing(children)}"


def _attentions(paths: dict[str, nn.Module]) -> Iterator[str]:
    """Modules that project to query, key and value; and those merely called attention, where nothing inside them does so."""
    projecting = [path for path, module in paths.items() if _projects(unwrap(module))]
    for path, module in paths.items():
        named = _ATTENTION.fullmatch(path.rpartition(".")[2].lower()) and _holds_maps(module)
        if path in projecting or (named and not any(_inside(each, path) or _inside(path, each) for each in projecting)):
            yield path


def _projects(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    names = [name.lower() for name in module._modules]
    fused = any(_FUSED.fullmatch(name) and _has_weight(module, name) for name in names)
    return fused or all(any(kind.fullmatch(name) for name in names) for kind in _APART)


def _holds_maps(module: nn.Module) -> bool:
    """Whether it has weights of other kinds than convolutions, of which channel attention is made."""
    return any(True for _ in module.parameters()) and not _holds_convolution(module)


def _has_weight(module: nn.Module, lowered: str) -> bool:
    """Whether the child is a map, and no module that merely carries the name ``attn``."""
    child = next(each for name, each in module._modules.items() if name.lower() == lowered)
    return child is not None and not child._modules and getattr(child, "weight", None) is not None


def _is_cross(path: str) -> bool:
    return bool(_CROSS.search(path.rpartition(".")[2].lower())) or bool(re.search(r"cross_?att", path.lower()))


def _items(module: nn.Module) -> list[str]:
    """The names of a list's items; empty for any other module."""
    names = [name for name, child in module._modules.items() if child is not None]
    return names if names and all(name.isdigit() for name in names) else []


def _repeated(model: nn.Module) -> list[str]:
    """The longest list of at least two modules of one class."""
    best: list[str] = []
    for path, module in module_paths(model).items():
        items = _items(unwrap(module))
        kinds = {type(unwrap(unwrap(module)._modules[name])) for name in items}  # type: ignore[arg-type]
        if len(kinds) == 1 and len(items) > max(len(best), 1):
            best = [_join(path, name) for name in items]
    return best


# --- stages


def _stage_ends(path: str, module: nn.Module) -> list[str]:
    segments: list[list[tuple[str, nn.Module]]] = [[]]
    for name, child in module._modules.items():
        if child is None:
            continue
        inner = unwrap(child)
        if _steps_down(inner):
            segments.append([])
        segments[-1].append((name, inner))
    bodies = [body for body in map(_body, segments) if any(_holds_convolution(each) for _, each in body)]
    if any(_is_composite(each) for body in bodies for _, each in body):
        bodies = [body for body in bodies if any(_is_composite(each) and _holds_convolution(each) for _, each in body)]
    ends = [[name for name, each in body if has_forward(each)] for body in bodies]
    return [_join(path, names[-1]) for names in ends if names]


def _body(segment: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The modules of a segment up to the pooling, flattening or linear map with which a head begins."""
    body: list[tuple[str, nn.Module]] = []
    for name, module in segment:
        at_start = isinstance(module, _POOLS) and not body
        if not (at_start or _holds_convolution(module) or isinstance(module, _NORMS) or _is_activation(module)):
            break
        body.append((name, module))
    return body


def _steps_down(module: nn.Module) -> bool:
    return any(isinstance(each, _CONVOLUTIONS + _POOLS) and _stride(each) > 1 for each in module.modules())


def _stride(module: nn.Module) -> int:
    stride = module.stride
    return max(stride) if isinstance(stride, tuple) else int(stride)  # type: ignore[arg-type]


def _holds_convolution(module: nn.Module) -> bool:
    return any(isinstance(each, _CONVOLUTIONS) for each in module.modules())


def _is_composite(module: nn.Module) -> bool:
    return bool(module._modules)


def _is_activation(module: nn.Module) -> bool:
    plain = not module._modules and not any(True for _ in module.parameters()) and not any(True for _ in module.buffers())
    return plain and (type(module).__module__ == "torch.nn.modules.activation" or "Activation" in type(module).__name__)


# --- outputs


def _output_kind(model: nn.Module) -> type | None:
    """The dataclass that ``forward`` is annotated to return; ``None`` where it is annotated with none."""
    try:
        annotation = typing.get_type_hints(model.forward).get("return")
    except Exception:  # names that exist for the type checker alone
        return None
    return next((kind for kind in _members(annotation) if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)


def _members(annotation: object) -> Iterable[object]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)


def _inside(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
