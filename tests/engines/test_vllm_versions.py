"""The tested versions of vLLM, wherever they are named."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from truedepth.engines.vllm.versions import FLOOR, TESTED

ROOT = Path(__file__).parents[2]


def test_the_extra_takes_the_tested_versions_alone():
    (listed,) = re.findall(r"^VLLM_TESTED := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    tested = [each.rpartition(".")[0] for each in listed.split()]
    assert (tested[0], tested[-1]) == (FLOOR, TESTED)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extra,) = map(Requirement, project["optional-dependencies"]["vllm"])
    assert [
        each for each in (f"0.{minor}" for minor in range(100)) if f"{each}.1" in extra.specifier
    ] == tested
