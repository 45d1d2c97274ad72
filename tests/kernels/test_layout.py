"""Tensors as rows at two strides: the rows must be those of the tensor, whatever its strides."""

import pytest
import torch

from hookdistill.fused.forms import FORMS
from hookdistill.fused.rows import RowTask, RowTerm
from hookdistill.kernels.layout import Layout, counted_part, entries_view, rows_view
from hookdistill.kernels.records import Table, bits

TENSORS = {
    "dense": lambda x: x,
    "one dimension": lambda x: x[0, 0, 0],
    "tokens but the first": lambda x: x[:, :, 1:],
    "every other example": lambda x: x[::2],
    "transposed": lambda x: x.transpose(0, 1),
    "reversed": lambda x: x.permute(2, 1, 0, 3),
    "expanded in front": lambda x: x[:1].expand(4, -1, -1, -1),
    "expanded behind": lambda x: x[:, :, :1].expand(-1, -1, 4, -1),
    "all expanded": lambda x: x[:1, :1, :1].expand(2, 3, 4, -1),
    "features in front": lambda x: x.movedim(-1, 0),
    "some features": lambda x: x[..., 2:],
    "every other feature": lambda x: x[..., ::2],
}


def read(view, rows, width):
    """What a kernel would read."""
    found = [(row // view.size) * view.outer + (row % view.size) * view.inner for row in range(rows)]
    if not view.split:
        assert found == [row * view.inner for row in range(rows)]
    origin = view.tensor.storage_offset()
    flat = view.tensor.as_strided((view.tensor.untyped_storage().nbytes() // view.tensor.itemsize,), (1,), 0)
    return torch.stack([flat[origin + start : origin + start + width] for start in found])


@pytest.mark.parametrize("arrange", TENSORS)
def test_rows_are_those_of_the_tensor(arrange):
    tensor = TENSORS[arrange](torch.arange(2 * 3 * 5 * 8, dtype=torch.float32).view(2, 3, 5, 8))
    width = tensor.shape[-1]
    assert torch.equal(read(rows_view(tensor), tensor.numel() // width, width), tensor.reshape(-1, width))


def test_nothing_is_copied_that_two_strides_can_say():
    tensor = torch.zeros(2, 3, 5, 8)
    for view in (tensor[:, :, 1:], tensor[:, 1:], tensor[:1].expand(4, -1, -1, -1), tensor[..., 2:]):
        assert rows_view(view).tensor is view
    assert rows_view(tensor.permute(2, 1, 0, 3)).tensor.data_ptr() != tensor.data_ptr()
    assert entries_view(tensor, (2, 3, 5), (8, 120, 3)) is None


def term(valid=None, name="mse", shape=(2, 6, 4, 5)):
    return RowTerm(form=FORMS[name], other=torch.zeros(shape), valid=valid)


def test_maps_of_channels_are_cut_without_a_copy_where_nothing_needs_whole_rows():
    student = torch.arange(2 * 6 * 4 * 5, dtype=torch.float32).view(2, 6, 4, 5)
    items = torch.tensor([True, False])[:, None, None].expand(2, 4, 5)
    layout = Layout.of(RowTask(student=student, dim=1, terms=[term(items), term(name="l1")]))
    assert layout.cut and (layout.rows, layout.width) == (12, 20)
    assert torch.equal(read(layout.view(student), 12, 20), student.view(12, 20))
    mask = layout.mask(items)
    assert read(mask, 12, 1).flatten().tolist() == [True] * 6 + [False] * 6
    rows, shaped = layout.gradient()
    assert rows.shape == shaped.shape == student.shape

    for other in (term(name="cosine"), term(torch.ones(2, 4, 5, dtype=torch.bool))):
        layout = Layout.of(RowTask(student=student, dim=1, terms=[term(items), other]))
        assert not layout.cut and (layout.rows, layout.width) == (40, 6)
        assert torch.equal(read(layout.view(student), 40, 6), student.movedim(1, -1).reshape(-1, 6))
        assert layout.gradient()[1].shape == student.shape
    assert not Layout.of(RowTask(student=student.transpose(2, 3), dim=1, terms=[term(shape=(2, 6, 5, 4))])).cut


@pytest.mark.parametrize(
    ("mask", "count", "times"),
    [
        (lambda m: m, 12, 1),
        (lambda m: m[:, :1].expand(-1, 7), 3, 7),
        (lambda m: m[:1].expand(5, -1), 4, 5),
        (lambda m: m[:1, :1].expand(5, 6), 1, 30),
        (lambda m: m.t(), 12, 1),
        (lambda m: m[:, ::2], 6, 1),
    ],
)
def test_a_mask_is_counted_without_its_repetitions(mask, count, times):
    drawn = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 0]]).bool()
    valid = mask(drawn)
    view, entries, repeated = counted_part(valid)
    assert (entries, repeated) == (count, times)
    assert read(view, entries, 1).sum().item() * times == valid.sum().item()


def test_sections_of_a_table_begin_on_16_bytes():
    table = Table()
    assert [table.add([(1, 2, 3)]), table.add([(4,), (5,)]), table.add([])] == [0, 4, 6]
    assert table.numbers == [1, 2, 3, 0, 4, 5]


def test_numbers_are_kept_as_the_bits_of_single_precision():
    for number in (0.0, 1.5, -2.75e-3, float("inf"), 1e300, -1e300):
        bits_of = torch.tensor([bits(number)], dtype=torch.int32)
        assert torch.equal(bits_of.view(torch.float32), torch.tensor([number], dtype=torch.float64).float())
