"""Errors that nobody thought of: one line, and a traceback only with --debug."""

from __future__ import annotations

import pytest
import torch

from truedepth import inspection
from truedepth.errors import TruedepthError

HOW = "run the command again with --debug to see where.\n"

ERRORS = {
    "no type": (TypeError("no\nsuch type"), f"unexpected error: TypeError: no such type; {HOW}"),
    "no words": (AssertionError(), f"unexpected error: AssertionError; {HOW}"),
    "half a character": (
        UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "surrogates not allowed"),
        f"unexpected error: UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud83d' in"
        f" position 0: surrogates not allowed; {HOW}",
    ),
    "no memory": (MemoryError(), "There is not enough memory: MemoryError.\n"),
    "no memory on a GPU": (
        torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB."),
        "There is not enough memory: OutOfMemoryError: CUDA out of memory. Tried 2 GiB.\n",
    ),
    "no memory on a CPU": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
        "There is not enough memory: RuntimeError: DefaultCPUAllocator: can't allocate memory: you"
        " tried 9 bytes.\n",
    ),
    "a library's OSError": (
        OSError("Cannot load it.\nSee the hub."),
        "Cannot load it. See the hub.\n",
    ),
    "a full disk": (OSError(28, "No space left", "x.json"), "No space left: x.json.\n"),
    "the user's": (TruedepthError("Give more.", 2), "Give more.\n"),
}


@pytest.mark.parametrize(("error", "said"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("place", [None, 0, 1, 2])
def test_errors(run, monkeypatch, error, said, place):
    def fail(_):
        raise error

    monkeypatch.setattr(inspection, "inspect_model", fail)
    words = ["info", "model"]
    if place is not None:
        words.insert(place, "--debug")
    code, out, err = run(*words)
    assert code == (2 if isinstance(error, TruedepthError) else 1)
    assert out == ""
    if place is None:
        assert err == f"truedepth: {said}"
    else:
        assert err.startswith("Traceback") and err.endswith(f"truedepth: {said}")
        assert "in fail" in err


def test_a_prompt_may_be_called_debug(run, make_model):
    code, _, err = run("generate", "--raw", "--max-new-tokens", 2, make_model(), "--", "--debug")
    assert (code, err) == (0, "")
