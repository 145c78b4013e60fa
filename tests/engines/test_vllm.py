"""Checkpoints served by vLLM, against transformers. `make test-vllm` runs these where vLLM is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    PersimmonConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    Starcoder2Config,
)

import truedepth as td
from family_models import staged as staged_logits
from int8_checkpoint import write_int8
from vllm_engines import engines

pytestmark = pytest.mark.vllm

SHAPES = {"hidden_size": 128, "head_dim": 32, "vocab_size": 320}
PLAN = td.Plan(6, [[0, 1], [3, 4]])  # the first layer in a group; wide and narrow mixed
STAGED = td.Plan(6, [[2, 3]], stages=[["A0", "F0", "A1"], ["A4", "F4"], ["A5", "F5"]])
"""Stages at the first and the last layer, one of three sub-layers, and a wide layer between."""

STAGGERED = td.Plan(6, stages=[["F0", "A1"], ["F1", "A2"], ["F2", "A3", "F3"], ["F4", "A5"]])


def local(*stages):
    """Stages that are local to two ranks."""
    return [{"sublayers": stage, "local": 2} for stage in stages]


LOCAL = td.Plan(6, stages=[*local(["A0", "F0", "A1"], ["F4", "A5", "F5"]), ["F2", "A3"]])
"""Local stages at the first and the last layer, and one that is not local."""

WHOLE = td.Plan(6, stages=[["A0", "F0"], ["A2", "F2", "A3", "F3"], ["A5", "F5"]])
ALONE = td.Plan(6, stages=[["A0", "F0"], ["A5", "F5"]])
WHOLE_LOCAL, ALONE_LOCAL = (
    td.Plan(6, stages=local(*map(list, plan.merged))) for plan in (WHOLE, ALONE)
)
"""Stages of whole layers, for families whose attention and FFN read one state."""

QWEN2_WINDOWS = {
    "family": Qwen2Config,
    "use_sliding_window": True,
    "sliding_window": 32,
    "max_window_layers": 1,
}
"""The attentions of the first stage of `STAGED` differ, so they cannot be joined."""

GEMMA2 = {"family": Gemma2Config, "sliding_window": 32, "attn_logit_softcapping": None}
"""vLLM's attention on CPUs does not cap logits, of the original either."""

BY_TYPE = {
    kind: {"rope_type": "default", "rope_theta": theta}
    for kind, theta in (("sliding_attention", 1e4), ("full_attention", 1e6))
}
GEMMA3, OLMO3 = (
    {"family": family, "sliding_window": 32, "rope_parameters": BY_TYPE}
    for family in (Gemma3TextConfig, Olmo3Config)
)

EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}

LENGTH = 12


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """What vLLM continues prompts with, each token's log probability, and what it logged."""
    with engines() as started:

        def serve(path, prompts, **options):
            log = tmp_path_factory.mktemp("vllm") / "log"
            options = {
                "model": str(path),
                "dtype": "float32",
                "max_model_len": 256,
                "enforce_eager": True,
                **options,
            }
            return started.serve(options, prompts, LENGTH, log), log.read_text()

        yield serve


def expected(path, prompts):
    """The same, by transformers."""
    model = td.load(path, device="cpu", dtype=torch.float32).model
    found = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=LENGTH,
            eos_token_id=None,  # vLLM, too, takes it for a token like others
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = out.sequences[0, len(prompt) :].tolist()
        logp = torch.cat(out.logits).log_softmax(-1)
        found.append([tokens, logp.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()])
    return found


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(1, 320, (4, 150), generator=generator).tolist()
    return [draw[0][:1], draw[1][:7], draw[2], draw[2][:140] + draw[3][:5]]  # two share a prefix


