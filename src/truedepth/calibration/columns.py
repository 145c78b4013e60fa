"""Which columns of an FFN go to which rank of a local stage.

A column is an inner feature of an FFN: a row of the maps that read, an input of the map that
writes. A model computes the same in any order of its columns, but in a local stage the order says
which rank has which. A rank's heads see only what its own columns have written, and its columns
only what its own heads have. So every column goes where little is missed; as many to every rank:

    missed[j, r] = what rank r lacks of the sub-layers before, in what column j reads
                 + what column j writes, in what the heads of the other ranks read behind it

Both are shares of the variance of what those maps give. Not counted is what linear maps of the
state can tell, as the maps that read are refitted afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from truedepth.calibration.ridge import check_finite
from truedepth.calibration.shares import Missed
from truedepth.calibration.trajectories import Walk
from truedepth.plan.stages import ATTENTION, FFN, LocalStage, Sublayer
from truedepth.runtime.stage import LoadedSublayer, local_states
from truedepth.widening.widen import packed_sizes

RIDGE = 1e-3  # the penalty of a linear map of the state, times the mean of its diagonal
TINY = 1e-30  # instead of 0, to divide by


def arrange(
    walk: Walk, stage: LocalStage, weights: Mapping[str, Tensor], seen: Mapping[Sublayer, Tensor]
) -> None:
    """Put the columns of a local stage's FFNs in the order in which its ranks miss least.

    Mixtures of experts stay as they are, and so does an FFN with parameters besides its maps'.

    Args:
        walk: Its converted model is in front of the stage; the fitted windows are run.
        stage: The stage.
        weights: Its maps and their biases, float32, by name in the original; changed in place.
        seen: What the maps of each sub-layer read in the original, behind their norm: `[fitted
            windows, length, hidden]`.
    """
    found = {each: _columns(walk, each, weights) for each in stage if each.kind == FFN}
    ffns = {ffn: own for ffn, own in found.items() if own and own.count % stage.ranks == 0}
    squares, varying = _features(walk, stage, ffns) if ffns else ({}, {})
    for ffn, own in ffns.items():
        members = walk.loaded((stage,), weights)[0][: stage.index(ffn) + 1]
        linear = _missed_by_columns(walk, own, squares[ffn], members, seen[ffn])
        missed, device = Missed(linear.to(walk.stack.device)), walk.stack.device
        for attention, moments in varying[ffn].items():
            heads = _heads(walk, attention, weights, seen[attention])
            written = [each.to(device) for each in _written_for(own, heads, stage.ranks)]
            missed.heads.append((written, moments.beside.to(device)))
        own.reorder(missed.least().argsort(stable=True).cpu())


@dataclass(frozen=True)
class _Columns:
    """An FFN as columns."""

    name: str
    """The name of the map that writes, within the layer."""

    reads: list[Tensor]
    """The maps that read, each `[columns, hidden]`."""

    biases: list[Tensor]
    """The biases of these maps, each `[columns]`."""

    writes: Tensor
    """`[hidden, columns]`."""

    gain: Tensor
    """The gain of the norm behind the FFN, ones if there is none: `[hidden]`."""

    @property
    def count(self) -> int:
        """The number of columns."""
        return self.writes.shape[1]

    def reorder(self, order: Tensor) -> None:
        """Put column `order[i]` in the place of column i, in the weights that this was made of."""
        for rows in (*self.reads, *self.biases):
            rows.copy_(rows[order])
        self.writes.copy_(self.writes[:, order])


@dataclass(frozen=True)
class _Heads:
    """An attention, as what its heads read."""

    reads: list[Tensor]
    """The maps that read, each `[rows, hidden]`."""

    gain: Tensor
    """The gain of the norm before them, ones if there is none: `[hidden]`."""

    covariance: Tensor
    """The covariance of what they read, `[hidden, hidden]`."""


class Moments:
    """Sums over tokens: how something varies, and how it varies beside what is known."""

    def __init__(self) -> None:
        """Begin with no tokens."""
        self._known = self._cross = self._own = torch.zeros(())

    def add(self, known: Tensor, wanted: Tensor) -> None:
        """Add tokens.

        Args:
            known: `[…, inputs]` float32; without any inputs it is only known what is constant.
            wanted: `[…, outputs]` float32.
        """
        x, z = known.flatten(0, -2), wanted.flatten(0, -2)
        x = torch.cat([x, torch.ones_like(z[:, :1])], -1)
        if not self._own.ndim:
            self._known, self._cross, self._own = (
                left.new_zeros(left.shape[1], right.shape[1])
                for left, right in ((x, x), (x, z), (z, z))
            )
        self._known.addmm_(x.T, x)
        self._cross.addmm_(x.T, z)
        self._own.addmm_(z.T, z)

    @property
    def beside(self) -> Tensor:
        """The covariance of what no linear map of the known tells, times the number of tokens.

        `[outputs, outputs]` float32, on the CPU.

        Raises:
            TruedepthError: It is not finite.
        """
        check_finite(self._known, self._cross, self._own)
        known, cross = self._known.double().cpu(), self._cross.double().cpu()
        inputs = known.diagonal()[:-1]
        inputs += RIDGE * inputs.sum().clamp_min(TINY) / max(1, len(inputs))
        told = torch.linalg.solve(known, cross)
        return self._own.cpu().addmm(cross.T.float(), told.float(), alpha=-1)


def _columns(walk: Walk, ffn: Sublayer, weights: Mapping[str, Tensor]) -> _Columns | None:
    """An FFN as columns, views of the weights; None if there is more in it than its maps."""
    family = walk.layout.source.family
    module = f"{family.ffn.module}."
    inside = {name for name in walk.stack.sublayer_tensors(ffn) if name.startswith(module)}
    reads, writes = _maps(walk, ffn, family.reads), _maps(walk, ffn, family.writes)
    prefix = family.layer.format(ffn.layer)
    parts = {part: [n for n in reads if f"{n}.{part}" in inside] for part in ("weight", "bias")}
    if {name.rpartition(".")[0] for name in inside} != {*reads, *writes} or len(writes) != 1:
        return None
    rows = {
        part: [
            each
            for name in names
            for each in _unpacked(walk, name, weights[f"{prefix}{name}.{part}"])
        ]
        for part, names in parts.items()
    }
    found = _Columns(
        writes[0],
        rows["weight"],
        rows["bias"],
        weights[f"{prefix}{writes[0]}.weight"],
        _gain(walk, ffn, family.ffn.post_norm),
    )
    sizes = {len(each) for each in (*found.reads, *found.biases)}
    return found if sizes == {found.count} else None


def _heads(walk: Walk, attention: Sublayer, weights: Mapping[str, Tensor], seen: Tensor) -> _Heads:
    family = walk.layout.source.family
    prefix = family.layer.format(attention.layer)
    reads = [
        rows
        for name in _maps(walk, attention, family.reads)
        for rows in _unpacked(walk, name, weights[f"{prefix}{name}.weight"])
    ]
    moments = Moments()
    for windows, _ in walk.fitted:
        read = walk.batch(seen, windows)
        moments.add(read[..., :0], read)
    return _Heads(reads, _gain(walk, attention, family.attention.norm), moments.beside)


def _maps(walk: Walk, sublayer: Sublayer, names: Sequence[str]) -> list[str]:
    """Those of the maps that a sub-layer has."""
    module = getattr(walk.layout.source.family, sublayer.kind).module
    inside = walk.stack.sublayer_tensors(sublayer)
    return [name for name in names if name.startswith(f"{module}.") and f"{name}.weight" in inside]


def _unpacked(walk: Walk, name: str, tensor: Tensor) -> tuple[Tensor, ...]:
    """The rows of each map that a map packs."""
    sizes = walk.stack.config.to_dict()
    return torch.split(tensor, packed_sizes(walk.layout.source.family, name, sizes, len(tensor)))


def _gain(walk: Walk, sublayer: Sublayer, norm: str | None) -> Tensor:
    """The gain of a norm of a sub-layer, `[hidden]` float64; ones if there is none."""
    weight = walk.stack.sublayer_tensors(sublayer).get(f"{norm}.weight")
    if weight is None:
        return torch.ones(walk.stack.hidden_size, dtype=torch.float64)
    gain: Tensor = weight.read().double() + walk.layout.source.family.gain_offset
    return gain


def _features(
    walk: Walk, stage: LocalStage, ffns: Mapping[Sublayer, _Columns]
) -> tuple[dict[Sublayer, Tensor], dict[Sublayer, dict[Sublayer, Moments]]]:
    """What the columns of FFNs give in the original.

    Returns:
        By FFN: the squares of its features, summed over tokens, `[columns]`; and, by attention that
        reads behind it, its features in the scale in which that reads them, beside the state before
        the stage.
    """
    squares = {ffn: torch.zeros(own.count, dtype=torch.float64) for ffn, own in ffns.items()}
    varying: dict[Sublayer, dict[Sublayer, Moments]] = {ffn: {} for ffn in ffns}
    family = walk.layout.source.family
    # The first maps of latent attention have no rows of a rank's own.
    by_rank = getattr(walk.stack.config, "kv_lora_rank", None) is None
    stages = [each for layer in walk.originals((stage,)) for each in layer]
    for windows, calls in walk.fitted:
        first = state = walk.batch(walk.converted_states, windows)
        features: dict[Sublayer, Tensor] = {}
        for members in stages:
            scale = state.square().mean(-1, keepdim=True).clamp_min(TINY).rsqrt()
            if family.attention.norm is None:
                scale = torch.ones_like(scale)
            added = torch.zeros_like(state)
            for member in members:
                own = Sublayer(member.index, member.kind)
                for ffn, given in features.items():
                    if own.kind == ATTENTION and by_rank:
                        moments = varying[ffn].setdefault(own, Moments())
                        moments.add(first * scale, given * scale)
                if own in ffns:
                    with _inputs(member, ffns[own].name) as inputs:
                        added = added + member(state, calls)
                    features[own] = inputs[0].float()
                    squares[own] += features[own].double().square().flatten(0, -2).sum(0).cpu()
                else:
                    added = added + member(state, calls)
            state = state + added
    return squares, varying


@contextmanager
def _inputs(member: LoadedSublayer, name: str) -> Iterator[list[Tensor]]:
    """What a map of a sub-layer reads until the block ends."""
    read: list[Tensor] = []
    module = member.layer.get_submodule(name)
    hook = module.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    yield read
    hook.remove()


def _missed_by_columns(
    walk: Walk,
    columns: _Columns,
    squares: Tensor,
    members: Sequence[LoadedSublayer],
    seen: Tensor,
) -> Tensor:
    """What the columns of an FFN miss of the sub-layers before it, `[columns, ranks]`.

    Args:
        walk: Its fitted windows are run.
        columns: The FFN's.
        squares: Of their features: a column counts by how much it writes.
        members: The stage up to the FFN.
        seen: What its maps read in the original.
    """
    *_, last = members
    assert last.ranks is not None
    count = last.ranks.count
    missed = torch.zeros(columns.count, count, dtype=torch.float64)
    if len(members) == 1:
        return missed
    everything, lacking = Moments(), [Moments() for _ in range(count)]
    for windows, calls in walk.fitted:
        *_, (_, state) = local_states(walk.batch(walk.converted_states, windows), members, calls)
        wanted = walk.batch(seen, windows)
        everything.add(wanted[..., :0], wanted)
        for moments, read in zip(lacking, last.normalised(state).chunk(count), strict=True):
            moments.add(read, wanted)
    whole, parts = everything.beside, [moments.beside for moments in lacking]
    for rows in columns.reads:
        own = _variances(rows, whole)
        missed += torch.stack([_variances(rows, part) / own for part in parts], 1)
    weight = squares * columns.writes.double().square().sum(0)
    return missed / len(columns.reads) * (weight / weight.sum().clamp_min(TINY))[:, None]


def _written_for(columns: _Columns, heads: _Heads, ranks: int) -> list[Tensor]:
    """What the columns of an FFN write in what each rank's heads read, `[rows, columns]`.

    In such a scale that the squares are shares of the variance of what their maps give.
    """
    written = heads.gain[:, None] * columns.gain[:, None] * columns.writes.double()
    found: list[list[Tensor]] = [[] for _ in range(ranks)]
    for rows in heads.reads:
        for own, each in zip(rows.double().chunk(ranks), found, strict=True):
            total = _variances(own, heads.covariance).sum() * len(heads.reads) * ranks
            each.append((own @ written / total.sqrt()).float())
    return list(map(torch.cat, found))


def _variances(rows: Tensor, covariance: Tensor) -> Tensor:
    """The variance of `W x` for each row of W, from the covariance of x; more than 0."""
    return ((rows.double() @ covariance.double()) * rows.double()).sum(1).clamp_min(TINY)
