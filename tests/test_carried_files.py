"""What goes along into an export lies in the model's folder: terms, a card, what an adapter takes of its base, the
picture of figures. And figures that are no folder of `limbeck evaluate` are one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.distill.report.card import read_licence
from limbeck.models.adapter import merged_folder
from limbeck.models.checkpoint import save_model
from limbeck.models.errors import InputError
from limbeck.models.fingerprint import fingerprint_of
from limbeck.tests.gguf_helpers import gguf_config
from limbeck.tests.helpers import limbeck, make_workshop, random_model
from limbeck.tests.page_content import gap_of
from safetensors.torch import load_file, save_file

NAMES = ("LICENSE", "Notice.txt", "README.md")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("carried"))


def linked(model: Path, folder: Path, name: str) -> Path:
    """A copy of a model's folder in which a file is a link out of it."""
    shutil.copytree(model, folder)
    folder.with_name("secret").write_text("of this machine")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder.with_name("secret"))
    return folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", ("model", "base"))
def test_a_link_out_of_the_folder_is_refused(option: str, name: str, workshop: Path, tmp_path: Path) -> None:
    given = {"model": workshop / "model"} | {option: linked(workshop / "model", tmp_path / "linked", name)}
    words = [f"{key}={value}" for key, value in given.items()]
    code, _, err = limbeck("export", *words, f"output={tmp_path / 'out'}", "check_tokens=8")
    assert code == 2 and name in err and "link out of its folder" in err and err.count("\n") == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linked", "secret"]


def test_links_within_the_folder_and_the_hub_s_cache_go_along(tmp_path: Path) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / "0"
    folder.mkdir(parents=True)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for name in NAMES:
        (blobs / f"{name}-blob").write_text("---\nlicense: mit\n---\n")
        (folder / name).symlink_to(blobs / f"{name}-blob")
    (folder / "COPYING").symlink_to(folder / "LICENSE")
    found = read_licence(folder)
    assert [file.name for file in found.files] == ["COPYING", "LICENSE", "Notice.txt"] and found.keys[
        "license"
    ] == "mit"


def test_a_file_of_any_size_does_not_go_along(tmp_path: Path) -> None:
    with (tmp_path / "LICENSE").open("wb") as stream:
        stream.truncate(2**28 + 1)
    with pytest.raises(InputError, match="LICENSE"):
        read_licence(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_takes_none_from_its_base(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    save_model(random_model(gguf_config("llama", 90), 0, torch.float32), tmp_path / "plain")
    base, adapter = linked(tmp_path / "plain", tmp_path / "base", name), tmp_path / "adapter"
    module = "model.layers.0.self_attn.q_proj"
    rows, columns = load_file(base / "model.safetensors")[f"{module}.weight"].shape
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"init_lora_weights": True}))
    factors = {f"base_model.model.{module}.lora_A.weight": torch.ones(2, columns),
               f"base_model.model.{module}.lora_B.weight": torch.ones(rows, 2)}  # fmt: skip
    save_file(factors, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=name):
        merged_folder(adapter)
    assert not (tmp_path / "cache").exists()
    (base / name).unlink()
    assert merged_folder(adapter).is_dir()


def gap_folder(folder: Path, model: Path, gap: Any, **changes: Any) -> Path:
    """A folder as `limbeck evaluate` leaves it, but for its sums."""
    made = {"made_by": "limbeck evaluate", "inputs": {"mine": fingerprint_of(model)}, "options": {"dtype": "float32"},
            "versions": {}, "fingerprint": "0"}  # fmt: skip
    folder.mkdir()
    (folder / "gap.json").write_text(json.dumps(gap))
    (folder / "limbeck.json").write_text(json.dumps(made | changes))
    return folder


def whole_gap() -> dict[str, Any]:
    gap = gap_of("mine") | {"data": {"data": "text", "split": "test"}, "tasks": {}}
    gap["continuation"] = {name: found | {"new_tokens": 16} for name, found in gap["continuation"].items()}
    return gap


DAMAGES: dict[str, Any] = {
    "a list": [],
    "empty": {},
    "models are a list": {"models": ["mine"]},
    "a model alone": {"models": {"mine": {}}},
    "no parameters": {key: value for key, value in whole_gap().items() if key != "parameters"},
    "no tokens": {key: value for key, value in whole_gap().items() if key != "tokens"},
    "no data": whole_gap() | {"data": None},
    "a figure is a text": whole_gap() | {"models": whole_gap()["models"] | {"mine": {"kl": "x"}}},
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_figures_are_one_line(name: str, workshop: Path, tmp_path: Path) -> None:
    gap, model = gap_folder(tmp_path / "gap", workshop / "model", DAMAGES[name]), workshop / "model"
    code, _, err = limbeck("export", f"model={model}", f"gap={gap}", f"output={tmp_path / 'out'}", "check_tokens=8")
    assert code == 2 and "gap" in err and err.count("\n") == 1, err
    assert [path.name for path in tmp_path.iterdir()] == ["gap"]


@pytest.mark.parametrize("made", ({"inputs": []}, {"options": None}, {"made_by": "limbeck score"}, {"versions": 1}))
def test_figures_of_no_evaluation_are_refused(made: dict[str, Any], workshop: Path, tmp_path: Path) -> None:
    gap, model = gap_folder(tmp_path / "gap", workshop / "model", whole_gap(), **made), workshop / "model"
    code, _, err = limbeck("export", f"model={model}", f"gap={gap}", f"output={tmp_path / 'out'}", "check_tokens=8")
    assert code == 2 and "no folder of limbeck evaluate" in err and err.count("\n") == 1, err


def test_whole_figures_with_a_picture_of_elsewhere(workshop: Path, tmp_path: Path) -> None:
    gap, model = gap_folder(tmp_path / "gap", workshop / "model", whole_gap()), workshop / "model"
    (gap / "plots").mkdir()
    (tmp_path / "secret").write_text("of this machine")
    (gap / "plots" / "gap.png").symlink_to(tmp_path / "secret")
    words = ("export", f"model={model}", f"gap={gap}", f"output={tmp_path / 'out'}", "check_tokens=8")
    code, _, err = limbeck(*words)
    assert code == 2 and "gap.png" in err and err.count("\n") == 1, err
    (gap / "plots" / "gap.png").unlink()
    assert limbeck(*words)[0] == 0 and '"mine"' in (tmp_path / "out" / "README.md").read_text()
