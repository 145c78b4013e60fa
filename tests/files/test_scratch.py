"""Tensors in files: what is written is kept or gone, and a full disk is an error at once."""

from __future__ import annotations

import resource

import pytest
import torch

from truedepth.files.scratch import mapped


@pytest.mark.parametrize("name", ["states", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.uint8])
def test_a_mapped_tensor_is_zeros_that_can_be_written(tmp_path, name, dtype):
    tensor = mapped(tmp_path, name, (3, 4, 5), dtype)
    assert (tensor.shape, tensor.dtype) == ((3, 4, 5), dtype)
    assert not tensor.any()
    tensor[1:] = 7
    assert tensor.sum() == 7 * 40


def test_a_named_file_keeps_what_was_written(tmp_path):
    first = mapped(tmp_path, "values", (2, 3), torch.int32)
    first.copy_(torch.arange(6).view(2, 3))
    again = mapped(tmp_path, "values", (2, 3), torch.int32)
    assert torch.equal(again, first)
    assert (tmp_path / "values").read_bytes() == first.numpy().tobytes()


def test_a_temporary_file_has_no_name(tmp_path):
    one, other = (mapped(tmp_path, None, (100,), torch.float32) for _ in range(2))
    assert not list(tmp_path.iterdir())
    one.fill_(1)
    assert not other.any()


@pytest.mark.parametrize("name", ["states", None])
def test_disk_space_is_taken_at_once(tmp_path, name):
    """A limit on file size fails the reservation, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            mapped(tmp_path, name, (1 << 16,), torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    mapped(tmp_path, "whole", (1 << 16,), torch.float32)
    assert (tmp_path / "whole").stat().st_blocks * 512 >= 1 << 18
