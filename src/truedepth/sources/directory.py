"""A transformers model directory, its weights in one file or in shards."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truedepth.errors import TruedepthError
from truedepth.sources.limits import MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES, read_json
from truedepth.sources.source import Source
from truedepth.sources.stamps import Stamps
from truedepth.sources.weights import ADAPTER, is_an_adapter, read_tensors, some

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Files that are copied unread: tokenizers, chat templates, generation config, licence.
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
    for file in (path / "config.json", *_companions(path)):
        stamps.add(file)
    if not (path / "config.json").exists():
        names = [file.name for file in path.iterdir()]
        raise TruedepthError(without_config(str(path), names, path))
    config = read_json(path / "config.json", most=MAX_CONFIG_BYTES)

    def save_companions(out: Path) -> None:
        for file in _companions(path):
            stamps.add(file)
            _check_link(file)
            if file.is_dir():
                shutil.copytree(file, out / file.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, out / file.name)

    def read_generation_config() -> Mapping[str, Any]:
        file = path / "generation_config.json"
        return read_json(file, most=MAX_CONFIG_BYTES) if file.exists() else {}

    def load_tokenizer() -> PreTrainedTokenizerBase:
        return _tokenizer(path, config, trust_remote_code)

    return Source(
        name=name or path.resolve().name,
        origin=origin,
        path=path,
        config=config,
        read_tensors=lambda: read_tensors(path, config, stamps, allow_pickle),
        save_companions=save_companions,
        load_tokenizer=load_tokenizer,
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


def _companions(path: Path) -> list[Path]:
    return [file for pattern in COMPANIONS for file in sorted(path.glob(pattern))]


def _tokenizer(
    path: Path, config: dict[str, Any], trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    from transformers import AutoConfig, AutoTokenizer

    from truedepth.families.registration import register

    for file in _companions(path):
        if file.is_file() and file.stat().st_size > MAX_TOKENIZER_BYTES:
            raise TruedepthError(
                f"{file} is too large for a tokenizer file: {file.stat().st_size} bytes, more"
                f" than {MAX_TOKENIZER_BYTES}."
            )
    register()
    try:
        # Given the config, transformers does not look for one, nor for a config's own code.
        return AutoTokenizer.from_pretrained(
            path, config=AutoConfig.for_model(**config), trust_remote_code=trust_remote_code
        )
    except Exception as error:
        settings = path / "tokenizer_config.json"
        if trust_remote_code or not settings.exists() or "auto_map" not in read_json(settings):
            raise
        raise TruedepthError(
            f"The tokenizer of {path} needs its own code, which runs only with"
            " --trust-remote-code (trust_remote_code=True in Python); read that code first."
        ) from error


def _check_link(file: Path) -> None:
    """Refuse links but those to a file of the same name or into the hub's cache, made of links.

    Otherwise a licence that is a link to somebody's keys would be copied into what they publish.
    """
    for each in (file, *(file.rglob("*") if file.is_dir() else ())):
        target = each.resolve()
        if each.is_symlink() and target.name != each.name and target.parent.name != "blobs":
            raise TruedepthError(
                f"{each} is a link to {target}, which is not copied; remove the link."
            )
