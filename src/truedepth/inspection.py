"""What a model is and what a plan would save, from its config alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from truedepth.engines.support import refused_by
from truedepth.families.family import KEY_VALUE, head_dim
from truedepth.families.lookup import original_family
from truedepth.plan.config import plan_of
from truedepth.plan.plan import Plan
from truedepth.runtime.empty import empty_model
from truedepth.sources.opening import open_source
from truedepth.sources.source import Source
from truedepth.widening.layout import Layout


@dataclass(frozen=True)
class Saving:
    """What a number of pairs would save, or of staggered stages."""

    pairs: int
    staggered: int | None
    """Stages such as `[F14 A15]` that save as much; None where no plan has so many of them."""

    paired_layers: int
    effective_depth: int | float
    all_reduces_per_token: int
    """At any tensor-parallel size above 1. Layers that run side by side save none: then these are
    those of the staggered stages."""


@dataclass(frozen=True)
class Info:
    """What `truedepth info` prints."""

    name: str
    origin: str
    family: str
    traced: bool
    """Whether the family was found by running a small model, not described by a file."""

    inside: str
    """`model_type` of the model that takes other input than text and has this one inside; empty for
    a model of text."""

    mixture: bool
    """Whether FFNs are mixtures of experts."""

    plan: Plan
    """A converted model's own plan; for any other model, every layer alone."""

    converted: bool
    parameters: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    quantization: str | None
    savings: tuple[Saving, ...]
    """For converted models empty: their layers are grouped already."""

    executed_plan: Plan
    """`plan` as engines run it: layers that run side by side are by themselves."""

    side_by_side: tuple[int, ...]
    """First layers of the pairs that would not become wide layers; of a converted model, first
    layers of the groups that did not."""

    side_by_side_reason: str
    """Why the first of them does not, as the end of a sentence."""

    stages_of_whole_layers: bool
    """Whether attention and FFN of a layer read one state already, so that a stage holds both."""

    engines: dict[str, str]
    """Every engine and why it does not run the model converted; empty where it does."""

    @property
    def kv_elements_per_token(self) -> int:
        """Keys and values of all layers for one token. A plan does not change it."""
        return 2 * self.plan.num_layers * self.kv_heads * self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain = replace(self, plan=self.plan.unpaired, executed_plan=self.plan.unpaired)
        data = asdict(plain) | {"plan": self.plan.to_dict()}
        for name, key in (  # the keys of 0.1.0
            ("executed_plan", "run"),
            ("side_by_side", "branches"),
            ("side_by_side_reason", "branch_reason"),
        ):
            data[key] = data.pop(name)
        data["run"] = self.executed_plan.to_dict()
        return data | {"kv_elements_per_token": self.kv_elements_per_token}


def inspect_model(model: str | Path | Source) -> Info:
    """Describe a model without reading its weights.

    Raises:
        TruedepthError: There is no such model, or its family is not supported.
    """
    source = open_source(model)
    layout = Layout.of(source)
    converted = plan_of(source.config) is not None
    family = original_family(source.config, str(source.path)) if converted else source.family
    empty = empty_model(source.config, source.path)
    config = empty.config
    plan = layout.plan
    if converted:
        alone = {group[0] for group in layout.executed_plan.groups if len(group) == 1}
        reasons = {g[0]: "" for g in plan.groups if len(g) > 1 and g[0] in alone}
    else:
        pairs = ((i, i + 1) for i in range(plan.num_layers - 1))
        found = {pair[0]: layout.why_not_wide(pair) for pair in pairs}
        reasons = {first: reason for first, reason in found.items() if reason}
    refused = bool(reasons) and (converted or len(reasons) == plan.num_layers - 1)
    if layout.is_parallel:  # stages of several layers are these side by side
        refused |= not all(map(layout.is_exact, plan.merged))
    return Info(
        name=source.name,
        origin=source.origin,
        family=family.model_type,
        traced=family.traced,
        inside=source.outer.model_type if source.outer else "",
        mixture=family.is_mixture,
        plan=plan,
        converted=converted,
        parameters=empty.num_parameters(),
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, KEY_VALUE, None) or config.num_attention_heads,
        head_dim=head_dim(config.to_dict()),
        ffn=config.intermediate_size,
        quantization=source.quantization,
        savings=() if converted else _savings(layout),
        executed_plan=layout.executed_plan,
        side_by_side=tuple(reasons),
        side_by_side_reason=next(iter(reasons.values()), ""),
        stages_of_whole_layers=layout.is_parallel,
        engines=refused_by(
            family.model_type,
            refused,
            stages=bool(plan.merged),
            wide=any(len(group) > 1 for group in layout.executed_plan.groups),
            inside=source.outer is not None,
            local=plan.ranks is not None,
        ),
    )


def _savings(original: Layout) -> tuple[Saving, ...]:
    """Plans that take away about 0, 10, 20, 30, 40 and 50 % of the depth."""
    source, num_layers = original.source, original.plan.num_layers
    most = 0 if original.is_parallel else num_layers - 1
    counts = sorted({num_layers * tenth // 10 for tenth in range(5)} | {num_layers // 2})
    found = []
    for pairs in counts:
        plan = Plan.late_pairs(num_layers, pairs)
        staggered = 2 * pairs if 2 * pairs <= most else None
        all_reduces = Layout(source, plan).all_reduces
        if original.is_parallel:
            all_reduces = num_layers - pairs  # one for each layer alone and each pair
        if staggered is not None:
            all_reduces = min(all_reduces, 2 * num_layers - staggered)
        found.append(
            Saving(pairs, staggered, plan.paired_layers, plan.effective_depth, all_reduces)
        )
    return tuple(found)
