"""A student that starts as every n-th layer of its teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .errors import StructureError, listing
from .layer_maps import chosen
from .paths import module_paths, unwrap
from .structure import Stack, described, stacks
from .tables import table

Part = Literal["block", "embeddings", "head"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Copied:
    """One module of the student that was filled from the teacher."""

    part: Part
    teacher: str
    student: str
    parameters: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Initialization:
    """What `initialize_student` did; ``print(initialization)`` shows it as a table."""

    copied: tuple[Copied, ...]
    left: tuple[str, ...]
    """Tensors of the student that kept their values, each with the reason."""

    def __str__(self) -> str:
        rows = [(each.part, each.student, each.teacher, f"{each.parameters:,}") for each in self.copied]
        shown = table(("part", "student", "from teacher", "parameters"), rows, right=("parameters",))
        kept = "\n".join(f"  {each}" for each in self.left) or "  nothing"
        return f"{shown}\n\nleft as it was:\n{kept}"


def initialize_student(
    teacher: nn.Module,
    student: nn.Module,
    *,
    layers: str | Sequence[int] = "spread",
    embeddings: bool = True,
    head: bool = True,
) -> Initialization:
    """Copy chosen blocks of the teacher, its embeddings and its head into a shallower student of the same widths.

    Sanh et al., *DistilBERT*, 2019 (arXiv 1910.01108), section 3: the student is initialised by taking one layer out of two.
    Models with an encoder and a decoder are treated stack by stack. Everything is compared before anything is written, so that
    a refusal leaves the student as it was.

    Args:
        layers: the teacher's blocks for the student's blocks in order: positions from 0 (negative ones from the end), or the
        name
            of a layer map: ``"spread"`` (12 → 6: 0, 2, 4, 7, 9, 11), ``"uniform"``, ``"skip"``, ``"first"``, ``"last"``.
        embeddings: copy what lies before the blocks.
        head: copy what lies behind them: last norm, pooler, classifier.

    Raises:
        StructureError: no repeated blocks, blocks made differently, or tensors of different shapes.
        MatchError: ``layers`` names blocks that do not exist.
    """
    theirs, ours = _stacks(teacher, student)
    plan = [pair for t, s in zip(theirs, ours, strict=True) for pair in _block_pairs(t, s, layers)]
    their_tensors, our_tensors = dict(_tensors(teacher)), dict(_tensors(student))
    moves: dict[str, str] = {}
    copied = []
    for their_block, our_block in plan:
        inside = _moves_inside(their_block, our_block, their_tensors, our_tensors)
        moves |= inside
        copied.append(_copied("block", their_block, our_block, inside, our_tensors))
    embedded = {path for path, module in module_paths(student).items() if isinstance(unwrap(module), nn.Embedding)}
    around, left = _around(theirs, ours, their_tensors, our_tensors, embedded, {"embeddings": embeddings, "head": head})
    for part, found in around.items():
        moves |= found
        for module in dict.fromkeys(_owner(name) for name in found):
            names = {name: source for name, source in found.items() if _owner(name) == module}
            copied.append(_copied(part, _owner(next(iter(names.values()))), module, names, our_tensors))
    _check_shapes(moves, their_tensors, our_tensors)
    with torch.no_grad():
        for name, source in moves.items():
            our_tensors[name].copy_(their_tensors[source])
    return Initialization(copied=tuple(copied), left=tuple(left))


def _stacks(teacher: nn.Module, student: nn.Module) -> tuple[list[Stack], list[Stack]]:
    found = stacks(teacher), stacks(student)
    for role, model, lists in (("teacher", teacher, found[0]), ("student", student, found[1])):
        if not lists:
            raise StructureError(
                f"the {role} has no repeated transformer blocks that could be copied: {described(model)}. Copy what you want "
                "by load_state_dict"
            )
    if len(found[0]) != len(found[1]):
        counts = [listing(stack.path for stack in lists) for lists in found]
        raise StructureError(f"the teacher has blocks in {counts[0]}, the student in {counts[1]}, which do not correspond")
    return found


def _block_pairs(teacher: Stack, student: Stack, layers: str | Sequence[int]) -> list[tuple[str, str]]:
    positions = chosen(layers, len(teacher), len(student))
    return [(teacher.blocks[position], block) for position, block in zip(positions, student.blocks, strict=True)]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers by name, without the prefixes of wrappers."""
    for path, module in module_paths(model).items():
        inner = unwrap(module)
        saved = {name: each for name, each in inner._buffers.items() if name not in inner._non_persistent_buffers_set}
        for name, tensor in (*inner._parameters.items(), *saved.items()):
            if tensor is not None:
                yield f"{path}.{name}" if path else name, tensor


