"""A folder of a PEFT adapter as the model that it makes of its base: a folder of its own in CACHE/adapters, with the
base's config and tokenizer, links to the base's weights, and the adapter, which is merged where weights are read
(lora.py). So whoever takes a folder takes this one, and what is made of it depends on the base as on the adapter.

CACHE is $LIMBECK_CACHE, or ~/.cache/limbeck. A folder there goes by name, size and time of change of all of its files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from .checkpoint import load_config, weight_files
from .companions import check_own, companions
from .errors import DiskError, InputError
from .families.family import stored_tensors
from .fingerprint import PROVENANCE
from .folder import cache_folder, finish_folder, write_json
from .hub import HUB, TERMS, hub_folder, is_hub_name, origins
from .lora import MERGED, read_adapter, read_settings
from .shards import ADAPTER_SETTINGS, ADAPTER_WEIGHTS, INDEX, SINGLE
from .tensors import refusal

MAKING = ".making-"
GENERATION = "generation_config.json"


def base_folder(adapter: Path, weights: bool = True) -> Path:
    """The folder of an adapter's base, with its weights or its config alone. Raises InputError where it is not
    there."""
    settings = read_settings(adapter)
    stated, revision = settings["base_model_name_or_path"], settings.get("revision")
    for folder in (Path(stated), adapter / stated):
        if is_folder(folder):
            return folder
    if is_hub_name(stated):
        return hub_folder(f"{HUB}{stated}" + (f"@{revision}" if revision else ""), weights)
    raise InputError(
        f"{adapter / ADAPTER_SETTINGS}: the base {stated!r} is neither a folder here nor OWNER/NAME of the hub; say in"
        " base_model_name_or_path where it is"
    )


def is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long
        return False


def merged_folder(adapter: Path) -> Path:
    """The folder of the model that an adapter makes of its base. Raises InputError where it makes none, DiskError where
    the disk refuses."""
    base = base_folder(adapter)
    config = load_config(base)
    read_adapter(adapter, config, stored_tensors(config))  # what is wrong is said of this folder
    own = (adapter / "tokenizer.json").is_file()
    along = [file for file in companions(base) if file.name == GENERATION or not own]
    along += [file for file in companions(adapter) if own]
    terms = [file for file in base.iterdir() if file.is_file() and is_term(file.name)]
    check_own(base, terms)
    along += terms
    copies = {file.name: file for file in (*along, base / "config.json")}
    links = {file.name: file for file in weight_files(base)}
    links |= {INDEX: base / INDEX} if SINGLE not in links else {}
    links |= {f"{MERGED}/{name}": adapter / name for name in (ADAPTER_SETTINGS, ADAPTER_WEIGHTS)}
    looks = [(name, str(file.resolve()), *look(file)) for name, file in sorted((copies | links).items())]
    folder = cache_folder() / "adapters" / hashlib.sha256(json.dumps(looks).encode()).hexdigest()[:32]
    if not folder.is_dir():
        write_links(folder, copies, links, origins({"base": base, "adapter": adapter}))
    return folder


def look(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def is_term(name: str) -> bool:
    """Whether a file of a model's folder says its terms."""
    return name == "README.md" or TERMS.fullmatch(name) is not None


def write_links(folder: Path, copies: dict[str, Path], links: dict[str, Path], sources: dict[str, str]) -> None:
    """Fills the folder; of several processes that do so at a time the first one's stays."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=MAKING, dir=folder.parent, ignore_cleanup_errors=True) as temporary:
            place = Path(temporary)
            (place / MERGED).mkdir()
            for name, file in copies.items():
                shutil.copy2(file, place / name)
            for name, file in links.items():
                os.symlink(file.resolve(), place / name)
            if sources:
                write_json(place / PROVENANCE, {"sources": sources})
            try:
                finish_folder(place, folder)
            except OSError:
                if not folder.is_dir():
                    raise
    except OSError as error:
        raise DiskError(f"{refusal(error, folder.parent)} (or set LIMBECK_CACHE to another folder)") from None
