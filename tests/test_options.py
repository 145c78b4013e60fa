"""Options, written once: what they say, and what Python refuses."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated

import pytest

import truedepth as td
from truedepth.healing.options import Healing, Objective, Recipe, TextPart
from truedepth.options import (
    Bounds,
    OneOf,
    Panel,
    TorchDtype,
    check_fields,
    checked,
    options_of,
    parameters_of,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Baking:
    """How to bake."""

    minutes: Annotated[int, Bounds(1, 60), Panel("Time")] = 30
    """Minutes in the oven;
    longer is browner."""

    dtype: torch.dtype | None = None
    heat: Annotated[str, OneOf("top", "bottom")] = "top"
    loaves: list[int] = field(default_factory=list)
    """Loaves."""

    def __post_init__(self) -> None:
        check_fields(self)


@checked
def bake(
    flour: Annotated[float, Bounds(above=0)],
    *,
    loaves: Annotated[tuple[int, ...], Bounds(1)] = (1,),
    steam: bool = False,
) -> float:
    """Bake.

    Args:
        flour: Kilograms of flour: all of it,
            sieved.
        loaves: Loaves per batch.
        steam: With steam.

    Raises:
        TruedepthError: No.
    """
    return flour


def test_a_dataclass_is_read_from_its_source():
    options = options_of(Baking())
    assert list(options) == ["minutes", "dtype", "heat", "loaves"]
    minutes = options["minutes"]
    assert minutes.text == "Minutes in the oven;\nlonger is browner."
    assert (minutes.type, minutes.panel) == (int, "Time")
    assert options["dtype"].type == TorchDtype | None
    assert (options["dtype"].text, options["loaves"].text) == ("", "Loaves.")


def test_a_function_is_read_without_importing_it():
    options = parameters_of(f"{__name__}.bake")
    assert list(options) == ["flour", "loaves", "steam"]
    assert options["flour"].text == "Kilograms of flour: all of it,\nsieved."
    assert options["steam"].text == "With steam."
    assert (options["loaves"].default, options["steam"].default) == ((1,), False)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Baking(minutes=0), "minutes must be from 1 to 60, not 0."),
        (lambda: Baking(minutes=61), "minutes must be from 1 to 60, not 61."),
        (lambda: Baking(heat="side"), "heat must be top or bottom, not side."),
        (lambda: bake(0), "flour must be above 0, not 0."),
        (lambda: bake(float("nan")), "flour must be above 0, not nan."),
        (lambda: bake(flour=1, loaves=(2, 0)), "loaves must be at least 1, not 0."),
        (lambda: td.Calibration(tokens=0), "tokens must be at least 1, not 0."),
        (lambda: td.Calibration(window=1), "window must be at least 2, not 1."),
        (lambda: td.Calibration(check=-1), "check must be at least 0, not -1."),
        (lambda: td.Calibration(batch_size=0), "batch_size must be at least 1, not 0."),
        (lambda: td.Calibration(own_text=1.5), "own_text must be from 0 to 1, not 1.5."),
        (lambda: Objective(next_token=2.0), "next_token must be from 0 to 1, not 2."),
        (lambda: Objective(temperature=0.0), "temperature must be above 0, not 0."),
        (lambda: Objective(hidden=-1.0), "hidden must be at least 0, not -1."),
        (lambda: TextPart("a", 0.0), "weight must be above 0, not 0."),
        (lambda: Healing(answer_share=0.0), "answer_share must be above 0, at most 1, not 0."),
        (lambda: Healing(answer_share=1.5), "answer_share must be above 0, at most 1, not 1.5."),
        (lambda: Healing(tokens=0), "tokens must be at least 1, not 0."),
        (lambda: Healing(sequence_length=1), "sequence_length must be at least 2, not 1."),
        (lambda: Healing(validation=0), "validation must be at least 1, not 0."),
        (lambda: Healing(rank=0), "rank must be at least 1, not 0."),
        (lambda: Healing(keep_predictions=-1), "keep_predictions must be at least 0, not -1."),
        (lambda: Healing(learning_rate=2.0), "learning_rate must be from 0 to 1, not 2."),
        (lambda: Healing(warmup=-0.5), "warmup must be from 0 to 1, not -0.5."),
        (lambda: Healing(batch_size=0), "batch_size must be at least 1, not 0."),
        (lambda: Healing(micro_batch_size=0), "micro_batch_size must be at least 1, not 0."),
        (lambda: Healing(weight_decay=-1.0), "weight_decay must be at least 0, not -1."),
        (lambda: Healing(max_grad_norm=-1.0), "max_grad_norm must be at least 0, not -1."),
        (lambda: Healing(eval_every=0), "eval_every must be at least 1, not 0."),
        (lambda: Healing(device="tpu"), "device must be cpu or cuda, not tpu."),
        (lambda: td.search("x", pairs=0), "pairs must be at least 1, not 0."),
        (lambda: td.search("x", depth=0), "depth must be at least 1, not 0."),
        (lambda: td.search("x", max_loss=0.0), "max_loss must be above 0, not 0."),
        (lambda: td.search("x", all_reduces=0), "all_reduces must be at least 1, not 0."),
        (lambda: td.search("x", depth=0.5), "depth must be at least 1, not 0.5."),
        (lambda: td.Merges(form="groups"), "form must be auto or pairs, not groups."),
        (lambda: td.Merges(max_run=1), "max_run must be at least 2, not 1."),
        (lambda: td.search("x", pairs=1, budget=-1), "budget must be at least 0, not -1."),
        (lambda: td.convert("x", "y", td.Plan(6), pad_heads=0), "pad_heads must be at least 1"),
        (lambda: td.study("x", "y", window=1), "window must be at least 2, not 1."),
        (lambda: td.study("x", "y", windows=0), "windows must be at least 1, not 0."),
        (lambda: td.perplexity("x", window=1), "window must be at least 2, not 1."),
        (lambda: td.perplexity("x", windows=0), "windows must be at least 1, not 0."),
        (lambda: td.perplexity("x", batch_size=0), "batch_size must be at least 1, not 0."),
        (lambda: td.task_scores("x", ["y"], limit=0), "limit must be at least 1, not 0."),
        (lambda: td.task_scores("x", ["y"], num_fewshot=-1), "num_fewshot must be at least 0"),
        (lambda: td.task_scores("x", ["y"], batch_size=0), "batch_size must be at least 1, not 0."),
        (lambda: td.bench("x", batches=[0]), "batches must be at least 1, not 0."),
        (lambda: td.bench("x", ranks=0), "ranks must be at least 1, not 0."),
        (lambda: td.bench("x", repetitions=0), "repetitions must be at least 1, not 0."),
        (lambda: td.bench("x", lengths=[]), "at least one task, one length and one batch."),
        (lambda: td.predict("x", ranks=0), "ranks must be at least 1, not 0."),
        (lambda: td.predict("x", batch=0), "batch must be at least 1, not 0."),
        (lambda: td.predict("x", length=0), "length must be at least 1, not 0."),
    ],
)
def test_what_is_out_of_bounds_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(td.TruedepthError) as refused:
        make()
    assert sentence in str(refused.value)
    assert refused.value.exit_code == 2


def test_what_is_within_bounds_is_taken():
    assert Baking(1).minutes == 1 and Baking(60, heat="bottom").heat == "bottom"
    assert bake(0.5, loaves=(1, 2)) == 0.5
    options = Healing(max_grad_norm=0.0, warmup=1.0, keep_predictions=1, sequence_length=512)
    assert options.steps == 488
    assert td.Calibration(own_text=0.0, check=0, tokens=1024).own_share == 0


def test_every_option_has_a_text():
    for options in (td.Calibration(), Healing(), Objective(), TextPart("a")):
        texts = {name: option.text for name, option in options_of(options).items()}
        assert list(texts) == [each.name for each in fields(options)]
        assert all(text.endswith(".") for text in texts.values()), texts


def test_a_recipe_is_options():
    assert Recipe.best.healing == Healing()
    assert Recipe.paper.healing.batch_size == 32