@pytest.fixture(scope="module")
def converted(make_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("vllm") / "out"
    td.convert(make_model(**SHAPES), out, PLAN)
    return out


@pytest.fixture(scope="module")
def staged(make_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("vllm-stages") / "out"
    td.convert(make_model(**SHAPES), out, STAGED)
    return out


@pytest.fixture
def check(served, prompts):
    """Compare with transformers; gives what vLLM logged."""

    def check(path, prompts=prompts, **options):
        wanted = expected(path, prompts)
        found, log = served(path, prompts, **options)
        for (tokens, logp), (wanted_tokens, wanted_logp) in zip(found, wanted, strict=True):
            assert tokens == wanted_tokens
            assert logp == pytest.approx(wanted_logp, abs=1e-3)
        return log

    return check


@pytest.mark.parametrize("ranks", [1, 2])
def test_greedy_tokens_are_those_of_transformers(converted, check, ranks):
    check(converted, tensor_parallel_size=ranks)


@pytest.mark.parametrize(("plan", "ranks"), [(STAGED, 1), (STAGED, 2), (STAGGERED, 2)])
def test_stages(make_model, check, tmp_path, plan, ranks):
    model = make_model(**SHAPES, attention_bias=True, mlp_bias=True)
    td.convert(model, tmp_path / "out", plan)
    log = check(tmp_path / "out", tensor_parallel_size=ranks)
    merged = json.loads((tmp_path / "out" / "config.json").read_text())["stages"]
    assert f"Fused the sub-layers of {len(merged)} merged stages" in log


@pytest.mark.parametrize(
    "options",
    [{"hf_overrides": {"fuse_stages": False}, "tensor_parallel_size": 2}, {"enable_lora": True}],
    ids=["unfused", "lora"],
)
def test_stages_that_are_not_fused(staged, check, options):
    assert "Fused the sub-layers" not in check(staged, **options)


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ({"family": MistralConfig, "sliding_window": None}, 1),
        ({"family": MistralConfig, "sliding_window": 32}, 1),
        ({"family": Qwen2Config}, 2),
        (QWEN2_WINDOWS, 1),
        ({"family": Qwen3Config, "head_dim": 32}, 2),
        ({"family": Phi3Config}, 2),
        ({"family": GraniteConfig, "residual_multiplier": 0.4, "logits_scaling": 3.0}, 1),
        ({"family": GemmaConfig, "head_dim": 32}, 1),
        ({"family": CohereConfig, "logit_scale": 0.5}, 1),
        ({"family": CohereConfig, "logit_scale": 0.5, "use_qk_norm": True}, 2),
    ],
    ids=lambda given: given["family"].model_type if isinstance(given, dict) else f"{given} ranks",
)
def test_other_families(make_model, options, ranks, check, tmp_path):
    shapes = {name: size for name, size in SHAPES.items() if name != "head_dim"}
    plan = PLAN if options["family"] is CohereConfig else STAGED  # its stages are layers already
    td.convert(make_model(**shapes, **options), tmp_path / "out", plan)
    check(tmp_path / "out", tensor_parallel_size=ranks)


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        (GEMMA2, 1),
        (GEMMA2, 2),
        (GEMMA3, 2),
        ({"family": Glm4Config}, 2),
        ({"family": MixtralConfig, **EXPERTS}, 1),
        ({"family": MixtralConfig, **EXPERTS}, 2),
        ({"family": Qwen3MoeConfig, **EXPERTS}, 2),
        ({"family": Qwen2MoeConfig, **EXPERTS, "shared_expert_intermediate_size": 64}, 2),
        ({"family": OlmoeConfig, **EXPERTS}, 2),
        ({"family": Olmo2Config}, 1),
        ({"family": Olmo2Config}, 2),
        (OLMO3, 2),
        ({"family": SeedOssConfig}, 2),
        ({"family": SmolLM3Config, "no_rope_layer_interval": 2}, 2),
        ({"family": Starcoder2Config}, 2),
    ],
    ids=lambda given: given["family"].model_type if isinstance(given, dict) else f"{given} ranks",
)
def test_stages_of_vllms_own_classes(make_model, options, ranks, check, tmp_path):
    td.convert(make_model(**SHAPES, **options), tmp_path / "out", STAGGERED)
    check(tmp_path / "out", tensor_parallel_size=ranks)


@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"family": Phi3Config},
        {"family": GraniteConfig, "residual_multiplier": 0.4, "logits_scaling": 3.0},
        GEMMA2,
        {"family": MixtralConfig, **EXPERTS},
        {"family": Qwen3MoeConfig, **EXPERTS},
        {"family": Starcoder2Config},
    ],
    ids=lambda given: given["family"].model_type if "family" in given else "llama",
)
def test_local_stages(make_model, options, check, tmp_path):
    td.convert(make_model(**SHAPES, **options), tmp_path / "out", LOCAL)
    check(tmp_path / "out", tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("model", "plan", "ranks", "words"),
    [
        (LlamaConfig, LOCAL, 1, "local to 2 tensor-parallel ranks, not to 1; .*parallel-size 2"),
        (Olmo2Config, LOCAL, 2, "queries of this model are normed over the heads of all ranks"),
        (CohereConfig, ALONE_LOCAL, 1, "local to 2 tensor-parallel ranks, not to 1"),
        (CohereConfig, WHOLE_LOCAL, 2, r"a stage, as those of \[A2 \| F2 \| A3 \| F3\] do"),
    ],
    ids=["llama", "olmo2", "cohere", "cohere of several layers"],
)
def test_local_stages_that_are_refused(
    make_model, model, plan, ranks, words, served, prompts, tmp_path
):
    td.convert(make_model(**SHAPES, family=model), tmp_path / "out", plan)
    with pytest.raises(AssertionError, match=words):
        served(tmp_path / "out", prompts, tensor_parallel_size=ranks)


