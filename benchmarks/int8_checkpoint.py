"""A checkpoint whose linear maps are int8, in the form that llm-compressor writes and vLLM reads.

    python benchmarks/int8_checkpoint.py CKPT OUT

One scale per row, rounded to nearest; vLLM rounds activations to int8 token by token (W8A8,
dynamic). Embedding and head stay as they are. (vLLM's own
`--quantization int8_per_channel_weight_only` quantizes only experts, and leaves the linear maps of
dense models as they are.)
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "strategy": "channel",
                "symmetric": True,
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
}


def main() -> None:
    """Write OUT."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    write_int8(arguments.checkpoint, arguments.out)


def write_int8(checkpoint: Path, out: Path) -> None:
    """Write the int8 form of a checkpoint whose weights are in one file."""
    shutil.copytree(checkpoint, out, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(checkpoint / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        dtype = tensors[name].dtype
        tensors[name] = (weight / scale).round().char()
        tensors[f"{name}_scale"] = scale.to(dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))


if __name__ == "__main__":
    main()
