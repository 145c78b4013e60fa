from __future__ import annotations

import pytest

from truedepth.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("too large"), "ValueError: too large."),
        (ValueError("\ntoo large.\nhere is why"), "ValueError: too large."),
        (TimeoutError(), "TimeoutError."),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device."),
    ],
)
def test_an_error_in_one_line(error, line):
    assert first_line(error) == line


def test_a_long_line_is_cut():
    assert len(first_line(ValueError("too large " * 99))) < 230
