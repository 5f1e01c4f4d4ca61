"""The model card of an exported folder: what it is, how near its teacher, how to open it, and whose terms apply."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from yaml import YAMLError

from ...models.companions import check_own
from ...models.config import HybridConfig
from ...models.cost.parameters import count_parameters
from ...models.errors import InputError
from ...models.fingerprint import PROVENANCE, read_provenance
from ...models.foreign import first_line, own_path, read_object
from ...models.hub import names_in
from ...models.kinds import KINDS
from .gap_rows import estimates, few_documents, pair_rows, probe_rows, task_rows, titles

Table = tuple[list[str], list[list[str]]]  # columns, rows
TERMS = re.compile(r"(licen[cs]e|notice|copying)([-._].*)?", re.IGNORECASE)
COLUMNS = ("bits_per_byte", "kl", "agreement", "mass_kept")
FURTHER = (
    "cross_entropy", "perplexity", "reverse_kl", "top5_agreement", "mean_rank", "ece", "length",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Opened:
    """How a published model is opened: the library that the hub knows, and lines of a language."""

    library: str
    language: str
    code: str


TRANSFORMERS = Opened(
    "transformers",
    "python",
    "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    'model = AutoModelForCausalLM.from_pretrained(".")\n'
    'tokenizer = AutoTokenizer.from_pretrained(".")',
)


VLLM = Opened("vllm", "python", 'from vllm import LLM\nmodel = LLM(".")')


def llama_cpp(file: str) -> Opened:
    return Opened("gguf", "bash", f"llama-cli -m {file} -p 'Once upon a time'")


@dataclasses.dataclass(frozen=True)
class Published:
    """What an export is: its dtype, how it is opened, how it was compared, and what others will not do with it, in
    sentences."""

    dtype: str
    opened: Opened
    checked: str
    cautions: tuple[str, ...] = ()
    relation: str = "finetune"  # to its base, in the hub's words: or "quantized"
    tables: tuple[tuple[str, Table], ...] = ()  # further figures, each with its words


@dataclasses.dataclass(frozen=True)
class Licence:
    """What a model folder says of its terms: the keys license, license_name and license_link of its card (or license of
    its config), and files with the terms."""

    keys: Mapping[str, Any]
    files: tuple[Path, ...]


@dataclasses.dataclass(frozen=True)
class Figures:
    """What was measured of a model: gap.json's content, what it calls the model, and a PNG of it; nothing, where
    nothing was."""

    gap: Mapping[str, Any] | None = None
    name: str | None = None
    picture: Path | None = None


def read_licence(folder: Path) -> Licence:
    """The terms of a base model's folder, as far as it tells any. Raises InputError for a file of them that is a link
    out of the folder."""
    keys: dict[str, Any] = {}
    card = folder / "README.md"
    files = sorted(path for path in folder.iterdir() if path.is_file() and TERMS.fullmatch(path.name))
    check_own(folder, [*files, *([card] if card.is_file() else [])])
    if card.is_file():
        keys = front_matter(card)
    if not keys and (folder / "config.json").is_file():
        keys = stated_terms({"license": read_object(folder / "config.json").get("license")})
    return Licence(keys, tuple(files))


def front_matter(card: Path) -> dict[str, Any]:
    """The licence keys of a card's YAML head; none where there is no head, or it is not YAML."""
    from huggingface_hub.repocard import metadata_load  # takes half a second, which only export waits for

    try:
        head = metadata_load(card) or {}
    except (ValueError, YAMLError, RecursionError):
        return {}
    return stated_terms(head)


def stated_terms(head: Mapping[str, Any]) -> dict[str, Any]:
    """The licence keys that say something: texts, and lists of them, which stay lists."""
    found: dict[str, Any] = {}
    for key in ("license", "license_name", "license_link"):
        value = head.get(key)
        each = value if isinstance(value, list) else [value]
        texts = [str(text) for text in each if text and not isinstance(text, (list, dict))]
        if texts:
            found[key] = texts if isinstance(value, list) else texts[0]
    return found


