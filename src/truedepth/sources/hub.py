"""Which files of a hub repository are downloaded: those that are read, and those that go along.

Repositories hold the same weights several times, in other formats and precisions. Their small files
come first, with the index of the weights, and then the weights that will be read.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from pathlib import Path

from truedepth.errors import TruedepthError
from truedepth.sources import pickled
from truedepth.sources.companions import COMPANIONS
from truedepth.sources.limits import read_json
from truedepth.sources.weights import ADAPTER, INDEX, SINGLE_FILE

SMALL_FILES = (
    *COMPANIONS,
    *("config.json", INDEX, pickled.INDEX),
    *(ADAPTER, "params.json"),  # for the sentence where there is no config.json
)


def fetch_weights(fetch: Callable[[Sequence[str]], Path], allow_pickle: bool) -> Path:
    """Download the weights that are read, and no other copy of them.

    A single file is read where there is one that the index does not name; else the files of the
    index.

    Args:
        fetch: Downloads the files that match the patterns; gives the directory.
        allow_pickle: Download pickled weights if there are no safetensors.

    Returns:
        The directory.
    """
    first = ("config.json", INDEX, pickled.INDEX)
    directory = fetch([*first, SINGLE_FILE])
    found = (directory / SINGLE_FILE).exists()
    shards = _indexed(directory / INDEX)
    if shards and not (found and SINGLE_FILE not in shards):
        return fetch([*first, *map(glob.escape, shards)])
    if allow_pickle and not found:
        shards = _indexed(directory / pickled.INDEX)
        return fetch([*first, *(map(glob.escape, shards) if shards else pickled.PATTERNS)])
    return directory


def _indexed(index: Path) -> list[str]:
    """The files that an index names; none if it is not there or broken, as its reader will say."""
    try:
        weight_map = read_json(index).get("weight_map")
    except TruedepthError:
        return []
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    return sorted({name for name in names if isinstance(name, str) and name.isprintable()})
