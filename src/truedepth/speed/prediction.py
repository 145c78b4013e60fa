"""`truedepth predict`: the time of a pass before and after, without converting anything.

The prediction adds up the times of a plan's layers, which are measured on stacks of layers with
random weights. Either the layers are sharded over ranks of this machine, or one rank's share is
measured and the all-reduces of a known link are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch

from truedepth.errors import TruedepthError
from truedepth.options import Bounds, OneOf, checked
from truedepth.plan.config import plan_of
from truedepth.plan.plan import Plan
from truedepth.plan.stages import ranks_of, staggered_stages, whole_layer
from truedepth.progress import working
from truedepth.runtime.device import device_of, fast_dtype
from truedepth.sources.opening import open_source
from truedepth.sources.source import Source
from truedepth.speed.layer_timing import LayerTimes, layer_times, rank_config, unpaired_config
from truedepth.speed.links import Link, parse_link
from truedepth.speed.ranks import check_accelerator
from truedepth.speed.timing import Case, Task
from truedepth.tensors import dtype_name
from truedepth.widening.layout import Layout
from truedepth.widening.padding import head_padding

PAYS = 1.05
"""The smallest speed-up that is worth changing a model for."""


@dataclass(frozen=True)
class Pass:
    """What the time of one pass consists of, in seconds: of one token, or of a prompt."""

    weights: float
    """The products with the layers' weights at the speed of one large product."""

    layers: float
    """The rest of the layers' time: short kernels, kernel launches, attention."""

    all_reduces: float
    """The all-reduces of the layers."""

    rest: float
    """Embedding, last norm and head, including their collectives."""

    @property
    def total(self) -> float:
        """The whole time, in seconds."""
        return self.weights + self.layers + self.all_reduces + self.rest


@dataclass(frozen=True)
class Costs:
    """What passes of any plan are made of."""

    measured: LayerTimes
    all_reduce: float
    """Seconds of one all-reduce; 0 for one rank."""

    rest: float
    """Seconds of embedding, last norm and head, with their collectives."""

    def of(self, plan: Plan) -> Pass:
        """The time of one pass under a plan, as engines run it."""
        # A local stage saves all-reduces alone.
        shared = sum(len(stage) - 1 for stage in plan.merged if ranks_of(stage) is None)
        layers = sum(self.measured.layers[width] for width in plan.widths)
        layers += shared * self.measured.shared
        products = min(layers, plan.num_layers * self.measured.weights)
        return Pass(products, layers - products, plan.all_reduces * self.all_reduce, self.rest)


