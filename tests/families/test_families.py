"""Every family against its own layers, and what upstream must not change unseen."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GPTNeoXConfig, Qwen2Config
from transformers.distributed import DistributedConfig
from typer.testing import CliRunner

import truedepth as td
from family_models import CAPPED, CASES, WITHOUT_TRUEDEPTH, options_of, repaired, side_by_side
from tiny_models import left_padded_logits, random_ids
from truedepth.calibration.trajectories import layer_stack, walk_through
from truedepth.cli.app import app
from truedepth.depth_study.schedule import Runner, Step
from truedepth.families.lookup import all_families
from truedepth.inspection import inspect_model
from truedepth.runtime.empty import empty_model
from truedepth.speed.ranks import run_ranks
from truedepth.widening.layout import Layout

GROUPS = [[0], [1, 2], [3, 4, 5]]
PARALLEL = {"cohere", "cohere, norms", "cohere2", "pythia"}
CLOSE = {"atol": 1e-4, "rtol": 0}
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def converted(make_model, tmp_path_factory):
    """`converted(case)` gives the original and the converted model's directory; cached."""
    made = {}

    def convert(case, **options):
        key = (case, *sorted(options.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("family") / "out"
            td.convert(make_model(**options_of(case)), out, td.Plan(6, GROUPS), **options)
            made[key] = make_model(**options_of(case)), out
        return made[key]

    return convert


def test_every_family_has_a_case():
    covered = {options_of(case)["family"].model_type for case in CASES}
    assert covered == {family.model_type for family in all_families()}


@pytest.mark.parametrize("case", CASES)
def test_groups_are_exact(converted, case):
    source, out = converted(case)
    original = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    ids = random_ids()
    expected = side_by_side(original, ids, GROUPS, case in PARALLEL)
    apart = (original(ids).logits - expected).abs().max()
    assert apart > 1e-2  # or a model that was not grouped at all would pass
    config = json.loads((out / "config.json").read_text())
    if CASES[case].get("side_by_side"):
        assert config["side_by_side"]
    else:
        assert config["layer_widths"] == [1, 2, 3] and "side_by_side" not in config
    model = td.load(out, attn_implementation=CAPPED.get(case)).model
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)

        torch.testing.assert_close(left_padded_logits(model, ids), expected, **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_cached_decoding_saving_and_loading(converted, case, tmp_path):
    _, out = converted(case)
    model, ids = td.load(out).model, random_ids()
    with torch.inference_mode():
        tokens = model.generate(ids, **GREEDY)
        assert torch.equal(tokens, model.generate(ids, use_cache=False, **GREEDY))
        model.save_pretrained(tmp_path / "saved")
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
        assert torch.equal(saved(ids).logits, model(ids).logits)


def test_a_fresh_process_without_truedepth(converted, tmp_path):
    torch.save(random_ids(), tmp_path / "ids")
    checkpoints = {case: str(converted(case)[1]) for case in CASES}
    given = [str(tmp_path / "ids"), json.dumps(checkpoints), str(tmp_path / "found")]
    subprocess.run([sys.executable, "-c", WITHOUT_TRUEDEPTH, *given], check=True)
    for case, logits in torch.load(tmp_path / "found").items():
        with torch.no_grad():
            assert torch.equal(logits, td.load(checkpoints[case]).model(random_ids()).logits)


@pytest.mark.parametrize("case", ["mistral", "qwen2", "qwen3", "granite", "cohere, norms", "glm"])
def test_padded_heads_are_exact(converted, case):
    source, out = converted(case, pad_heads=4)
    original = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    expected = side_by_side(original, random_ids(), GROUPS, case in PARALLEL)
    model = td.load(out).model
    assert model.config.num_key_value_heads == 4
    torch.testing.assert_close(model(random_ids()).logits, expected, **CLOSE)


@pytest.mark.parametrize("case", ["phi3", "olmo2"])
def test_heads_that_cannot_be_padded(make_model, case, tmp_path):
    with pytest.raises(td.TruedepthError, match="cannot be padded"):
        td.convert(make_model(**options_of(case)), tmp_path / "out", td.Plan(6, []), pad_heads=4)


REPAIRED = ("mistral, window", "qwen2", "qwen3", "phi3", "granite", "gemma", "cohere", "starcoder2")


@pytest.mark.parametrize("case", REPAIRED)
def test_calibration_and_healing(make_model, case, prose, tmp_path):
    source, plan = make_model(**options_of(case)), td.Plan(6, [[2, 3], [4, 5]])
    # StarCoder2's calibration leaves next to nothing, which a large step would only add to
    rate = 2e-5 if case == "starcoder2" else 1e-3
    raw, calibrated, healed = repaired(source, plan, prose, tmp_path, rate)
    assert healed < calibrated < raw


def test_layers_side_by_side_are_healed_and_their_wide_neighbours_calibrated(
    make_model, prose, tmp_path
):
    source = make_model(**options_of("smollm3"))  # its layers 3 and 4 have no RoPE
    raw, calibrated, healed = repaired(source, td.Plan(6, [[0, 1], [2, 3]]), prose, tmp_path)
    assert healed < calibrated < raw
    config = json.loads((tmp_path / "calibrated" / "config.json").read_text())
    assert (config["layer_widths"], config["side_by_side"]) == ([2, 1, 1, 1, 1], [[1, 2]])
    before, after = (td.open_source(tmp_path / name).tensors for name in ("calibrated", "healed"))
    changed = {
        int(name.split(".")[2])
        for name, tensor in before.items()
        if not torch.equal(tensor.read(), after[name].read())
    }
    assert changed == {0, 1, 2}


def test_layers_side_by_side_alone_have_nothing_to_calibrate(make_model, prose, tmp_path):
    source = make_model(**options_of("olmo2"))
    with pytest.raises(td.TruedepthError, match="No group of the plan becomes a wide layer"):
        td.convert(
            source,
            tmp_path / "out",
            td.Plan(6, [[2, 3]]),
            calibration=td.Calibration(text=[prose], tokens=4096),
        )


def test_layers_side_by_side_keep_their_weights(converted):
    source, out = converted("gemma2")
    before, after = td.open_source(source).tensors, td.open_source(out).tensors
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].read(), after[name].read()) for name in before)


