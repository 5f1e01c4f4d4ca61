"""Models of the Hugging Face hub, by name and revision: config, tokenizer and safetensors, into the hub's own cache.

Nothing else is fetched, and nothing that was fetched is run. Files that are there already are not fetched again, and a
broken transfer continues (huggingface_hub does that); HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME and HF_TOKEN mean what they
mean there.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import InputError
from .fingerprint import LOG, PROVENANCE, RESULT, RUN, content_of
from .foreign import first_line
from .schema import read_index
from .shards import ADAPTER_SETTINGS, ADAPTER_WEIGHTS, INDEX, SINGLE

HUB = "hf:"
SPELLED = "hf:OWNER/NAME[@REVISION]"
NAME = r"[\w.-]+/[\w.-]+"
ADAPTER = (ADAPTER_SETTINGS, ADAPTER_WEIGHTS)
# What is fetched beside the weights: what the tokenizer needs, and the terms, which an export's card names.
SMALL = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja", "README.md",
)  # fmt: skip
TERMS = re.compile(r"(licen[cs]e|notice|copying)([-._][^/]*)?", re.IGNORECASE)
AT_ONCE = 4  # transfers
LOCAL = (RESULT, LOG)  # of a folder, what says where it lies, and when it was made
log = logging.getLogger("limbeck")


@dataclasses.dataclass(frozen=True)
class HubModel:
    """A model of the hub; without a revision its main one as it is now."""

    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubModel:
        """Raises InputError where the text is none."""
        parts = re.fullmatch(rf"{HUB}({NAME})(?:@([\w./-]+))?", text)
        if parts is None:
            raise InputError(f"{text}: expected {SPELLED}")
        return cls(*parts.groups())

    @property
    def text(self) -> str:
        return f"{HUB}{self.name}" + (f"@{self.revision}" if self.revision else "")


def is_hub_name(text: str) -> bool:
    """Whether a text that is no folder could be meant for the hub, without the prefix that it needs."""
    return re.fullmatch(NAME, text) is not None and not text.startswith(".")


@functools.lru_cache(maxsize=64)
def hub_folder(text: str, weights: bool = True) -> Path:
    """The folder in the cache that holds a model of the hub, or its config.json alone (of an adapter its settings);
    requested once in a run.

    Raises InputError where the hub has none of the name or the revision, does not let it be read, or cannot be reached
    and the cache has none either; and for a model without safetensors.
    """
    import huggingface_hub
    from huggingface_hub import errors

    model = HubModel.parse(text)
    try:
        info = huggingface_hub.HfApi().model_info(model.name, revision=model.revision)
        files = [sibling.rfilename for sibling in info.siblings or ()]
        config = ADAPTER[0] if ADAPTER[0] in files and "config.json" not in files else "config.json"
        wanted = chosen_files(model, files, info.sha) if weights else [config]
        return download(model, wanted)
    except InputError:
        raise
    except errors.GatedRepoError:
        raise InputError(
            f"{text} is gated: accept its terms on the model's page of the hub, and log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{text}: the hub has no model {model.name}, or it is private; mind the spelling, or log in with"
            " `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{text}: {model.name} has no revision {model.revision}; leave out @REVISION for the main one"
                         ) from None  # fmt: skip
    except errors.HFValidationError as error:
        raise InputError(f"{text}: {first_line(error)}; expected {SPELLED}") from None
    except Exception as error:  # no network, a network that breaks, offline mode, a server's fault
        return cached(model, error, weights)


def chosen_files(model: HubModel, files: Sequence[str], commit: str | None) -> list[str]:
    """Those of a model's files that are read. Raises InputError where the weights are not in safetensors."""
    small = [name for name in files if name in SMALL or TERMS.fullmatch(name)]
    if INDEX in files:
        index = Path(fetch(model, INDEX, commit))
        return [*small, INDEX, *sorted(set(read_index(index).values()))]
    if SINGLE in files:
        return [*small, SINGLE]
    if set(ADAPTER) <= set(files):
        return [*small, *ADAPTER]
    if any(name.endswith((".bin", ".pt", ".pth")) for name in files):
        raise InputError(
            f"{model.text} has no safetensors, only files that run code when they are read; have it converted at"
            " huggingface.co/spaces/safetensors/convert, and give the revision that it makes (@refs/pr/N)"
        )
    raise InputError(f"{model.text} has no weights: expected {SINGLE} or {INDEX}; found {', '.join(files[:4]) or 'no'}")


def fetch(model: HubModel, name: str, commit: str | None) -> str:
    import huggingface_hub

    return huggingface_hub.hf_hub_download(model.name, name, revision=commit)