def write_card(
    folder: Path,
    config: HybridConfig,
    published: Published,
    licence: Licence,
    gap: Mapping[str, Any] | None = None,
    name: str | None = None,
    picture: Path | None = None,
    sources: Mapping[str, str] | None = None,
) -> None:
    """Writes README.md into the folder, and copies the files with the base model's terms beside it.

    `gap` is gap.json's content, `name` what it calls this model, and `picture` a PNG of its figures, which is copied as
    gap.png; `sources` are what of it is the hub's (models/hub.py)."""
    for path in licence.files:
        shutil.copyfile(path, folder / path.name)
    if picture is not None:
        shutil.copyfile(picture, folder / "gap.png")
    text = card_text(config, published, licence, gap, name, picture is not None, sources)
    (folder / "README.md").write_text(text, encoding="utf-8")


def gap_folder(name: str) -> Path:
    """Raises InputError where it is no folder of `limbeck evaluate`."""
    folder = own_path(name)
    if not (folder / "gap.json").is_file() or read_provenance(folder).get("made_by") != "limbeck evaluate":
        raise InputError(f"gap={name} is no folder of limbeck evaluate; expected gap.json and {PROVENANCE} in it")
    return folder


def read_figures(folder: Path, model: str, config: HybridConfig) -> Figures:
    """What a `gap_folder` tells of the model of this sum. Raises InputError where it is not about it, or does not hold
    what a card tells."""
    made, gap = read_provenance(folder), read_object(folder / "gap.json")
    known = gap["models"] if isinstance(gap.get("models"), dict) else {}
    names = [name for name, digest in made["inputs"].items() if digest == model and name in known]
    if not names:
        raise InputError(f"gap={folder} measured other models than model=; evaluate this one, or leave it out")
    if isinstance(gap.get("data"), dict):
        gap["data"]["dtype"] = made["options"].get("dtype")
    check_gap(folder / "gap.json", gap, names[0], config)
    picture = folder / "plots" / "gap.png"
    if not picture.is_file():
        return Figures(gap, names[0])
    check_own(folder, [picture])
    return Figures(gap, names[0], picture)


def check_gap(path: Path, gap: Mapping[str, Any], name: str, config: HybridConfig) -> None:
    """Raises InputError where gap.json's content lacks what a card tells of it, found before there is an export."""
    try:
        card_text(config, Published("", TRANSFORMERS, ""), Licence({}, ()), gap, name)
    except Exception as error:  # whatever is missing, or of another kind
        raise InputError(
            f"{path} does not hold what limbeck evaluate writes ({type(error).__name__}: {first_line(error)}); evaluate"
            " again"
        ) from None


def card_text(
    config: HybridConfig,
    published: Published,
    licence: Licence,
    gap: Mapping[str, Any] | None = None,
    name: str | None = None,
    pictured: bool = False,
    sources: Mapping[str, str] | None = None,
) -> str:
    """The card, of what `write_card` is given."""
    from huggingface_hub import ModelCardData

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    tags = ["limbeck", "pruned", config.family]
    models, datasets = names_in(sources or {})
    relation: dict[str, Any] = {"base_model": models, "base_model_relation": published.relation} if models else {}
    head = ModelCardData(library_name=published.opened.library, pipeline_tag="text-generation", tags=tags,
                         datasets=datasets or None, **relation, **licence.keys)  # fmt: skip
    names = [kind.name for kind in config.kinds]
    kinds = {name: names.count(name) for name in dict.fromkeys(kind.name for kind in KINDS.values()) if name in names}
    told = {key: ", ".join(value) if isinstance(value, list) else value for key, value in licence.keys.items()}
    return environment.get_template("card.md.jinja").render(
        head=head.to_yaml(), config=config, published=published, licence=dataclasses.replace(licence, keys=told),
        gap=gap, name=name,
        few=few_documents(gap) if gap else "",
        parameters=f"{count_parameters(config):,}", kinds=list(kinds),
        layers=", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        tables=[] if gap is None else [near(gap), further(gap)], others=[] if gap is None else others(gap),
        picture=pictured,
    )  # fmt: skip


