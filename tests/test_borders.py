"""Files that are not ours: what is refused before it is read, and what does not travel into an export."""

from __future__ import annotations

import json
import math
import os
import shutil
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from limbeck.models.checkpoint import load_config, load_model, save_model
from limbeck.models.config import HybridConfig
from limbeck.models.errors import InputError
from limbeck.models.families.known import FAMILIES
from limbeck.models.foreign import DEEPEST, parse_json, read_json, read_yaml
from limbeck.models.named import CONF
from limbeck.models.schema import config_schema
from limbeck.models.tokenizer import load_tokenizer
from limbeck.tests.fuzz_helpers import judged_command, linked
from limbeck.tests.helpers import any_config, limbeck
from limbeck.tests.puzzle_config import puzzle


@pytest.mark.parametrize(
    ("text", "says"),
    (
        ("[" * 100_000, "deeper than 64 levels"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "deeper than 64 levels"),
        ('{"a": ' + "9" * 5000 + "}", "999999999999... has 5000 digits"),
        ('{"a": NaN}', "NaN stands where a number should"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"a": 1, "a": true}', "'a' stands twice"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"a": 1', "is no valid JSON"),
    ),
)
def test_json_is_bounded(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        parse_json(text, "file")
    assert str(caught.value).startswith("file") and len(str(caught.value)) < 200


def test_json_that_is_odd_and_right() -> None:
    assert parse_json("[" * DEEPEST + "]" * DEEPEST, "file") is not None
    assert parse_json('{"a": 1, "a": 1, "b": Infinity}', "file") == {"a": 1, "b": math.inf}
    assert parse_json('{"model_max_length": 1000000000000000019884624838656}', "file")["model_max_length"] > 1e29
    assert parse_json('"\\ud83d\\ude00"', "file") == "\N{GRINNING FACE}"


@pytest.mark.parametrize(
    ("text", "says"),
    (
        ("a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)), "aliases"),
        ("&a [*a]", "levels"),
        ("[" * 9000, "levels"),
        ("x: 2024-99-99", "no YAML that can be read"),
        ("x: 0x" + "f" * 9999, "digits"),
        ("x: " + "9" * 5000, "no YAML that can be read"),
        ("- !!python/object:os.system x", "no YAML"),
        ("x" * 2**19, "262,144 at most"),
        ("a: 1\na: 2", "'a' stands twice"),
        ("- {path: a, path: [a]}", "'path' stands twice"),
    ),
)
def test_yaml_is_bounded(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=says):
        read_yaml(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("a: &a [1, 2]\nb: *a\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": [1, 2], "b": [1, 2]}
    (tmp_path / "x.yaml").write_text("a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, y: 2}\nd: 5\nd: 5\n")
    assert read_yaml(tmp_path / "x.yaml")["c"] == {"x": 2, "y": 2}


FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors",
         "chat_template.jinja")  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ("pipe", "device", "folder"))
def test_a_pipe_a_device_or_a_folder_is_no_file(name: str, kind: str, workshop: Path, tmp_path: Path) -> None:
    folder = linked(workshop / "model", tmp_path / "model", {name: b""})
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/dev/zero")
    chat = ("chat=true",) if "template" in name else ()
    assert judged_command(kind, "generate", f"model={folder}", "prompt=x", "max_new_tokens=1", *chat) == 2


def test_links_out_of_a_folder_do_not_travel(workshop: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_bytes((workshop / "model" / "tokenizer_config.json").read_bytes())
    folder = tmp_path / "model"
    shutil.copytree(workshop / "model", folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").symlink_to(secret)
    out = tmp_path / "out"
    code, _, err = limbeck("export", f"model={folder}", f"output={out}")
    assert code == 2 and f"is a link out of its folder, to {secret}" in err and not out.exists()
    (folder / "tokenizer_config.json").unlink()
    (folder / "own.json").write_bytes(secret.read_bytes())
    (folder / "tokenizer_config.json").symlink_to("own.json")
    save_model(load_model(folder), out, tokenizer_from=folder)
    assert (out / "tokenizer_config.json").read_bytes() == secret.read_bytes()
    assert not (out / "tokenizer_config.json").is_symlink()


def test_a_snapshot_of_the_hub_travels(workshop: Path, tmp_path: Path) -> None:
    """Whose files are links to blobs beside it."""
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    shutil.copytree(workshop / "model", blobs)
    linked(blobs, snapshot, {})
    save_model(load_model(snapshot), tmp_path / "out", tokenizer_from=snapshot)
    assert load_tokenizer(tmp_path / "out").vocab_size == load_tokenizer(snapshot).vocab_size


def test_what_points_to_code_does_not_travel(workshop: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(workshop / "model", folder)
    code = {"auto_map": {"AutoModel": "evil--x.Model"}, "custom_pipelines": {"x": {}}}
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text()) | code | {"inner": code | {"kept": 1}}
        (folder / name).write_text(json.dumps(content))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2} | code))
    save_model(load_model(folder), tmp_path / "out", tokenizer_from=folder)
    for file in (tmp_path / "out").glob("*.json"):
        assert "auto_map" not in file.read_text() and "custom_pipelines" not in file.read_text(), file
    assert read_json(tmp_path / "out" / "tokenizer_config.json")["inner"] == {"kept": 1}
    assert read_json(tmp_path / "out" / "generation_config.json") == {"eos_token_id": 2}


