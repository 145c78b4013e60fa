"""What benchmarks/fuzz.py feeds the readers: small valid files, damaged ones, made-up ones."""

from __future__ import annotations

import io
import json
import random
import re
import struct
import tempfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "vocab_size": 16,
}
PLAN = "model: someone/some-model\nnum_layers: 30\ngroups: [[14, 15], [16, 17], [18, 19, 20]]\n"

NUMBERS = [
    0,
    1,
    2,
    7,
    255,
    4096,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**60,
    2**63,
    2**64 - 1,
]
WORDS = [
    "",
    "x",
    "llama",
    "deci",
    "none",
    "\u0000",
    "é" * 9,
    "../../etc/passwd",
    "/dev/zero",
    "\ud800",
]
TEXT_BITS = ["9" * 400, "-1", "1e999", "NaN", "null", "true", "[]", "{}", '"x"', "0x" + "f" * 999]
TEXT_BITS += ["[" * 500, "{" * 99, "&a ", "*a", "<<: ", "!!python/object/apply:os.system [id]"]
TEXT_BITS += [
    "1:" * 99 + "1",
    "2001-99-99",
    "!!binary x",
    "\t",
    "---\n",
    "\x00",
    "\u2028",
    ": ",
    "? ",
]


def state() -> dict[str, torch.Tensor]:
    """Tensors of the model of `CONFIG`."""
    made = {"model.embed_tokens.weight": torch.zeros(16, 32), "model.norm.weight": torch.ones(32)}
    for layer in range(2):
        sizes = {"self_attn.q_proj": 32, "self_attn.k_proj": 16, "self_attn.v_proj": 16}
        sizes |= dict.fromkeys(("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"), 32)
        sizes |= {"mlp.down_proj": 32}
        for name, rows in sizes.items():
            made[f"model.layers.{layer}.{name}.weight"] = torch.zeros(rows, 32)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"model.layers.{layer}.{norm}.weight"] = torch.ones(32)
    return made