@pytest.mark.parametrize("case", ["mistral, window", "smollm3", "phi3", "gemma2", "pythia"])
def test_predict(converted, case):
    source, out = converted(case)
    for model in (source, out):
        found = td.predict(model, td.Plan(6, GROUPS))
        assert found.speedup > 0
        assert found.plan == td.Plan(6, GROUPS)
        # SmolLM3's first group here is a wide layer
        assert (found.before == found.after) == (case in ("gemma2", "pythia"))


@pytest.mark.parametrize("case", CASES)
def test_info(converted, case):
    source, out = converted(case)
    for model in (source, out):
        said = CliRunner().invoke(app, ["info", str(model)])
        assert said.exit_code == 0, said.output
        assert options_of(case)["family"].model_type in said.output
    assert inspect_model(out).plan == td.Plan(6, GROUPS)


@pytest.mark.parametrize("case", CASES)
def test_schedules_and_walks_give_what_the_converted_model_gives(converted, case):
    """The study's way through the layers and the calibration's, against the checkpoint."""
    source, out = converted(case)
    ids = random_ids(batch=3)
    with torch.no_grad():
        logits = td.load(out).model(ids).logits[:, :-1]
    expected = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    schedule = tuple(Step(tuple(group)) for group in GROUPS)
    ((_, nll),) = Runner(td.load(source, dtype=torch.float32), ids).run([schedule])
    torch.testing.assert_close(nll.float(), expected, **CLOSE)
    options = td.Calibration(dtype=torch.float32)
    opened = td.open_source(source)
    plan = td.Plan(6, GROUPS)
    walk = walk_through(layer_stack(opened, options), Layout(opened, plan), ids[:0], ids, options)
    for segment in walk.layout.segments:
        walk.advance(segment)
    torch.testing.assert_close(walk.losses()[0, :, 0].float(), expected, **CLOSE)


def test_a_plan_is_searched_among_wide_layers_and_layers_side_by_side(make_model, prose):
    source = make_model(**options_of("smollm3"))
    text = td.Calibration(text=[prose], tokens=4096)
    found = td.search(source, depth=4, calibration=text)
    assert found.plan.effective_depth == 4


