"""`truedepth predict`: a token's time before and after pairing, with nothing converted.

What the layers of a plan take, measured on stacks of them with random weights, adds up. They are
sharded over ranks of this machine; or one rank's share is measured, and what is known of a link
added.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from truedepth.errors import TruedepthError
from truedepth.families.lookup import family_of
from truedepth.options import Bounds, checked
from truedepth.plan.config import plan_of
from truedepth.plan.plan import Plan
from truedepth.progress import working
from truedepth.runtime.device import device_of, fast_dtype
from truedepth.sources.opening import open_source
from truedepth.sources.source import Source
from truedepth.speed.layer_timing import LayerTimes, layer_times, rank_config, unpaired_config
from truedepth.speed.links import Link
from truedepth.speed.ranks import check_accelerator
from truedepth.speed.timing import Case, Task
from truedepth.tensors import dtype_name
from truedepth.widening.layout import Layout
from truedepth.widening.padding import head_padding

PAYS = 1.05
"""The least speed-up worth a changed model."""


@dataclass(frozen=True)
class Token:
    """Where the time of a token goes, in seconds."""

    weights: float
    """Reading the weights of layers at the measured bandwidth."""

    layers: float
    """What the layers take beyond that: short kernels, their launches, attention."""

    all_reduces: float
    rest: float
    """Embedding, last norm and head, and their collectives."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.layers + self.all_reduces + self.rest


@dataclass(frozen=True)
class Prediction:
    """What `truedepth predict` prints."""

    model: str
    plan: Plan
    ranks: int
    link: Link | None
    """None is measured, or one rank."""

    device: str
    dtype: str
    batch: int
    length: int
    padded: bool
    """Heads do not divide by the ranks and were taken as padded."""

    measured: LayerTimes
    before: Token
    after: Token

    @property
    def speedup(self) -> float:
        """Of a token."""
        return self.before.total / self.after.total

    @property
    def pays(self) -> bool:
        """Whether that is worth a changed model."""
        return self.speedup >= PAYS

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {
            "plan": self.plan.to_dict(),
            "speedup": self.speedup,
            "pays": self.pays,
        }


@checked
def predict(
    model: str | Path | Source,
    plan: Plan | None = None,
    *,
    depth: Annotated[int | None, Bounds(1)] = None,
    ranks: Annotated[int, Bounds(1)] = 1,
    link: Link | None = None,
    batch: Annotated[int, Bounds(1)] = 1,
    length: Annotated[int, Bounds(1)] = 128,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> Prediction:
    """Time a token before and after pairing would take.

    Args:
        model: What `open_source` takes; its weights are not read.
        plan: Of its layers; of a converted model by default its own.
        depth: Effective depth, instead of a plan; which layers are paired does not affect speed.
        ranks: Tensor-parallel size.
        link: Between them; by default all-reduces are measured on this machine.
        batch: Number of sequences that run at a time.
        length: Tokens in the KV cache.
        device: By default the first GPU, else the CPU.
        dtype: Of weights; by default bfloat16 on CPUs that are fast at it and float32 on others,
            on a GPU what the config says.

    Raises:
        TruedepthError: There is no such model or device, its family is not supported, nothing says
            what to pair, or there are not so many GPUs to measure on.
    """
    source = open_source(model)
    where = device_of(device)
    if link is None:
        check_accelerator(ranks, where)
    plan = _plan(source, plan, depth)
    run = _executed(source, plan)
    if dtype is None:
        given = source.config.get("dtype") or source.config.get("torch_dtype") or "bfloat16"
        dtype = fast_dtype(source, where) if where.type == "cpu" else getattr(torch, given)
    config = unpaired_config(source.config, ranks)
    size = batch * config["hidden_size"] * dtype.itemsize
    if link is not None:
        config = rank_config(config, ranks)
    with working("Timing layers"):
        measured = layer_times(
            config,
            source.path,
            sorted({1, *run.widths}),
            Case(Task.decode, length, batch),
            str(where),
            dtype,
            ranks if link is None else 1,
        )
    each, rest = measured.all_reduce, measured.rest
    if link is not None:  # the embedding is summed too, and the head gathered: half a ring's steps
        each = link.all_reduce(size, ranks)
        logits = batch * source.config["vocab_size"] * dtype.itemsize
        rest += each + link.all_reduce(logits, ranks) / 2

    def token(of: Plan) -> Token:
        layers = sum(measured.layers[width] for width in of.widths)
        reading = min(layers, of.num_layers * measured.weights)
        return Token(
            weights=reading,
            layers=layers - reading,
            all_reduces=of.all_reduces * each if ranks > 1 else 0.0,
            rest=rest,
        )

    return Prediction(
        model=source.name,
        plan=plan,
        ranks=ranks,
        link=link,
        device=str(where),
        dtype=dtype_name(dtype),
        batch=batch,
        length=length,
        padded=bool(head_padding(source.config, ranks)),
        measured=measured,
        before=token(plan.unpaired),
        after=token(run),
    )


def _plan(source: Source, plan: Plan | None, depth: int | None) -> Plan:
    """What is predicted, of a model that can be paired or is."""
    own = plan_of(source.config)
    if own is None:
        family_of(source.config, str(source.path))
    num_layers = own.num_layers if own else source.num_layers
    if depth is not None:
        if not num_layers - num_layers // 2 <= depth <= num_layers:
            raise TruedepthError(
                f"{num_layers} layers in pairs have an effective depth of"
                f" {num_layers - num_layers // 2} to {num_layers}, not {depth}."
            )
        plan = Plan.late_pairs(num_layers, num_layers - depth)
    plan = plan or own
    if plan is None:
        raise TruedepthError(f"{source.name} is not converted yet: say what to pair.")
    if plan.num_layers != num_layers:
        raise TruedepthError(
            f"The plan is for {plan.num_layers} layers; {source.name} has {num_layers}."
        )
    return plan


def _executed(source: Source, plan: Plan) -> Plan:
    """The plan as engines run it; one that a converted model does not have is taken as it is."""
    own = plan_of(source.config)
    if own is None:
        return Layout(source, plan).executed_plan
    return Layout.of(source).executed_plan if own == plan else plan
