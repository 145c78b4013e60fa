"""Does a refactoring change a weight? Two checkouts make the same checkpoints, tensor by tensor.

    python benchmarks/same_weights.py BASE        (make same BASE=<commit>)

Tiny random models of five families are converted as they are, calibrated, healed for a few steps
and, where llama.cpp runs the family, exported; one is studied and searched for a plan. The commit
BASE and the working tree do this with the same Python, each with its own sources. Tensors are
compared byte for byte; config.json and results as data, except for versions and times, and with
numbers equal to a millionth. Both then load the checkpoints that BASE has made, and their logits
are compared byte for byte too.

Only public names of truedepth are used here, so that any two checkouts can be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[1]

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 32},  # norms of heads
    "Phi3": {},  # packed maps
    "Cohere": {},  # LayerNorm, one norm for attention and FFN
    "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},  # layers that do not become wide
}
EXPORTED = ("Llama",)
REFITTED = ("Llama", "Qwen3", "Phi3", "Cohere")
PADDED = ("Llama", "Qwen3", "Cohere")
GROUPS = [[1, 2], [3, 4, 5]]
LAYERS = 7
PASSING = ("version", "truedepth", "seconds", "origin", "source", "original", "path", "machine")
"""Keys of results that may differ between two checkouts."""


def main() -> None:
    """Make everything with both checkouts and print what differs; exit code 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="commit to compare the working tree with")
    parser.add_argument("--keep", type=Path, help="directory to work in, kept afterwards")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = arguments.keep or Path(scratch)
        _make_models(directory)
        base = directory / "checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(base), arguments.base], check=True)
        try:
            found = [_run(tree, directory, name) for tree, name in ((base, "base"), (ROOT, "now"))]
        finally:
            subprocess.run([*git, "remove", "--force", str(base)], check=True)
    before, now = found
    changed = [key for key in before | now if not _alike(before.get(key), now.get(key))]
    for key in changed:
        said = (str(each.get(key, "absent"))[:200] for each in (before, now))
        print(f"{key}: {' -> '.join(said)}")
    print(f"{len(changed)} of {len(before | now)} tensors, configs and results differ.")
    sys.exit(1 if changed or not before else 0)


def _alike(one: Any, other: Any) -> bool:
    """Whether two results are the same, numbers to a millionth; hashes are text."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6)
    return type(one) is type(other) and bool(one == other)


def _run(tree: Path, directory: Path, name: str) -> dict[str, Any]:
    """What a checkout's sources make: a hash of every tensor, configs and results."""
    environment = os.environ | {
        "PYTHONPATH": str(tree / "src"),
        "OMP_NUM_THREADS": "1",  # sums in one order
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, __file__, "--work", str(directory), name, str(tree / "src")]
    subprocess.run(command, env=environment, check=True)
    found: dict[str, Any] = json.loads((directory / f"{name}.json").read_text())
    return found


def _make_models(directory: Path) -> None:
    import transformers

    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(_alphabet())}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    for family, options in FAMILIES.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(
            vocab_size=len(_alphabet()),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=family in ("Llama", "Gemma2"),
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
            **options,
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            spread = torch.rand_like if "norm" in name else torch.randn_like
            parameter.data.copy_(spread(parameter) * 0.2 + (0.5 if "norm" in name else 0.0))
        model.to(torch.bfloat16 if family == "Qwen3" else torch.float32)
        model.save_pretrained(directory / family)
        tokenizer.save_pretrained(directory / family)
    generator = random.Random(0)
    text = " ".join(generator.choice(["the", "cat", "sat", "on", "a", "mat"]) for _ in range(9000))
    (directory / "text.txt").write_text(text)


def _alphabet() -> list[str]:
    return ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]


