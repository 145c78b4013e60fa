"""Directories that several tools have left files in: every command computes with the same tensors.

For each oddity the tensors that a model runs with, those that layers are loaded from one at a time,
and those of a conversion are compared with the tensors that are known to be meant.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import truedepth as td
from tiny_models import TINY, byte_tokenizer, random_model
from truedepth import progress
from truedepth.runtime.layer_stack import LayerStack
from truedepth.sources.names import current_names
from truedepth.tensors import from_tensor

Tensors = dict[str, Tensor]
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass
class Case:
    """A directory, the tensors that are meant, and a word of the note on standard error, if any."""

    path: Path
    meant: Tensors
    said: str = ""


def saved(path: Path, seed: int = 0, tied: bool = False, shard_size: str = "1GB") -> Tensors:
    """A random model in a directory, and its tensors."""
    config = LlamaConfig(**TINY | {"tie_word_embeddings": tied})
    torch.manual_seed(seed)
    model = random_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01 * seed)
    model.save_pretrained(path, max_shard_size=shard_size)
    byte_tokenizer().save_pretrained(path)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if tied:
        del tensors[HEAD]
    return tensors


def write(path: Path, tensors: Tensors, **metadata: str) -> None:
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(held, path, metadata={"format": "pt", **metadata})


def index(path: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((path / INDEX).read_text())["weight_map"]
    return found


def reindex(path: Path, weight_map: dict[str, str]) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def a_new_single_file_beside_an_older_index(path: Path) -> Case:
    saved(path, seed=1, shard_size="100KB")
    meant = saved(path / "new", seed=2)
    shutil.copy(path / "new" / SINGLE, path / SINGLE)
    return Case(path, meant, "which is read, as transformers does")


def an_index_whose_shards_are_gone(path: Path) -> Case:
    saved(path, shard_size="100KB")
    for shard in set(index(path).values()):
        (path / shard).unlink()
    return Case(path, saved(path, seed=2))


def an_index_of_the_single_file(path: Path) -> Case:
    meant = saved(path)
    reindex(path, dict.fromkeys(meant, SINGLE))
    return Case(path, meant)


def a_first_shard_with_the_name_of_the_single_file(path: Path) -> Case:
    meant = saved(path)
    rest = {name: meant[name] for name in meant if name.startswith("model.layers.")}
    write(path / "more.safetensors", rest)
    write(path / SINGLE, {name: meant[name] for name in meant if name not in rest})
    reindex(path, {name: "more.safetensors" if name in rest else SINGLE for name in meant})
    return Case(path, meant)


def an_older_shard_that_the_index_does_not_name(path: Path) -> Case:
    meant = saved(path, shard_size="100KB")
    write(path / "model-00001-of-00099.safetensors", {NORM: torch.zeros(64)})
    return Case(path, meant)


def a_stale_copy_in_a_shard_of_the_index(path: Path) -> Case:
    meant = saved(path, shard_size="100KB")
    for shard in sorted(set(index(path).values())):  # in the first and the last, whichever is read
        if shard != index(path)[NORM]:
            write(path / shard, load_file(path / shard) | {NORM: torch.zeros(64)})
    return Case(path, meant, "the index is followed")


def a_tensor_that_the_index_forgot(path: Path) -> Case:
    meant = saved(path, shard_size="100KB")
    reindex(path, {name: shard for name, shard in index(path).items() if name != NORM})
    return Case(path, meant)


def a_tied_head_that_is_kept_without_the_embedding(path: Path) -> Case:
    meant = saved(path, tied=True)
    write(path / SINGLE, {(HEAD if name == EMBEDDING else name): t for name, t in meant.items()})
    return Case(path, meant)


def a_model_as_safetensors_itself_saves_it(path: Path) -> Case:
    """It writes one of two tensors that share their memory, and names the other in the header."""
    meant = saved(path, tied=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    save_model(model, str(path / SINGLE), metadata={"format": "pt"})
    return Case(path, meant)


def a_shared_tensor_of_a_model_that_says_untied(path: Path) -> Case:
    meant = saved(path)
    meant[HEAD] = meant[EMBEDDING].clone()
    kept = {name: tensor for name, tensor in meant.items() if name != EMBEDDING}
    write(path / SINGLE, kept, **{EMBEDDING: HEAD})
    return Case(path, meant)


def a_tied_name_in_the_index_that_no_shard_holds(path: Path) -> Case:
    meant = saved(path, tied=True, shard_size="100KB")
    reindex(path, index(path) | {HEAD: index(path)[EMBEDDING]})
    return Case(path, meant)


def the_body_alone(path: Path) -> Case:
    meant = saved(path, tied=True)
    write(path / SINGLE, {name.removeprefix("model."): t for name, t in meant.items()})
    return Case(path, meant)


def the_body_without_its_prefix_and_a_head(path: Path) -> Case:
    meant = saved(path)
    write(path / SINGLE, {name.removeprefix("model."): t for name, t in meant.items()})
    return Case(path, meant)


def the_body_alone_in_shards(path: Path) -> Case:
    meant = saved(path, tied=True, shard_size="100KB")
    shards = {name.removeprefix("model."): shard for name, shard in index(path).items()}
    for shard in set(shards.values()):
        held = load_file(path / shard)
        write(path / shard, {name.removeprefix("model."): t for name, t in held.items()})
    reindex(path, shards | {HEAD: min(shards.values())})
    return Case(path, meant)


def a_wrapper_around_the_model(path: Path) -> Case:
    """As torch.compile, data parallelism and peft name their tensors."""
    meant = saved(path)
    write(path / SINGLE, {f"_orig_mod.module.{name}": t for name, t in meant.items()})
    return Case(path, meant, "read without '_orig_mod.module.'")


def an_adapter_beside_merged_weights(path: Path) -> Case:
    saved(path)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    adapted = get_peft_model(
        base, LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")
    )
    adapted.save_pretrained(path)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(path)
    meant = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    return Case(path, meant, "the adapter is not added")


CASES = [
    a_new_single_file_beside_an_older_index,
    an_index_whose_shards_are_gone,
    an_index_of_the_single_file,
    a_first_shard_with_the_name_of_the_single_file,
    an_older_shard_that_the_index_does_not_name,
    a_stale_copy_in_a_shard_of_the_index,
    a_tensor_that_the_index_forgot,
    a_tied_head_that_is_kept_without_the_embedding,
    a_model_as_safetensors_itself_saves_it,
    a_shared_tensor_of_a_model_that_says_untied,
    a_tied_name_in_the_index_that_no_shard_holds,
    the_body_alone,
    the_body_without_its_prefix_and_a_head,
    the_body_alone_in_shards,
    a_wrapper_around_the_model,
    an_adapter_beside_merged_weights,
]


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_every_command_computes_with_the_tensors_that_are_meant(
    make: Callable[[Path], Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress._noted.clear()
    case = make(tmp_path / "m")
    capsys.readouterr()
    source = td.open_source(case.path)
    run = td.load(source).model  # eval, generate, study, the teacher of heal
    for name, meant in case.meant.items():
        assert torch.equal(run.state_dict()[name], meant), name
    assert torch.equal(
        run.get_output_embeddings().weight, case.meant.get(HEAD, case.meant[EMBEDDING])
    )
    said = capsys.readouterr().err
    assert said.count("truedepth: note: ") == said.count("\n") == (1 if case.said else 0), said
    assert case.said in said

    stack = LayerStack(source, device="cpu", dtype=torch.float32)  # calibration and search
    for index in range(source.num_layers):
        prefix = f"model.layers.{index}."
        for name, parameter in stack.layer(index).named_parameters():
            assert torch.equal(parameter, case.meant[prefix + name])
    x, _ = stack.start(torch.tensor([[5, 7]]))
    assert torch.equal(x[0], case.meant[EMBEDDING][[5, 7]])

    td.convert(source, tmp_path / "out", td.Plan(source.num_layers))
    written = td.open_source(tmp_path / "out").tensors
    tied = td.load(tmp_path / "out").model.config.tie_word_embeddings
    assert written.keys() == case.meant.keys() - ({HEAD} if tied else set())
    assert all(torch.equal(tensor.read(), case.meant[name]) for name, tensor in written.items())


def test_an_adapter_is_added_by_transformers_itself(tmp_path: Path) -> None:
    """Why one reader is needed: `from_pretrained` would run another model than is converted."""
    case = an_adapter_beside_merged_weights(tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(case.path, dtype=torch.float32)
    ours = td.load(case.path).model
    ids = torch.tensor([[5, 7, 9]])
    assert (theirs(ids).logits - ours(ids).logits).abs().max() > 1e-3


def test_two_copies_that_no_index_names_are_refused(tmp_path: Path) -> None:
    meant = saved(tmp_path / "m", shard_size="100KB")
    weight_map = index(tmp_path / "m")
    for shard in set(weight_map.values()):
        write(tmp_path / "m" / shard, load_file(tmp_path / "m" / shard) | {NORM: meant[NORM]})
    reindex(tmp_path / "m", {name: shard for name, shard in weight_map.items() if name != NORM})
    with pytest.raises(td.TruedepthError, match=r"Both .* hold 'model.norm.weight'"):
        td.load(tmp_path / "m")


def test_tensors_that_are_no_part_of_the_model_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress._noted.clear()
    meant = saved(tmp_path / "m")
    write(tmp_path / "m" / SINGLE, meant | {"model.vision.weight": torch.ones(2)})
    td.load(tmp_path / "m")
    assert "'model.vision.weight'; they are not used" in capsys.readouterr().err
    with pytest.raises(td.TruedepthError, match=r"model\.vision\.weight"):
        td.convert(tmp_path / "m", tmp_path / "out", td.Plan(6))


def test_names_of_another_kind_are_named(tmp_path: Path) -> None:
    meant = saved(tmp_path / "m")
    write(
        tmp_path / "m" / SINGLE, {name.replace("layers", "blocks"): t for name, t in meant.items()}
    )
    with pytest.raises(
        td.TruedepthError, match=r"no tensors for layer 0; .*such as 'lm_head.weight'"
    ):
        td.convert(tmp_path / "m", tmp_path / "out", td.Plan(6))


def test_the_prefix_of_another_family(tmp_path: Path) -> None:
    config = {"model_type": "gpt_neox"}
    body = ["embed_in.weight", "layers.0.mlp.dense_h_to_4h.bias", "final_layer_norm.weight"]
    one = from_tensor(torch.ones(1))
    expected = [f"gpt_neox.{name}" for name in body] + ["lm_head.weight"]
    for names in ([*expected[:-1], "embed_out.weight"], [*body, "embed_out.weight"]):
        assert [*current_names(dict.fromkeys(names, one), config, tmp_path)] == expected
