"""transformers' own tensor parallelism over two CPU processes."""

from __future__ import annotations

import subprocess
from math import prod

import pytest
import torch

import truedepth as td
from tiny_models import random_ids, torchrun

RANK = """
import sys, torch, truedepth
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from truedepth.speed.collectives import watched
checkpoint, ids, found, odd = sys.argv[1:]
ranks = DistributedConfig(tp_size=2)
try:
    refusal = str(AutoModelForCausalLM.from_pretrained(odd, distributed_config=ranks))
except ValueError as error:
    refusal = str(error)
model = AutoModelForCausalLM.from_pretrained(checkpoint, distributed_config=ranks)
wide = model.model.layers[1]
shard = wide.self_attn.q_proj.weight.to_local()
with torch.no_grad(), watched() as traffic:
    output = model(torch.load(ids)).logits
with torch.no_grad(), torch.profiler.profile() as profile:
    model(torch.load(ids))
sent = {e.key: e.count for e in profile.key_averages() if e.key.startswith("gloo:")}
with torch.no_grad(), watched(delay=0.01) as slow:
    model(torch.load(ids))
rank = torch.distributed.get_rank()
held = {
    name: tuple(getattr(weight, "to_local", lambda: weight)().shape)
    for name, weight in model.named_parameters()
}
torch.save((shard, output, traffic, sent, held, slow.seconds, refusal), f"{found}.{rank}")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(make_model, tmp_path_factory):
    """The directory of a checkpoint, and what each of two ranks found."""
    where = tmp_path_factory.mktemp("ranks")
    td.convert(make_model(), where / "out", td.Plan(6, [[1, 2], [3, 4]]))
    odd = make_model(hidden_size=48, num_attention_heads=3, num_key_value_heads=1)
    td.convert(odd, where / "odd", td.Plan(6, [[1, 2]]))
    torch.save(random_ids(), where / "ids")
    (where / "rank.py").write_text(RANK)
    command = [*torchrun(2), str(where / "rank.py")]
    command += [str(where / name) for name in ("out", "ids", "found", "odd")]
    subprocess.run(command, check=True)
    return where / "out", [torch.load(where / f"found.{n}", weights_only=False) for n in (0, 1)]


def test_two_ranks_hold_one_layer_each_and_give_the_same_logits(make_model, ranks):
    checkpoint, found = ranks
    expected = td.load(checkpoint).model
    layer = td.open_source(make_model()).tensors
    for rank, (shard, logits, traffic, sent, held, slow, _) in enumerate(found):
        whole = {name: tuple(weight.shape) for name, weight in expected.named_parameters()}
        assert held.keys() == whole.keys()
        for name, shape in whole.items():  # narrow layers and wide ones
            if "_proj" in name:
                assert prod(held[name]) == prod(shape) // 2, name
            elif "norm" in name:
                assert held[name] == shape, name
        embeddings = held["model.embed_tokens.weight"] != whole["model.embed_tokens.weight"]
        reduces = 2 * 4 + embeddings  # of 4 layers
        assert traffic.calls == {"all_reduce": reduces, "all_gather": 1}  # the head's
        assert sent == {f"gloo:{kind}": count for kind, count in traffic.calls.items()}
        states, head = random_ids().numel() * 64 * 4, random_ids().numel() * 320 // 2 * 4
        assert traffic.bytes == reduces * states + head
        assert slow >= (reduces + 1) * 0.01
        torch.testing.assert_close(logits, expected(random_ids()).logits, atol=1e-4, rtol=0)
        original = layer[f"model.layers.{1 + rank}.self_attn.q_proj.weight"].read()
        gain = layer[f"model.layers.{1 + rank}.input_layernorm.weight"].read()
        assert torch.equal(shard, original * gain)


def test_heads_that_would_be_cut_are_refused(ranks):
    for *_, said in ranks[1]:
        assert "3 heads and 1 KV heads are not divisible by 2 tensor-parallel ranks" in said
        assert "--pad-heads 2" in said
