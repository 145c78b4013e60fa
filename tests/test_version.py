"""Old names of modules."""

from __future__ import annotations

from importlib import import_module

import pytest

from truedepth.version import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_a_module_of_0_1_0_is_the_module_of_today(old):
    with pytest.warns(DeprecationWarning, match=f"{old} is now {MOVED[old]}"):
        found = import_module(old)
    assert found is import_module(MOVED[old])
    assert found.__name__ == found.__spec__.name == MOVED[old]


def test_other_names_are_still_unknown():
    with pytest.raises(ModuleNotFoundError, match=r"truedepth\.no_such_module"):
        import_module("truedepth.no_such_module")
