"""Plans of stages on the command line: what is written, and what is refused in one sentence."""

from __future__ import annotations

import json
import re

import pytest

import truedepth as td
from family_models import options_of

PLANS = {
    "a gap": ("[[F1, A3]]", "In the stage [F1 A3] F1 is followed by A3 instead of A2"),
    "a sub-layer twice": ("[[F1, A2], [A2, F2]]", "A2 is in two stages, [F1 A2] and [A2 F2]"),
    "a stage twice": ("[[F1, A2], [F1, A2]]", "F1 is in two stages, [F1 A2] and [F1 A2]"),
    "attentions out of order": ("[[A3, F2]]", "A3 is followed by F2 instead of F3"),
    "two attentions": ("[[A2, A3]]", "A2 is followed by A3 instead of F2"),
    "beyond the last layer": ("[[F5, A6]]", "A6 is out of range: the model has layers 0 to 5"),
    "layers": ("[[1, 2]]", "1 is not a sub-layer; write the attention of layer 14 as A14"),
    "no comma": ("[[F1 A2]]", "'F1 A2' is not a sub-layer"),
    "one list": ("[F1, A2]", "stages must be a list of lists of sub-layers"),
    "nothing": ("[[]]", "A stage is empty"),
    "with a group": ("[[F1, A2]]\ngroups: [[2, 3]]", "A2 is in the stage [F1 A2] and, with its"),
}

WORDS = {
    "past the last layer": ("--staggered 2-6", "Layer 6 is out of range: the model has layers"),
    "one layer": ("--staggered 3-3", "The span 3-3 holds one layer; give at least two."),
    "an empty span": ("--staggered 4-2", "The span 4-2 is empty"),
    "no span": ("--staggered all", "'all' is not a span of layers; write it as 14-27."),
    "two ways": ("--staggered 1-3 --layers 1-4", "with one of --layers, --staggered, --plan."),
    "a goal and a way": ("--staggered 1-3 --all-reduces 9", "Say how far to go with one of"),
    "groups of a staggered span": ("--staggered 1-3 --group 2", "--group goes with --layers only."),
    "a form for nothing": ("--staggered 1-3 --form pairs", "--form goes with --max-loss, --all-"),
    "a budget for nothing": ("--staggered 1-3 --budget 2", "--budget goes with --max-loss, --all-"),
    "no all-reduces": ("--all-reduces 0", "--all-reduces must be at least 1, not 0."),
    "too few": ("--all-reduces 3", "3 all-reduces are out of reach (an effective depth of 1.5)"),
    "as many as the model's": ("--all-reduces 12", "merges leave 4 to 11 of the model's 12."),
    "more than the model's": ("--all-reduces 13", "merges leave 4 to 11 of the model's 12."),
    "odd for pairs": ("--all-reduces 9 --form pairs", "6 to 10 of the model's 12, in steps of 2."),
    "half for pairs": ("--depth 4.5 --form pairs", "9 all-reduces are out of reach"),
    "local to how many": ("--staggered 1-3 --local", "--local goes with --tp N: local stages are"),
    "ranks for nothing": ("--staggered 1-3 --tp 2", "--tp goes with --local: other stages are for"),
    "local pairs": ("--pairs 1 --local --tp 2", "Pairs of layers have no local stages"),
    "a local form": ("--depth 5 --form pairs --local --tp 2", "Pairs of layers have no local"),
    "one rank": ("--staggered 1-3 --local --tp 1", "--tp must be from 2 to 1024, not 1."),
    "ranks that do not divide the heads": (
        "--staggered 1-3 --local --tp 3",
        "has 4 heads and 2 KV heads, which are not divisible by 3; truedepth convert --pad-heads 3",
    ),
    "a search for such ranks": (
        "--all-reduces 9 --local --tp 3",
        "divisible by 3; truedepth convert --pad-heads",
    ),
    "no half": ("--depth 4.2", "An effective depth of 4.2 is not half a number of stages"),
    "too few tokens for a run": (
        "--depth 5 --tokens 600 --max-run 12 --window 32",
        "the widest map has 960",
    ),
}


@pytest.fixture
def refused(run):
    def refused(*arguments):
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), err
        assert err.startswith("truedepth: ") and err.endswith(".\n") and err.count("\n") == 1
        return err

    return refused


@pytest.mark.parametrize(("stages", "words"), PLANS.values(), ids=PLANS)
def test_plan_files_that_are_refused(refused, make_model, tmp_path, stages, words):
    (tmp_path / "p.yaml").write_text(f"num_layers: 6\nstages: {stages}\n")
    out = tmp_path / "out"
    assert words in refused("convert", make_model(), out, "--plan", tmp_path / "p.yaml")
    assert not out.exists()


@pytest.mark.parametrize(("options", "words"), WORDS.values(), ids=WORDS)
def test_options_that_are_refused(refused, make_model, tmp_path, options, words):
    out = tmp_path / "out"
    assert words in refused("convert", make_model(), out, *options.split())
    if not options.startswith("--staggered"):
        assert words in refused("plan", make_model(), "-o", tmp_path / "p.yaml", *options.split())
    assert not list(tmp_path.iterdir())


