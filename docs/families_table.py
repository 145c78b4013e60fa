"""Prints the table of docs/families.md that is made by running small models.

    python docs/families_table.py

It has the architectures of tests/traced_models.py and what a trace finds in their layers; then the
others of the installed transformers in which it finds layers that can be staggered; then the models
of tests/outer_models.py, which take other input than text, and the decoders inside them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import outer_models
from traced_models import ARCHITECTURES, config_of
from truedepth.families.family import Family
from truedepth.families.lookup import all_families
from truedepth.families.tracing.trace import traced_family


def ffn_of(family: Family) -> str:
    """What the FFNs of a family are."""
    if not family.is_mixture:
        return "dense"
    own = [name for name in family.writes if family.part_of("ffn", name)]
    more = []
    if any("shared" in name for name in own):
        more.append("shared experts")
    if any("shared" not in name for name in own):
        more.append("dense layers")
    return "experts" + (f", {' and '.join(more)}" if more else "")


def norms_of(family: Family) -> str:
    """Where the norms of a family stand."""
    names = family.sublayers
    before, behind = all(each.norm for each in names), any(each.post_norm for each in names)
    return "before and behind" if before and behind else "before" if before else "behind"


def main() -> None:
    """Print the tables."""
    logging.set_verbosity_error()
    print("| `model_type` | class | FFN | norms | multiplied by |\n|---|---|---|---|---|")
    for name in sorted(ARCHITECTURES):
        family = traced_family(config_of(name).to_dict())
        said = [ffn_of(family), norms_of(family), family.multiplier or ""]
        print(f"| {name} | {family.classes[-1]} | {' | '.join(said)} |")
    described = {family.model_type for family in all_families()}
    others = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - described - ARCHITECTURES.keys()
    print(f"\nFound too: {', '.join(name for name in sorted(others) if _is_found(name))}.")
    print("\n| `model_type` | class | decoder inside |\n|---|---|---|")
    for name in sorted((*outer_models.PICTURES, *outer_models.OTHERS, *outer_models.MORE)):
        inside = outer_models.config_of(name).text_config.model_type
        made = outer_models.auto_of(name)._model_mapping[type(outer_models.config_of(name))]
        print(f"| {name} | {made.__name__} | {inside} |")


def _is_found(name: str) -> bool:
    """Whether a trace finds the layers of a model with the sizes of its config class."""
    try:
        config: Any = CONFIG_MAPPING[name]().to_dict()
        traced_family(config)
    except Exception:  # config classes raise exceptions of any type
        return False
    return True


if __name__ == "__main__":
    main()