@pytest.mark.parametrize("plan", [ALONE, ALONE_LOCAL], ids=["shared", "local"])
def test_stages_of_one_whole_layer(make_model, plan, check, tmp_path):
    """Where attention and FFN read one state already."""
    model = make_model(**SHAPES, family=CohereConfig, logit_scale=0.5)
    td.convert(model, tmp_path / "out", plan)
    check(tmp_path / "out", tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (GEMMA3, {"enable_chunked_prefill": True, "max_num_batched_tokens": 64}),
        ({"family": MixtralConfig, **EXPERTS}, {"enforce_eager": False}),
    ],
    ids=["gemma3 in chunks", "mixtral compiled"],
)
def test_what_the_engine_does_with_its_own_classes(
    make_model, model, options, check, prompts, tmp_path
):
    td.convert(make_model(**SHAPES, **model), tmp_path / "out", STAGGERED)
    check(tmp_path / "out", prompts * 2, max_num_seqs=4, **options)


@pytest.mark.parametrize(
    ("model", "plan", "words"),
    [
        (
            {"family": PersimmonConfig},
            STAGGERED,
            r"vLLM 0\.\d+\.\d+ does not know PersimmonForCausalLM",
        ),
        (
            {"family": CohereConfig},
            WHOLE,
            r"do not share a stage, as those of \[A2 F2 A3 F3\] do",
        ),
        (GEMMA3, PLAN, "stages of sub-layers of Gemma3ForCausalLM, but not groups"),
    ],
)
def test_what_stages_cannot_run_in_is_refused_by_name(
    make_model, model, plan, words, served, prompts, tmp_path
):
    td.convert(make_model(**SHAPES, **model), tmp_path / "out", plan)
    with pytest.raises(AssertionError, match=words):
        served(tmp_path / "out", prompts)


@pytest.mark.parametrize(("plan", "ranks"), [(STAGED, 1), (LOCAL, 2)], ids=["one", "local"])
def test_prefill_in_chunks_and_cached_prefixes(make_model, plan, ranks, check, prompts, tmp_path):
    td.convert(make_model(**SHAPES), tmp_path / "out", plan)
    options = {"enable_chunked_prefill": True, "enable_prefix_caching": True}
    options |= {"max_num_batched_tokens": 64, "max_num_seqs": 4, "tensor_parallel_size": ranks}
    check(tmp_path / "out", prompts * 2, **options)


@pytest.mark.parametrize(("plan", "ranks"), [(STAGED, 1), (LOCAL, 2)], ids=["one", "local"])
def test_compiled(make_model, plan, ranks, check, tmp_path):
    td.convert(make_model(**SHAPES), tmp_path / "out", plan)
    check(tmp_path / "out", enforce_eager=False, tensor_parallel_size=ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_int8(staged, served, prompts, tmp_path, ranks):
    """Of a checkpoint that holds no other weights of linear maps."""
    write_int8(staged, tmp_path / "int8")
    held = load_file(tmp_path / "int8" / "model.safetensors")
    assert {held[name].dtype for name in held if name.endswith("_proj.weight")} == {torch.int8}
    found, _ = served(tmp_path / "int8", prompts, dtype="bfloat16", tensor_parallel_size=ranks)
    for (_, logp), (_, wanted) in zip(found, expected(staged, prompts), strict=True):
        assert logp[0] == pytest.approx(wanted[0], abs=0.15)  # of the likeliest token


def test_stages_of_an_int8_original(make_model, served, prompts, tmp_path):
    """Copied, its weights are those of the int8 form of the stages."""
    source = make_model(**SHAPES)
    write_int8(source, tmp_path / "int8")
    td.convert(tmp_path / "int8", tmp_path / "staged-int8", STAGGERED)
    td.convert(source, tmp_path / "staged", STAGGERED)
    write_int8(tmp_path / "staged", tmp_path / "int8-staged")
    found, wanted = (
        served(tmp_path / name, prompts, dtype="bfloat16")[0]
        for name in ("staged-int8", "int8-staged")
    )
    assert found == wanted
    ids = torch.tensor(prompts[3:])
    original, copied = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("int8", "staged-int8")
    )
    reference = staged_logits(original, ids, [list(map(str, each)) for each in STAGGERED.stages])
    off, changed = (  # activations are rounded to int8, so a last bit can move one by a step
        (each - reference).abs().mean() for each in (copied(ids).logits, original(ids).logits)
    )
    assert off < 0.05 * changed
    for (_, logp), (_, whole) in zip(found, expected(tmp_path / "staged", prompts), strict=True):
        assert logp[0] == pytest.approx(whole[0], abs=0.15)  # of the likeliest token


