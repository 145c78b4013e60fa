"""Plans on one device, with random weights of known shapes: decoding, prefill, simulated ranks.

    python benchmarks/one_device.py --json PATH [--shapes SmolLM2-135M,Llama-3.2-1B,…]
        [--all-reduces 77,67,50] [--length 128] [--prompt 1024] [--steps 32] [--repetitions 7]
        [--ranks 4] [--delays 5,16,40]

Plans of pairs and staggered plans leave so many per cent of the original's all-reduces: 46, 40 and
30 of 60. A wide layer runs fewer and larger kernels, and so does a stage that is fused
(`truedepth.fuse`), which is faster for small layers even without all-reduces. Batch 1, bfloat16;
decoding with a static cache and, on a GPU, CUDA graphs of whole steps. Each plan is loaded beside
the original, both as they are and fused, and all four run in turn. Bandwidth counts the weights and
the KV cache read per token, as a share of the bandwidth that copying a large tensor reaches.

Simulated ranks: one rank's share of the layers decodes, and in place of every all-reduce the device
spins for so many microseconds, inside the graph.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StaticCache

import truedepth as td
from rows import Rows, parser_of
from stages import plans
from truedepth.families.registration import register
from truedepth.plan.plan import Plan
from truedepth.runtime.device import default_device
from truedepth.runtime.empty import transformers_config
from truedepth.runtime.kv_cache import cache_argument
from truedepth.speed.layer_timing import planned, rank_config, unpaired_config
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

SPINS = 64
"""Spins that are timed together, to find how long one takes."""


class Spin:
    """Keeps a device busy for a time, in order with its other work."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.fixed, self.per_cycle = 0.0, 0.0
        if device == "cuda":
            few, many = 1000, 100_000
            short, long = (self._measured(cycles) for cycles in (few, many))
            self.per_cycle = (long - short) / (many - few)
            self.fixed = short - few * self.per_cycle

    def _cycles(self, cycles: int) -> None:
        sleep: Any = torch.cuda._sleep
        sleep(cycles)

    def _measured(self, cycles: int) -> float:
        """Seconds of one spin among others in a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(SPINS):
                self._cycles(cycles)
        times = [stopwatch(graph.replay, self.device) for _ in range(12)]
        return median(times[2:]) / SPINS

    def __call__(self, seconds: float) -> None:
        """Spin for so long; on a GPU at least as long as an empty kernel takes."""
        if self.device == "cuda":
            self._cycles(max(0, round((seconds - self.fixed) / self.per_cycle)))
            return
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass


class Decoder:
    """A model that decodes from a full cache."""

    def __init__(self, model: Any, length: int, steps: int) -> None:
        self.model, self.steps = model, steps
        self.device = model.device
        self.cache = StaticCache(model.config, length + steps)
        self.given = cache_argument(model, self.cache)
        self.ids = torch.arange(length, device=self.device)[None] % model.config.vocab_size
        self.token = self.ids[:, :1].clone()
        self.fill()
        self.step: Callable[[], object] = self.decode
        if self.device.type == "cuda":
            self.capture()

    def fill(self) -> None:
        """Fill the cache from its beginning."""
        self.cache.reset()
        self.model(self.ids, **self.given, use_cache=True, logits_to_keep=1)

    def decode(self) -> None:
        """Decode one token."""
        logits = self.model(self.token, **self.given, use_cache=True).logits
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


def original_config(shape: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of a model of this shape."""
    return {**shape, "model_type": "llama", "max_position_embeddings": 8192}


def even_numbers(layers: int, percents: list[int]) -> list[int]:
    """So many per cent of a model's all-reduces; even, as pairs of layers save two at a time."""
    return [2 * round(layers * percent / 100) for percent in percents]


def build(shape: dict[str, Any], plan: Plan, fused: bool, device: str, ranks: int = 1) -> Any:
    """A model with random weights under a plan; over several ranks, one rank's share of it."""
    where = Path("shape")
    config = unpaired_config(original_config(shape), ranks)
    if ranks > 1:
        config = rank_config(config, ranks)
    config |= planned(config, where, plan)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            transformers_config(config, where), dtype=torch.bfloat16
        ).eval()
    return td.fuse(model) if fused else model


