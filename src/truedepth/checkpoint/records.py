"""Records of how a checkpoint was made, under `truedepth` in its config.json.

A record is written once, by the run that made the checkpoint, and read by model cards and reports.
Its keys are the names of the fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

from truedepth.errors import TruedepthError

Data = Mapping[str, Any]


@dataclass(frozen=True)
class Loss:
    """A model's loss compared with its original's, on the same tokens."""

    tokens: int
    """Tokens predicted."""

    excess: float
    """NLL minus the original's, nats per token."""

    stderr: float | None
    """Standard error of the excess over windows; None for a single window."""

    kl: float
    """KL(original ‖ model), nats per token."""


@dataclass(frozen=True)
class MapError:
    """The error of one linear map on held-out windows, relative to its target."""

    penalty: float | None
    """λ of the ridge regression; None if the map was not changed."""

    before: float
    after: float


@dataclass(frozen=True)
class CalibrationRecord:
    """How a checkpoint was calibrated, and the loss after it."""

    text: list[str]
    """Names of the text files."""

    tokens: int
    own_text: float
    """Share of the tokens that the model generated itself."""

    window: int
    """Tokens per window."""

    seed: int
    dtype: str
    """Dtype in which the layers computed."""

    activation_dtype: str
    """Dtype of the hidden states that were kept."""

    check: Loss | None
    """Loss on windows that nothing was fitted to; None if no windows were set aside."""

    held_out_errors: dict[str, dict[str, MapError]]
    """Errors by group (`14+15`) or stage (`F14 A15`), and map."""

    @classmethod
    def from_dict(cls, data: Data) -> CalibrationRecord:
        """Make a record from the data of `to_dict`.

        Raises:
            TruedepthError: The data are not such a record.
        """
        with _named("calibration"):
            errors = {
                group: {name: MapError(**error) for name, error in maps.items()}
                for group, maps in data["held_out_errors"].items()
            }
            check = Loss(**data["check"]) if data["check"] else None
            own = {field.name: data[field.name] for field in fields(cls)}
            return cls(**{**own, "check": check, "held_out_errors": errors})

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-compatible data."""
        return asdict(self)

    def __str__(self) -> str:
        """For example `65,536 tokens, novel.txt and 50% the model's own text`."""
        own = self.own_text
        parts = [", ".join(self.text)] if own < 1 else []
        if own > 0:
            parts.append(f"{own:.0%} the model's own text" if own < 1 else "the model's own text")
        return f"{self.tokens:,} tokens, " + " and ".join(parts)


@dataclass(frozen=True)
class Validation:
    """Losses on the validation windows."""

    windows: int
    before: dict[str, float]
    """`step`, `loss`, `nll`, `excess`, `stderr` and `kl` before the first step."""

    after: dict[str, float]
    """The same figures for the checkpoint that was kept."""


@dataclass(frozen=True)
class HealingRecord:
    """How a checkpoint was trained, and its losses before and after."""

    options: dict[str, Any]
    """The options of `td.Healing` that reproduce the run."""

    original: str
    """The teacher's name."""

    version: str
    """Version of truedepth."""

    text: dict[str, int]
    """Number of distinct tokens, by the name of the text."""

    validation: Validation

    @property
    def train(self) -> str:
        """Which parameters were trained: `paired`, `all` or `lora`."""
        return str(self.options["train"])

    @property
    def at_least(self) -> str:
        """What goes before a KL: it is a lower bound if the most likely tokens alone were kept."""
        return "at least " if self.options.get("keep_predictions") else ""

    @classmethod
    def from_dict(cls, data: Data) -> HealingRecord:
        """Make a record from the data of `to_dict`.

        Raises:
            TruedepthError: The data are not such a record.
        """
        own = ("original", "version", "text", "validation")
        with _named("healing"):
            return cls(
                options={name: value for name, value in data.items() if name not in own},
                original=data["original"],
                version=data["version"],
                text=data["text"],
                validation=Validation(**data["validation"]),
            )

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-compatible data; the options are keys of their own."""
        data = asdict(self)
        return {**data.pop("options"), **data}


@contextmanager
def _named(record: str) -> Iterator[None]:
    """Turn errors in reading a record into one that names the record."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        raise TruedepthError(
            f"The {record} record in config.json is not one that truedepth writes: {error!r}."
        ) from error
