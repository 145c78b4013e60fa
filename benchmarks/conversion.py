"""Memory and time of converting a synthetic checkpoint, against copying its files.

Writes a checkpoint with a known model's shapes in bfloat16, then in turn copies it and converts it
in a separate process, whose anonymous resident memory is sampled. Half of a dense model's layers
become pairs; a mixture of experts is staggered, which copies every tensor. Both begin without the
source in the page cache and end with the copy on the disk. Needs disk for two checkpoints, and
Linux.

With --sparse the checkpoint takes no disk: its files are holes, which read as zeros, and what is
computed is written to /dev/null. That shows memory and the tensors that come out, but not speed.

    python benchmarks/conversion.py [--model llama-3-70b] [--layers 8] [--runs 5] [--json PATH]
    python benchmarks/conversion.py --model mixtral-8x22b --sparse [--json PATH]
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from rows import machine, parser_of, report
from truedepth.checkpoint.writing import write_weights
from truedepth.files.copying import Copier
from truedepth.tensors import LazyTensor

LLAMA_2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}

LLAMA_3_70B = LLAMA_2_7B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}

MIXTRAL_8X22B = LLAMA_2_7B | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32768,
    "max_position_embeddings": 65536,
    "rope_theta": 1000000.0,
}

MODELS: dict[str, dict[str, Any]] = {
    "llama-2-7b": LLAMA_2_7B,
    "llama-3-70b": LLAMA_3_70B,
    "mixtral-8x22b": MIXTRAL_8X22B,
}

CONVERT = """
import os, sys, time
import truedepth as td
from truedepth.conversion import convert
from truedepth.files.copying import Copier
layers, sink = int(sys.argv[3]), sys.argv[4] == "True"
if sink:
    nowhere, copy = os.open(os.devnull, os.O_WRONLY), Copier.copy
    Copier.copy = lambda self, name, tensor, file, at: copy(self, name, tensor, nowhere, at)