def gguf_file(kind: gguf.GGMLQuantizationType) -> bytes:
    """A small valid file of the llama architecture."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.gguf")
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_context_length(64)
        writer.add_embedding_length(32)
        writer.add_feed_forward_length(32)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["<end>", "a", "b", "ab"])
        writer.add_token_types([3, 1, 1, 1])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(0)
        rows = {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32}
        rows |= {"ffn_gate": 32, "ffn_up": 32, "ffn_down": 32}
        matrices = {"token_embd.weight": 4} | {f"blk.0.{n}.weight": r for n, r in rows.items()}
        for name, count in matrices.items():
            values = np.zeros((count, 32), np.float32)
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
            writer.add_tensor(name, np.ones(32, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def seeds(reader: str) -> list[bytes]:
    """Valid files of a reader."""
    kinds = gguf.GGMLQuantizationType
    if reader == "gguf":
        return [gguf_file(kind) for kind in (kinds.F32, kinds.F16, kinds.Q8_0, kinds.Q4_1)]
    if reader == "safetensors":
        return [save(state()), save({"a": torch.zeros(2, 2), "b": torch.zeros(3).bfloat16()})]
    if reader == "plan":
        short = "num_layers: 4\ngroups:\n- - 0\n  - 1\n- [2, 3]\n"
        return [PLAN.encode(), short.encode()]
    if reader == "config":
        wide = CONFIG | {"model_type": "truedepth_llama", "layer_widths": [2, 1], "head_dim": 16}
        others = [CONFIG | {"model_type": name} for name in ("mistral", "qwen2")]
        return [json.dumps(config).encode() for config in (CONFIG, wide, *others)]
    if reader == "index":
        weight_map = dict.fromkeys(state(), "model-1.safetensors")
        return [json.dumps({"metadata": {"total_size": 9}, "weight_map": weight_map}).encode()]
    if reader == "pickle":
        held = io.BytesIO()
        torch.save(state(), held)
        return [held.getvalue()]
    raise ValueError(reader)


def _bytes_mutation(data: bytes, others: list[bytes], dice: random.Random) -> bytes:
    # Most of what readers decide on is in the first bytes.
    reach = len(data) if dice.random() < 0.3 else min(len(data), 2048)
    at = dice.randrange(reach + 1)
    kind = dice.randrange(8)
    if kind == 0:
        return data[:at] + bytes([dice.randrange(256)]) + data[at + 1 :]
    if kind == 1:
        width = dice.choice([2, 4, 8])
        number = dice.choice(NUMBERS) % (1 << 8 * width)
        return data[:at] + number.to_bytes(width, "little") + data[at + width :]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + data[at + dice.randrange(1, 64) :]
    if kind == 4:
        return data[:at] + dice.randbytes(dice.randrange(1, 64)) + data[at:]
    if kind == 5:
        return data[:at] + data[at : at + dice.randrange(1, 256)] * dice.randrange(1, 9) + data[at:]
    if kind == 6:
        other = dice.choice(others)
        return data[:at] + other[dice.randrange(len(other) + 1) :]
    return data[:at] + dice.choice(TEXT_BITS).encode() + data[at + dice.randrange(9) :]


def _text_mutation(data: bytes, dice: random.Random) -> bytes:
    """Replace a word, number or bracket by another."""
    text = data.decode(errors="replace")
    tokens = re.findall(r"\w+|\W", text)
    for _ in range(dice.randrange(1, 4)):
        at = dice.randrange(len(tokens) or 1)
        other = dice.choice(
            [str(dice.choice(NUMBERS)), dice.choice(TEXT_BITS), dice.choice(tokens or [""])]
        )
        tokens[at : at + 1] = [other] * dice.choice([1, 1, 1, 2, 50])
    return "".join(tokens).encode(errors="replace")


def _odd(dice: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = dice.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return dice.choice(NUMBERS) * dice.choice([1, -1])
    if kind == 1:
        return dice.choice([0.0, -1.5, 1e-300, 1e300, float("inf"), float("nan")])
    if kind == 2:
        return dice.choice(WORDS)
    if kind in (3, 4):
        return dice.choice([None, True, False])
    if kind == 5:
        return 10 ** dice.randrange(9, 4000)
    if kind == 6:
        return {dice.choice(WORDS): _odd(dice, depth + 1) for _ in range(dice.randrange(4))}
    if dice.random() < 0.2:
        return [_odd(dice, 3) for _ in range(99)]
    return [_odd(dice, depth + 1) for _ in range(dice.choice([0, 1, 2, 5]))]


def _made_config(dice: random.Random) -> bytes:
    config = json.loads(dice.choice(seeds("config")))
    extra = ["head_dim", "layer_types", "layer_widths", "rope_scaling", "rope_theta", "auto_map"]
    extra += ["dtype", "pad_token_id", "attention_bias", "mlp_bias", "sliding_window", "truedepth"]
    extra += [
        "quantization_config",
        "per_layer_config",
        "attn_implementation",
        "base_model_tp_plan",
    ]
    extra += ["self", "cls", "args", "kwargs", "_name_or_path", "use_cache", "id2label", "dict"]
    extra += ["base_model_tp_plan"]
    for _ in range(dice.randrange(1, 4)):
        key = dice.choice([*config, *extra])
        value = config.get(key)
        if isinstance(value, dict) and value and dice.random() < 0.7:
            value[dice.choice([*value, "factor", "type"])] = _odd(dice)
        elif dice.random() < 0.1:
            config.pop(key, None)
        else:
            config[key] = dice.choice(NUMBERS[:6]) if dice.random() < 0.3 else _odd(dice)
    return json.dumps(config).encode()


def _made_index(dice: random.Random) -> bytes:
    names = ["model-1.safetensors", "model-1.safetensors", "../x.safetensors", *WORDS]
    names += ["/etc/passwd", "a" * 300 + ".safetensors", ".", "..", "model\\1.safetensors"]
    weight_map: Any = {name: dice.choice(names) for name in state() if dice.random() < 0.9}
    if dice.random() < 0.3:
        weight_map = _odd(dice)
    return json.dumps({"weight_map": weight_map, "metadata": _odd(dice)}).encode()


def _made_safetensors(dice: random.Random) -> bytes:
    header: dict[str, Any] = {}
    offset = 0
    dtypes = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "F6_E2M3"]
    dtypes += ["E8M0", "C64", "U16", "X", "F8_E5M2FNUZ"]
    for number in range(dice.randrange(6)):
        shape = [dice.choice([0, 1, 2, 3, 8]) for _ in range(dice.randrange(4))]
        if dice.random() < 0.2:
            shape = [dice.choice(NUMBERS) for _ in range(dice.randrange(1, 70))]
        size = min(prod(shape), 1 << 16)
        size *= dice.choice([1, 2, 4, 8])
        begin, end = offset, offset + size
        if dice.random() < 0.15:
            begin, end = dice.choice(NUMBERS), dice.choice(NUMBERS)
        entry: Any = {"dtype": dice.choice(dtypes), "shape": shape, "data_offsets": [begin, end]}
        if dice.random() < 0.1:
            entry[dice.choice(list(entry))] = _odd(dice)
        header[dice.choice([f"t{number}", "model.norm.weight", *WORDS])] = entry
        offset += size
    if dice.random() < 0.2:
        header["__metadata__"] = _odd(dice)
    encoded = json.dumps(header).encode()
    length = len(encoded) if dice.random() < 0.85 else dice.choice(NUMBERS)
    return struct.pack("<Q", length) + encoded + bytes(dice.choice([offset, offset, offset // 2]))


def _made_plan(dice: random.Random) -> bytes:
    kind = dice.randrange(5)
    if kind == 0:  # each line stands for ten times the one before
        lines = ["a0: &a0 [1, 1]"]
        merges = dice.random() < 0.5
        for i in range(1, dice.randrange(3, 12)):
            inner = ", ".join([f"*a{i - 1}"] * 10)
            lines.append(f"a{i}: &a{i} {{<<: [{inner}]}}" if merges else f"a{i}: &a{i} [{inner}]")
        return "\n".join([*lines, f"num_layers: 3\ngroups: *a{len(lines) - 1}"]).encode()
    if kind == 1:
        open_, close = dice.choice([("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", "")])
        depth = dice.choice([*range(1, 20), 300, 2000, 9000])
        return f"num_layers: 3\ngroups: {open_ * depth}1{close * depth}".encode()
    if kind == 2:
        length = dice.choice([*range(10, 30), 5000, 9000, 50000])
        big = dice.choice(["0x" + "f" * length, "1:" * (length // 2) + "1", "9" * length, "-0b1"])
        where = dice.choice(["num_layers: {}\ngroups: []", "num_layers: 9\ngroups: [[{}]]"])
        return where.format(big).encode()
    value = {"num_layers": _odd(dice), "groups": _odd(dice), "model": _odd(dice)}
    if dice.random() < 0.5:
        value["num_layers"] = dice.choice([1, 30, 4096, 10**6])
        value["groups"] = [
            [dice.randrange(40) for _ in range(dice.randrange(4))] for _ in range(dice.randrange(9))
        ]
    return json.dumps(value).encode()


def _made_gguf(dice: random.Random) -> bytes:
    def text(value: str) -> bytes:
        raw = value.encode(errors="replace")
        length = len(raw) if dice.random() < 0.97 else dice.choice(NUMBERS)
        return struct.pack("<Q", length) + raw

    forms = dict(zip(range(8), "BbHhIif?", strict=True)) | {10: "Q", 11: "q", 12: "d"}

    def value(kind: int, depth: int = 0) -> bytes:
        if kind == 8:
            return text(dice.choice(WORDS))
        if kind == 9:
            inner = dice.choice([*range(13)]) if depth < 3 else 4
            count = dice.randrange(5)
            items = b"".join(value(inner, depth + 1) for _ in range(count))
            told = count if dice.random() < 0.9 else dice.choice(NUMBERS)
            return struct.pack("<IQ", inner, told) + items
        form = forms.get(kind, "I")
        small = dice.choice([0, 1, 2, 32, 100])
        if form in "fd":
            return struct.pack("<" + form, dice.choice([0.0, 1e-5, 1e4, float("nan"), -1.0]))
        raw = dice.choice([small, dice.choice(NUMBERS)]) % (1 << 8 * struct.calcsize(form))
        return raw.to_bytes(struct.calcsize(form), "little")

    keys = ["embedding_length", "feed_forward_length", "block_count", "attention.head_count"]
    keys += ["attention.head_count_kv", "context_length", "attention.layer_norm_rms_epsilon"]
    keys += ["attention.key_length", "rope.freq_base", "rope.dimension_count", "rope.scaling.type"]
    usual = dict(zip(keys, [32, 32, 1, 2, 1, 64], strict=False))
    fields = []
    architecture = dice.choice(["llama"] * 8 + ["deci", "x"])
    fields.append(text("general.architecture") + struct.pack("<I", 8) + text(architecture))
    for key in keys:
        chance = dice.random()
        if key == "attention.layer_norm_rms_epsilon" and chance < 0.9:
            fields.append(text(f"llama.{key}") + struct.pack("<If", 6, 1e-5))
        elif key in usual and chance < 0.9:
            fields.append(text(f"llama.{key}") + struct.pack("<II", 4, usual[key]))
        elif chance > 0.9:
            kind = dice.choice([*range(13), 99])
            fields.append(text(f"llama.{key}") + struct.pack("<I", kind) + value(kind))
    others = ["split.count", "general.alignment", "truedepth.config", "tokenizer.ggml.tokens"]
    for key in others:
        if dice.random() < 0.2:
            kind = dice.randrange(13)
            fields.append(text(key) + struct.pack("<I", kind) + value(kind))
    if architecture == "deci":
        config = _made_config(dice).decode()
        fields.append(text("truedepth.config") + struct.pack("<I", 8) + text(config))
    tensors, offset = [], 0
    names = ["token_embd.weight", "output_norm.weight", "rope_freqs.weight"]
    names += [f"blk.0.{name}.weight" for name in ("attn_q", "attn_k", "ffn_up", "attn_norm")]
    for name in names:
        shape = [32, dice.choice([1, 4, 16, 32])][: dice.choice([1, 2, 2])]
        if dice.random() < 0.1:
            shape = [dice.choice([*NUMBERS, 32]) for _ in range(dice.randrange(6))]
        kind = dice.choice([0, 0, 0, 1, 2, 8, 30, dice.randrange(45)])
        at = offset if dice.random() < 0.9 else dice.choice(NUMBERS)
        if dice.random() < 0.85:
            info = text(name) + struct.pack("<I", len(shape))
            info += b"".join(struct.pack("<Q", each) for each in shape)
            tensors.append(info + struct.pack("<IQ", kind, at))
            offset += 4096
    counts = [len(tensors), len(fields)]
    if dice.random() < 0.1:
        counts[dice.randrange(2)] = dice.choice(NUMBERS)
    head = b"GGUF" + struct.pack("<IQQ", dice.choice([3, 3, 3, 2, 1, 0]), *counts)
    return head + b"".join(fields) + b"".join(tensors) + bytes(dice.choice([0, 100, 9 * 4096]))


MADE: dict[str, Callable[[random.Random], bytes]] = {
    "gguf": _made_gguf,
    "safetensors": _made_safetensors,
    "plan": _made_plan,
    "config": _made_config,
    "index": _made_index,
}


class Inputs:
    """Input number i of a reader, the same at every run of the same seed."""

    def __init__(self, reader: str, seed: int) -> None:
        self.reader, self.seed, self.valid = reader, seed, seeds(reader)

    def __getitem__(self, number: int) -> bytes:
        dice = random.Random(f"{self.seed} {self.reader} {number}")
        if self.reader in MADE and dice.random() < 0.5:
            data = MADE[self.reader](dice)
            if dice.random() < 0.8:
                return data
        else:
            data = dice.choice(self.valid)
        for _ in range(dice.choice([1, 1, 1, 2, 4, 16])):
            if self.reader in ("plan", "config", "index") and dice.random() < 0.6:
                data = _text_mutation(data, dice)
            else:
                data = _bytes_mutation(data, self.valid, dice)
        return data[: 1 << 20]
