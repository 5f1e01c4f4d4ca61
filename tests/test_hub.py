"""Models of the hub, fetched from a server on this machine: what is fetched, what is remembered, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import limbeck as package
import pytest
import torch
from huggingface_hub import HfApi, constants
from limbeck.models import hub
from limbeck.models.checkpoint import load_config, load_model, save_model
from limbeck.models.hub import hub_folder, hub_origin, names_in
from limbeck.models.named import model_weights
from limbeck.tests.gguf_helpers import gguf_config, write_tokenizer
from limbeck.tests.helpers import limbeck, make_workshop, random_model
from limbeck.tests.hub_server import COMMIT, HubServer, serving


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_workshop(tmp_path_factory.mktemp("hub"))
    for name, content in {"LICENSE": "terms", "README.md": "---\nlicense: mit\n---\n", "train.py": "print()",
                          "pytorch_model.bin": "x" * 100, "original/params.json": "{}"}.items():  # fmt: skip
        (root / "model" / name).parent.mkdir(exist_ok=True)
        (root / "model" / name).write_text(content)
    return root


@pytest.fixture
def server(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving(tmp_path / "cache", monkeypatch) as server:
        server.models["our/tiny"] = workshop / "model"
        yield server


def test_only_what_is_read_is_fetched_and_once(server: HubServer) -> None:
    folder = hub_folder("hf:our/tiny")
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "LICENSE", "README.md"}
    assert {path.name for path in folder.iterdir()} == expected == set(server.fetched())
    hub.hub_folder.cache_clear()
    before = len(server.fetched())
    assert hub_folder(f"hf:our/tiny@{COMMIT}") == folder and len(server.fetched()) == before
    assert hub_origin(folder) == f"hf:our/tiny@{COMMIT}" and hub_origin(folder.parent) is None


def test_shards_are_those_of_the_index(server: HubServer, workshop: Path, tmp_path: Path) -> None:
    save_model(load_model(workshop / "model"), tmp_path / "shards", max_shard_bytes=20000)
    shutil.copy(workshop / "model" / "model.safetensors", tmp_path / "shards" / "consolidated.safetensors")
    server.models["our/shards"] = tmp_path / "shards"
    folder = hub_folder("hf:our/shards")
    assert load_config(folder) == load_config(workshop / "model")
    assert "consolidated.safetensors" not in server.fetched()
    assert sum(name.startswith("model-") for name in server.fetched()) == len(list(folder.glob("model-*")))


def test_a_broken_transfer_continues(server: HubServer, workshop: Path) -> None:
    server.broken["model.safetensors"] = 5000
    folder = hub_folder("hf:our/tiny")
    assert (folder / "model.safetensors").read_bytes() == (workshop / "model" / "model.safetensors").read_bytes()
    assert server.fetched().count("model.safetensors") == 2


def test_commands_write_the_revision(server: HubServer, workshop: Path, tmp_path: Path) -> None:
    pruned, out = tmp_path / "pruned", tmp_path / "exported"
    few = ["seq_len=32", "batch=2"]
    scored = ["importance.tokens=256", "importance.depth_tokens=128", "importance.remove_layers=1"]
    data = f"data={workshop / 'text'}"
    assert limbeck("score", "model=hf:our/tiny", data, f"output={tmp_path / 's'}", *few, *scored)[0] == 0
    code, _, err = limbeck(
        "prune", "model=hf:our/tiny", f"scores={tmp_path / 's'}", f"output={pruned}", "target.layers=5", "repair=plain"
    )
    assert code == 0, err
    assert json.loads((pruned / "limbeck.json").read_text())["sources"]["model"] == f"hf:our/tiny@{COMMIT}"
    code, _, err = limbeck("export", f"model={pruned}", "base=hf:our/tiny", f"output={out}", "check_tokens=16")
    assert code == 0, err
    made, card = json.loads((out / "limbeck.json").read_text()), (out / "README.md").read_text()
    assert made["sources"]["base"] == made["sources"]["model.model"] == f"hf:our/tiny@{COMMIT}"
    head = card.split("---")[1]
    assert "\nbase_model:\n- our/tiny\n" in head and "\nbase_model_relation: finetune\n" in head
    assert "datasets" not in head and (out / "LICENSE").is_file()


def test_a_config_alone(server: HubServer) -> None:
    code, _, err = limbeck("memory-fit", "model=hf:our/tiny", "fit.context=64", "output=null")
    assert code == 0 and server.fetched() == ["config.json"], (code, err)


@pytest.mark.parametrize("form", (pytest.param("fp8", marks=pytest.mark.slow), "w4a16"))
def test_quantised_weights_are_counted_by_their_headers(form: str, server: HubServer, tmp_path: Path) -> None:
    """As of the same folder here, in one file or several; without the headers they count as plain, which is said."""
    pytest.importorskip("compressed_tensors")
    config = gguf_config("llama", write_tokenizer(tmp_path / "words", "gpt-2"))
    save_model(random_model(config, 1, torch.bfloat16), tmp_path / "model", tokenizer_from=tmp_path / "words")
    words = (f"model={tmp_path / 'model'}", f"output={tmp_path / 'q'}", f"format={form}", "max_shard_bytes=60000")
    assert limbeck("export", *words, "check_tokens=8")[0] == 0
    server.models["our/q"] = tmp_path / "q"
    held = model_weights(str(tmp_path / "q"), torch.bfloat16)
    assert model_weights("hf:our/q", torch.bfloat16) == held
    files = {name for name, _ in server.ranges if name.endswith(".safetensors")}
    assert files == {path.name for path in (tmp_path / "q").glob("*.safetensors")} and len(files) > 1
    code, text, _ = limbeck("memory-fit", "model=hf:our/q", "hardware=l4", "context=64")
    assert code == 0 and "quantised weights" in text and "counted as plain" not in text
    folder = hub_folder("hf:our/q")  # fetched, it is read here
    server.models.clear()
    assert model_weights("hf:our/q", torch.bfloat16) == held
    next(folder.glob("*.safetensors")).unlink()
    assert model_weights("hf:our/q", torch.bfloat16) is None
    code, text, _ = limbeck("memory-fit", "model=hf:our/q", "hardware=l4", "context=64")
    assert code == 0 and "counted as plain" in text


def test_sources_by_name() -> None:
    sources = {"model.teacher": "hf:a/teacher@1", "base": "hf:a/base@2", "model.data": "hf:a/text@3:en:train",
               "model.student.model": "hf:a/teacher@1"}  # fmt: skip
    assert names_in(sources) == (["a/base", "a/teacher"], ["a/text"])


def test_push(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing leaves the machine unless told; then all that the folder is."""
    calls: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda api, name, **options: calls.append((name, options)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **options: calls.append((options["repo_id"], options)))
    monkeypatch.setattr(HfApi, "upload_file", lambda api, **options: calls.append((options["repo_id"], options)))
    given = ("export", f"model={workshop / 'model'}", f"output={tmp_path / 'out'}", "check_tokens=16")
    code, out, _ = limbeck(*given, "push=our/small")
    assert code == 0 and not calls and "push_dry=false" in out and "model.safetensors" in out
    code, out, _ = limbeck(*given, "push=our/small", "push_dry=false")
    assert code == 0 and [name for name, _ in calls] == ["our/small"] * 3 and "Uploaded" in out
    assert calls[0][1]["private"] and calls[1][1]["ignore_patterns"] == [
        "result.json", "log.txt", "limbeck.json",
    ]  # fmt: skip
    sent, kept = json.loads(calls[2][1]["path_or_fileobj"]), json.loads((tmp_path / "out" / "limbeck.json").read_text())
    assert kept.pop("run")["host"] and sent == kept and str(tmp_path) not in json.dumps(sent)
    assert calls[1][1]["folder_path"] == tmp_path / "out"
    for options, says in (
        ("push=small", "push=small: expected OWNER/NAME"),
        ("push=a/..b", "push=a/..b: "),
        ("push=a/b--c", "push=a/b--c: "),
        ("push=-a/b", "push=-a/b: "),
        ("push=a/b.git", "push=a/b.git: "),
        ("push_dry=false", "push=OWNER/NAME"),
    ):
        code, _, err = limbeck(*given[:2], f"output={tmp_path / 'no'}", options)
        assert code == 2 and says in err and err.count("\n") == 1, err
        assert not (tmp_path / "no").exists()
    monkeypatch.setattr(HfApi, "create_repo", lambda *given, **options: 1 / 0)
    code, _, err = limbeck(*given, "push=our/small", "push_dry=false")
    assert code == 2 and "the hub does not take it (division by zero)" in err and err.count("\n") == 1


