"""Which files of a model directory hold its weights, and which of them holds which tensor.

Directories gather what several tools left: an index of files that are gone, a single file beside
older shards, two copies of one tensor. What is read is decided here, once, for every command. An
index decides where a tensor is; a single file comes before an index that does not name it, as in
transformers.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from truedepth.errors import TruedepthError, reason_of
from truedepth.progress import note
from truedepth.sources import pickled
from truedepth.sources.fetched import check_fetched
from truedepth.sources.limits import read_json
from truedepth.sources.mapped import mapped_tensor
from truedepth.sources.names import may_be_left_out
from truedepth.sources.pickled import open_pickle
from truedepth.sources.stamps import Stamps
from truedepth.tensors import LazyTensor, Stored

MAX_NAME_BYTES = 255  # per file name, on every common file system
MAX_HEADER_BYTES = 16 << 20  # per safetensors file; 100,000 tensors take 10 MB

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"

ADAPTER = "adapter_config.json"


def read_tensors(
    path: Path, config: Mapping[str, Any], stamps: Stamps, allow_pickle: bool = False
) -> Mapping[str, LazyTensor]:
    """The tensors of a model directory, by their names in its files.

    Args:
        path: The directory.
        config: The contents of config.json, which says what may be left out.
        stamps: Receives the stamps of the weight files, which are watched from then on.
        allow_pickle: Read pickled weights if there are no safetensors.

    Raises:
        TruedepthError: Weights are missing, are pickled without `allow_pickle`, are broken, or two
            files hold the same tensor and no index says which is meant.
    """
    for index in (INDEX, pickled.INDEX):
        stamps.add(path / index)
    files = _weight_files(path, allow_pickle)
    placed = {name: file for file, names in files.items() for name in names}
    tensors: dict[str, LazyTensor] = {}
    unplaced: dict[str, Path] = {}
    copies: dict[str, Path] = {}
    for file in files:
        stamps.add(file)
        for name, tensor in _open_file(file).items():
            if placed.get(name, file) != file:
                copies[name] = file
                continue
            if name not in placed and name in tensors:
                raise TruedepthError(
                    f"Both {unplaced[name]} and {file.name} hold {name!r}, and the index names"
                    " neither; remove the one that is out of date."
                )
            if name not in placed:
                unplaced[name] = file
            tensors[name] = stamps.watched(file, tensor)
    if lost := placed.keys() - tensors.keys() - may_be_left_out(config, placed.keys()):
        name = min(lost)
        raise TruedepthError(
            f"The index of {path} places {name!r} in {placed[name].name}, which does not hold it."
        )
    if copies:
        name = min(copies)
        note(
            f"{copies[name]} holds {len(copies)} tensors that the index places in other files, such"
            f" as {name!r} in {placed[name].name}; the index is followed."
        )
    if (path / ADAPTER).exists():
        note(
            f"{path} holds an adapter ({ADAPTER}) beside its weights; the weights are taken as they"
            " are, and the adapter is not added."
        )
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
            raise TruedepthError(_no_weights(path))
        if not allow_pickle:
            raise TruedepthError(
                f"{path} has pickled weights only, which can run code when they are read; get"
                " safetensors or, if you trust their author, convert them with truedepth convert"
                " MODEL OUT --pairs 0 --allow-pickle."
            )
        index, suffixes, single = pickled.INDEX, pickled.SUFFIXES, pickled.only_file(path)
    files: dict[str, set[str]] = {}
    if (path / index).exists():
        files = _indexed(path / index, suffixes)
        if single is not None and (path / single).is_file() and single not in files:
            if left := [name for name in files if (path / name).exists()]:
                note(
                    f"{path} holds {single}, which is read, as transformers does, and {index} with"
                    f" {left[0]}, which are not; remove the ones that are out of date."
                )
            files = {single: set()}
    elif single is not None:
        files = {single: set()}
    else:
        raise TruedepthError(f"{path} has several files of pickled weights but no {index}.")
    for name in files:
        check_fetched(path / name)
        if not (path / name).is_file():
            raise TruedepthError(f"The shard {path / name} is missing.")
    return {path / name: tensors for name, tensors in files.items()}


def _no_weights(path: Path) -> str:
    """Why nothing in a directory can be read as weights, and what to do."""
    sentence = f"{path} has no weights: neither {SINGLE_FILE} nor {INDEX}"
    if (path / ADAPTER).exists():
        return is_an_adapter(str(path), path / ADAPTER)
    names = sorted(file.name for file in path.iterdir())
    if files := [str(path / name) for name in names if name.endswith(".gguf")]:
        return f"{sentence}, but GGUF files; give one of them: {some(files)}."
    if files := [name for name in names if name.endswith(SUFFIX)]:
        return f"{sentence}; of its files these are not read: {some(files)}."
    return f"{sentence}."


def is_an_adapter(where: str, config: Path) -> str:
    """The sentence that refuses an adapter: `where` it is, and its adapter_config.json."""
    base = read_json(config).get("base_model_name_or_path")
    return (
        f"{where} is an adapter of {reprlib.repr(base)}, not a model; merge it into that model"
        " first (merge_and_unload of peft, then save_pretrained), and give the result."
    )


def some(names: Sequence[str]) -> str:
    """The first names of a list, and how many there are beside them."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _indexed(index: Path, suffixes: list[str]) -> dict[str, set[str]]:
    """The files that an index names, each with the tensors that it places in it."""
    files: dict[str, set[str]] = {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise TruedepthError(f"{index} has no weight_map.")
    for tensor, name in weight_map.items():
        # Only a bare name: a path could leave the directory. Links are followed, because the hub's
        # cache is made of them.
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.isprintable()
            or len(name.encode()) > MAX_NAME_BYTES
            or Path(name).suffix not in suffixes
        ):
            raise TruedepthError(
                f"{index} names {reprlib.repr(name)}, which is not a plain name of a weight file in"
                " this directory."
            )
        files.setdefault(name, set()).add(tensor)
    return files


def _open_file(file: Path) -> dict[str, LazyTensor]:
    """The tensors of one file. They share its memory map, so reading copies nothing."""
    if file.suffix != SUFFIX:
        return open_pickle(file)
    try:
        with file.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
        if header > MAX_HEADER_BYTES:
            raise ValueError(f"its header claims {header} bytes, more than {MAX_HEADER_BYTES}")
        with safe_open(file, framework="pt") as handle:
            stored = _offsets(file)
            names, metadata = handle.keys(), handle.metadata() or {}
            held = {name: mapped_tensor(handle.get_tensor(name), stored[name]) for name in names}
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        if any(said in str(error) for said in ("Dtype not understood", "unknown variant")):
            raise TruedepthError(
                f"{file} holds a type of tensor that cannot be read: {reason_of(error)}"
            ) from error
        raise TruedepthError(f"{file} is corrupt or truncated: {error}.") from error
    # Of tensors that share their memory safetensors' save_model writes one, and says so here.
    return held | {
        left_out: held[name]
        for left_out, name in metadata.items()
        if name in held and left_out not in held
    }


def _offsets(file: Path) -> dict[str, Stored]:
    """Where the tensors of a safetensors file that was checked before lie in it."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    begin = 8 + size
    return {name: Stored(file, begin + held["data_offsets"][0]) for name, held in header.items()}
