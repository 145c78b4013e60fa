"""What config.json records of how a checkpoint was made."""

from __future__ import annotations

import json

import pytest

import truedepth as td
from truedepth.checkpoint.records import (
    CalibrationRecord,
    HealingRecord,
    Loss,
    MapError,
    Validation,
)

CALIBRATION = CalibrationRecord(
    text=["a.txt", "b.jsonl"],
    tokens=65536,
    own_text=0.5,
    window=512,
    seed=0,
    dtype="bfloat16",
    activation_dtype="float32",
    check=Loss(8176, 0.1, 0.01, 0.2),
    held_out_errors={"14+15": {"mlp.down_proj": MapError(None, 0.5, 0.5)}},
)
MEASURED = {"step": 0, "loss": 0.2, "nll": 3.0, "excess": 0.1, "stderr": 0.01, "kl": 0.2}
HEALING = HealingRecord(
    options={"train": "lora", "rank": 16, "objective": {"next_token": 0.0}, "dtype": "float32"},
    original="default",
    version="0.1.0",
    text={"a.txt": 1024},
    validation=Validation(8, MEASURED, MEASURED | {"step": 50, "excess": 0.05}),
)


@pytest.mark.parametrize("record", [CALIBRATION, HEALING], ids=lambda record: type(record).__name__)
def test_a_record_is_what_is_read_back(record):
    assert type(record).from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_the_keys_are_those_of_the_first_release():
    assert CALIBRATION.to_dict() == {
        "text": ["a.txt", "b.jsonl"],
        "tokens": 65536,
        "own_text": 0.5,
        "window": 512,
        "seed": 0,
        "dtype": "bfloat16",
        "activation_dtype": "float32",
        "check": {"tokens": 8176, "excess": 0.1, "stderr": 0.01, "kl": 0.2},
        "held_out_errors": {
            "14+15": {"mlp.down_proj": {"penalty": None, "before": 0.5, "after": 0.5}}
        },
    }
    assert HEALING.to_dict() == {
        "train": "lora",
        "rank": 16,
        "objective": {"next_token": 0.0},
        "dtype": "float32",
        "original": "default",
        "version": "0.1.0",
        "text": {"a.txt": 1024},
        "validation": {
            "windows": 8,
            "before": MEASURED,
            "after": MEASURED | {"step": 50, "excess": 0.05},
        },
    }
    assert HEALING.train == "lora"


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (0.0, "65,536 tokens, a.txt, b.jsonl"),
        (0.5, "65,536 tokens, a.txt, b.jsonl and 50% the model's own text"),
        (1.0, "65,536 tokens, the model's own text"),
    ],
)
def test_a_calibration_in_words(own, words):
    assert str(CalibrationRecord.from_dict(CALIBRATION.to_dict() | {"own_text": own})) == words


@pytest.mark.parametrize("data", [{}, [], {"check": None, "held_out_errors": 3}, "text"])
def test_what_is_no_record_is_refused(data):
    with pytest.raises(td.TruedepthError, match="The calibration record in config"):
        CalibrationRecord.from_dict(data)
    with pytest.raises(td.TruedepthError, match="The healing record in config"):
        HealingRecord.from_dict(data)
