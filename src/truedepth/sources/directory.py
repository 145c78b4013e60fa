"""A transformers model directory, its weights in one file or in shards."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from truedepth.errors import TruedepthError
from truedepth.sources import pickled
from truedepth.sources.companions import check_companions, companions, copy_companions
from truedepth.sources.fetched import check_fetched
from truedepth.sources.limits import MAX_CONFIG_BYTES, read_json
from truedepth.sources.mapped import mapped_tensor
from truedepth.sources.pickled import open_pickle
from truedepth.sources.source import Source
from truedepth.sources.stamps import Stamps
from truedepth.sources.tokenizer import load_tokenizer
from truedepth.tensors import LazyTensor, Stored

MAX_NAME_BYTES = 255  # per file name, on every common file system
MAX_HEADER_BYTES = 16 << 20  # per safetensors file; 100,000 tensors take 10 MB

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"


def open_directory(
    path: Path,
    name: str | None = None,
    origin: str = "directory",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Source:
    """Open a directory that holds config.json and weights.

    Args:
        path: The directory.
        name: The model's name; by default the directory's.
        origin: Where the model was found, for the reader.
        allow_pickle: Read pickled weights if there are no safetensors.
        trust_remote_code: Run the tokenizer's own code if it has some.

    Raises:
        TruedepthError: `path` is not a model directory, or one of its files is broken.
    """
    stamps = Stamps()
    for file in ("config.json", *companions(path)):
        stamps.add(path / file)
    missing = f"{path} is not a model directory: it has no"
    config = read_json(path / "config.json", missing, MAX_CONFIG_BYTES)

    def save_companions(out: Path) -> None:
        for file in companions(path):
            stamps.add(path / file)
        copy_companions(path, out)

    return Source(
        name=name or path.resolve().name,
        origin=origin,
        path=path,
        config=config,
        read_tensors=lambda: read_tensors(path, stamps, allow_pickle),
        check_companions=lambda: check_companions(path),
        save_companions=save_companions,
        load_tokenizer=lambda: load_tokenizer(path, config, trust_remote_code),
        stamps=stamps,
    )


def read_tensors(
    path: Path, stamps: Stamps, allow_pickle: bool = False
) -> Mapping[str, LazyTensor]:
    """The tensors of a model directory, by name.

    Args:
        path: The directory.
        stamps: Receives the stamps of the weight files, which are watched from then on.
        allow_pickle: Read pickled weights if there are no safetensors.

    Raises:
        TruedepthError: Weights are missing, are pickled without `allow_pickle`, or are broken.
    """
    tensors: dict[str, LazyTensor] = {}
    for index in (INDEX, pickled.INDEX):
        stamps.add(path / index)
    for file, expected in _weight_files(path, allow_pickle).items():
        stamps.add(file)
        held = _open_file(file) if file.suffix == SUFFIX else open_pickle(file)
        if lost := expected - set(held):
            raise TruedepthError(
                f"The index of {path} places {min(lost)!r} in {file.name}, which does not hold it."
            )
        tensors |= {name: stamps.watched(file, tensor) for name, tensor in held.items()}
    return tensors


def has_safetensors(path: Path) -> bool:
    """Whether a model directory has weights as safetensors."""
    return any((path / name).exists() for name in (INDEX, SINGLE_FILE))


def _weight_files(path: Path, allow_pickle: bool) -> dict[Path, set[str]]:
    """The weight files of a model, each with the tensors that an index, if any, places in it."""
    index, suffixes = INDEX, [SUFFIX]
    single: str | None = SINGLE_FILE
    if not has_safetensors(path):
        for name in (SINGLE_FILE, INDEX):
            check_fetched(path / name)
        if not any(file.suffix in pickled.SUFFIXES for file in path.iterdir()):
            raise TruedepthError(f"{path} has no weights: neither {SINGLE_FILE} nor {INDEX}.")
        if not allow_pickle:
            raise TruedepthError(
                f"{path} has pickled weights only, which can run code when they are read; get"
                " safetensors or, if you trust their author, convert them with truedepth convert"
                " MODEL OUT --pairs 0 --allow-pickle."
            )
        index, suffixes, single = pickled.INDEX, pickled.SUFFIXES, pickled.only_file(path)
    files: dict[str, set[str]] = {}
    if (path / index).exists():
        weight_map = read_json(path / index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise TruedepthError(f"{path / index} has no weight_map.")
        for tensor, name in weight_map.items():
            # Only a bare name: a path could leave the directory. Links are followed, because the
            # hub's cache is made of them.
            if (
                not isinstance(name, str)
                or Path(name).name != name
                or not name.isprintable()
                or len(name.encode()) > MAX_NAME_BYTES
                or Path(name).suffix not in suffixes
            ):
                raise TruedepthError(
                    f"{path / index} names {reprlib.repr(name)}, which is not a plain name of a"
                    " weight file in this directory."
                )
            files.setdefault(name, set()).add(tensor)
    elif single is not None:
        files[single] = set()
    else:
        raise TruedepthError(f"{path} has several files of pickled weights but no {index}.")
    for name in files:
        check_fetched(path / name)
        if not (path / name).is_file():
            raise TruedepthError(f"The shard {path / name} is missing.")
    return {path / name: tensors for name, tensors in files.items()}


def _open_file(file: Path) -> dict[str, LazyTensor]:
    """The tensors of one file. They share its memory map, so reading copies nothing."""
    try:
        with file.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
        if header > MAX_HEADER_BYTES:
            raise ValueError(f"its header claims {header} bytes, more than {MAX_HEADER_BYTES}")
        with safe_open(file, framework="pt") as handle:
            stored = _offsets(file)
            names = handle.keys()
            return {name: mapped_tensor(handle.get_tensor(name), stored[name]) for name in names}
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise TruedepthError(f"{file} is corrupt or truncated: {error}.") from error


def _offsets(file: Path) -> dict[str, Stored]:
    """Where the tensors of a safetensors file that was checked before lie in it."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    begin = 8 + size
    return {name: Stored(file, begin + held["data_offsets"][0]) for name, held in header.items()}
