"""What a model is and what a plan would save, from its config alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from truedepth.engines.support import refused_by
from truedepth.families.family import KEY_VALUE, head_dim
from truedepth.families.lookup import made_from
from truedepth.plan.config import plan_of
from truedepth.plan.plan import Plan
from truedepth.runtime.empty import empty_model
from truedepth.sources.opening import open_source
from truedepth.sources.source import Source
from truedepth.widening.layout import as_run


@dataclass(frozen=True)
class Saving:
    """What a number of pairs would save."""

    pairs: int
    paired_layers: int
    effective_depth: int
    all_reduces_per_token: int
    """At any tensor-parallel size above 1."""


@dataclass(frozen=True)
class Info:
    """What `truedepth info` prints."""

    name: str
    origin: str
    family: str
    plan: Plan
    """Of a converted model its own; of any other all layers alone."""

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

    run: Plan
    """`plan` with the layers of branch groups by themselves, as engines run them."""

    branches: tuple[int, ...]
    """First layers of the pairs that would be branch groups; of a converted model, of those that
    are.
    """

    branch_reason: str
    """Why, of the first of them, as the end of a sentence."""

    engines: dict[str, str]
    """Every engine and why it does not run the model in groups; empty where it does."""

    @property
    def kv_elements_per_token(self) -> int:
        """Keys and values of all layers for one token. A plan does not change it."""
        return 2 * self.plan.num_layers * self.kv_heads * self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        data = asdict(self) | {"plan": self.plan.to_dict(), "run": self.run.to_dict()}
        return data | {"kv_elements_per_token": self.kv_elements_per_token}


def inspect_model(model: str | Path | Source) -> Info:
    """Describe a model without reading its weights.

    Raises:
        TruedepthError: There is no such model, or its family is not supported.
    """
    source = open_source(model)
    plan = plan_of(source.config)
    family = source.family if plan is None else made_from(source.config, str(source.path))
    empty = empty_model(source.config, source.path)
    config = empty.config
    own = plan or Plan(source.num_layers)
    run = as_run(source, own)
    if plan:
        alone = {group[0] for group in run.groups if len(group) == 1}
        reasons = {g[0]: "" for g in plan.groups if len(g) > 1 and g[0] in alone}
    else:
        pairs = ((i, i + 1) for i in range(own.num_layers - 1))
        found = {pair[0]: source.family.why_branches(config, pair) for pair in pairs}
        reasons = {first: reason for first, reason in found.items() if reason}
    whole = bool(reasons) and (plan is not None or len(reasons) == own.num_layers - 1)
    return Info(
        name=source.name,
        origin=source.origin,
        family=family.model_type,
        plan=own,
        converted=plan is not None,
        parameters=empty.num_parameters(),
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, KEY_VALUE, None) or config.num_attention_heads,
        head_dim=head_dim(config.to_dict()),
        ffn=config.intermediate_size,
        quantization=source.quantization,
        savings=() if plan else _savings(source),
        run=run,
        branches=tuple(reasons),
        branch_reason=next(iter(reasons.values()), ""),
        engines=refused_by(family.model_type, whole),
    )


def _savings(source: Source) -> tuple[Saving, ...]:
    """Plans that take away about 0, 10, 20, 30, 40 and 50 % of the depth."""
    num_layers = source.num_layers
    counts = sorted({num_layers * tenth // 10 for tenth in range(5)} | {num_layers // 2})
    plans = [(pairs, Plan.late_pairs(num_layers, pairs)) for pairs in counts]
    return tuple(
        Saving(
            pairs,
            plan.paired_layers,
            plan.effective_depth,
            as_run(source, plan).all_reduces_per_token(2),
        )
        for pairs, plan in plans
    )
