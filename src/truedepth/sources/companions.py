"""The files that go along with a model's config and weights: one list for every use.

They are fetched from the hub, checked before any long work begins, and copied to what is made of
the model. Patterns are those of `fnmatch`, for names relative to the model's directory, but that
`*` does not stand for a `/`.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import stat
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from truedepth.errors import TruedepthError
from truedepth.sources.fetched import check_fetched
from truedepth.sources.limits import MAX_TOKENIZER_BYTES, read_json


def _any_case(pattern: str) -> str:
    return "".join(f"[{c.upper()}{c.lower()}]" if c.isalpha() else c for c in pattern)


SETTINGS = "tokenizer_config.json"

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",  # Mistral's, by the version of its chat format
    "tekken.json",
    "*.model",  # SentencePiece's under other names: spiece.model, sentencepiece.bpe.model
    "*.tiktoken",
    "vocab.*",
)
"""Files that a tokenizer is made from."""

TOKENIZER = (
    *VOCABULARIES,
    SETTINGS,
    "tokenizer*.json",  # by the release of transformers: tokenizer.4.0.0.json
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokeniz*.py",
    "chat_template*.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)

LICENCES = tuple(
    map(
        _any_case,
        (
            *("*license*", "*licence*", "copying*", "copyright*"),
            *("*notice*", "*use_policy*", "*use-policy*"),
        ),
    )
)

PROCESSORS = ("processor_config.json", "*preprocessor_config.json")
"""What makes a model's input of pictures, video and sound."""

COMPANIONS = (*TOKENIZER, *PROCESSORS, "generation_config.json", *LICENCES)

STORES = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}
"""Hash functions by the number of hex digits of what they give."""


def in_folders(patterns: Iterable[str]) -> list[str]:
    """The patterns of what others match only where their `*` stands for a `/`, too."""
    return [
        f"{pattern[: star.start()]}*/*{pattern[star.end() :]}"
        for pattern in patterns
        for star in re.finditer(r"(?<!\[)\*", pattern)  # not the `[*]` of a name with a star
    ]


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Those of a model's files that match a pattern, in the order of their names."""
    ignored = in_folders(patterns)
    return sorted(
        name
        for name in names
        if any(fnmatchcase(name, pattern) for pattern in patterns)
        and not any(fnmatchcase(name, pattern) for pattern in ignored)
    )


def companions(path: Path, patterns: Sequence[str] = COMPANIONS) -> list[str]:
    """The names of the companions in a directory, also of links to nothing."""
    names = [file.name for file in path.iterdir() if file.suffix != ".dvc"]
    folders = {pattern.partition("/")[0] for pattern in patterns if "/" in pattern}
    for folder in folders & {*names}:
        if (path / folder).is_dir():
            names += [f"{folder}/{file.name}" for file in (path / folder).iterdir()]
    return [
        name
        for name in matching(names, patterns)
        if name in patterns or not (path / name).is_dir()  # `licenses` may be a folder
    ]


def check_companions(path: Path) -> None:
    """Check that the companions in a directory can be copied and be given to others.

    Raises:
        TruedepthError: One is not fetched yet, not a file, too large, cannot be read, is a link to
            what may be private, or is not the JSON that it should be.
    """
    stored = {file.name.removesuffix(".dvc") for file in path.glob("*.dvc")}
    for name in sorted({*companions(path), *matching(stored, COMPANIONS)}):
        file = path / name
        check_fetched(file)
        try:
            found = file.stat()
            if stat.S_ISREG(found.st_mode):
                file.open("rb").close()
        except OSError as error:
            raise TruedepthError(f"Cannot read {file}: {error.strerror}.") from error
        if not stat.S_ISREG(found.st_mode):
            kind = "a directory" if stat.S_ISDIR(found.st_mode) else "something else"
            raise TruedepthError(f"{file} must be a file, but it is {kind}; remove it.")
        check_size(file.name, found.st_size, str(file))
        for part in (file, *(folder for folder in file.parents if path in folder.parents)):
            _check_link(part)
    if (path / SETTINGS).exists():
        read_json(path / SETTINGS)


def check_size(name: str, size: int, where: str) -> None:
    """Refuse a companion that is too large to be one.

    Raises:
        TruedepthError: It is.
    """
    if size > MAX_TOKENIZER_BYTES:
        kind = "tokenizer file" if matching([name], TOKENIZER) else "file that goes along"
        raise TruedepthError(
            f"{where} is too large for a {kind}: {size} bytes, more than {MAX_TOKENIZER_BYTES};"
            " remove it if the model does not need it."
        )


def copy_companions(path: Path, out: Path) -> None:
    """Copy the companions of a directory to another.

    Raises:
        TruedepthError: One of them must not or cannot be copied; see `check_companions`.
    """
    check_companions(path)
    for name in companions(path):
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path / name, out / name)


def _check_link(file: Path) -> None:
    """Refuse links, but those to a file of the same name or into a store of files by content.

    Otherwise a licence that is a link to somebody's keys would be copied into what they publish.
    In the stores of DVC, git-annex and the hub's cache a file bears the hash of its own content,
    which a file that was not put there does not.
    """
    target = file.resolve()
    if (
        not file.is_symlink()
        or target.name == file.name
        or target.parent.name == "blobs"
        or (target.is_file() and _named_by_content(target))
    ):
        return
    raise TruedepthError(
        f"{file} is a link to {target}, which is not copied, because it may be private; replace the"
        " link by the file (cp -L), or remove it."
    )


def _named_by_content(file: Path) -> bool:
    """Whether a file's name, or the last two parts of its path, hold the hash of its content."""
    names = (file.name, file.parent.name + file.name)
    for digits in {found for name in names for found in re.findall(r"[0-9a-f]{32,}", name)}:
        if function := STORES.get(len(digits)):
            with file.open("rb") as opened:
                if hashlib.file_digest(opened, function).hexdigest() == digits:
                    return True
    return False
