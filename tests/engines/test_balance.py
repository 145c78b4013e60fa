"""Rescaled weights: the same model, and less lost when they are rounded."""

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, Qwen2Config

import truedepth as td
from tiny_models import random_ids
from truedepth.engines.gguf.balance import balanced
from truedepth.engines.gguf.export import balanced_tensors
from truedepth.families.llama import LLAMA
from truedepth.tensors import from_tensor

PLAN = td.Plan(6, [[0, 1, 2], [4, 5]])
MODELS = (
    {},
    {"attention_bias": True, "mlp_bias": True},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1, "head_dim": 32},
    {"family": MistralConfig, "sliding_window": None},
    {"family": Qwen2Config},
)


def spread_columns(checkpoint):
    """Gains and columns of different size, as folded gains make them."""
    held = load_file(checkpoint / "model.safetensors")
    for name, tensor in held.items():
        *_, layer, module, map_name, _ = ["", "", *name.split(".")]
        if module in ("self_attn", "mlp") and name.endswith("weight") and map_name != "o_proj":
            seed = 10 * int(layer) + 2 * (module == "mlp") + (map_name == "down_proj")
            generator = torch.Generator().manual_seed(seed)
            tensor *= torch.exp(0.7 * torch.randn(tensor.shape[-1], generator=generator))
    save_file(held, checkpoint / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_the_model_is_the_same(make_model, options, tmp_path):
    padding = 2 if options.get("num_key_value_heads") == 1 else 1
    td.convert(make_model(**options), tmp_path / "out", PLAN, pad_heads=padding)
    spread_columns(tmp_path / "out")
    ids = random_ids()
    with torch.inference_mode():
        before = td.load(tmp_path / "out").model(ids).logits
    tensors = {
        name: tensor.read()
        for name, tensor in balanced_tensors(td.open_source(tmp_path / "out")).items()
    }
    held = load_file(tmp_path / "out/model.safetensors")
    assert tensors.keys() == held.keys()
    changed = {name for name in held if not torch.equal(held[name], tensors[name])}
    assert {name.split(".")[-2] for name in changed if name.endswith("weight")} == {
        *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"),
        *("input_layernorm", "post_attention_layernorm"),
    }
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with torch.inference_mode():
        assert (td.load(tmp_path / "out").model(ids).logits - before).abs().max() < 1e-4


def layer(spread, hidden=64, ffn=128):
    """A random layer whose gains, or columns, differ by orders of magnitude."""
    torch.manual_seed(0)
    gain = torch.exp(spread * torch.randn(hidden))
    columns = torch.exp(spread * torch.randn(ffn))
    rows = {"self_attn.q_proj": hidden, "self_attn.k_proj": 32, "self_attn.v_proj": 32}
    made = {
        f"{name}.weight": torch.randn(rows.get(name, ffn), hidden) * gain for name in LLAMA.reads
    }
    made |= {f"{norm}.weight": torch.ones(hidden) for norm in LLAMA.norms}
    made["self_attn.o_proj.weight"] = torch.randn(hidden, hidden)
    made["mlp.down_proj.weight"] = torch.randn(hidden, ffn) * columns
    return {name: from_tensor(tensor) for name, tensor in made.items()}


def test_columns_are_level(make_model):
    found = balanced(LLAMA, layer(1.5))
    for name in ("self_attn.q_proj.weight", "mlp.gate_proj.weight", "mlp.down_proj.weight"):
        before = layer(1.5)[name].read().norm(dim=0)
        after = found[name].read().norm(dim=0)
        assert after.max() / after.min() < 2 < 50 < before.max() / before.min()


def test_columns_of_zeros_stay(make_model):
    held = layer(0.5)
    down = held["mlp.down_proj.weight"].read().clone()
    down[:, 5:9] = 0
    for zero in (down, torch.zeros(64, 128)):
        found = balanced(LLAMA, held | {"mlp.down_proj.weight": from_tensor(zero)})
        assert all(tensor.read().isfinite().all() for tensor in found.values())
        assert torch.equal(found["mlp.down_proj.weight"].read() == 0, zero == 0)


def test_quantized_exports_are_nearer(make_model, tmp_path, monkeypatch):
    """Of a model whose gains differ much, as folded ones do."""
    source = make_model(num_hidden_layers=4)
    td.convert(source, tmp_path / "out", td.Plan(4, [[0, 1], [2, 3]]))
    spread_columns(tmp_path / "out")
    ids = random_ids()
    errors = []
    for balance in (True, False):
        if not balance:
            monkeypatch.setattr(
                "truedepth.engines.gguf.export.balanced", lambda family, layer: dict(layer)
            )
        td.export(tmp_path / "out", tmp_path / "out.gguf", type="q4_0", force=True)
        rounded = {
            name: tensor.read().float()
            for name, tensor in td.open_source(tmp_path / "out.gguf").tensors.items()
        }
        model = td.load(tmp_path / "out").model
        with torch.inference_mode():
            exact = model(ids).logits
            model.load_state_dict(rounded)
            errors.append((model(ids).logits - exact).norm().item())
    assert errors[0] < 0.8 * errors[1]


def test_exact_types_are_left_alone(make_model, tmp_path):
    td.convert(make_model(), tmp_path / "out", PLAN)
    td.export(tmp_path / "out", tmp_path / "out.gguf", type="f16")
    for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
        if "norm" in tensor.name and tensor.name.startswith("blk.0"):
            assert (tensor.data == 1).all()
