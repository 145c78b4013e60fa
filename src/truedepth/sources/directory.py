"""A transformers model directory with safetensors weights, in one file or in shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from truedepth.errors import TruedepthError
from truedepth.sources.mapped import mapped_tensor
from truedepth.sources.source import Source
from truedepth.tensors import LazyTensor, Stored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_JSON_BYTES = 256 << 20  # the index of a model with a million tensors takes about 100 MB

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What goes along unread: tokenizers of every kind, chat templates, generation config, licence.
COMPANIONS = (
    "tokenizer*",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def open_directory(path: Path, name: str | None = None, origin: str = "directory") -> Source:
    """Open a directory that holds config.json and safetensors.

    Raises:
        TruedepthError: It is not a model directory, or a file of it is broken.
    """
    config = read_json(path / "config.json", missing=f"{path} is not a model directory: it has no")

    def save_companions(out: Path) -> None:
        for pattern in COMPANIONS:
            for file in sorted(path.glob(pattern)):
                if file.is_dir():
                    shutil.copytree(file, out / file.name, dirs_exist_ok=True)
                else:
                    shutil.copyfile(file, out / file.name)

    def load_tokenizer() -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path)

    return Source(
        name=name or path.resolve().name,
        origin=origin,
        path=path,
        config=config,
        read_tensors=lambda: read_tensors(path),
        save_companions=save_companions,
        load_tokenizer=load_tokenizer,
    )


def read_json(path: Path, missing: str = "There is no") -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        TruedepthError: The file is missing (`missing` begins the sentence), too large or no object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise TruedepthError(f"{path} is too large for a JSON file of a model.")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TruedepthError(f"{missing} {path.name}.") from error
    except OSError as error:
        raise TruedepthError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise TruedepthError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise TruedepthError(f"{path} does not hold a JSON object.")
    return data


def read_tensors(path: Path) -> Mapping[str, LazyTensor]:
    """The tensors of a model directory, by name.

    Raises:
        TruedepthError: Weights are missing, pickled, or a file of them is broken.
    """
    tensors: dict[str, LazyTensor] = {}
    for file, expected in _weight_files(path).items():
        held = _open_file(file)
        if lost := expected - set(held):
            raise TruedepthError(
                f"{path / INDEX} places {min(lost)!r} in {file.name}, which does not hold it."
            )
        tensors.update(held)
    return tensors


def _weight_files(path: Path) -> dict[Path, set[str]]:
    """The safetensors files of a model and the tensors that the index, if any, places in each."""
    files: dict[str, set[str]] = {}
    if (path / INDEX).exists():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise TruedepthError(f"{path / INDEX} has no weight_map.")
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or Path(name).name != name:
                raise TruedepthError(f"{path / INDEX} names {name!r}, which is no file beside it.")
            files.setdefault(name, set()).add(tensor)
    elif (path / SINGLE_FILE).exists():
        files[SINGLE_FILE] = set()
    elif any(file.suffix in (".bin", ".pt", ".pth") for file in path.iterdir()):
        raise TruedepthError(
            f"{path} has pickled weights only, which can run code when they are read;"
            " save the model as safetensors first."
        )
    else:
        raise TruedepthError(f"{path} has no weights: neither {SINGLE_FILE} nor {INDEX}.")
    for name in files:
        if not (path / name).is_file():
            raise TruedepthError(f"The shard {path / name} is missing.")
    return {path / name: tensors for name, tensors in files.items()}


def _open_file(file: Path) -> dict[str, LazyTensor]:
    """The tensors of one file. They share its memory map, so that reading makes no copy."""
    try:
        with safe_open(file, framework="pt") as handle:
            stored = _places(file)
            names = handle.keys()
            return {name: mapped_tensor(handle.get_tensor(name), stored[name]) for name in names}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise TruedepthError(f"{file} is corrupt or truncated: {error}.") from error


def _places(file: Path) -> dict[str, Stored]:
    """Where the tensors of a safetensors file, checked before, lie in it."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    begin = 8 + size
    return {name: Stored(file, begin + held["data_offsets"][0]) for name, held in header.items()}