def test_from_python(server: HubServer) -> None:
    model = package.load("hf:our/tiny", device="cpu")
    assert model.tokenizer is not None and package.generate(model, ["def "], max_new_tokens=2)[0].startswith("def ")


def test_without_a_network(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = hub_folder("hf:our/tiny")
    for name, value in (("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")):
        hub.hub_folder.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(constants, name, value)
            assert hub_folder("hf:our/tiny") == folder and "taken from the cache" in caplog.text
            refused("hf:our/other", "is not in the local cache; without a network give a folder")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        refused("hf:our/other", "HF_HUB_OFFLINE is set")


def test_without_a_network_a_config_is_no_model(
    server: HubServer, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What estimates fetch is not enough to run; nor are some of several files of weights."""
    save_model(load_model(workshop / "model"), tmp_path / "shards", max_shard_bytes=20000)
    server.models["our/shards"] = tmp_path / "shards"
    shard = next(hub_folder("hf:our/shards").glob("model-*"))
    shard.unlink()
    fit = ("memory-fit", "model=hf:our/tiny", "fit.context=64", "output=null")
    assert limbeck(*fit)[0] == 0 and server.fetched().count("config.json") == 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("tiny", "shards"):
        hub.hub_folder.cache_clear()
        refused(f"hf:our/{name}", f"its weights are not in the local cache (revision {COMMIT} without them)")
    assert limbeck(*fit)[0] == 0


def test_teacher_and_student_of_the_hub(server: HubServer, workshop: Path, tmp_path: Path) -> None:
    server.models["our/small"] = workshop / "model"
    data, small = f"data={workshop / 'text'}", ["seq_len=32", "batch=2"]
    pair = ["teacher=hf:our/tiny", f"student=hf:our/small@{COMMIT}"]
    options = ["distill.train.steps=1", "distill.evaluate_tokens=0", *(f"distill.{option}" for option in small)]
    code, _, err = limbeck("distill", *pair, data, *options, f"output={tmp_path / 'out'}")
    assert code == 0, err
    sources = {"teacher": f"hf:our/tiny@{COMMIT}", "student": f"hf:our/small@{COMMIT}"}
    assert json.loads((tmp_path / "out" / "limbeck.json").read_text())["sources"] == sources
    measured = ["details.prompt_tokens=8", "details.new_tokens=4", "details.resamples=20", "split=all", "tokens=128"]
    code, _, err = limbeck("evaluate", pair[0], "student.small=hf:our/small", data, *small, *measured,
                           f"output={tmp_path / 'gap'}")  # fmt: skip
    made = json.loads((tmp_path / "gap" / "limbeck.json").read_text()) if code == 0 else {}
    assert made.get("sources") == {"teacher": sources["teacher"], "small": sources["student"]}, err


def refused(model: str, says: str) -> None:
    code, _, err = limbeck("generate", f"model={model}", "prompt=x")
    assert code == 2 and says in err and err.count("\n") == 1, (code, err)


def test_what_the_hub_does_not_give(server: HubServer, workshop: Path, tmp_path: Path) -> None:
    server.models["our/gated"] = workshop / "model"
    server.gated.add("our/gated")
    refused("hf:our/gated", "is gated: accept its terms")
    refused("hf:our/none", "has no model our/none")
    refused("hf:our/tiny@v2", "has no revision v2")
    refused("hf:tiny", "expected hf:OWNER/NAME[@REVISION]")
    refused("our/tiny", "of the hub it is hf:our/tiny")
    (tmp_path / "bin").mkdir()
    shutil.copy(workshop / "model" / "config.json", tmp_path / "bin")
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"x")
    server.models["our/bin"] = tmp_path / "bin"
    refused("hf:our/bin", "safetensors/convert")
    (tmp_path / "bin" / "pytorch_model.bin").unlink()
    hub.hub_folder.cache_clear()
    refused("hf:our/bin", "has no weights")
    assert "pytorch_model.bin" not in server.fetched()
    assert torch.is_tensor(load_model(workshop / "model").head_weight)
