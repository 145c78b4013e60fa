"""A transformers model directory, its weights in one file or in shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from truedepth.errors import TruedepthError
from truedepth.sources.companions import check_companions, companions, copy_companions
from truedepth.sources.fetched import check_fetched
from truedepth.sources.limits import MAX_CONFIG_BYTES, read_json
from truedepth.sources.outer import outer_model
from truedepth.sources.source import Source
from truedepth.sources.stamps import Stamps
from truedepth.sources.tokenizer import load_tokenizer
from truedepth.sources.weights import ADAPTER, is_an_adapter, read_tensors, some
from truedepth.tensors import LazyTensor


def open_directory(
    path: Path,
    name: str | None = None,
    origin: str = "directory",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    weights: Callable[[], Path] | None = None,
) -> Source:
    """Open a directory that holds config.json and weights.

    Args:
        path: The directory.
        name: The model's name; by default the directory's.
        origin: Where the model was found, for the reader.
        allow_pickle: Read pickled weights if there are no safetensors.
        trust_remote_code: Run the tokenizer's own code if it has some.
        weights: Gives the directory that holds the weights, if it is another.

    Raises:
        TruedepthError: `path` is not a model directory, or one of its files is broken.
    """
    stamps = Stamps()
    for file in ("config.json", *companions(path)):
        stamps.add(path / file)
    check_fetched(path / "config.json")
    if not (path / "config.json").exists():
        names = [file.name for file in path.iterdir()]
        raise TruedepthError(without_config(str(path), names, path))
    config = read_json(path / "config.json", most=MAX_CONFIG_BYTES)

    def save_companions(out: Path) -> None:
        for file in companions(path):
            stamps.add(path / file)
        copy_companions(path, out)

    def read_generation_config() -> Mapping[str, Any]:
        file = path / "generation_config.json"
        return read_json(file, most=MAX_CONFIG_BYTES) if file.exists() else {}

    def read() -> Mapping[str, LazyTensor]:
        return read_tensors(weights() if weights else path, config, stamps, allow_pickle)

    outer = outer_model(config, path, read)
    return Source(
        name=name or path.resolve().name,
        origin=origin,
        path=path,
        config=outer.inside if outer else config,
        read_tensors=outer.tensors_inside if outer else read,
        outer=outer,
        check_companions=lambda: check_companions(path),
        save_companions=save_companions,
        load_tokenizer=lambda: load_tokenizer(path, config, trust_remote_code),
        read_generation_config=read_generation_config,
        stamps=stamps,
    )


def without_config(where: str, names: Sequence[str], path: Path, separator: str = "/") -> str:
    """Why a directory or hub repository without a config.json is not a model, and what to give.

    Args:
        where: The directory, or the hub id.
        names: The files in it.
        path: A directory that holds its small files.
        separator: What stands between `where` and a file's name where the file is given by itself.
    """
    if ADAPTER in names:
        return is_an_adapter(where, path / ADAPTER)
    reason = f"{where} is not a model directory: it has no config.json"
    if files := sorted(f"{where}{separator}{name}" for name in names if name.endswith(".gguf")):
        return f"{reason}, but GGUF files; give one of them: {some(files)}."
    if "params.json" in names:
        return f"{reason}, but params.json, another format; give its version for transformers."
    return f"{reason}."