def _work(directory: Path, name: str, sources: str) -> None:
    """Make everything, in a separate process, with the sources of one checkout."""
    import truedepth as td

    assert str(td.__file__).startswith(sources), f"{td.__file__} is not in {sources}"
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    out, text = directory / name, directory / "text.txt"
    options = td.Calibration(text=[text], tokens=2048, window=32, dtype=torch.float32)
    part = type(td.Healing().text[0])
    healing = td.Healing(
        text=(part(str(text)),),
        tokens=2048,
        sequence_length=32,
        batch_size=4,
        learning_rate=5e-5,
        validation=4,
        eval_every=4,
        dtype=torch.float32,
        device="cpu",
    )
    plan = td.Plan(LAYERS, GROUPS)
    for family in FAMILIES:
        model, made = directory / family, out / family
        td.convert(model, made / "raw", plan)
        start = made / "raw"
        if family in REFITTED:
            start = made / "refitted"
            td.calibrate(model, start, plan, options)
        if family in PADDED:
            td.convert(model, made / "padded", plan, pad_heads=4, dtype=torch.float16)
        healed = td.heal(start, made / "healed", teacher=model, healing=healing)
        found[f"{family}: healing"] = _plain(healed.curve)
        for checkpoint in sorted(path for path in made.iterdir() if path.is_dir()):
            found |= _hashes(checkpoint, f"{family} {checkpoint.name}")
        if family in EXPORTED:
            for kind in ("auto", "q8_0"):
                td.export(made / "refitted", made / f"{kind}.gguf", type=kind)
                found[f"{family}: {kind}.gguf"] = _file_hash(made / f"{kind}.gguf")
    triples: dict[str, Any] = {"max_group": 3}
    if hasattr(td, "Merges"):  # after 0.1.0
        triples = {"merges": td.Merges(**triples)}
    for refit in (False, True):
        searched = td.search(
            directory / "Llama", pairs=2, calibrate=refit, calibration=options, **triples
        ).to_dict()
        kept = {key: searched[key] for key in ("plan", "loss", "check")}
        found[f"search, refitted {refit}"] = _plain(kept)
    studied = td.study(directory / "Llama", out / "study", text=text, window=32, windows=2)
    transformed = {  # what 0.1.0 has too; other spans and measures came later
        name: matrix
        for name, matrix in studied.transformed.items()
        if name not in ("staggered", "A beside F")
    }
    found["study"] = _plain(
        {"nll": studied.nll, "transformed": transformed, "dependence": studied.dependence}
    )
    ids = torch.arange(48).reshape(2, 24) + 5
    for config in sorted(directory.glob("base/*/*/config.json")):
        model = td.load(config.parent, device="cpu", dtype=torch.float32).model
        logits = model(ids).logits.detach().numpy().tobytes()
        found[f"logits of {config.parent}"] = hashlib.sha256(logits).hexdigest()
    (directory / f"{name}.json").write_text(json.dumps(found))


def _hashes(checkpoint: Path, title: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"{title}: config.json": _plain(json.loads((checkpoint / "config.json").read_text()))
    }
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                tensor = file.get_tensor(name).contiguous()
                data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                said = f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}"
                found[f"{title}: {name}"] = said
    return found


def _file_hash(path: Path) -> str:
    """A hash of a GGUF file's tensors, without its metadata, which carry the version."""
    import gguf

    digest = hashlib.sha256()
    for tensor in gguf.GGUFReader(path).tensors:
        digest.update(f"{tensor.name} {tensor.tensor_type} {list(tensor.shape)}".encode())
        digest.update(tensor.data.tobytes())
    return digest.hexdigest()


def _plain(data: Any) -> Any:
    """Data as JSON can hold it, but for what may differ."""
    if isinstance(data, dict):
        made = data.get("truedepth")  # in config.json how it was made, in results a version
        kept = {str(key): _plain(each) for key, each in data.items() if key not in PASSING}
        return kept | ({"made": _plain(made)} if isinstance(made, dict) else {})
    if isinstance(data, list | tuple):
        return [_plain(each) for each in data]
    return data if isinstance(data, float | int | bool | None) else str(data)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        _work(Path(sys.argv[2]), *sys.argv[3:])
    else:
        main()