def vllm_version():
    from vllm import __version__

    return __version__


@pytest.mark.xfail(
    "vllm_version().startswith('0.30.')",
    reason="vLLM 0.30 launches a Triton kernel for any draft model, on CPUs too",
    raises=AssertionError,
    strict=True,
)
def test_as_the_draft_of_its_original(make_model, converted, check):
    draft = {"model": str(converted), "num_speculative_tokens": 2, "method": "draft_model"}
    check(make_model(**SHAPES), speculative_config=draft)


def benched(model, base, out, *options):
    """The rows that `truedepth bench` writes to a file."""
    command = [sys.executable, "-m", "truedepth", "bench", model, "--against", base, "--json", out]
    command += ["--engine", "vllm", *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["rows"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_bench(make_model, converted, tmp_path, ranks):
    options = ["--tp", ranks, "--lengths", 9, "--batch", 2, "--repetitions", 2]
    rows = benched(converted, make_model(**SHAPES), tmp_path / "bench.json", *options)
    assert [row["case"]["task"] for row in rows] == ["prefill", "generate", "decode"]
    for row in rows:
        assert min(row["model"]["seconds"] + row["base"]["seconds"]) > 0
        before, after = row["base"]["collectives"], row["model"]["collectives"]
        if ranks == 1:
            assert before is None
            assert after is None
            continue
        passes = 9 if row["case"]["task"] == "generate" else 1
        calls = [sent["calls"]["allreduce"] for sent in (before, after)]
        assert calls == [passes * (1 + plan.all_reduces) for plan in (PLAN.unpaired, PLAN)]
        assert 0 < after["share"] < 1


def test_a_stage_costs_one_all_reduce(make_model, tmp_path):
    source, plans = make_model(**SHAPES), {"staggered": STAGGERED, "local": LOCAL}
    for name, plan in plans.items():
        td.convert(source, tmp_path / name, plan)
    options = ["--tp", 2, "--tasks", "prefill", "--lengths", 9, "--repetitions", 1, "--eager"]
    models = [tmp_path / name for name in plans]
    (row,) = benched(*models, tmp_path / "bench.json", *options)
    calls = [row[each]["collectives"]["calls"]["allreduce"] for each in ("model", "base")]
    assert calls == [1 + plan.all_reduces for plan in plans.values()]


def test_what_vllm_cannot_load_is_said(make_model):
    command = [
        sys.executable,
        "-m",
        "truedepth",
        "bench",
        str(make_model(max_position_embeddings=64)),
    ]
    done = subprocess.run(
        [*command, "--engine", "vllm", "--lengths", "100"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "max_position_embeddings" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("truedepth: vLLM failed: ")


def test_heads_that_do_not_divide(make_model, served, prompts, tmp_path):
    source = make_model(
        **SHAPES | {"hidden_size": 144}, num_attention_heads=9, num_key_value_heads=3
    )
    td.convert(source, tmp_path / "odd", PLAN)
    with pytest.raises(AssertionError, match=r"heads \(9\) must be divisible"):
        served(tmp_path / "odd", prompts, tensor_parallel_size=2)
    td.convert(source, tmp_path / "padded", PLAN, pad_heads=2)
    wanted = expected(tmp_path / "odd", prompts)
    found, _ = served(tmp_path / "padded", prompts, tensor_parallel_size=2)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]


def test_versions(monkeypatch):
    """What the version at hand has is all that a version that was not tested is asked for."""
    from truedepth.engines.vllm import versions

    assert versions.missing() == []
    for version in ("0.29.0", "0.32.0", "0.32.9"):
        assert versions.check_version(version) is None
    with pytest.raises(td.TruedepthError, match=r"This is vLLM 0\.28\.0, .* needs 0\.29 or newer"):
        versions.check_version("0.28.0")
    for version in ("0.33.0", "1.0.0rc1", "0.32.1.dev7+gabc", "0.1.dev9"):
        warned = versions.check_version(version)
        assert f"tested with vLLM 0.29 to 0.32. This is {version}" in warned
    more = {"vllm.config:VllmConfig": ("depth",), "vllm.width:narrow": (), "vllm.config:Wide": ()}
    monkeypatch.setattr(versions, "RELIED_ON", versions.RELIED_ON | more)
    gone = r"vllm\.config\.VllmConfig\(depth\), vllm\.width\.narrow, vllm\.config\.Wide\."
    with pytest.raises(td.TruedepthError, match=rf"This is vLLM 9\.1\.0, .* lacks .*{gone}"):
        versions.check_version("9.1.0")
    assert versions.check_version("0.32.0") is None