def download(model: HubModel, files: Sequence[str]) -> Path:
    """The folder that holds the files, those that were not in it fetched. The first one goes by the revision's name, so
    that the cache knows which commit that was when there is no network."""
    first, *others = files
    folder = Path(fetch(model, first, model.revision)).parents[first.count("/")]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda name: fetch(model, name, folder.name), others))
    return folder


def cached(model: HubModel, error: Exception, weights: bool) -> Path:
    """The folder that an earlier download left. Raises InputError where there is none, or none with the weights that
    are wanted, with what kept the hub away."""
    import huggingface_hub
    from huggingface_hub import errors

    names = ("config.json", ADAPTER[0])
    places: list[Any] = [huggingface_hub.try_to_load_from_cache(model.name, name, revision=model.revision)
                         for name in names]  # fmt: skip
    folder = next((Path(place).parent for place in places if isinstance(place, str)), None)
    if folder is not None and (not weights or has_weights(folder) or (folder / ADAPTER[1]).is_file()):
        log.warning("%s: taken from the cache, revision %s", model.text, folder.name)
        return folder
    why = "HF_HUB_OFFLINE is set" if isinstance(error, errors.OfflineModeIsEnabled) else first_line(error)
    there = "is not in the local cache"
    if folder is not None:
        there = f"its weights are not in the local cache (revision {folder.name} without them)"
    raise InputError(f"{model.text} cannot be fetched ({why}), and {there}; without a network give a folder") from None


def has_weights(folder: Path) -> bool:
    """Whether all of a model's weights lie in a folder. Raises InputError for a broken index."""
    if (folder / INDEX).is_file():
        return all((folder / name).is_file() for name in read_index(folder / INDEX).values())
    return (folder / SINGLE).is_file()


def check_push_name(name: str) -> None:
    """Raises InputError where the hub has no models of such names."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not is_hub_name(name):
        raise InputError(f"push={name}: expected OWNER/NAME")
    try:
        for part in (name, *name.split("/")):  # an owner is spelled as a name is
            validate_repo_id(part)
    except HFValidationError as error:
        raise InputError(f"push={name}: {first_line(error)} Give OWNER/NAME so") from None


def push_folder(folder: Path, name: str, dry: bool) -> list[Path]:
    """The files of a folder that go to the hub as the model OWNER/NAME, which is made, private, where it is not there;
    `dry` uploads nothing. Raises InputError where the hub does not take them."""
    import huggingface_hub

    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in LOCAL)
    if not dry:
        try:
            api = huggingface_hub.HfApi()
            api.create_repo(name, private=True, exist_ok=True)
            made = content_of(folder)
            own = [PROVENANCE] if made else []  # without what it says of this machine
            api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=[*LOCAL, *own])
            if made:
                text = json.dumps({key: value for key, value in made.items() if key != RUN}, indent=2)
                api.upload_file(path_or_fileobj=text.encode(), path_in_repo=PROVENANCE, repo_id=name)
        except Exception as error:  # no network, no login, no right to write
            raise InputError(
                f"push={name}: the hub does not take it ({first_line(error)}); log in with `hf auth login`, and run the"
                " same command again"
            ) from None
    return files


def origins(inputs: Mapping[str, Path | str]) -> dict[str, str]:
    """What of a stage's inputs is the hub's, each with its commit: a model's folder, a data set, and what a folder of
    ours says that it came from (its `sources`, as "input.source")."""
    known: dict[str, str] = {}
    for key, value in inputs.items():
        if isinstance(value, str):
            known |= {key: value} if value.startswith(HUB) else {}
        elif (origin := hub_origin(value)) is not None:
            known[key] = origin
        elif isinstance(before := content_of(value).get("sources"), dict):
            known |= {f"{key}.{name}": str(text) for name, text in before.items()}
    return known


def names_in(sources: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The models and the data sets of `origins`, OWNER/NAME, each once, the base before the others. (A data set's text
    has its config and split, too.)"""
    found: tuple[list[str], list[str]] = ([], [])
    for key in sorted(sources, key=lambda key: (key != "base", key)):
        name, *parts = sources[key].removeprefix(HUB).split(":")
        list_of, name = found[bool(parts)], name.partition("@")[0]
        if name not in list_of:
            list_of.append(name)
    return found


def hub_origin(path: Path) -> str | None:
    """The name and commit of a folder of the cache, models--OWNER--NAME/snapshots/COMMIT, as `HubModel.parse` reads
    it; None for any other folder."""
    snapshot, home = path.parent, path.parent.parent.name
    if snapshot.name != "snapshots" or not home.startswith("models--"):
        return None
    owner, _, name = home.removeprefix("models--").partition("--")
    return HubModel(f"{owner}/{name}", path.name).text