def copy_bandwidth(device: str, size: int) -> float:
    """Bytes per second that copying reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [stopwatch(lambda: target.copy_(source), device) for _ in range(12)]
    return 2 * size / median(times[2:])


def prefill(model: Any, length: int) -> float:
    """Seconds of a pass over a prompt."""
    ids = torch.arange(length, device=model.device)[None] % model.config.vocab_size
    return stopwatch(partial(model, ids, use_cache=True, logits_to_keep=1), model.device)


def spin_between(model: Any, plan: Plan, spin: Spin, seconds: float) -> None:
    """Let every layer spin behind it, once for each stage that ends there, and the embedding once.

    Layers are those of the model: members of a group are one.
    """
    home = {layer: index for index, group in enumerate(plan.groups) for layer in group}
    ends = [home[stage[-1].layer] for stage in plan.stages]

    def behind(times: int, *called: Any) -> None:
        for _ in range(times):
            spin(seconds)

    model.get_input_embeddings().register_forward_hook(partial(behind, 1))
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(partial(behind, ends.count(index)))


def timed(models: dict[str, Any], arguments: Any, copied: float) -> dict[str, dict[str, Any]]:
    """Decoding and prefill of models in turn."""
    decoders = {
        name: Decoder(model, arguments.length, arguments.steps) for name, model in models.items()
    }
    repeat = partial(in_turn, repetitions=arguments.repetitions)
    decoded = repeat([decoder.seconds for decoder in decoders.values()])
    filled = repeat([partial(prefill, model, arguments.prompt) for model in models.values()])
    return {
        name: {
            "decode": decode,
            "prefill": fill,
            "speedup": median(decoded[0]) / median(decode),
            "prefill_speedup": median(filled[0]) / median(fill),
            "bandwidth_share": decoders[name].bytes_read / median(decode) / copied,
        }
        for name, decode, fill in zip(models, decoded, filled, strict=True)
    }


def simulated(
    shape: dict[str, Any], plan: Plan, spin: Spin, delays: list[float], arguments: Any
) -> dict[str, dict[str, Any]]:
    """Decoding of one rank's share with spins, of the original and a plan, both fused, in turn."""
    found = {}
    for delay in delays:
        decoders = []
        for each in (plan.unpaired, plan):
            model = build(shape, each, True, spin.device, arguments.ranks)
            spin_between(model, each, spin, delay)
            decoders.append(Decoder(model, arguments.length, arguments.steps))
        base, own = in_turn([each.seconds for each in decoders], arguments.repetitions)
        found[f"{delay * 1e6:g} µs"] = {
            "original": base,
            "plan": own,
            "all_reduces": [plan.unpaired.all_reduces + 1, plan.all_reduces + 1],
            "speedup": median(base) / median(own),
        }
    return found


@torch.inference_mode()
def main() -> None:
    """Measure shape after shape; rows that the file has are not measured again."""
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", default=",".join(name for name in SHAPES if name != "tiny"))
    parser.add_argument("--all-reduces", default="77,67,50", help="per cent of the original's")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--ranks", type=int, default=4, help="number of simulated ranks")
    parser.add_argument("--delays", default="5,16,40", help="microseconds of an all-reduce")
    arguments = parser.parse_args()
    percents = [int(word) for word in arguments.all_reduces.split(",")]
    delays = [float(word) * 1e-6 for word in arguments.delays.split(",")]
    if arguments.steps < 4:
        parser.error("--steps needs at least 4")
    register()
    device = default_device()
    copied = copy_bandwidth(device, 1 << (31 if device == "cuda" else 27))
    spin = Spin(device)
    rows = Rows(arguments.json)
    rows["setup"] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "copy_bandwidth": copied,
        "empty_spin": spin.fixed,
        **{name: getattr(arguments, name) for name in ("length", "prompt", "steps", "ranks")},
    }
    rows.show("setup")
    for shape_name in arguments.shapes.split(","):
        shape = SHAPES[shape_name]
        layers = shape["num_hidden_layers"]
        found = plans(layers, even_numbers(layers, percents))
        base = found.pop("original")
        for name, plan in found.items():
            title = f"{shape_name}, {name} of {2 * layers}"
            if title not in rows:
                models = {
                    f"{said}{how}": build(shape, each, bool(how), device)
                    for said, each in (("original", base), (name, plan))
                    for how in ("", ", fused")
                }
                rows[title] = timed(models, arguments, copied)
                del models
                ranks = simulated(shape, plan, spin, delays, arguments)
                rows[f"{title}, {arguments.ranks} ranks"] = ranks
            show(title, rows[title], rows[f"{title}, {arguments.ranks} ranks"])


def show(title: str, models: dict[str, Any], ranks: dict[str, Any]) -> None:
    """Print one plan."""
    print(title)
    for name, each in models.items():
        print(
            f"  {name:22} decode {median(each['decode']) * 1e3:8.3f} ms, {each['speedup']:.2f}x,"
            f" {each['bandwidth_share']:.0%} of copying's bandwidth; prefill"
            f" {median(each['prefill']) * 1e3:8.3f} ms, {each['prefill_speedup']:.2f}x"
        )
    for delay, each in ranks.items():
        print(f"  ranks, {delay}: {each['speedup']:.2f}x", flush=True)


if __name__ == "__main__":
    main()