def near(gap: Mapping[str, Any]) -> Table:
    """Each model's parameters and main figures, with their intervals."""
    return ["model", "parameters", *titles(COLUMNS)], [
        [masked(model), f"{gap['parameters'][model]:,}", *(figure(figures[key]) for key in COLUMNS)]
        for model, figures in gap["models"].items()
    ]


def further(gap: Mapping[str, Any]) -> Table:
    """Each model's other figures, as far as they were measured."""
    models = estimates(gap)
    keys = [key for key in FURTHER if any(figures.get(key) for figures in models.values())]
    columns = titles(keys)
    if keys[-1] == "length":
        columns[-1] += f", of {next(iter(gap['continuation'].values()))['new_tokens']} tokens"
    return ["model", *columns], [
        [masked(name), *(figure(figures[key]) if figures.get(key) else "" for key in keys)]
        for name, figures in models.items()
    ]


def others(gap: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """What else was measured, each with a sentence of what it is; what was not is left out."""
    tables = {
        "How two students differ, paired by document; p is how likely such a difference would be if there were none:":
            differences(gap),
        "Retrieval from long text: the share of probes that were answered, and the nats of an answer:": retrieval(gap),
        "Answers to lm-evaluation-harness, with its standard errors:": tasks(gap),
        "Memory, and tokens a second as the roofline allows them:": fits(gap),
    }  # fmt: skip
    return [(words, table) for words, table in tables.items() if table[1]]


def differences(gap: Mapping[str, Any]) -> Table:
    """Of every two students the second minus the first, in the main figures."""
    rows = [[masked(label), *cells] for label, cells in pair_rows(gap, COLUMNS, figure, " - ")]
    return ["models", *titles(COLUMNS)], rows


def retrieval(gap: Mapping[str, Any]) -> Table:
    """A line for each kind and length of probe."""
    rows = [
        [label, *(f"{figure(each['answered'], digits=2)}; {each['nats']['value']:.1f}" for each in answers)]
        for label, answers in probe_rows(gap)
    ]
    return ["probe", *map(masked, gap["models"])], rows


def tasks(gap: Mapping[str, Any]) -> Table:
    """A line for each task and metric."""
    answers = gap.get("tasks") or {}
    if not answers:
        return [], []
    return ["task, metric", *map(masked, answers)], [[masked(label), *cells] for label, *cells in task_rows(answers)]


def fits(gap: Mapping[str, Any]) -> Table:
    """A line for each model: its bytes and whether they fit, for the requested card and context."""
    rows = []
    for name, fit in (gap.get("memory") or {}).items():
        held, verdict, speed = fit["memory"], fit["verdict"], fit.get("throughput")
        place = f"{fit['hardware']['name']}, {held['context']:,} tokens x {held['batch']}"
        sizes = [f"{bytes_ / 2**30:.3f} GiB" for bytes_ in (held["weights"], held["total"], verdict["budget"])]
        rate = f"{speed['tokens_per_second']:,.0f} at a batch of {speed['batch']:,}" if speed else ""
        rows.append([masked(name), place, *sizes, "yes" if verdict["fits"] else "no", rate])
    return ["model", "for", "weights", "together", "budget", "fits", "tokens a second"], rows


def masked(name: str) -> str:
    """A name whose pipes do not end a cell."""
    return name.replace("|", "\\|")


def figure(estimate: Mapping[str, Any], sign: str = "", digits: int = 4, p: float | None = None) -> str:
    if estimate["low"] is None:
        return f"{estimate['value']:{sign}.{digits}f}"
    value, low, high = (f"{estimate[end]:{sign}.{digits}f}" for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]" + ("" if p is None else f", p {p:.3f}")
