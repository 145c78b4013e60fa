"""Decoding on one device at several effective depths, with random weights of known shapes.

    python benchmarks/one_device.py --json PATH [--shapes SmolLM2-135M,Llama-3.2-1B,…]
        [--length 128] [--depths 0,20,33,50] [--steps 32] [--repetitions 7]

A wide layer runs fewer and larger kernels, which is faster for small layers even without
all-reduces. Batch 1, bfloat16, a static cache and, on a GPU, CUDA graphs of whole steps. All models
run in turn, against the original; `fused` has one product for queries, keys and values and one for
gate and up. Bandwidth counts the weights and the KV cache read per token, as a share of the
bandwidth that copying a large tensor reaches.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, StaticCache

from rows import parser_of
from truedepth.families.registration import register
from truedepth.plan.plan import Plan
from truedepth.runtime.device import default_device
from truedepth.runtime.empty import transformers_config
from truedepth.speed.timing import in_turn
from truedepth.speed.transformers import stopwatch

SHAPES: dict[str, dict[str, Any]] = {
    name: dict(
        zip(
            (
                "num_hidden_layers",
                "hidden_size",
                "intermediate_size",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "vocab_size",
                "tie_word_embeddings",
            ),
            values,
            strict=True,
        )
    )
    for name, values in {
        "tiny": (6, 64, 96, 4, 2, 16, 320, True),
        "SmolLM2-135M": (30, 576, 1536, 9, 3, 64, 49152, True),
        "Llama-3.2-1B": (16, 2048, 8192, 32, 8, 64, 128256, True),
        "Llama-3.2-3B": (28, 3072, 8192, 24, 8, 128, 128256, True),
        "Llama-2-7B": (32, 4096, 11008, 32, 32, 128, 32000, False),
    }.items()
}


class Joined(nn.Module):
    """Linear maps of the same input as one product, computed by the first map that is called."""

    def __init__(self, maps: list[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([linear.weight for linear in maps]), False)
        self.sizes = [linear.out_features for linear in maps]
        self.parts: tuple[Tensor, ...] = ()


class Part(nn.Module):
    """One map of a joined product."""

    def __init__(self, joined: Joined, index: int) -> None:
        super().__init__()
        self.joined = joined
        self.index = index

    def forward(self, states: Tensor) -> Tensor:
        """Its share of the product."""
        if self.index == 0:
            product = nn.functional.linear(states, self.joined.weight)
            self.joined.parts = torch.split(product, self.joined.sizes, dim=-1)
        return self.joined.parts[self.index]


def fuse(model: Any) -> Any:
    """Join queries, keys and values, and gate and up, in the order in which they are called."""
    for layer in model.model.layers:
        for owner, names in (
            (layer.self_attn, ("q_proj", "k_proj", "v_proj")),
            (layer.mlp, ("gate_proj", "up_proj")),
        ):
            joined = Joined([getattr(owner, name) for name in names])
            for index, name in enumerate(names):
                setattr(owner, name, Part(joined, index))
    return model


class Decoder:
    """A model that decodes from a full cache."""

    def __init__(self, model: Any, length: int, steps: int) -> None:
        self.model, self.steps = model, steps
        self.device = model.device
        self.cache = StaticCache(model.config, length + steps)
        self.ids = torch.arange(length, device=self.device)[None] % model.config.vocab_size
        self.token = self.ids[:, :1].clone()
        self.fill()
        self.step: Callable[[], object] = self.decode
        if self.device.type == "cuda":
            self.capture()

    def fill(self) -> None:
        """Fill the cache from its beginning."""
        self.cache.reset()
        self.model(self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def decode(self) -> None:
        """Decode one token."""
        logits = self.model(self.token, past_key_values=self.cache, use_cache=True).logits
        self.token.copy_(logits[:, -1:].argmax(-1))

    def capture(self) -> None:
        """Record the step as a CUDA graph."""
        cuda: Any = torch.cuda
        stream = cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.decode()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.decode()
        self.step = graph.replay

    def seconds(self) -> float:
        """Seconds per token."""
        self.fill()
        return stopwatch(lambda: [self.step() for _ in range(self.steps)], self.device) / self.steps

    @property
    def bytes_read(self) -> int:
        """Bytes of weights and cache read per token."""
        model = self.model
        weights = sum(p.nbytes for name, p in model.named_parameters() if "embed" not in name)
        if model.config.tie_word_embeddings:  # the head is the embedding
            weights += model.get_input_embeddings().weight.nbytes
        cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
        return int(weights + cache)


def build(shape: dict[str, Any], plan: Plan, fused: bool, device: str) -> Any:
    """A model with random weights."""
    config = {
        **shape,
        "model_type": "truedepth_llama",
        "num_hidden_layers": plan.effective_depth,
        "layer_widths": plan.widths,
        "max_position_embeddings": 8192,
    }
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            transformers_config(config, Path("shape")), dtype=torch.bfloat16
        ).eval()
    return fuse(model) if fused else model


def copy_bandwidth(device: str, size: int) -> float:
    """Bytes per second that copying reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [stopwatch(lambda: target.copy_(source), device) for _ in range(12)]
    return 2 * size / median(times[2:])


@torch.inference_mode()
def main() -> None:
    """Measure shape after shape."""
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", default=",".join(name for name in SHAPES if name != "tiny"))
    parser.add_argument("--depths", default="0,20,33,50", help="per cent fewer layers")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    depths = [int(word) for word in arguments.depths.split(",")]
    if 0 not in depths or arguments.steps < 4:
        parser.error("--depths needs 0, the original, and --steps at least 4")
    register()
    device = default_device()
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    copied = copy_bandwidth(device, 1 << (31 if device == "cuda" else 27))
    rows: list[dict[str, Any]] = []
    print(f"{name}, copying at {copied / 1e9:.0f} GB/s")
    for shape_name in arguments.shapes.split(","):
        shape = SHAPES[shape_name]
        layers = shape["num_hidden_layers"]
        plans = [Plan.late_pairs(layers, round(layers * percent / 100)) for percent in depths]
        decoders = {
            (plan.effective_depth, fused): Decoder(
                build(shape, plan, fused, device), arguments.length, arguments.steps
            )
            for plan in plans
            for fused in (False, True)
        }
        runs = [decoder.seconds for decoder in decoders.values()]
        taken = dict(zip(decoders, in_turn(runs, arguments.repetitions), strict=True))
        for (depth, fused), decoder in decoders.items():
            seconds = median(taken[depth, fused])
            row = {
                "device": name,
                "copy_bandwidth": copied,
                "shape": shape_name,
                "layers": layers,
                "depth": depth,
                "fused": fused,
                "length": arguments.length,
                "seconds": taken[depth, fused],
                "speedup": median(taken[layers, False]) / seconds,
                "bandwidth_share": decoder.bytes_read / seconds / copied,
            }
            rows.append(row)
            print(
                f"{shape_name:14} {layers} -> {depth}{', fused' if fused else '':8}"
                f" {seconds * 1e3:8.3f} ms, {row['speedup']:.2f}x,"
                f" {row['bandwidth_share']:.0%} of copying's bandwidth",
                flush=True,
            )
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
        del decoders, decoder


if __name__ == "__main__":
    main()
