"""transformers' own tensor parallelism over two CPU processes."""

from __future__ import annotations

import os
import subprocess
from math import prod

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import truedepth as td
from tiny_models import random_ids, torchrun
from truedepth.speed.ranks import run_ranks

RANK = """
import sys, torch, truedepth
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from truedepth.speed.collectives import watched
checkpoint, ids, logits = sys.argv[1:]
ranks = DistributedConfig(tp_size=2)
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
torch.save((shard, output, traffic, sent, held, slow.seconds), f"{logits}.{rank}")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_ranks_hold_one_layer_each_and_give_the_same_logits(make_model, tmp_path):
    td.convert(make_model(), tmp_path / "out", td.Plan(6, [[1, 2], [3, 4]]))
    expected = td.load(tmp_path / "out").model
    torch.save(random_ids(), tmp_path / "ids")
    (tmp_path / "rank.py").write_text(RANK)
    command = [*torchrun(2), str(tmp_path / "rank.py")]
    command += [str(tmp_path / name) for name in ("out", "ids", "logits")]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    layer = td.open_source(make_model()).tensors
    for rank in (0, 1):
        shard, logits, traffic, sent, held, slow = torch.load(
            tmp_path / f"logits.{rank}", weights_only=False
        )
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


def refusal(checkpoint):
    with pytest.raises(ValueError) as caught:
        AutoModelForCausalLM.from_pretrained(
            checkpoint, distributed_config=DistributedConfig(tp_size=2)
        )
    return str(caught.value)


def test_heads_that_would_be_cut_are_refused(make_model, tmp_path):
    odd = make_model(hidden_size=48, num_attention_heads=3, num_key_value_heads=1)
    td.convert(odd, tmp_path / "out", td.Plan(6, [[1, 2]]))
    said = run_ranks(2, refusal, tmp_path / "out")
    assert "3 heads and 1 KV heads are not divisible by 2 tensor-parallel ranks" in said
    assert "--pad-heads 2" in said
