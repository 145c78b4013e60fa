from __future__ import annotations

import itertools

import pytest

from truedepth.errors import reason_of


def _caused(*errors):
    """The first error, whose cause is the next, and so on."""
    for error, cause in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[0]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("too large"), "ValueError: too large."),
        (
            ValueError("\nwrong field 'a':\n    expected\tfloat,\n\ngot str.\n"),
            "ValueError: wrong field 'a': expected float, got str.",
        ),
        (TimeoutError(), "TimeoutError."),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device."),
        (
            _caused(OSError("Cannot load."), KeyError("x"), ValueError("line 3 is cut\nshort.")),
            "OSError: Cannot load, because of ValueError: line 3 is cut short.",
        ),
        (
            _caused(OSError("Field a:\n expected 3"), ValueError("expected 3")),
            "OSError: Field a: expected 3.",
        ),
        (_caused(OSError("Cannot load."), ValueError()), "OSError: Cannot load."),
    ],
)
def test_an_error_in_one_line_with_its_whole_reason(error, reason):
    assert reason_of(error) == reason


def test_long_reasons_are_cut():
    for message in ("too large " * 99, "x" * 999):
        reason = reason_of(ValueError(message))
        assert reason.startswith(f"ValueError: {message[:200]}")
        assert reason.endswith("….")
        assert len(reason) < 410
    reason = reason_of(_caused(ValueError("too large " * 99), OSError("No space left.")))
    assert reason.endswith("…, because of OSError: No space left.")


def test_an_error_that_causes_itself():
    error = ValueError("too large")
    _caused(error, OSError("no space"), error)
    assert reason_of(error) == "ValueError: too large, because of OSError: no space."
