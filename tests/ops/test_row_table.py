"""Where the kernels are told that a row lies."""

import itertools

import pytest
import torch

from minegan_fast.ops._row_table import CHUNK, RowTensor, Table, _place, fill_state


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("leaf_layout", [torch.contiguous_format, torch.channels_last])
def test_places(axis, layout, leaf_layout):
    """Every element of a row is where the four strides say, or nothing is said."""
    numbers = torch.arange(4 * 6 * 3 * 5).float()
    weight = numbers.view(4, 6, 3, 5).contiguous(memory_format=layout)
    memory = weight.as_strided((weight.numel(),), (1,))
    leaf = weight.movedim(axis, 0)[:3].contiguous(memory_format=leaf_layout)
    place = _place(leaf, weight, axis)
    if place is None:
        assert (axis, layout, leaf_layout) == (1, torch.contiguous_format, torch.channels_last)
        return
    row_stride, outer_stride, inner, inner_stride = place
    for row, j in itertools.product(range(3), range(leaf[0].numel())):
        lies = leaf.as_strided((leaf.numel(),), (1,))[row * leaf[0].numel() + j]
        assert memory[row * row_stride + j // inner * outer_stride + j % inner * inner_stride] == lies


def test_items_cover_every_row_once():
    tensors = [RowTensor(torch.zeros(shape)) for shape in ((5, 3000), (700, 3), (1,), (2, CHUNK), (3, 0))]
    for t in tensors:
        fill_state(t, "adam", False)
    table = Table("adam", tensors, True)
    table.take([torch.zeros_like(t.leaf) for t in tensors])
    seen = [torch.zeros(t.leaf.numel()) for t in tensors]
    for tensor, row, rows, part in table.to_device()["items"].tolist():
        length = tensors[tensor].leaf[0].numel()
        first = row * length + part * CHUNK
        count = rows * length if rows > 1 else min(CHUNK, length - part * CHUNK)
        assert 0 < count <= CHUNK
        seen[tensor][first : first + count] += 1
    assert all((s == 1).all() for s in seen)
