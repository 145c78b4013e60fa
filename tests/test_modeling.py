"""The model class: everything that transformers does with a Llama works with wide layers and with
stages of sub-layers."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    StaticCache,
)

import truedepth as td
from tiny_models import TINY, left_padded_logits, random_ids, staged_logits
from truedepth import modeling
from truedepth.runtime.kv_cache import cache_argument

PLANS = {
    "groups": td.Plan(6, [[0, 1], [2], [3, 4, 5]]),
    "stages": td.Plan(6, [[1, 2]], stages=[["A0", "F0"], ["F3", "A4"], ["F4", "A5", "F5"]]),
}
HEADS = {"groups": [2, 1, 3], "stages": [1, 2, 1, 1, 1]}
"""Widths of the layers."""

CLOSE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def source(make_model):
    return make_model(attention_bias=True)


@pytest.fixture(scope="module", params=PLANS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def stages(kind):
    return [list(map(str, stage)) for stage in PLANS[kind].stages]


@pytest.fixture(scope="module")
def checkpoint(source, kind, tmp_path_factory):
    out = tmp_path_factory.mktemp("wide") / "out"
    td.convert(source, out, PLANS[kind])
    return out


@pytest.fixture
def model(checkpoint):
    return td.load(checkpoint).model


@pytest.fixture(scope="module")
def expected(source, stages):
    original = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    return staged_logits(original, random_ids(), stages)


def test_layers_have_their_widths(model, kind):
    for layer, width in zip(model.model.layers, HEADS[kind], strict=True):
        assert layer.self_attn.q_proj.out_features == width * 64
        assert layer.self_attn.k_proj.out_features == width * 32
        assert layer.self_attn.num_key_value_groups == 2
        assert layer.mlp.up_proj.out_features == width * 96
    assert len(model.model.layers) == model.config.num_hidden_layers == len(HEADS[kind])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_back_ends(model, expected, implementation):
    model.set_attn_implementation(implementation)
    assert model.model.layers[0].self_attn.config._attn_implementation == implementation
    torch.testing.assert_close(model(random_ids()).logits, expected, **CLOSE)


CACHES = {
    "dynamic": lambda config: DynamicCache(),
    "dynamic by config": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config, max_cache_len=32),
}


@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
def test_cached_decoding(model, expected, make_cache):
    ids = random_ids()
    given = cache_argument(model, make_cache(model.config))
    logits = [model(ids[:, :5], **given).logits]
    for position in range(5, ids.shape[1]):
        logits.append(model(ids[:, position : position + 1], **given).logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, **CLOSE)


def test_early_initialized_static_cache(model, expected, kind):
    """What `generate` does for compiled prefill: it sizes every layer by its own config."""
    heads, head_dim = model._get_static_cache_init_shape()
    assert heads == [2 * width for width in HEADS[kind]]
    cache = StaticCache(model.config, max_cache_len=32)
    cache.early_initialization(2, heads, head_dim, torch.float32, torch.device("cpu"))
    logits = model(random_ids(), **cache_argument(model, cache)).logits
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_left_padded_batch(model, expected):
    torch.testing.assert_close(left_padded_logits(model, random_ids()), expected, **CLOSE)


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(model, expected, backend):
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(random_ids()).logits, expected, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_compiled_decoding_with_a_static_cache(model, expected, backend):
    ids = random_ids()
    given = cache_argument(model, StaticCache(model.config, max_cache_len=32))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    logits = [model(ids[:, :5], **given).logits]
    for position in range(5, 9):
        positions = torch.full((2, 1), position)
        token = ids[:, position : position + 1]
        logits.append(compiled(token, position_ids=positions, **given).logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected[:, :9], **CLOSE)


def greedy_by_the_formula(source, stages, ids, steps):
    original = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    for _ in range(steps):
        ids = torch.cat([ids, staged_logits(original, ids, stages)[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate(model, source, stages, cache):
    ids = random_ids(batch=1, length=7)
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        cache_implementation=cache,
    )
    # min_new_tokens forbids the end token, which the formula might choose.
    expected = greedy_by_the_formula(source, stages, ids, 12)
    assert not (expected == TINY["eos_token_id"]).any()
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_of_a_left_padded_batch(model, cache):
    """Rows of several lengths give what they give alone."""
    rows = [random_ids(1, length, seed=length)[0].tolist() for length in (5, 9, 7)]
    alone = [
        model.generate(
            torch.tensor([row]),
            attention_mask=torch.ones(1, len(row), dtype=torch.int64),
            max_new_tokens=8,
            do_sample=False,
        )[0, len(row) :].tolist()
        for row in rows
    ]
    ids = torch.tensor([[0] * (9 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (9 - len(row)) + [1] * len(row) for row in rows])
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    together = model.generate(ids, attention_mask=mask, **options)[:, 9:].tolist()
    for one, many in zip(alone, together, strict=True):
        assert many[: len(one)] == one
    assert len(set(map(tuple, alone))) == 3


def test_gradient_checkpointing(model):
    ids = random_ids()
    model.train()
    model(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    runs = []
    model.model.layers[2].self_attn.register_forward_hook(lambda *_: runs.append(1))
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert len(runs) == 2  # once forward, once again for the backward pass
    for name, parameter in model.named_parameters():
        assert plain[name].abs().sum() > 0
        torch.testing.assert_close(parameter.grad, plain[name])


def test_hidden_states_and_attentions_are_recorded(model, kind):
    model.set_attn_implementation("eager")
    output = model(random_ids(), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == len(HEADS[kind]) + 1
    heads = [attention.shape[1] for attention in output.attentions]
    assert heads == [4 * width for width in HEADS[kind]]


def test_tensor_parallel_plan_is_the_familys(model):
    assert model.tp_plan["model.layers.*.self_attn.q_proj"] == "colwise"
    assert model.tp_plan["model.layers.*.mlp.down_proj"] == "rowwise"


def test_auto_model(checkpoint, model):
    body = AutoModel.from_pretrained(checkpoint)
    assert type(body).__name__ == "TruedepthLlamaModel"
    hidden = model.model(random_ids()).last_hidden_state
    torch.testing.assert_close(body(random_ids()).last_hidden_state, hidden)


def test_copies_and_saved_models_are_the_same_model(model, expected, kind, tmp_path):
    torch.testing.assert_close(copy.deepcopy(model)(random_ids()).logits, expected, **CLOSE)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(random_ids()).logits, expected, **CLOSE)
    planned = {"model": again.config.truedepth["source"], **PLANS[kind].to_dict()}
    assert again.config.truedepth["plan"] == planned
    assert {file.name for file in modeling.FILES} <= {file.name for file in tmp_path.iterdir()}


WITHOUT_TRUEDEPTH = """
import sys
sys.modules["truedepth"] = None  # importing it now fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
assert tokenizer.decode(tokenizer("the cat").input_ids) == "the cat"
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
model.save_pretrained(sys.argv[4])
"""


def test_a_fresh_process_without_truedepth(checkpoint, expected, tmp_path):
    torch.save(random_ids(), tmp_path / "ids")
    arguments = [checkpoint, tmp_path / "ids", tmp_path / "logits", tmp_path / "saved"]
    subprocess.run([sys.executable, "-c", WITHOUT_TRUEDEPTH, *map(str, arguments)], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, **CLOSE)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(random_ids()).logits, expected, **CLOSE)


@pytest.mark.parametrize(
    "imports",
    [
        "import truedepth; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import truedepth",
        "import truedepth, transformers; from transformers.models.llama import modeling_llama;"
        "from transformers import AutoModelForCausalLM",
        "import truedepth; from transformers import AutoConfig, AutoModelForCausalLM",
    ],
)
def test_a_fresh_process_without_trust(checkpoint, imports):
    code = f"{imports}\nimport sys\nmodel = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
    code += "assert type(model).__module__ == 'truedepth.modeling.modeling'"
    subprocess.run([sys.executable, "-c", code, str(checkpoint)], check=True)


def test_tokenizer_is_the_originals(source, checkpoint):
    text = "the cat and then the hat 42"
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (checkpoint, source))
    assert ours(text).input_ids == theirs(text).input_ids


@pytest.mark.parametrize(
    ("widths", "words"),
    [
        ([1, 2], "2 entries, but num_hidden_layers is 3"),
        ([1, 2, 0], "at least 1"),
        ("123", "list of integers"),
    ],
)
def test_config_refuses_wrong_widths(widths, words):
    with pytest.raises(ValueError, match=words):
        modeling.TruedepthLlamaConfig(num_hidden_layers=3, layer_widths=widths)


def test_config_without_widths_is_the_plain_family():
    config = modeling.TruedepthLlamaConfig(num_hidden_layers=3)
    assert config.layer_widths == [1, 1, 1]
    assert config.per_layer_config == [config] * 3
    with pytest.raises(ValueError, match="follows from layer_widths"):
        config.per_layer_config = {}
