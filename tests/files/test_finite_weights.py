"""Weights that are NaN or infinite are not written, whatever they come from."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import truedepth as td
from truedepth.checkpoint.writing import write_weights
from truedepth.tensors import NotFiniteError, check_finite, from_tensor

PROJECTION, NORM = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.input_layernorm.weight"
PLAN = td.Plan(6, [[1, 2]])


def edited(make_model, tmp_path, change, **options):
    """A copy of a model whose tensors `change` has changed."""
    path = tmp_path / "m"
    shutil.copytree(make_model(**options), path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_block_is_finite_only_if_all_of_it_is(dtype, value):
    block = torch.full((5, 7), 60000.0).to(dtype)  # of which float16 cannot hold the sum
    check_finite("w", block)
    block[3, 6] = value
    with pytest.raises(NotFiniteError) as caught:
        check_finite("w", block, first=10)
    assert (caught.value.name, caught.value.row) == ("w", 13)
    assert repr(caught.value.value) == repr(value)


def test_an_infinity_of_each_sign_does_not_sum_to_something_finite():
    with pytest.raises(NotFiniteError):
        check_finite("w", torch.tensor([[math.inf, -math.inf]]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.uint8])
def test_whole_numbers_are_finite(dtype):
    check_finite("w", torch.ones(3, dtype=dtype))


def fold(tensors):
    tensors[NORM][0], tensors[PROJECTION][0, 0] = 300.0, 300.0


def large(tensors):
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e5


@pytest.mark.parametrize(
    ("change", "options", "dtype", "name"),
    [
        (fold, {"dtype": torch.float16}, None, PROJECTION),
        (large, {"dtype": torch.bfloat16}, torch.float16, "model.layers.0.mlp.down_proj.weight"),
        (large, {}, torch.float16, "model.layers.0.mlp.down_proj.weight"),
    ],
)
def test_what_float16_cannot_hold(make_model, tmp_path, change, options, dtype, name):
    source = edited(make_model, tmp_path, change, **options)
    with pytest.raises(td.TruedepthError) as caught:
        td.convert(source, tmp_path / "out", PLAN, dtype=dtype)
    for words in (repr(name), "inf in row 0", "the 65504 of float16", "--dtype bfloat16"):
        assert words in str(caught.value)
    assert not (tmp_path / "out").exists()
    td.convert(source, tmp_path / "out", PLAN, dtype=torch.bfloat16)  # the way out
    written = td.open_source(tmp_path / "out").tensors
    assert all(tensor.read().isfinite().all() for tensor in written.values())


@pytest.mark.parametrize("layer", [1, 5])  # one that is joined, and one that is copied as it is
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_source_that_is_not_finite_is_named(make_model, tmp_path, layer, value):
    name = f"model.layers.{layer}.mlp.up_proj.weight"

    def spoil(tensors):
        tensors[name][2, 3] = value

    source = edited(make_model, tmp_path, spoil)
    with pytest.raises(td.TruedepthError) as caught:
        td.convert(source, tmp_path / "out", PLAN)
    for words in (str(source), f"its {name!r} holds {value} in row 2"):
        assert words in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_weights_from_elsewhere_are_looked_at_too(tmp_path):
    with pytest.raises(NotFiniteError, match=r"'b' would hold nan in row 1; it is not written"):
        write_weights(
            tmp_path,
            {
                "a": from_tensor(torch.ones(3, 2)),
                "b": from_tensor(torch.tensor([[1.0], [math.nan]])),
            },
        )