@pytest.mark.parametrize(
    ("change", "says"),
    (
        ({"layer_norm_epsilon": "x"}, 'layer_norm_epsilon is "x"; expected a number'),
        ({"layer_norm_epsilon": -1}, "norm_eps is -1"),
        ({"time_step_limit": 5}, "time_step_limit is 5; expected a list"),
        ({"time_step_limit": [0, [1]]}, "time_step_limit[1] is [1]; expected a number or an object"),
        ({"max_position_embeddings": True}, "max_position_embeddings is true; expected a whole number"),
        ({"max_position_embeddings": 10**15}, "expected at most 1099511627776"),
        ({"layers_block_type": 5}, "layers_block_type is 5; expected a list"),
        ({"layers_block_type": [[]]}, "layers_block_type[0] is []; expected a text"),
        ({"model_type": []}, "model_type is []; supported: "),
        ({"hidden_size": 32.5}, "hidden_size is 32.5; expected a whole number"),
        ({"hidden_size": 10**12}, "expected at most 16777216"),
        ({"hidden_size": 2**24, "vocab_size": 2**24}, "expected 1,099,511,627,776 at most"),
        ({"eos_token_id": {"a": 1}}, 'eos_token_id is {"a": 1}; expected a whole number or a list'),
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings is "false"; expected true or false'),
        ({"hybrid_override_pattern": "M" * 10**6}, "hybrid_override_pattern"),
        ({"model_type": "llama", "num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected at most 4096"),
        ({"model_type": "qwen3", "num_hidden_layers": 2, "rope_scaling": [1]}, "rope_scaling is [1]; expected an obj"),
    ),
)  # fmt: skip
def test_fields_of_a_config(change: dict[str, Any], says: str, workshop: Path, tmp_path: Path) -> None:
    content = json.loads((workshop / "model" / "config.json").read_text()) | change
    folder = linked(workshop / "model", tmp_path / "model", {"config.json": json.dumps(content).encode()})
    with pytest.raises(InputError) as caught:
        load_config(folder)
    assert says in str(caught.value) and len(str(caught.value)) < 400, caught.value


class Watched(dict[str, Any]):
    """A config.json that notes which of its fields are looked at."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


def published() -> list[Any]:
    """A config.json of each family: those in conf/model/, and drawn ones."""
    named = [yaml.safe_load(path.read_text()) for path in sorted((CONF / "model").glob("*.yaml"))]
    return [*named, puzzle(), *(any_config(seed).to_hf() for seed in (1, 50, 51))]


@pytest.mark.parametrize("content", published(), ids=lambda content: content["model_type"])
def test_every_field_that_a_family_reads_has_a_type(content: dict[str, Any]) -> None:
    family = FAMILIES[content["model_type"]]
    watched = Watched(content)
    family.read(watched)
    schema = config_schema(family, family.config or HybridConfig).model_fields
    untyped = {
        name for name in watched.read - {"model_type"}
        if name not in schema or Any in (schema[name].annotation, *typing.get_args(schema[name].annotation))
    }  # fmt: skip
    assert watched.read and not untyped


def test_each_family_is_among_them() -> None:
    assert {content["model_type"] for content in published()} == set(FAMILIES)
