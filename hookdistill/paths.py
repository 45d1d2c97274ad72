"""From the module path of an address to the modules it names, on the bare or the wrapped model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .addresses import Address, Segment
from .errors import AddressError, did_you_mean, listing, nearest

_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PARALLEL = {
    "DistributedDataParallel",
    "DataParallel",
    "FullyShardedDataParallel",
    "DeepSpeedEngine",
    "AveragedModel",
}


@dataclass(frozen=True, slots=True)
class Found:
    """A module that an address names: its path without wrapper prefixes, and the module to put the hook on."""

    path: str
    module: nn.Module


class CallWrapper:
    """What may stand where ``Module.compile()`` puts its compiled call, and compiles nothing."""


def wrapped_name(module: nn.Module) -> str | None:
    """The attribute under which a wrapper (DDP, FSDP, ``torch.compile``, checkpointing) holds the module it wraps."""
    children = module._modules
    for name in _WRAPPED:
        if name in children:
            return name
    if "module" in children and any(cls.__name__ in _PARALLEL for cls in type(module).__mro__):
        return "module"
    return None


def unwrap(module: nn.Module) -> nn.Module:
    """The user's module inside any number of wrappers."""
    while name := wrapped_name(module):
        inner = module._modules[name]
        assert inner is not None
        module = inner
    return module


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``Module.compile`` was used on the model or anything in it."""
    return any(
        hasattr(module, "_orig_mod") or not isinstance(module._compiled_call_impl, CallWrapper | None)
        for module in model.modules()
    )


def forward_signature(module: nn.Module) -> inspect.Signature:
    """The signature of the user's ``forward``, seen through wrappers; an empty one where Python knows none (ScriptModules)."""
    try:
        return inspect.signature(unwrap(module).forward)
    except ValueError:
        return inspect.Signature()


def has_forward(module: nn.Module) -> bool:
    """Whether the module can be called at all; ``ModuleList`` and ``ModuleDict`` cannot."""
    return getattr(type(module), "forward", None) is not nn.Module.forward or "forward" in module.__dict__


def module_paths(model: nn.Module) -> dict[str, nn.Module]:
    """Every path of the model, aliases included, as ``named_modules()`` prints them on the bare model."""
    return {found.path: found.module for found in _walk(model, (Segment("**"),), "", strict=False)}


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path without wrapper prefixes, or ``None``; for many look-ups faster than `module_paths`."""
    for name in path.split(".") if path else ():
        children = unwrap(model)._modules
        child = children[name] if name in children else None  # noqa: SIM401  # a ScriptModule's children know no get()
        if child is None:
            return None
        model = child
    return model


def resolve(model: nn.Module, address: Address) -> list[Found]:
    """The modules that an address names, in the order written (braces) or of the model (wildcards).

    Raises:
        AddressError: nothing is named, or what is named can never be called.
    """
    found = {each.path: each for each in _walk(model, address.segments, "", strict=True)}
    if address.several:
        callable_ones = [each for each in found.values() if has_forward(unwrap(each.module))]
        if not callable_ones:
            raise AddressError(_names_nothing(model, address, found))
        return callable_ones
    (only,) = found.values()
    if not has_forward(unwrap(only.module)):
        raise AddressError(_cannot_be_called(address, only))
    return [only]


def _walk(
    module: nn.Module, segments: tuple[Segment, ...], path: str, *, strict: bool, above: tuple[int, ...] = ()
) -> Iterator[Found]:
    if not segments:
        yield Found(path, module)
        return
    head, rest = segments[0], segments[1:]
    inner = unwrap(module)
    if head.text == "**":
        yield from _walk(module, rest, path, strict=False)
        if id(inner) in above:  # a module that holds its own ancestor
            return
        for name, child in _children(inner):
            yield from _walk(child, segments, _join(path, name), strict=False, above=(*above, id(inner)))
    elif head.text == "*":
        for name, child in _children(inner):
            yield from _walk(child, rest, _join(path, name), strict=False)
    elif inner is not module and head.text == wrapped_name(module):
        yield from _walk(module._modules[head.text], rest, path, strict=strict)  # type: ignore[arg-type]
    else:
        for wanted in head.names:
            found = _child(inner, wanted)
            if found is not None:
                name, child = found
                yield from _walk(child, rest, _join(path, name), strict=strict)
            elif strict:
                raise AddressError(_no_such_child(module, inner, path, wanted, rest))


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _child(module: nn.Module, wanted: str) -> tuple[str, nn.Module] | None:
    children = _children(module)
    by_name = dict(children)
    if wanted in by_name:
        return wanted, by_name[wanted]
    if wanted.startswith("-") and wanted[1:].isdigit() and _is_list(module):
        position = len(children) + int(wanted)
        if 0 <= position < len(children):
            return children[position]
    return None


def _is_list(module: nn.Module) -> bool:
    return bool(module._modules) and all(name.isdigit() for name in module._modules)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _no_such_child(module: nn.Module, inner: nn.Module, path: str, wanted: str, rest: tuple[Segment, ...]) -> str:
    names = [name for name, _ in _children(inner)]
    full = ".".join([*([path] if path else []), wanted, *(segment.text for segment in rest)])
    where = f"{path!r} ({type(inner).__name__})" if path else type(inner).__name__
    if not names:
        return f"no module {full!r}: {where} has no submodules."
    if _is_list(inner):
        return f"no module {full!r}: {where} has {len(names)} items, {names[0]!r} to {names[-1]!r}."
    tail = "".join(f".{segment.text}" for segment in rest)
    likely = [_join(path, name) + tail for name in nearest(wanted, names)]
    below = [] if likely else [p for p in module_paths(module) if p.split(".")[-1] == wanted][:3]
    likely = likely or [_join(path, each) + tail for each in below]
    hint = f" Did you mean {', '.join(map(repr, likely))}?" if likely else ""
    return f"no module {full!r}.{hint} {where} has: {listing(names)}."


def _names_nothing(model: nn.Module, address: Address, found: dict[str, Found]) -> str:
    kind = type(unwrap(model)).__name__
    if found:
        return f"{address.path!r} names only containers that are never called in {kind}: {listing(found)}."
    paths = module_paths(model)
    return f"{address.path!r} names none of the {len(paths)} modules of {kind}.{did_you_mean(address.path, paths)}"


def _cannot_be_called(address: Address, found: Found) -> str:
    kind = type(unwrap(found.module)).__name__
    items = [name for name, _ in _children(unwrap(found.module))]
    return (
        f"{address.path!r} is a {kind}, which is never called itself and so has no input or output. "
        f"Name its items: {found.path}.* for all of them; it has {listing(items)}."
    )
