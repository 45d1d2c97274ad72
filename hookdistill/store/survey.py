"""What the teacher makes of a first batch: which inputs it takes, and the dtype, shape and token dimensions of each tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..addresses import Address
from ..batches import (
    BatchAdaptor,
    BatchKey,
    Inputs,
    check_fits,
    contents,
    given_inputs,
    has_item,
    model_inputs,
    named_items,
    pick,
)
from ..capture import Capture, Captured
from ..errors import BatchError, HookDistillError, StoreError
from ..paths import is_compiled
from ..running import device_of, teaching, undisturbed
from .keep import Keep, feature_indices
from .keys import Recognition
from .manifest import Stored

USUAL_MASK = "attention_mask"


class Run:
    """A teacher with its hooks on: a batch goes in, tensors by address come out.

    Args:
        addresses: one tensor each.
        targets: items of the batch that are only compared with, and not given to the model.
        masks: items that are masks.
        adaptor: what makes the inputs instead, see `Distiller`.
    """

    def __init__(
        self,
        teacher: nn.Module,
        addresses: Sequence[Address],
        *,
        targets: Collection[BatchKey] = (),
        masks: Collection[BatchKey] = (),
        adaptor: BatchAdaptor | None = None,
    ) -> None:
        self.teacher = teacher
        self.addresses = addresses
        self.targets, self.masks, self.adaptor = targets, masks, adaptor
        from_the_end = any(isinstance(each.call, int) and each.call < 0 for each in addresses)
        self.capture = Capture(teacher, addresses, stop=not from_the_end and not is_compiled(teacher), detach=True)
        self.captured: Captured | None = None

    def __enter__(self) -> Run:
        self.captured = self.capture.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.capture.close()

    def inputs(self, batch: Any) -> Inputs:
        """What the teacher is called with."""
        device = device_of(self.teacher)
        if self.adaptor is None:
            return model_inputs(self.teacher, batch, targets=self.targets, masks=self.masks).to(device)
        adapted = self.adaptor(device, batch)
        if not isinstance(adapted, (tuple, list)) or len(adapted) != 2:
            raise BatchError(f"batch_adaptor(device, batch) must return (teacher_inputs, student_inputs), got {type(adapted)}")
        inputs = given_inputs(adapted[0])
        check_fits(inputs, self.teacher)
        return inputs

    def __call__(self, inputs: Inputs, *, whole: bool = False) -> dict[Address, Tensor]:
        """The tensors of one forward."""
        captured = self.captured
        assert captured is not None
        with teaching(self.teacher), self.capture.recording(whole=whole):
            self.teacher(*inputs.args, **inputs.kwargs)
        tensors = {address: captured[address.path][address.key] for address in self.addresses}
        captured.clear()
        return tensors


def survey(
    run: Run, batch: Any, keeps: Mapping[Address, Keep], *, mask: BatchKey | None, fields: Sequence[BatchKey]
) -> tuple[Recognition, tuple[Stored, ...]]:
    """How samples will be recognised, and what will be stored of each.

    Raises:
        StoreError: a tensor cannot be stored as it should.
        HookDistillError: the teacher cannot be run on the batch.
    """
    if mask == "auto":
        mask = USUAL_MASK if has_item(batch, USUAL_MASK) and getattr(pick(batch, USUAL_MASK), "ndim", 0) == 2 else None
    if mask is not None and not has_item(batch, mask):
        raise StoreError(f"mask={mask!r} is no item of the batch, which has {contents(batch)}")
    with undisturbed(run.teacher):
        inputs = run.inputs(batch)
        recognition = Recognition(_recognised(run, inputs, batch), mask, tuple(fields))
        samples = recognition.of(batch)
        with _explained(run, inputs):
            tensors = run(inputs, whole=True)
        token_dims = {address: tuple(keeps[address].token_dims or ()) for address in tensors}
        open_question = [address for address in tensors if keeps[address].token_dims is None]
        if mask is not None and open_question:
            found = _token_dims(run, inputs, tensors, len(samples), samples.tokens)
            token_dims.update({address: found[address] for address in open_question})
    stored = []
    for address, tensor in tensors.items():
        try:
            stored.append(_stored(address, tensor, keeps[address], token_dims[address], len(samples)))
        except StoreError as error:
            raise StoreError(f"{str(address)!r} cannot be stored: {error}") from error
    return recognition, tuple(stored)


def _recognised(run: Run, inputs: Inputs, batch: Any) -> dict[str, BatchKey]:
    if run.adaptor is None:
        return dict(inputs.taken)
    # What the adaptor takes from the batch is its own affair: everything in it that is a tensor counts.
    items = named_items(batch)
    if items is None:
        raise StoreError("with a batch_adaptor= the batch must have names, so that samples can be recognised by its items")
    return {name: name for name, value in items.items() if isinstance(value, Tensor) and name not in run.targets}


def _stored(address: Address, tensor: Tensor, keep: Keep, token_dims: tuple[int, ...], count: int) -> Stored:
    if not tensor.ndim or tensor.shape[0] != count:
        raise StoreError(f"its shape is {list(tensor.shape)}, whose first dimension is not that of the {count} samples")
    shape = tuple(tensor.shape[1:])
    if any(not 0 <= dim < len(shape) for dim in token_dims):
        raise StoreError(f"token_dims={token_dims} are no dimensions of {list(shape)}, its shape without the batch")
    if keep.tokens is not None and len(token_dims) != 1:
        raise StoreError(f"tokens= needs one dimension of tokens, and {list(shape)} has {len(token_dims)}")
    if keep.sparse and (not shape or len(shape) - 1 in token_dims):
        raise StoreError(f"top_k= and samples= need classes in the last dimension of {list(shape)}")
    if keep.features is not None and (not shape or len(shape) - 1 in token_dims):
        raise StoreError(f"features= needs features in the last dimension of {list(shape)}")
    if shape:
        feature_indices(keep, shape[-1])
    stored = Stored(address, tensor.dtype, shape, token_dims, keep)
    _ = stored.codec
    return stored


def _token_dims(
    run: Run, inputs: Inputs, tensors: Mapping[Address, Tensor], count: int, tokens: int
) -> dict[Address, tuple[int, ...]]:
    """Which dimensions are tokens: those that grow when a sample gets a padding token more, or shrink when it gets one less.

    A size that equals the number of tokens proves nothing: the classes may be as many.
    """
    attempts: list[tuple[int, Callable[[Tensor], Tensor]]] = [(tokens + 1, _lengthened)]
    if tokens > 1:
        attempts.append((tokens - 1, lambda tensor: tensor[:, :-1]))
    failures = []
    for length, change in attempts:
        try:
            changed = run(_changed(inputs, count, tokens, change), whole=True)
        except Exception as error:
            failures.append(f"with {length}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        return {address: _followed(address, tensors[address], changed[address], tokens, length) for address in tensors}
    raise StoreError(
        f"which dimensions are tokens is found out by running the teacher with another number of them than {tokens}, and it "
        f"refuses ({'; '.join(failures)}). Say it: keep={{'address': Keep(token_dims=(0,))}}, or mask=None to store padding"
    )


def _followed(address: Address, tensor: Tensor, changed: Tensor, tokens: int, length: int) -> tuple[int, ...]:
    if tensor.ndim != changed.ndim:
        return ()
    dims = []
    for dim, (before, after) in enumerate(zip(tensor.shape[1:], changed.shape[1:], strict=True)):
        if before == after:
            continue
        if (before, after) != (tokens, length):
            raise StoreError(
                f"{str(address)!r} has a dimension that follows the tokens without being as long ({before} for {tokens}, "
                f"{after} for {length}), so its padding cannot be cut off. Keep(token_dims=()) stores it with its padding"
            )
        dims.append(dim)
    return tuple(dims)


def _lengthened(tensor: Tensor) -> Tensor:
    last = tensor[:, -1:]
    is_mask = tensor.ndim == 2 and bool(((tensor == 0) | (tensor == 1)).all())
    return torch.cat([tensor, torch.zeros_like(last) if is_mask else last], 1)


def _changed(inputs: Inputs, count: int, tokens: int, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The inputs of the first sample alone, those that run along the tokens changed."""

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            if not value.ndim or value.shape[0] != count:
                return value
            return change(value[:1]) if value.ndim > 1 and value.shape[1] == tokens else value[:1]
        if isinstance(value, dict):
            return {key: walk(child) for key, child in value.items()}
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return type(value)(walk(child) for child in value)
        return value

    return Inputs(tuple(walk(list(inputs.args))), walk(dict(inputs.kwargs)), inputs.taken)


@contextlib.contextmanager
def _explained(run: Run, inputs: Inputs) -> Iterator[None]:
    """What the teacher raises on its first batch says what it was called with."""
    try:
        yield
    except (HookDistillError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kind = type(run.teacher).__name__
        called = f"It was called with {inputs.described()}"
        raise BatchError(f"{kind}.forward raised {type(error).__name__}: {error}\n{called}") from error