def test_families_whose_stages_hold_whole_layers(refused, run, make_model, tmp_path):
    model, out = make_model(**options_of("cohere")), tmp_path / "out"
    err = refused("convert", model, out, "--staggered", "1-3")
    assert re.search(r"cannot share the stage \[F1 A2\]: .*read one state already", err)
    assert "2 all-reduces are out of reach" in refused("convert", model, out, "--all-reduces", "2")
    assert run("convert", model, out, "--layers", "1-4")[0] == 0


def test_what_is_free_is_taken_and_said(run, make_model, prose, tmp_path):
    model, out = make_model(**options_of("cohere")), tmp_path / "out"
    code, shown, err = run("convert", model, out, "--all-reduces", "8", "--text", prose)
    assert code == 0, err
    assert "it computes what the original computes" in err
    assert re.search(r"all-reduces +12 -> 8 per token", shown)
    assert max(map(len, shown.splitlines())) <= 80


def test_a_staggered_span(run, make_model, tmp_path):
    code, shown, err = run("convert", make_model(), tmp_path / "out", "--staggered", "1-4")
    assert code == 0, err
    assert "0 · A1 [F1 A2] [F2 A3] [F3 A4] F4 · 5" in shown
    assert re.search(r"effective depth +6 -> 4\.5 *\n", shown)
    assert re.search(r"all-reduces +12 -> 9 per token", shown)
    assert max(map(len, shown.splitlines())) <= 80
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert td.Plan.from_dict(config["truedepth"]["plan"]) == td.Plan.staggered(
        6, 1, 4, model=config["truedepth"]["source"]
    )


def test_local_stages(run, refused, make_model, prose, tmp_path):
    """From a span, padded for ranks that do not divide the heads, and from a search."""
    layers = ["convert", make_model(), tmp_path / "span", "--layers", "1-4"]
    assert "--local goes with --max-loss" in refused(*layers, "--local", "--tp", 2)
    code, out, err = run(
        *("convert", make_model(), tmp_path / "span", "--staggered", "1-3"),
        *("--local", "--tp", 4, "--pad-heads", 4),
    )
    assert code == 0, err
    assert "[F1 | A2] [F2 | A3]" in out and "4, and no other number" in out
    config = json.loads((tmp_path / "span" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (8, 4)
    assert config["stages"][0] == {"sublayers": ["F1", "A2"], "local": 4}
    card = (tmp_path / "span" / "README.md").read_text()
    assert 'from_pretrained("THIS", trust_remote_code=True, simulate_ranks=True)' in card
    assert "DistributedConfig(tp_size=4)" in card

    search = ["--all-reduces", 8, "--local", "--tp", 2, "--text", prose, "--window", 32]
    code, out, err = run(
        *("plan", make_model(), "-o", tmp_path / "p.yaml", *search, "--tokens", 768),
        *("--json", tmp_path / "p.json"),
    )
    assert code == 0, err
    plan = td.Plan.from_yaml(tmp_path / "p.yaml")
    assert (plan.ranks, plan.all_reduces) == (2, 8)
    data = json.loads((tmp_path / "p.json").read_text())
    assert td.Plan.from_dict(data["plan"]) == plan
    assert {"sublayers": ["F1", "A2"], "local": 2} in [each["merged"][0] for each in data["scores"]]
    code, out, err = run("info", tmp_path / "span", "--json", tmp_path / "i.json")
    assert code == 0 and "4, and no other number" in out
    assert json.loads((tmp_path / "i.json").read_text())["plan"]["stages"] == config["stages"]
    code, out, err = run("bench", tmp_path / "span", "--tp", 2)
    assert (code, out) == (2, "") and "local to 4 tensor-parallel ranks; give --tp 4." in err


def test_a_plan_file_of_groups_and_stages_is_calibrated(run, make_model, prose, tmp_path):
    (tmp_path / "p.yaml").write_text("num_layers: 6\ngroups: [[0, 1]]\nstages: [[F3, A4]]\n")
    words = ["--plan", tmp_path / "p.yaml", "--calibrate", "--text", prose, "--tokens", 1024]
    code, shown, err = run("convert", make_model(), tmp_path / "out", *words, "--window", 32)
    assert code == 0, err
    assert "calibrated" in shown
    record = json.loads((tmp_path / "out" / "config.json").read_text())["truedepth"]["calibration"]
    assert record["held_out_errors"].keys() == {"0+1", "F3 A4"}


def test_a_search_takes_the_tokens_that_the_widest_map_needs(
    run, make_model, prose, tmp_path, monkeypatch
):
    """As if it took 64 of its own accord: the map of three sub-layers has 256 inputs."""
    usual = td.Calibration(tokens=64, window=32)
    monkeypatch.setattr("truedepth.cli.plan.SEARCH_CALIBRATION", usual)
    words = ["--all-reduces", 11, "--text", prose, "--window", 32, "--tokens"]
    code, _, err = run("convert", make_model(), tmp_path / "out", *words, 512)
    assert code == 0, err
    code, _, err = run("convert", make_model(), tmp_path / "other", *words, 224)
    assert (code, "224 calibration tokens are too few" in err) == (2, True), err