def _moves_inside(their_block: str, our_block: str, theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, str]:
    inside = {name: f"{their_block}{name.removeprefix(our_block)}" for name in ours if name.startswith(f"{our_block}.")}
    expected = {name for name in theirs if name.startswith(f"{their_block}.")}
    missing = [name for name, source in inside.items() if source not in theirs]
    unused = sorted(expected - set(inside.values()))
    if missing or unused:
        only = [f"only the student has {listing(missing, most=4)}"] if missing else []
        only += [f"only the teacher has {listing(unused, most=4)}"] if unused else []
        raise StructureError(
            f"the student's block {our_block!r} and the teacher's {their_block!r} are made differently: {'; '.join(only)}. "
            "Choose other layers=, or a student of the teacher's own class"
        )
    return inside


def _around(
    theirs: list[Stack],
    ours: list[Stack],
    their_tensors: dict[str, Tensor],
    our_tensors: dict[str, Tensor],
    embedded: set[str],
    wanted: dict[Part, bool],
) -> tuple[dict[Part, dict[str, str]], list[str]]:
    """What is to be copied outside the blocks, by part, and what is left with the reason. Tied tensors occur once."""
    found: dict[Part, dict[str, str]] = {"embeddings": {}, "head": {}}
    left = {}
    rename = [_prefixes(t, s) for t, s in zip(theirs, ours, strict=True)]
    blocks = [block for stack in ours for block in stack.blocks]
    behind, done = False, set()
    for name, tensor in our_tensors.items():
        if any(name.startswith(f"{block}.") for block in blocks):
            behind = True
            continue
        part: Part = "head" if behind and _owner(name) not in embedded else "embeddings"
        sources = [f"{t}{name.removeprefix(s)}" for t, s in rename if name.startswith(s)]
        source = next((each for each in (*sources, name) if each in their_tensors), None)
        if not wanted[part] or source is None:
            left[name] = f"{part}=False" if not wanted[part] else "the teacher has none"
        elif id(tensor) not in done:
            done.add(id(tensor))
            found[part][name] = source
    return found, [f"{name} ({reason})" for name, reason in left.items() if id(our_tensors[name]) not in done]


def _prefixes(teacher: Stack, student: Stack) -> tuple[str, str]:
    """What stands before the part of the two paths that is alike: ``bert.encoder.layer`` and ``encoder.layer`` → ``bert.``,
    ``""``.
    """
    theirs, ours = teacher.path.split("."), student.path.split(".")
    while theirs and ours and theirs[-1] == ours[-1]:
        theirs.pop()
        ours.pop()
    return "".join(f"{each}." for each in theirs), "".join(f"{each}." for each in ours)


def _copied(part: Part, teacher: str, student: str, moves: dict[str, str], tensors: dict[str, Tensor]) -> Copied:
    return Copied(part=part, teacher=teacher, student=student, parameters=sum(tensors[name].numel() for name in moves))


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _check_shapes(moves: dict[str, str], theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    wrong = [
        f"{name} is {list(ours[name].shape)} in the student and {list(theirs[source].shape)} in the teacher"
        for name, source in moves.items()
        if ours[name].shape != theirs[source].shape
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise StructureError(
            f"nothing was copied, because shapes differ: {'; '.join(wrong[:3])}{more}. The widths must be the teacher's; leave "
            "parts that differ out by embeddings=False or head=False"
        )
