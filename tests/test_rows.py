"""Rows of tables: numpy's copy on a CPU does what PyTorch's would."""

import numpy as np
import pytest
import torch

from headrace.rows import upload, write_rows


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.float32])
def test_rows_land_where_index_copy_puts_them(dtype: torch.dtype) -> None:
    table = torch.zeros(7, 3, 2).to(dtype)
    rows = torch.arange(18).reshape(3, 3, 2).to(dtype)
    index = torch.tensor([5, 0, 2])
    expected = table.clone().index_copy_(0, index, rows)
    write_rows(table, index, rows)
    assert torch.equal(table, expected)
    assert not table[1].any()


def test_upload_shares_memory_on_a_cpu_and_takes_strided_arrays() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    shared = upload(array, torch.device("cpu"))
    array[0, 0] = 7
    assert shared[0, 0] == 7
    assert upload(array[:, ::2], torch.device("cpu")).tolist() == array[:, ::2].tolist()