start, busy = time.perf_counter(), time.process_time()
span = layers, layers // 2 - 2, layers - 3
plan = td.Plan.staggered(*span) if sys.argv[5] == "True" else td.Plan.span(*span)
convert(sys.argv[1], sys.argv[2], plan)
print(time.perf_counter() - start, time.process_time() - busy)
"""


def write_model(directory: Path, model: dict[str, Any], sparse: bool = False) -> int:
    """Write a checkpoint of a model's shapes; returns its size in bytes."""
    hidden, ffn, vocabulary = (
        model[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    heads = hidden * model["num_key_value_heads"] // model["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(model["num_hidden_layers"]):
        names: dict[str, tuple[int, ...]] = {}
        names |= {f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
        names |= {f"self_attn.{name}_proj": (heads, hidden) for name in "kv"}
        experts = model.get("num_local_experts", 0)
        for expert in range(experts):
            inside = f"block_sparse_moe.experts.{expert}"
            names |= {f"{inside}.{name}": (ffn, hidden) for name in ("w1", "w3")}
            names |= {f"{inside}.w2": (hidden, ffn)}
        if experts:
            names |= {"block_sparse_moe.gate": (experts, hidden)}
        else:
            names |= {f"mlp.{name}_proj": (ffn, hidden) for name in ("gate", "up")}
            names |= {"mlp.down_proj": (hidden, ffn)}
        names |= {f"{norm}_layernorm": (hidden,) for norm in ("input", "post_attention")}
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in names.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    (directory / "config.json").write_text(json.dumps(model))

    noise = (torch.randn(1 << 22) * 0.02).to(torch.bfloat16)

    def lazy(shape: tuple[int, ...]) -> LazyTensor:
        def rows(start: int, stop: int) -> torch.Tensor:
            count = (stop - start) * (shape[1] if len(shape) > 1 else 1)
            repeated = noise.repeat(-(-count // len(noise)))[:count]
            return repeated.reshape(stop - start, *shape[1:])

        return LazyTensor(shape, torch.bfloat16, rows)

    def hole(_: Copier, name: str, tensor: LazyTensor, file: int, place: int) -> Iterator[int]:
        os.ftruncate(file, place + tensor.nbytes)
        yield tensor.nbytes

    with mock.patch.object(Copier, "copy", hole if sparse else Copier.copy):
        return write_weights(directory, {name: lazy(shape) for name, shape in shapes.items()})


def peak_memory(command: list[str]) -> tuple[int, bytes]:
    """Peak of a command's anonymous resident memory, in bytes, and what it printed."""
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(command, stdout=printed)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process))
            time.sleep(0.02)
        if process.returncode:
            raise SystemExit(process.returncode)
        printed.seek(0)
        return peak, printed.read()


def anonymous_memory(process: subprocess.Popen[bytes]) -> int:
    """Resident bytes that no file backs, of a running process; 0 once it has ended."""
    try:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def uncached(directory: Path) -> None:
    """Drop a directory's files from the page cache."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed_copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds to copy a directory and sync it to the disk, and seconds of a core."""
    uncached(source)
    start, busy = time.perf_counter(), time.process_time()
    shutil.copytree(source, target)
    subprocess.run(["sync", "-f", target], check=True)
    elapsed = time.perf_counter() - start, time.process_time() - busy
    shutil.rmtree(target)
    return elapsed


def timed_conversion(
    source: Path, target: Path, layers: int, mixture: bool, sink: bool = False
) -> tuple[list[float], int]:
    """Seconds of a conversion (with Python's start, without it, of a core) and its peak memory."""
    uncached(source)
    start = time.perf_counter()
    arguments = map(str, (source, target, layers, sink, mixture))
    peak, printed = peak_memory([sys.executable, "-c", CONVERT, *arguments])
    return [time.perf_counter() - start, *map(float, printed.split())], peak


def headers(directory: Path) -> dict[str, dict[str, Any]]:
    """The headers of a checkpoint's shards by tensor name, checked against its index."""
    found: dict[str, dict[str, Any]] = {}
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    for shard in sorted(set(index["weight_map"].values())):
        with (directory / shard).open("rb") as file:
            held = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        held.pop("__metadata__")
        if set(held) != {name for name, place in index["weight_map"].items() if place == shard}:
            raise SystemExit(f"{shard} does not hold what the index says")
        found |= held
    sizes = [end - start for start, end in (held["data_offsets"] for held in found.values())]
    if sum(sizes) != index["metadata"]["total_size"]:
        raise SystemExit("the index gives another size than the shards")
    return found


def main() -> None:
    """Copy and convert in turn; print and write what it took."""
    parser = parser_of(__doc__, json_required=False)
    parser.add_argument("--model", choices=MODELS, default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="number of layers instead of all")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sparse", action="store_true", help="memory only, needs no disk")
    parser.add_argument("--directory", type=Path, help="a directory on the disk to measure")
    arguments = parser.parse_args()
    model: dict[str, Any] = MODELS[arguments.model]
    mixture = "num_local_experts" in model
    layers: int = arguments.layers or model["num_hidden_layers"]
    with tempfile.TemporaryDirectory(dir=arguments.directory) as temporary:
        source, target = Path(temporary) / "source", Path(temporary) / "target"
        source.mkdir()
        size = write_model(source, model | {"num_hidden_layers": layers}, arguments.sparse)
        result: dict[str, Any] = {
            "machine": machine(),
            "model": arguments.model,
            "layers": layers,
            "size": size,
        }
        if arguments.sparse:
            seconds, peak = timed_conversion(source, target, layers, mixture, sink=True)
            result |= {"tensors": len(headers(target)), "seconds": seconds[0]}
            result["peak_anonymous_bytes"] = peak
        else:
            result |= compared(source, target, layers, mixture, arguments.runs)
    report(result, arguments.json)


def compared(source: Path, target: Path, layers: int, mixture: bool, runs: int) -> dict[str, Any]:
    """Copy and convert in turn, and compare."""
    copies, conversions, peaks = [], [], []
    for _ in range(runs):
        copies.append(timed_copy(source, target))
        seconds, peak = timed_conversion(source, target, layers, mixture)
        shutil.rmtree(target)
        conversions.append(seconds)
        peaks.append(peak)
        (copy, copying), (whole, call, computing) = copies[-1], seconds
        print(
            f"copy {copy:.1f} s ({copying:.1f} s of a core), convert {whole:.1f} s, of which the"
            f" call {call:.1f} s ({computing:.1f} s of a core), {peak / 1e9:.2f} GB anonymous",
            flush=True,
        )

    def ratio(ours: int, theirs: int) -> float:
        pairs = zip(conversions, copies, strict=True)
        return statistics.median(seconds[ours] / copy[theirs] for seconds, copy in pairs)

    return {
        "copy_seconds": [copy for copy, _ in copies],
        "copy_core_seconds": [busy for _, busy in copies],
        "convert_seconds": [seconds[0] for seconds in conversions],
        "call_seconds": [seconds[1] for seconds in conversions],
        "call_core_seconds": [seconds[2] for seconds in conversions],
        "median_ratio": ratio(0, 0),
        "median_ratio_of_the_call": ratio(1, 0),
        "median_ratio_of_core_seconds": ratio(2, 1),
        "peak_anonymous_bytes": max(peaks),
    }


if __name__ == "__main__":
    main()