@dataclass(frozen=True)
class Prediction:
    """What `predict` measured and predicts."""

    model: str
    plan: Plan
    ranks: int
    link: Link | None
    """The link; None if all-reduces were measured or there is one rank."""

    device: str
    dtype: str
    task: str
    batch: int
    length: int
    message: int
    """Bytes of one all-reduce."""

    fused: bool
    """Whether the stages were fused."""

    padded: bool
    """Whether heads were counted as padded, as their number is not divisible by `ranks`."""

    measured: LayerTimes
    before: Pass
    after: Pass

    @property
    def speedup(self) -> float:
        """The original's time, divided by that under the plan."""
        return self.before.total / self.after.total

    @property
    def pays(self) -> bool:
        """Whether the speed-up is at least `PAYS`."""
        return self.speedup >= PAYS

    def to_dict(self) -> dict[str, Any]:
        """The prediction as JSON-compatible data."""
        return asdict(replace(self, plan=self.plan.unpaired)) | {
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
    all_reduces: Annotated[int | None, Bounds(1)] = None,
    ranks: Annotated[int, Bounds(1)] = 1,
    link: Link | str | None = None,
    task: Annotated[str, OneOf("decode", "prefill")] = "decode",
    batch: Annotated[int, Bounds(1)] = 1,
    length: Annotated[int, Bounds(1)] = 128,
    fuse: bool = False,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> Prediction:
    """Predict how long a token or a prompt takes in a model as it is and under a plan.

    Args:
        model: What `open_source` takes; its weights are not read.
        plan: The plan; default: a converted model's own.
        depth: Effective depth of pairs of layers, instead of a plan; which ones does not affect
            speed.
        all_reduces: Number of all-reduces of staggered layers, instead of a plan.
        ranks: Tensor-parallel size.
        link: Link between the ranks, or what `parse_link` reads, such as pcie-host; default:
            all-reduces are measured on this machine.
        task: What is predicted. decode: one token, with `length` tokens in the KV cache; prefill:
            one pass over prompts of `length` tokens.
        batch: Number of sequences that run at a time.
        length: Number of tokens in the KV cache or in each prompt.
        fuse: Time fused stages, of the model as it is and under the plan; see `truedepth.fuse`.
        device: Default: the first GPU, else the CPU.
        dtype: Dtype of the weights. Default: on a CPU bfloat16 if it is fast there, else float32;
            on a GPU the config's dtype.

    Raises:
        TruedepthError: The model, link or device does not exist, the family is not supported, not
            one of plan, depth and all_reduces is given or it does not fit the model, its stages
            cannot be fused, or there are too few GPUs.
    """
    source = open_source(model)
    link = parse_link(link) if isinstance(link, str) else link
    where = device_of(device)
    if link is None:
        check_accelerator(ranks, where)
    plan = _plan(source, plan, depth, all_reduces)
    if plan.ranks not in (None, ranks):
        raise TruedepthError(
            f"The plan has stages that are local to {plan.ranks} tensor-parallel ranks; give --tp"
            f" {plan.ranks}."
        )
    run = _executed(source, plan)
    dtype = dtype or _default_dtype(source, where)
    case = Case(Task(task), length, batch)
    measured = _times(source, run.widths, bool(run.merged), case, where, dtype, ranks, link, fuse)
    costs = costs_of(measured, link, source.config, case, dtype, ranks)
    return Prediction(
        model=source.name,
        plan=plan,
        ranks=ranks,
        link=link,
        device=str(where),
        dtype=dtype_name(dtype),
        task=case.task.value,
        batch=batch,
        length=length,
        message=message_bytes(source.config, case, dtype),
        fused=fuse,
        padded=bool(head_padding(source.config, ranks)),
        measured=measured,
        before=costs.of(plan.unpaired),
        after=costs.of(run),
    )


def seconds_of_plans(
    source: Source,
    max_group: int = 2,
    *,
    ranks: int = 1,
    link: Link | str | None = None,
    device: str | torch.device | None = None,
) -> Callable[[Plan], float]:
    """A function of plans, the seconds that they are predicted to take per token.

    Layers are timed once, at the first call, with their stages fused where the family allows it.

    Args:
        source: An original.
        max_group: The most layers in a group of a plan.
        ranks: Tensor-parallel size.
        link: Link between the ranks, or what `parse_link` reads; None for one rank.
        device: As in `predict`.

    Raises:
        TruedepthError: The link or the device does not exist, or the family is not supported.
    """
    wire = parse_link(link) if isinstance(link, str) else link
    where = device_of(device)
    dtype, case = _default_dtype(source, where), Case(Task.decode, 128)
    folds = not source.family.side_by_side_only
    widths = range(1, max_group + 1) if folds else [1]

    @cache
    def costs() -> Costs:
        measured = _times(source, widths, True, case, where, dtype, ranks, wire, folds)
        return costs_of(measured, wire, source.config, case, dtype, ranks)

    @cache
    def seconds(plan: Plan) -> float:
        return costs().of(_executed(source, plan)).total

    return seconds


def _times(
    source: Source,
    widths: Iterable[int],
    staggered: bool,
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    ranks: int,
    link: Link | None,
    fused: bool,
) -> LayerTimes:
    """Times of layers: sharded over ranks of this machine, or with a link of one rank's share."""
    config = unpaired_config(source.config, ranks)
    if link is not None:
        config = rank_config(config, ranks)
    with working("Timing layers"):
        return layer_times(
            config,
            source.path,
            sorted({1, *widths}),
            case,
            str(device),
            dtype,
            ranks if link is None else 1,
            staggered=staggered,
            fused=fused,
        )


def message_bytes(config: Mapping[str, Any], case: Case, dtype: torch.dtype) -> int:
    """Bytes of one all-reduce: the hidden states of all tokens of a pass."""
    size: int = case.rows * config["hidden_size"] * dtype.itemsize
    return size


def costs_of(
    measured: LayerTimes,
    link: Link | None,
    config: Mapping[str, Any],
    case: Case,
    dtype: torch.dtype,
    ranks: int,
) -> Costs:
    """What passes are made of, over a link or, without one, as measured.

    Args:
        measured: Times of layers for this case; with a link, of one rank's share.
        link: The link between the ranks.
        config: Contents of config.json.
        case: What is predicted.
        dtype: Dtype of the hidden states.
        ranks: Tensor-parallel size.
    """
    if ranks == 1:
        return Costs(measured, 0.0, measured.rest)
    if link is None:
        return Costs(measured, measured.all_reduce, measured.rest)
    # The rest includes an all-reduce after the embedding and an all-gather after the head, which
    # takes half as long as an all-reduce of the same size. Only the last token has logits.
    each = link.all_reduce(message_bytes(config, case, dtype), ranks)
    logits = case.batch * config["vocab_size"] * dtype.itemsize
    return Costs(measured, each, measured.rest + each + link.all_reduce(logits, ranks) / 2)


def _default_dtype(source: Source, device: torch.device) -> torch.dtype:
    """On a CPU bfloat16 if it is fast there, else float32; on a GPU the config's dtype."""
    if device.type == "cpu":
        return fast_dtype(source, device)
    given = source.config.get("dtype") or source.config.get("torch_dtype") or "bfloat16"
    dtype: torch.dtype = getattr(torch, given)
    return dtype


def _plan(source: Source, plan: Plan | None, depth: int | None, all_reduces: int | None) -> Plan:
    """The plan to predict, for a model that can be converted or is converted already."""
    if [plan, depth, all_reduces].count(None) < 2:
        raise TruedepthError("Say what runs together with one of plan, depth and all_reduces.")
    own = plan_of(source.config)
    if own is None:
        source.family  # noqa: B018  raises if it is not supported
    source.check_plain("which truedepth does not compute with")
    num_layers = own.num_layers if own else source.num_layers
    if depth is not None:
        if not num_layers - num_layers // 2 <= depth <= num_layers:
            raise TruedepthError(
                f"{num_layers} layers in pairs have an effective depth of"
                f" {num_layers - num_layers // 2} to {num_layers}, not {depth}."
            )
        plan = Plan.late_pairs(num_layers, num_layers - depth)
    if all_reduces is not None:
        whole_layers = Layout.of(source).is_parallel
        least = num_layers if whole_layers else num_layers + 1
        if not least <= all_reduces <= 2 * num_layers:
            said = "layers that are stages" if whole_layers else "staggered layers"
            raise TruedepthError(
                f"{num_layers} {said} have {least} to {2 * num_layers} all-reduces, not"
                f" {all_reduces}; for fewer give --plan."
            )
        saved, last = 2 * num_layers - all_reduces, num_layers - 1
        layers = range(num_layers - saved, num_layers)
        stages = [whole_layer(each) for each in layers]
        if not whole_layers:
            stages = staggered_stages(last - saved, last)
        plan = Plan(num_layers, stages=stages)
    plan = plan or own
    if plan is None:
        raise TruedepthError(
            f"{source.name} is not converted yet, so it has no plan; give --all-reduces, --depth"
            " or --plan."
        )
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
