"""What the model card says of what runs together, and of what was done to it."""

from __future__ import annotations

import pytest

import truedepth as td
from truedepth.checkpoint.card import model_card, with_figures
from truedepth.checkpoint.records import (
    CalibrationRecord,
    HealingRecord,
    Loss,
    MapError,
    Validation,
)

STAGES = td.Plan(6, stages=[["F2", "A3"], ["F3", "A4"]])
BOTH = td.Plan(6, [[0, 1]], stages=[["F2", "A3"]])
PAIRS = td.Plan(6, [[0, 1], [2, 3]])
MERGED = {
    "stages": (STAGES, "sub-layers that share a stage"),
    "both": (BOTH, "wide layers and the sub-layers that share a stage"),
    "pairs": (PAIRS, "wide layers"),
}


def calibration(plan):
    errors = {" ".join(map(str, stage)): stage for stage in plan.merged}
    return CalibrationRecord(
        text=["novel.txt"],
        tokens=512,
        own_text=0.0,
        window=32,
        seed=0,
        dtype="float32",
        activation_dtype="float32",
        check=Loss(96, 0.0625, 0.01, 0.125),
        held_out_errors={name: {"mlp.up_proj": MapError(1.0, 0.5, 0.25)} for name in errors},
    )


def healing(train):
    row = {"step": 8, "loss": 0.1, "nll": 3.0, "excess": 0.05, "stderr": 0.01, "kl": 0.1}
    return HealingRecord(
        {"train": train}, "model", "1", {"novel.txt": 1024}, Validation(8, row, row)
    )


@pytest.mark.parametrize("plan", [STAGES, BOTH, PAIRS], ids=MERGED)
def test_what_runs_together_as_it_is(make_model, plan):
    said = model_card(td.open_source(make_model()), plan, plan.all_reduces, None)
    assert f"    {plan}\n" in said
    assert f"| all-reduces per token under tensor parallelism | 12 | {plan.all_reduces} |" in said
    assert f"| sequential layers (effective depth) | 6 | {plan.effective_depth} |" in said
    assert ("running side by side" in said) == bool(plan.paired_layers)
    stages = f"{len(plan.merged)} stage"
    assert (f"{stages}{'s' * (len(plan.merged) > 1)} in which sub-layers" in said) == bool(
        plan.merged
    )
    assert "refitted" not in said
    assert "trained toward" not in said


@pytest.mark.parametrize("which", MERGED)
def test_what_was_refitted_and_trained(make_model, which):
    plan, words = MERGED[which]
    source, fitted = td.open_source(make_model()), calibration(plan)
    assert CalibrationRecord.from_dict(fitted.to_dict()) == fitted
    said = model_card(source, plan, plan.all_reduces, fitted)
    assert f"The {words} were refitted to the original in closed form, on 512 tokens" in said
    assert "0.0625 nats per token above the original's" in said
    for train, how in (
        ("paired", f"Then the {words} were trained"),
        ("lora", f"Then low-rank additions to the {words} were trained"),
        ("all", "Then all weights were trained"),
    ):
        healed = " ".join(model_card(source, plan, plan.all_reduces, None, healing(train)).split())
        assert f"{how} toward the original on 1,024 tokens of novel.txt." in healed


def test_figures_are_added_and_replaced():
    card = "---\ntags: [a]\n---\n\n# M\n\nText.\n"
    one = with_figures(card, "Loss on a.txt", "| a |")
    assert one == card + "\n## Measured\n\n### Loss on a.txt\n\n| a |\n"
    two = with_figures(one, "Probes", "| b |")
    assert two == one + "\n### Probes\n\n| b |\n"
    assert with_figures(two, "Loss on a.txt", "| c |") == two.replace("| a |", "| c |")
    assert with_figures(two, "Probes", "| d |") == two.replace("| b |", "| d |")
