"""Sub-layers of neighbouring decoder layers that read one state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from transformers import __version__

from .forms import KINDS, Entry, LayerForm, places_and_ranks, run_sublayer
from .parts import (
    GATHERED,
    SimulatedRanks,
    WholeOutput,
    give_parts,
    mesh_of,
    mix_in,
    on_the_first,
)


class Stage:
    """A stage of a loaded model, shared by the layers that have a sub-layer in it.

    Over several ranks every sub-layer gives a rank's part of its output, and the stage ends in one
    all-reduce: of the sum of the parts, or where norms follow, of the parts side by side.
    """

    def __init__(self, form: LayerForm) -> None:
        self._form = form
        self._members: list[tuple[Any, str]] = []
        self._writers: list[nn.Module] = []
        self._whole: list[tuple[Any, str]] = []
        self._sharded: list[nn.Module] | None = None

    is_local = False
    """Whether its members read what their rank has written, too."""

    def join(self, layer: Any, kind: str) -> None:
        """Make a sub-layer its next member."""
        self._members.append((layer, kind))

    @property
    def is_merged(self) -> bool:
        """Whether it has several members."""
        return len(self._members) > 1

    def give_parts(self) -> None:
        """Let the modules that write give their parts, if they are several."""
        if len(self._members) == 1 and len(self.written(*self._members[0])) < 2:
            return
        for layer, kind in self._members:
            writers = give_parts(layer, self.written(layer, kind), self)
            self._writers += writers
            if not writers:
                self._whole.append((layer, kind))

    def written(self, layer: Any, kind: str) -> list[str]:
        """The names of the modules whose outputs add up to what a member's module gives."""
        modules = dict(layer.named_modules())
        return [name for name in self._form.writes[KINDS.index(kind)] if name in modules]

    @property
    def mesh(self) -> Any:
        """The ranks that share its sub-layers; None in one process."""
        if self._sharded is None:  # by the first run all weights are where they stay
            self._sharded = [writer for writer in self._writers if mesh_of(writer)]
        return mesh_of(self._sharded[0]) if self._sharded else None

    @property
    def _norms_follow(self) -> bool:
        return any(getattr(self._form, kind)[2] for _, kind in self._members)

    def begin(self, x: Tensor) -> Tensor:
        """The state that it is given, `[batch, length, hidden]`, for its members."""
        return x

    def read(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        """What its next member reads, from the state and what the members before it gave."""
        return x

    def run(
        self, parts: list[Tensor], layer: Any, kind: str, normed: Tensor, *args: Any, **call: Any
    ) -> list[Tensor]:
        """Run a member.

        Args:
            parts: What the members before it gave.
            layer: The member's layer.
            kind: `attention` or `ffn`.
            normed: The state that the stage reads, normed for it, `[batch, length, hidden]`.
            args: For attention, the positional arguments that the layer gets.
            call: For attention, its keyword arguments.

        Returns:
            What it gave too.
        """
        part = self._form.output(layer, kind, normed, *args, **call)
        if self.mesh is not None and any(each is layer and k == kind for each, k in self._whole):
            part = on_the_first(part, self.mesh)
        if self.mesh is not None and self._norms_follow:
            return [*parts, part]
        part = self._form.added(layer, kind, part)
        return [parts[0] + part] if parts else [part]

    def summed(self, parts: list[Tensor]) -> list[Tensor]:
        """The sum over all ranks of each of the parts, in one all-reduce."""
        if len(parts) == 1:
            return [self.reduced(parts[0])]
        return list(self.reduced(torch.stack(parts)))

    def reduced(self, part: Tensor) -> Tensor:
        """The sum of what all ranks have, of the same shape."""
        if not part.requires_grad:
            torch.distributed.all_reduce(part, group=self.mesh.get_group())
            return part
        whole = DTensor.from_local(part, self.mesh, [Partial()])
        local: Tensor = whole.redistribute(self.mesh, [Replicate()]).to_local()
        return local

    def end(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        """The state behind it, from the state before it and what its members gave."""
        if self.mesh is None:
            return x + parts[0]
        wholes = self.summed(parts)
        if not self._norms_follow:
            return x + wholes[0]
        for (layer, kind), whole in zip(self._members, wholes, strict=True):
            x = x + self._form.added(layer, kind, whole)
        return x


class LocalStage(Stage):
    """A stage whose members run one after another on every rank, which goes on with its own parts:

        y = x + Σ_r p_r        p_r = Σ_i s_i^r(N_i (x + p_r so far))

    Ranks that are simulated in one process are side by side in the batch while it is open.
    """

    is_local = True

    def __init__(
        self, form: LayerForm, ranks: int, simulated: SimulatedRanks | None, layers: nn.Module
    ) -> None:
        super().__init__(form)
        self._ranks, self.simulated, self._layers = ranks, simulated, layers
        self._shared_by: Any = None

    @property
    def mesh(self) -> Any:
        """The ranks that share the model; those that are simulated in one process."""
        if self.simulated is not None:
            return self.simulated
        if self._shared_by is None:  # by the first run all weights are where they stay
            self._shared_by = next(filter(None, map(mesh_of, self._layers.modules())), None)
            ranks = 1 if self._shared_by is None else self._shared_by.size()
            if ranks != self._ranks:
                world = dist.get_world_size() if dist.is_initialized() else 1
                raise ValueError(wrong_ranks(self._ranks, ranks, world))
        return self._shared_by

    def begin(self, x: Tensor) -> Tensor:
        """The state for its members, simulated ranks side by side."""
        return x if self.simulated is None else self.simulated.spread(x)

    def read(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        """The state and what the rank has written itself."""
        if not self._norms_follow:
            return x + parts[0] if parts else x
        for (layer, kind), part in zip(self._members, parts, strict=False):
            x = x + self._form.added_by_rank(layer, kind, part, self._ranks)
        return x

    def run(
        self, parts: list[Tensor], layer: Any, kind: str, normed: Tensor, *args: Any, **call: Any
    ) -> list[Tensor]:
        """Run a member; see `Stage.run`."""
        if self.simulated is not None:
            batch = len(normed) // self._ranks
            args, call = self.simulated.spread_call((args, call), batch)
        return super().run(parts, layer, kind, normed, *args, **call)

    def summed(self, parts: list[Tensor]) -> list[Tensor]:
        """The sum over all ranks of each of the parts."""
        if self.simulated is None:
            return super().summed(parts)
        return list(map(self.simulated.summed, parts))

    def end(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        """The state behind it, `[batch, length, hidden]`."""
        if self.simulated is not None:
            x = x[: len(x) // self._ranks]
        return super().end(x, parts)

    def keep_to_itself(self, styles: Mapping[str, str]) -> None:
        """Let maps whose outputs would be gathered from ranks with other inputs run whole.

        Args:
            styles: transformers' styles of sharding, by names in a layer.

        Raises:
            ValueError: A member cannot be shared out over the ranks.
        """
        ranks = SimulatedRanks(self._ranks, styles)
        gathered = [name for name, style in styles.items() if style in GATHERED]
        for layer, kind in self._members:
            body, modules = getattr(self._form, kind)[0], dict(layer.named_modules())
            writes = self.written(layer, kind)
            reasons = [ranks.why_not(modules[name], name) for name in writes]
            unknown = f"transformers {__version__} does not say how ranks would share it"
            reason = next(filter(None, reasons), "" if writes else unknown)
            if reason:
                raise ValueError(
                    f"{body} cannot be in a stage that is local to {self._ranks} ranks: {reason}"
                )
            for name in gathered:
                if name.startswith(f"{body}.") and isinstance(modules.get(name), nn.Linear):
                    mix_in(modules[name], WholeOutput)


def wrong_ranks(local: int, ranks: int, processes: int = 1) -> str:
    """What is said of a number of ranks that local stages are not for.

    Args:
        local: The ranks that they are for.
        ranks: Those that share the layers.
        processes: Those that run.
    """
    if ranks == 1 and processes == local:
        return (
            f"this model has stages that are local to {local} tensor-parallel ranks, and"
            f" transformers {__version__} gives each of them all weights of its layers; let one"
            f" process compute what {local} would with simulate_ranks=True"
        )
    return (
        f"this model has stages that are local to {local} tensor-parallel ranks, so {local} ranks"
        f" compute it, not {ranks}; load it over {local}, or let one process compute what {local}"
        " would with simulate_ranks=True"
    )


class Staged:
    """Mixed into the layers that have a sub-layer in a stage of several:

        y = x + Σ_s s(N_s x)

    A layer at whose end a stage is open passes on x and what its members gave so far, `[1 + parts,
    batch, length, hidden]`.
    """

    continues = joined = leaves_open = False
    """Whether the attention is in the stage of the layer before, whether the FFN is in that of the
    attention, and whether the next layer's attention is in that of the FFN."""

    form: LayerForm
    stages: list[Stage]
    """Attention's and the FFN's."""

    def forward(self, hidden_states: Tensor, *args: Any, **call: Any) -> Tensor:
        """From the stream, or x and parts, to the stream, or x and parts."""
        attention, ffn = self.stages
        x, *parts = hidden_states.unbind(0) if self.continues else [attention.begin(hidden_states)]
        state = attention.read(x, parts)
        normed = self.form.normed(self, "attention", state)
        parts = attention.run(parts, self, "attention", normed, *args, **call)
        if not self.joined:
            x, parts = ffn.begin(attention.end(x, parts)), []
        moved = not self.joined or (ffn.is_local and not self.form.parallel)
        if moved:
            state = ffn.read(x, parts)
        if moved or self.form.attention[1] != self.form.ffn[1]:
            normed = self.form.normed(self, "ffn", state)
        parts = ffn.run(parts, self, "ffn", normed)
        return torch.stack([x, *parts]) if self.leaves_open else ffn.end(x, parts)


def merge_stages(
    layers: Any,
    form: LayerForm,
    stages: Sequence[Entry],
    styles: Mapping[str, str],
    simulate: bool = False,
) -> None:
    """Let neighbouring sub-layers read one state, or in local stages what their rank has, in place.

    Args:
        layers: A model's decoder layers.
        form: How they compute.
        stages: Every stage of several.
        styles: transformers' styles of sharding, by names in a layer.
        simulate: Whether this process computes what all ranks of local stages would.

    Raises:
        ValueError: A sub-layer cannot be in a local stage.
    """
    held = {place: Stage(form) for place in range(2 * len(layers))}
    merged = set()
    for places, ranks in map(places_and_ranks, stages):
        stage = held[places[0]]
        if ranks is not None:
            simulated = SimulatedRanks(ranks, styles) if simulate else None
            stage = LocalStage(form, ranks, simulated, layers)
        held |= dict.fromkeys(places, stage)
        merged |= {place // 2 for place in places}
    for index in range(len(layers)):
        modules = dict(layers[index].named_modules())
        several = any(sum(name in modules for name in names) > 1 for names in form.writes)
        if index not in merged and not several:  # experts and shared experts are summed apart
            continue
        layer, places = layers[index], [2 * index, 2 * index + 1]
        mix_into(layer, Staged, form)
        layer.stages = [held[place] for place in places]
        for kind, stage in zip(KINDS, layer.stages, strict=True):
            stage.join(layer, kind)
        layer.continues = held[places[0]] is held.get(places[0] - 1)
        layer.joined = held[places[0]] is held[places[1]]
        layer.leaves_open = held[places[1]] is held.get(places[1] + 1)
    for each in dict.fromkeys(held.values()):
        if isinstance(each, LocalStage):
            each.keep_to_itself(styles)
        each.give_parts()


def mix_into(layer: Any, behaviour: type, form: LayerForm) -> None:
    """Give a layer the forward of `Staged` or `SideBySide`, in place."""
    mix_in(layer, behaviour)
    layer.form = form


class SideBySide:
    """Mixed into the layers of a group that run on one input x:

        a = x + Σ A_i(N_i x)        y = a + Σ F_i(N'_i a)

    In `parallel` families the FFNs read x instead of a. Layers before the last pass on x and the
    sum a so far, `[2, batch, length, hidden]`; the last returns y.
    """

    is_first = is_last = False
    members: tuple[Any, ...] = ()
    form: LayerForm

    def forward(self, hidden_states: Tensor, *args: Any, **call: Any) -> Tensor:
        """From x (the first layer) or x and a: x and a, or y (the last layer)."""
        x, a = (hidden_states, hidden_states) if self.is_first else hidden_states.unbind(0)
        a = a + run_sublayer(self, self.form, "attention", x, *args, **call)
        if not self.is_last:
            return torch.stack([x, a])
        y, entered = a, x if self.form.parallel else a
        for member in self.members:
            y = y + run_sublayer(member, self.form, "ffn", entered)
        return y
