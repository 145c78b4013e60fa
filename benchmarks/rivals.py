"""Other methods that make a model shallower without training, after their papers' descriptions.

Every function changes `model.base_model.layers` in place; the caller passes a copy of its own. They
are for comparison only: none of them is part of the package.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from truedepth.depth_study.schedule import Runner, in_order
from truedepth.modeling import LayerForm
from truedepth.plan.plan import Plan
from truedepth.runtime.loading import Loaded
from truedepth.runtime.stage import run_stage, stages_of


def parallel_whole_layers(loaded: Loaded, plan: Plan) -> None:
    """PAR, the form of CQIL (arXiv 2404.06709): the group's layers side by side, each whole."""
    layers = loaded.model.base_model.layers
    _replace(loaded, [_SideBySide(loaded, [layers[i] for i in group]) for group in plan.groups])


class _SideBySide(nn.Module):
    """y = x + Σ_i f_i(x), where x + f_i(x) is the output of layer i."""

    def __init__(self, loaded: Loaded, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self._form = LayerForm(**loaded.source.family.layer_form(loaded.model.config))
        self.members = nn.ModuleList(members)

    def forward(self, hidden_states: Tensor, **call: Any) -> Tensor:
        """Called like a decoder layer."""
        x = hidden_states.float()
        y = x
        for member in self.members:
            state = x
            for stage in stages_of({0: member}, self._form):
                state = run_stage(state, stage, [call])
            y = y + (state - x)
        return y.to(hidden_states.dtype)


def drop_by_influence(loaded: Loaded, ids: Tensor, count: int) -> list[int]:
    """ShortGPT (arXiv 2403.03853): the layers of least block influence, 1 - E cos(x_i, x_{i+1})."""
    states = Runner(loaded, ids).inputs()
    influence = [
        1 - torch.cosine_similarity(before, after, dim=-1).mean().item()
        for before, after in itertools.pairwise(states)
    ]
    dropped = sorted(range(len(influence)), key=influence.__getitem__)[:count]
    drop(loaded, dropped)
    return sorted(dropped)


def greedy_order(loaded: Loaded, ids: Tensor, count: int) -> list[int]:
    """SLEB (arXiv 2402.09025): one layer after another, whichever leaves the least perplexity."""
    runner = Runner(loaded, ids)
    left, dropped = list(range(len(runner.layers))), list[int]()
    for _ in range(count):
        options = {in_order([i for i in left if i != layer]): layer for layer in left}
        losses = {options[done]: nll.mean().item() for done, nll in runner.run(options)}
        least = min(losses, key=losses.__getitem__)
        left.remove(least)
        dropped.append(least)
    return dropped


def drop(loaded: Loaded, layers: Sequence[int]) -> None:
    """Remove layers."""
    kept = [x for i, x in enumerate(loaded.model.base_model.layers) if i not in set(layers)]
    _replace(loaded, kept)


def straightest_span(states: Sequence[Tensor], count: int) -> int:
    """The first of `count` layers over which hidden states turn least, by mean cosine distance.

    Layer 0 is kept, for something must stand before the span.
    """
    turns = {
        start: 1 - torch.cosine_similarity(states[start], states[start + count], dim=-1).mean()
        for start in range(1, len(states) - count)
    }
    return min(turns, key=lambda each: turns[each].item())


def _least_squares(x: Tensor, y: Tensor) -> Tensor:
    """T of least ‖x T - y‖, `[in, out]` float64, from `[windows, length, in]` and `[…, out]`."""
    x, y = (each.flatten(0, 1).double() for each in (x, y))
    gram = x.T @ x
    gram.diagonal().add_(1e-6 * gram.diagonal().mean())
    solution: Tensor = torch.linalg.solve(gram, x.T @ y)
    return solution


@torch.no_grad()
def patch_linearly(loaded: Loaded, ids: Tensor, count: int) -> list[int]:
    """ReplaceMe (arXiv 2505.02819): a span of layers becomes a linear map after the previous FFN.

    The map is the least-squares solution T of (M T + Y ≈ L), where M is the FFN's output in the
    last layer before the span, Y is what it is added to and L is the span's output. T is folded
    into the down projection.
    """
    runner = Runner(loaded, ids)
    states = runner.inputs()
    start = straightest_span(states, count)
    before = states[start - 1]
    attended = before + runner.member("attention", start - 1)(before, runner.calls)
    ffn = runner.member("ffn", start - 1)(attended, runner.calls)
    patch = _least_squares(ffn, states[start + count] - attended)
    name = loaded.source.family.writes[1]
    weight = runner.layers[start - 1].get_parameter(f"{name}.weight")
    weight.copy_(patch.T @ weight.double())
    dropped = list(range(start, start + count))
    drop(loaded, dropped)
    return dropped


@torch.no_grad()
def ghost_layers(loaded: Loaded, ids: Tensor, count: int) -> list[int]:
    """Ghosted Layers (arXiv 2605.15491): a span becomes x + x W, W by least squares."""
    states = Runner(loaded, ids).inputs()
    start = straightest_span(states, count)
    x, y = states[start], states[start + count]
    patch = _least_squares(x, y - x)
    return _patched(loaded, start, count, torch.eye(len(patch), dtype=patch.dtype) + patch)


@torch.no_grad()
def patch_magnitudes(loaded: Loaded, ids: Tensor, count: int) -> list[int]:
    """LinearPatch (arXiv 2505.24680): a span becomes H D Hᵀ, without its fine-tuning.

    H is a Hadamard matrix, which spreads the outliers of single tokens, and D scales each rotated
    channel by the ratio of its mean magnitudes behind and before the span.
    """
    states = Runner(loaded, ids).inputs()
    start = straightest_span(states, count)
    turn = hadamard(states[0].shape[-1])
    before, behind = ((states[at].double() @ turn).abs() for at in (start, start + count))
    scale = behind.mean((0, 1)) / before.mean((0, 1))
    return _patched(loaded, start, count, turn * scale @ turn.T)


def hadamard(size: int) -> Tensor:
    """An orthogonal matrix `[size, size]` float64 whose entries have one magnitude.

    By Sylvester's doubling of 1, or of Paley's second construction from a prime q = 1 mod 4.
    """
    odd = size // (size & -size)
    if odd == 1:
        core = torch.ones(1, 1, dtype=torch.float64)
    else:
        q = 2 * odd - 1  # 2 (q + 1) is 4 times the odd part
        squares = {i * i % q for i in range(1, q)}
        residue = [0, *(1 if i in squares else -1 for i in range(1, q))]
        inner = torch.ones(q + 1, q + 1, dtype=torch.float64)
        inner[0, 0] = 0
        inner[1:, 1:] = torch.tensor([[residue[(i - j) % q] for j in range(q)] for i in range(q)])
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        core = torch.kron(inner, pair) + torch.kron(torch.eye(q + 1, dtype=torch.float64), other)
    while len(core) < size:
        core = torch.cat([torch.cat([core, core], 1), torch.cat([core, -core], 1)])
    found: Tensor = core / len(core) ** 0.5
    if not torch.allclose(found @ found.T, torch.eye(size, dtype=torch.float64)):
        raise ValueError(f"no Hadamard matrix of size {size} by this construction")
    return found


def _patched(loaded: Loaded, start: int, count: int, patch: Tensor) -> list[int]:
    """Put a linear map `[in, out]` into the place of a span of layers."""
    layers = list(loaded.model.base_model.layers)
    before = _Patched(layers[start - 1], patch.float())
    _replace(loaded, [*layers[: start - 1], before, *layers[start + count :]])
    return list(range(start, start + count))


class _Patched(nn.Module):
    """A layer with a linear map behind it."""

    def __init__(self, layer: nn.Module, patch: Tensor) -> None:
        super().__init__()
        self.layer, self.patch = layer, patch

    def forward(self, hidden_states: Tensor, **call: Any) -> Tensor:
        """Called like a decoder layer."""
        x: Tensor = self.layer(hidden_states, **call)
        return (x.float() @ self.patch).to(x.dtype)


def drop_syncs(loaded: Loaded, layers: Sequence[int], ranks: int) -> None:
    """SPD (arXiv 2502.20727): no all-reduce between attention and FFN of these layers.

    A rank's FFN reads the state and its own attention heads' part; so many ranks are simulated.
    """
    kept = loaded.model.base_model.layers
    _replace(
        loaded,
        [_SyncDropped(loaded, x, ranks) if i in layers else x for i, x in enumerate(kept)],
    )


def sync_order(loaded: Loaded, ids: Tensor, ranks: int) -> list[int]:
    """Layers by what the model loses without their sync, least first."""
    layers = list(loaded.model.base_model.layers)
    losses = {}
    for index, layer in enumerate(layers):
        changed = [*layers[:index], _SyncDropped(loaded, layer, ranks), *layers[index + 1 :]]
        _replace(loaded, changed)
        with torch.inference_mode():
            losses[index] = float(loaded.model(ids, labels=ids).loss)
        changed[index].undo()
    _replace(loaded, layers)
    return sorted(losses, key=losses.__getitem__)


class _SyncDropped(nn.Module):
    """y = x + Σ_r p_r + F_r(N'(x + p_r)), p_r what rank r's heads write; layers like Llama's."""

    def __init__(self, loaded: Loaded, layer: Any, ranks: int) -> None:
        super().__init__()
        config: Any = loaded.model.config
        self.layer, self.output = layer, layer.self_attn.o_proj
        layer.self_attn.o_proj = nn.Identity()
        held = -(-config.num_key_value_heads // ranks)  # KV heads of a rank, the last padded
        heads = held * config.num_attention_heads // config.num_key_value_heads
        size, width = heads * layer.self_attn.head_dim, config.intermediate_size // ranks
        self.shards = [
            (slice(r * size, (r + 1) * size), slice(r * width, (r + 1) * width))
            for r in range(ranks)
        ]

    def undo(self) -> None:
        """Give the layer its map back."""
        self.layer.self_attn.o_proj = self.output

    def forward(self, hidden_states: Tensor, **call: Any) -> Tensor:
        """Called like a decoder layer."""
        layer, mlp, linear = self.layer, self.layer.mlp, nn.functional.linear
        features, _ = layer.self_attn(layer.input_layernorm(hidden_states), **call)
        added = torch.zeros_like(hidden_states, dtype=torch.float32)
        for heads, rows in self.shards:
            part = linear(features[..., heads], self.output.weight[:, heads])
            read = layer.post_attention_layernorm(hidden_states + part)
            gate = mlp.act_fn(linear(read, mlp.gate_proj.weight[rows]))
            inside = gate * linear(read, mlp.up_proj.weight[rows])
            added += part.float() + linear(inside, mlp.down_proj.weight[:, rows]).float()
        return (hidden_states.float() + added).to(hidden_states.dtype)


def _replace(loaded: Loaded, layers: Sequence[nn.Module]) -> None:
    model = loaded.model
    model.base_model.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    model.config.use_cache = False  # layers keep the numbers that caches know them by
