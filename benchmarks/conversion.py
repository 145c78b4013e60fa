"""Memory and time of converting a checkpoint with Llama-2-7B's shapes, against copying its files.

Writes a synthetic checkpoint (13.5 GB, bfloat16, sharded), then in turn copies it and converts it
in a process of its own, whose anonymous resident memory is sampled. Needs 45 GB of disk and Linux.

    python benchmarks/conversion.py [--layers 32] [--runs 2] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from truedepth.checkpoint import write_weights
from truedepth.tensors import LazyTensor

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}

CONVERT = """
import sys, truedepth as td
layers = int(sys.argv[3])
td.convert(sys.argv[1], sys.argv[2], td.Plan.span(layers, layers // 2 - 2, layers - 3))
"""


def write_model(directory: Path, layers: int) -> int:
    """A checkpoint of Llama-2-7B's shapes; gives its size in bytes."""
    hidden, ffn, vocabulary = 4096, 11008, 32000
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        names: dict[str, tuple[int, ...]] = {}
        names |= {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
        names |= {f"mlp.{name}_proj": (ffn, hidden) for name in ("gate", "up")}
        names |= {"mlp.down_proj": (hidden, ffn)}
        names |= {f"{norm}_layernorm": (hidden,) for norm in ("input", "post_attention")}
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in names.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    config = LLAMA_2_7B | {"num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(config))

    noise = (torch.randn(1 << 22) * 0.02).to(torch.bfloat16)

    def lazy(shape: tuple[int, ...]) -> LazyTensor:
        def rows(start: int, stop: int) -> torch.Tensor:
            count = (stop - start) * (shape[1] if len(shape) > 1 else 1)
            repeated = noise.repeat(-(-count // len(noise)))[:count]
            return repeated.reshape(stop - start, *shape[1:])

        return LazyTensor(shape, torch.bfloat16, rows)

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


def timed_copy(source: Path, target: Path) -> float:
    """Seconds to copy a directory and have it on the disk."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    subprocess.run(["sync", "-f", target], check=True)
    elapsed = time.perf_counter() - start
    shutil.rmtree(target)
    return elapsed


def timed_conversion(source: Path, target: Path, layers: int) -> tuple[float, int]:
    """Seconds of a conversion, start of Python included, and its peak of anonymous memory."""
    start = time.perf_counter()
    command = [sys.executable, "-c", CONVERT, str(source), str(target), str(layers)]
    peak, _ = peak_memory(command)
    elapsed = time.perf_counter() - start
    shutil.rmtree(target)
    return elapsed, peak


def main() -> None:
    """Copy and convert in turn; print and write what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--directory", type=Path, help="on the disk to measure")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as temporary:
        source, target = Path(temporary) / "source", Path(temporary) / "target"
        source.mkdir()
        size = write_model(source, arguments.layers)
        copies, conversions, peaks = [], [], []
        for _ in range(arguments.runs):
            copies.append(timed_copy(source, target))
            elapsed, peak = timed_conversion(source, target, arguments.layers)
            conversions.append(elapsed)
            peaks.append(peak)
            print(
                f"copy {copies[-1]:.1f} s, convert {elapsed:.1f} s, {peak / 1e9:.2f} GB anonymous"
            )
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "size": size,
        "copy_seconds": copies,
        "convert_seconds": conversions,
        "ratio": statistics.median(conversions) / statistics.median(copies),
        "peak_anonymous_bytes": max(peaks),
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
