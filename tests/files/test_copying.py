"""Tensors into files: every source byte at most once, the same bytes on every way."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import Qwen2Config

import truedepth as td
from truedepth.checkpoint.writing import write_weights
from truedepth.files import copying
from truedepth.sources import mapped
from truedepth.sources.mapped import mapped_tensor
from truedepth.tensors import Stored, from_tensor, pick_rows, scale_columns, stack_rows

PLANS = {"pairs": [[1, 2], [3, 4]], "threes": [[0, 1, 2], [3, 4, 5]], "mixed": [[0, 1, 2], [4, 5]]}


def counted(source, reads):
    """The source, whose reads are counted, row by row; copies in the kernel are not among them."""

    def tensor(name, lazy):
        def rows(start, stop):
            reads[name].update(range(start, stop))
            return lazy.rows(start, stop)

        return replace(lazy, rows=rows)

    held = source.tensors
    return replace(source, read_tensors=lambda: {name: tensor(name, held[name]) for name in held})


@pytest.mark.parametrize("groups", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"family": Qwen2Config}])
def test_every_byte_is_read_at_most_once(make_model, tmp_path, monkeypatch, groups, options):
    source = td.open_source(make_model(dtype=torch.bfloat16, shard_size="100KB", **options))
    reads = {name: Counter() for name in source.tensors}
    by_place = {tensor.stored: name for name, tensor in source.tensors.items()}
    stored = copying._stored

    def counting(tensor, file, start, stop):
        reads[by_place[tensor.stored]].update(range(start, stop))
        return stored(tensor, file, start, stop)

    monkeypatch.setattr(copying, "_stored", counting)
    monkeypatch.setattr(copying, "BLOCK_BYTES", 1000)
    td.convert(counted(source, reads), tmp_path / "out", td.Plan(6, groups))
    for name, tensor in source.tensors.items():
        assert reads[name] == Counter(range(tensor.shape[0]))


def test_blocks_of_any_size_give_the_same_bytes(make_model, tmp_path, monkeypatch):
    source = make_model(dtype=torch.bfloat16)
    plan = td.Plan(6, PLANS["pairs"])
    td.convert(source, tmp_path / "large", plan)
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.setattr(copying, "BLOCK_BYTES", 1000)
    td.convert(source, tmp_path / "small", plan)
    large, small = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("large", "small")
    )
    assert small == large


def test_a_source_that_is_cut_short_is_an_error(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(100))
    lazy = from_tensor(torch.zeros(100, dtype=torch.uint8), Stored(path, 50))
    with pytest.raises(OSError, match="was cut short while it was read"):
        write_weights(tmp_path, {"a": lazy})


def test_the_number_of_threads_is_as_before(tmp_path):
    before = torch.get_num_threads()
    write_weights(tmp_path, {"a": from_tensor(torch.zeros(3))})
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_those_of_float64_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 200, generator=generator).to(dtype)
    gain = (torch.rand(200, generator=generator) * 2).to(dtype)
    lazy = scale_columns(from_tensor(matrix), from_tensor(gain), dtype)
    assert lazy.dtype == dtype
    assert torch.equal(lazy.read(), (matrix.double() * gain.double()).to(dtype))


def test_files_are_asked_for_ahead_and_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(mapped, "AHEAD_BYTES", 64)
    advise = lambda file, begin, count, advice: asked.append((begin, count))  # noqa: E731
    monkeypatch.setattr(os, "posix_fadvise", advise)
    tensor = torch.arange(100 * 8, dtype=torch.int16).view(100, 8)
    lazy = mapped_tensor(tensor, Stored(tmp_path, 0))
    assert torch.equal(torch.cat(list(lazy.blocks(48))), tensor)
    ahead = 0
    for begin, count in asked:
        assert begin == ahead
        ahead += count
    assert ahead == tensor.nbytes


def test_rows_behind_others_are_not_mistaken_for_stored_ones(tmp_path):
    stored = from_tensor(torch.arange(6.0).view(3, 2), Stored(tmp_path, 8))
    assert stored.to(torch.float32).stored == Stored(tmp_path, 8)
    for made in (
        stored.to(torch.float16),
        stored.row_range(1, 3),
        pick_rows(stored, torch.tensor([2, 0, 1])),
        stack_rows([stored]),
        scale_columns(stored, from_tensor(torch.ones(2))),
    ):
        assert made.stored is None