def test_info_of_a_converted_model_that_was_quantized_since(converted, tmp_path):
    config = json.loads((converted("llama")[1] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert inspect_model(tmp_path).plan == td.Plan(6, GROUPS)
    del config["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(td.TruedepthError, match="not supported"):
        inspect_model(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_info_needs_the_config_alone(make_model, case, tmp_path):
    config = json.loads((make_model(**options_of(case)) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 1 << 10}))
    found = inspect_model(tmp_path)
    assert bool(found.side_by_side) == bool(CASES[case].get("side_by_side"))
    assert found.engines["transformers"] == ""
    for saving, pairs in zip(found.savings, ((), (4,), (2, 4), (0, 2, 4)), strict=True):
        wide = 2 * sum(first not in found.side_by_side for first in pairs)
        least = 12 - max(wide, saving.staggered or 0)
        if found.stages_of_whole_layers:
            least = 6 - len(pairs)
        assert saving.all_reduces_per_token == least


@pytest.mark.parametrize("family", list(all_families()), ids=lambda family: family.model_type)
def test_upstream_layers_are_what_widening_knows(family, make_model):
    """Fails when a layer of the installed transformers gains or loses a parameter or a module."""
    case = next(c for c in CASES if options_of(c)["family"].model_type == family.model_type)
    source = td.open_source(make_model(**options_of(case)))
    layer = empty_model(source.config, source.path).base_model.layers[0]
    attention, ffn = family.sublayers
    known = {attention.module, ffn.module, *filter(None, (attention.norm, ffn.norm))}
    known |= set(filter(None, (attention.post_norm, ffn.post_norm)))
    children = {
        name for name, module in layer.named_children() if any(True for _ in module.parameters())
    }
    assert children == known
    held = {name.rpartition(".")[0] for name, _ in layer.named_parameters()}
    if family.side_by_side_only:
        assert set(family.reads) | set(family.writes) <= held
    else:
        optional = set(family.head_norms)
        assert set(family.modules) - optional <= held <= set(family.modules)


def test_what_an_upstream_layer_has_beyond_that_is_noticed(make_model, tmp_path):
    source = td.open_source(make_model(family=Qwen2Config))
    tensors = dict(source.tensors)
    for layer in range(6):
        tensors[f"model.layers.{layer}.self_attn.sinks"] = tensors["model.norm.weight"]
    changed = type(source)(
        **{
            name: getattr(source, name)
            for name in ("name", "origin", "path", "config", "load_tokenizer", "save_companions")
        },
        read_tensors=lambda: tensors,
    )
    with pytest.raises(td.TruedepthError, match=r"'self_attn\.sinks', which the family qwen2"):
        td.convert(changed, tmp_path / "out", td.Plan(6, [[2, 3]]))


def test_gpt_neox_without_parallel_residual_is_sequential(make_model):
    config = GPTNeoXConfig(use_parallel_residual=False)
    (family,) = (each for each in all_families() if each.model_type == "gpt_neox")
    assert not family.is_parallel(config)
    assert family.is_parallel(GPTNeoXConfig())


def logits_over_ranks(checkpoints, ids):
    """In every rank: what each model gives, and that maps in parts are held in parts."""
    found = {}
    for case, path in checkpoints.items():
        model = AutoModelForCausalLM.from_pretrained(
            path, distributed_config=DistributedConfig(tp_size=2)
        )
        for layer in model.base_model.layers:
            maps = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
            for map_ in maps:
                assert map_.weight.to_local().numel() * 2 == map_.weight.numel(), case
        with torch.no_grad():
            found[case] = model(ids).logits
    return found


def test_two_tensor_parallel_ranks_give_the_same_logits(converted):
    """`cohere, norms` is left out: upstream's own layer of it does not run over ranks."""
    checkpoints = {case: converted(case)[1] for case in CASES if case != "cohere, norms"}
    found = run_ranks(2, logits_over_ranks, checkpoints, random_ids())
    for case, path in checkpoints.items():
        with torch.no_grad():
            expected = td.load(path).model(random_ids()).logits
        torch.testing.assert_close(
            found[case], expected, **CLOSE, msg=lambda m, c=case: f"{c}: {m}"
        )
