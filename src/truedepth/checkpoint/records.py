"""What config.json records of how a checkpoint was made: under `truedepth`, in its own words.

A record is written once, by the run that made the checkpoint, and read by model cards and reports.
The keys are the names of the fields.
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
    """What a model loses against its original, on the same tokens."""

    tokens: int
    """Tokens predicted."""

    excess: float
    """NLL above the original's, nats per token."""

    stderr: float | None
    """Standard error of the excess over windows; None for a single window."""

    kl: float
    """KL(original ‖ model), nats per token."""


@dataclass(frozen=True)
class MapError:
    """The error of one linear map on held-out windows, relative to what it should give."""

    penalty: float | None
    """λ of the ridge regression; None where the map was left as it was."""

    before: float
    after: float


@dataclass(frozen=True)
class CalibrationRecord:
    """What a checkpoint was calibrated on, and what that gained."""

    text: list[str]
    """Names of the text files."""

    tokens: int
    own_text: float
    """Share of the tokens that the model wrote itself."""

    window: int
    """Tokens per window."""

    seed: int
    dtype: str
    """In which the layers computed."""

    activation_dtype: str
    """Of the states that were kept."""

    check: Loss | None
    """On windows that nothing was fitted to; None where none were kept for it."""

    held_out_errors: dict[str, dict[str, MapError]]
    """By group (`14+15`) and map."""

    @classmethod
    def from_dict(cls, data: Data) -> CalibrationRecord:
        """Read what `to_dict` gave.

        Raises:
            TruedepthError: It is something else.
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
        """Plain data."""
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
    """What was measured on the validation windows."""

    windows: int
    before: dict[str, float]
    """`step`, `loss`, `nll`, `excess`, `stderr`, `kl`, before the first step."""

    after: dict[str, float]
    """The same of the checkpoint that was kept."""


@dataclass(frozen=True)
class HealingRecord:
    """What a checkpoint was trained on and how, and what that gained."""

    options: dict[str, Any]
    """Those of `td.Healing` that make the run again."""

    original: str
    """The teacher's name."""

    version: str
    """Of truedepth."""

    text: dict[str, int]
    """Distinct tokens by the name of the text."""

    validation: Validation

    @property
    def train(self) -> str:
        """Which parameters were trained: `paired`, `all` or `lora`."""
        return str(self.options["train"])

    @classmethod
    def from_dict(cls, data: Data) -> HealingRecord:
        """Read what `to_dict` gave.

        Raises:
            TruedepthError: It is something else.
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
        """Plain data, the options beside the rest."""
        data = asdict(self)
        return {**data.pop("options"), **data}


@contextmanager
def _named(record: str) -> Iterator[None]:
    """Around the reading of a record from a file of anybody's."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        raise TruedepthError(
            f"The {record} record in config.json is not one that truedepth writes: {error!r}."
        ) from error
