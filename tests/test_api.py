"""limbeck from Python: the functions of a notebook do what the commands do, and what docs/python.md says."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import limbeck
import pytest
import torch
from limbeck.distill import in_memory
from limbeck.distill.options import DistillLoss, HiddenLoss
from limbeck.distill.text import given
from limbeck.distill.text.packing import Corpus
from limbeck.models.checkpoint import load_model, save_model
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.errors import InputError
from limbeck.models.hybrid import HybridLM
from limbeck.models.named import model_config, read_hardware
from limbeck.prune.scores import load_scores, save_scores
from limbeck.tests.gguf_helpers import gguf_config, write_tokenizer
from limbeck.tests.helpers import TEXT, random_model, tiny_config
from limbeck.tests.helpers import limbeck as command

DOCS = Path(__file__).parents[1] / "docs"
NEST = {"sizes": [{"target": {}, "name": "whole"},
                  {"target": {"hidden_size": 24, "intermediate_size": 40}, "share": 2, "name": "most"}]}  # fmt: skip
TEXTS = [TEXT[start : start + 500] for start in range(0, 6000, 500)]


@pytest.fixture(scope="module")
def model(workshop: Path) -> HybridLM:
    return limbeck.load(workshop / "model")


def copied(model: HybridLM) -> HybridLM:
    """A model of its own weights."""
    own = HybridLM(model.config, dtype=model.head_weight.dtype).eval()
    own.load_state_dict(model.state_dict())
    own.tokenizer = model.tokenizer
    return own


def same_weights(one: HybridLM, other: HybridLM) -> bool:
    weights = other.state_dict()
    return all(torch.equal(tensor, weights[name]) for name, tensor in one.state_dict().items())


def test_scores_and_weights_are_the_commands(workshop: Path, model: HybridLM, tmp_path: Path) -> None:
    """Of data= with the commands' options: to the bit."""
    text, sizes = str(workshop / "text"), {"seq_len": 64, "batch": 4}
    words = [f"model={workshop / 'model'}", f"data={text}", "seq_len=64", "batch=4", "device=cpu"]
    importance = ["importance.tokens=512", "importance.depth_tokens=128", "importance.remove_layers=2"]
    assert command("score", *words, *importance, f"output={tmp_path / 'scores'}")[0] == 0
    scores, expected = (
        limbeck.score(model, text, tokens=512, depth_tokens=128, remove_layers=2, **sizes),
        load_scores(tmp_path / "scores"),
    )
    assert scores.widths.keys() == expected.widths.keys() and scores.layers == expected.layers
    assert all(torch.equal(value, expected.widths[axis]) for axis, value in scores.widths.items())
    target = ["target.layers=5", "target.hidden_size=24", "target.mamba_num_heads=6", "repair.tokens=512"]
    assert command("prune", *words, *target, f"scores={tmp_path / 'scores'}", f"output={tmp_path / 'small'}")[0] == 0
    small = limbeck.prune(model, scores, layers=5, hidden_size=24, mamba_num_heads=6, data=text, tokens=512, **sizes)
    assert same_weights(small, load_model(tmp_path / "small"))


def test_the_whole_chain_on_a_few_texts(model: HybridLM, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with caplog.at_level(logging.WARNING, "limbeck"):
        scores = limbeck.score(model, TEXTS, tokens=512, depth_tokens=128)
        small = limbeck.prune(model, scores, parameters=0.75, repair=True, data=TEXTS)
        figures = limbeck.distill(model, small, TEXTS, steps=6, learning_rate=0.01)
    assert "batches of" in caplog.text and figures.batch < 8
    assert small.tokenizer is model.tokenizer and small.config.hidden_size < model.config.hidden_size
    assert figures.steps == len(figures.records) == 6 and figures.tokens == 6 * figures.batch * figures.seq_len
    assert figures.loss == figures.records[-1]["loss"] < figures.records[0]["loss"]
    assert same_weights(model, model) and all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert all(weight.requires_grad for weight in (*model.parameters(), *small.parameters())) and not small.training
    gap = limbeck.evaluate(model, {"small": small, "itself": model}, TEXTS, tokens=512, seq_len=64)
    assert gap.kl.keys() == {"small", "itself"} and gap.kl["small"] > gap.kl["itself"] == pytest.approx(0, abs=1e-6)
    assert gap.bits_per_byte["itself"] == gap.bits_per_byte["teacher"]
    page = gap.page(tmp_path / "pages" / "gap.html")
    assert "small" in page.read_text() and list((tmp_path / "pages" / "plots").glob("*.png"))
    assert set(limbeck.evaluate(model, small, TEXTS, tokens=512, seq_len=64).kl) == {"student"}
    texts = limbeck.generate(small, ["def name_1(x):", "def"], max_new_tokens=4)
    assert [text[:3] for text in texts] == ["def", "def"] and texts == limbeck.generate(
        small, ["def name_1(x):", "def"], max_new_tokens=4, batch=1
    )
    assert limbeck.export(small, tmp_path / "out") == tmp_path / "out"
    again = limbeck.load(tmp_path / "out")
    assert same_weights(small, again) and again.tokenizer is not None
    assert again.tokenizer.vocab_size == small.config.vocab_size


def test_few_bits_and_few_tokens(model: HybridLM) -> None:
    """A student in bfloat16 trains in float32 and stays what it was; a text shorter than a row is a row."""
    student = random_model(tiny_config(vocab_size=model.config.vocab_size), 1, torch.bfloat16)
    figures = limbeck.distill(model, student, [TEXT[:200]], steps=2, loss=DistillLoss(ce_weight=0.5))
    assert figures.batch == 1 and figures.seq_len < 200 and figures.epochs == pytest.approx(2, rel=0.1)
    assert {weight.dtype for weight in student.parameters()} == {torch.bfloat16}
    assert not same_weights(student, random_model(student.config, 1, torch.bfloat16))


def test_nested_sizes_are_the_commands(workshop: Path, model: HybridLM, tmp_path: Path) -> None:
    """Each size as `prune nested=` cuts it out of what `distill` leaves, to the bit; the student stays as it was."""
    text, sizes = str(workshop / "text"), {"seq_len": 32, "batch": 2}
    scores = limbeck.score(model, text, tokens=512, depth_tokens=128, **sizes)
    save_scores(tmp_path / "scores", scores)
    nest = json.dumps(NEST).replace('"', "")
    code, _, err = command(
        "distill", f"teacher={workshop / 'model'}", f"student={workshop / 'model'}", f"data={text}", "device=cpu",
        f"output={tmp_path / 'nested'}", f"scores={tmp_path / 'scores'}", f"distill.nested={nest}", "wandb=off",
        "distill.seq_len=32", "distill.batch=2", "distill.train.steps=6", "distill.train.warmup_steps=1",
        "distill.train.learning_rate=0.01",
    )  # fmt: skip
    assert code == 0, err
    student = copied(model)
    figures = limbeck.distill(model, student, text, steps=6, learning_rate=0.01, nested=NEST, scores=scores, **sizes)
    assert same_weights(student, model) and list(figures.sizes) == ["whole", "most"] and figures.steps == 6
    assert {record["size_parameters"] for record in figures.records if "size_parameters" in record} == {
        count_parameters(each.config) for each in figures.sizes.values()
    }
    assert same_weights(figures.sizes["whole"], load_model(tmp_path / "nested"))
    assert command("prune", f"model={tmp_path / 'nested'}", "nested=most", f"output={tmp_path / 'most'}")[0] == 0
    most = figures.sizes["most"]
    assert same_weights(most, load_model(tmp_path / "most")) and most.tokenizer is student.tokenizer
    assert most.config.intermediate_size == 40 and not same_weights(figures.sizes["whole"], model)
    assert limbeck.evaluate(model, figures.sizes, TEXTS, tokens=256, seq_len=32).kl.keys() == {"whole", "most"}


def test_a_nested_student_in_few_bits(model: HybridLM) -> None:
    scores = limbeck.score(model, TEXTS, tokens=64, depth_tokens=64, seq_len=32)
    student = copied(model).bfloat16()
    figures = limbeck.distill(model, student, TEXTS, steps=2, nested=NEST, scores=scores, seq_len=32, batch=2)
    for each in (student, *figures.sizes.values()):
        assert {weight.dtype for weight in each.parameters()} == {torch.bfloat16} and not each.training


@pytest.mark.parametrize("form", ("hf", "gguf", "fp8", "w8a8", "w4a16"))
def test_export_formats_are_the_commands(form: str, tmp_path: Path) -> None:
    """The same files, of a model in memory and of a folder."""
    pytest.importorskip("gguf" if form == "gguf" else "compressed_tensors")
    size = write_tokenizer(tmp_path / "words", "gpt-2")
    config = gguf_config("qwen3", size, tie_word_embeddings=True)
    save_model(random_model(config, 1, torch.float32).bfloat16(), tmp_path / "model", tokenizer_from=tmp_path / "words")
    code, _, err = command("export", f"model={tmp_path / 'model'}", f"output={tmp_path / 'command'}", f"format={form}")
    assert code == 0, err
    in_memory = limbeck.load(tmp_path / "model", dtype=torch.bfloat16, device="cpu")
    assert limbeck.export(in_memory, tmp_path / "memory", format=form) == tmp_path / "memory"
    limbeck.export(tmp_path / "model", tmp_path / "folder", format=form)
    expected = json.loads((tmp_path / "command" / "export.json").read_text())
    for name in ("memory", "folder"):
        assert json.loads((tmp_path / name / "export.json").read_text()) == expected
        for file in (tmp_path / "command").iterdir():
            if file.suffix == ".safetensors":
                assert file.read_bytes() == (tmp_path / name / file.name).read_bytes()


def test_export_on_data_is_the_command_s(tmp_path: Path) -> None:
    """Calibrated, a most sensitive layer kept."""
    pytest.importorskip("compressed_tensors")
    size = write_tokenizer(tmp_path / "words", "gpt-2")
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"# file {number}\n" + TEXT[number * 60 : number * 60 + 900])
    model = random_model(gguf_config("qwen3", size), 1, torch.float32).bfloat16()
    save_model(model, tmp_path / "model", tokenizer_from=tmp_path / "words")
    how = {"calibration_tokens": 256, "keep_layers": 1, "sensitivity_tokens": 128, "seq_len": 64, "batch": 2}
    words = [
        f"model={tmp_path / 'model'}",
        f"data={tmp_path / 'text'}",
        "format=w8a8",
        f"output={tmp_path / 'command'}",
    ]
    code, _, err = command("export", *words, *(f"{name}={value}" for name, value in how.items()), "device=cpu")
    assert code == 0, err
    limbeck.export(tmp_path / "model", tmp_path / "out", format="w8a8", data=str(tmp_path / "text"), **how)
    one, other = (json.loads((tmp_path / name / "export.json").read_text()) for name in ("command", "out"))
    assert one == other and len(one["keep_layers"]) == 1 and 200 < one["calibration_tokens"] < 256


def test_a_folder_with_few_documents(model: HybridLM, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "one.txt").write_text(TEXT[:3000])
    assert limbeck.evaluate(model, model, str(tmp_path), seq_len=64, tokens=256, resamples=10).report.documents == 1
    assert "held out" in caplog.text or "its documents" in caplog.text


def test_memory_fit_is_the_command_s(tmp_path: Path) -> None:
    name = "nemotron-nano-9b-v2"
    assert command("memory-fit", f"model={name}", "context=131072", f"output={tmp_path / 'fit'}")[0] == 0
    expected: dict[str, Any] = json.loads((tmp_path / "fit" / "result.json").read_text())
    for model in (name, model_config(name)):
        fit = limbeck.memory_fit(model, hardware="a10g", context=131072)
        assert fit.fits and json.loads(json.dumps(dataclasses.asdict(fit.verdict))) == expected["verdict"]
        assert fit.memory.peak == expected["memory"]["peak"]
    assert not limbeck.memory_fit("nemotron-nano-12b-v2", read_hardware("a10g")).fits


def test_a_model_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    ours, ids = limbeck.load(theirs, device="cpu"), torch.randint(97, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)
    assert ours.tokenizer is None
    with pytest.raises(InputError, match="tokenizer=FOLDER"):
        limbeck.score(theirs, TEXTS)


@pytest.mark.parametrize(
    ("wrong", "says"),
    (
        (lambda model, scores: limbeck.load("nvidia/NVIDIA-Nemotron-Nano-9B-v2"), "neither a folder nor a name"),
        (lambda model, scores: limbeck.load(3), "int"),
        (lambda model, scores: limbeck.score(model, TEXTS, tokns=3), "did you mean 'tokens'"),
        (lambda model, scores: limbeck.score(model, TEXTS, method="best"), "taylor"),
        (lambda model, scores: limbeck.distill(model, "zoo", TEXTS, stepps=3), "in place"),
        (lambda model, scores: limbeck.prune(model, scores, width=3), "hidden_size"),
        (lambda model, scores: limbeck.prune(model, scores, hidden_size=999), "999"),
        (lambda model, scores: limbeck.prune(model, scores, layers=2), "remove_layers=4"),
        (lambda model, scores: limbeck.distill(model, model, TEXTS), "in place"),
        (lambda model, scores: limbeck.distill(model, "zoo", TEXTS), "in place"),
        (lambda model, scores: limbeck.evaluate(model, {"teacher": model}, TEXTS), "teacher"),
        (lambda model, scores: limbeck.memory_fit(model, "a11g"), "a10g"),
        (lambda model, scores: limbeck.memory_fit(model, "cpu"), "usable_gib"),
        (lambda model, scores: limbeck.memory_fit("zoo", context=9000), "8,192"),
        (lambda model, scores: limbeck.generate(model, "def"), "list of texts"),
        (lambda model, scores: limbeck.export(model, "x", format="awq"), "known: hf, gguf, fp8, w8a8, w4a16"),
        (lambda model, scores: limbeck.export(model, "x", keep_layers=[1]), "format=hf rounds nothing"),
        (lambda model, scores: limbeck.export(model, "x", format="fp8", keep_layers=2), "need data="),
        (lambda model, scores: limbeck.export(model, "x", format="fp8", keep_layer=2), "did you mean 'keep_layers'"),
        (lambda model, scores: limbeck.export(model, "x", pre_tokenizer="gpt-2"), "format=gguf"),
        (lambda model, scores: limbeck.export(model, "x", format="fp8", dtype=torch.float32), "leave dtype out"),
        (lambda model, scores: limbeck.export(model, DOCS), "exists already"),
        (lambda model, scores: limbeck.distill(model, copied(model), TEXTS, nested={"sizes": []}), "give both"),
        (
            lambda model, scores: limbeck.distill(model, copied(model), TEXTS, nested={"sizes": []}, scores=scores),
            "two",
        ),
        (
            lambda model, scores: limbeck.distill(
                model, copied(model), TEXTS, nested=NEST, scores=scores, rollouts={"new_tokens": 4, "prompt_tokens": 4}
            ),
            "distill.nested does not go with distill.rollouts",
        ),
    ),
)
def test_wrong_input(wrong: Any, says: str, model: HybridLM) -> None:
    scores = limbeck.score(model, TEXTS, tokens=64, depth_tokens=64, seq_len=32)
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        wrong(model, scores)
    assert "\n" not in str(caught.value)


def test_importing_is_light_and_nothing_knows_hydra(workshop: Path) -> None:
    code = f"""
import sys, limbeck
assert "torch" not in sys.modules and "load" in dir(limbeck) and limbeck.__version__
import limbeck.prune.slice, limbeck.distill.losses
model = limbeck.load({str(workshop / "model")!r})
scores = limbeck.score(model, [{TEXTS[0]!r}], tokens=64, depth_tokens=64, seq_len=32)
small = limbeck.prune(model, scores, hidden_size=24)
limbeck.distill(teacher=model, student=small, data=[{TEXTS[0]!r}], steps=1)
limbeck.evaluate(model, small, [{TEXTS[0]!r}]), limbeck.memory_fit(small), limbeck.generate(small, ["x"])
assert not {{"hydra", "omegaconf", "matplotlib", "wandb"}} & set(sys.modules), sorted(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow  # the notebook has most of its calls
def test_the_code_of_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("compressed_tensors")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.S)
    names: dict[str, Any] = {}
    exec("\n".join(blocks), names)
    assert len(blocks) == 8 and names["fit"].fits and names["fit"].held is not None
    assert names["small"].config.num_layers == 12
    assert list(names["nested"].sizes) == ["whole", "75%", "60%"]
    assert json.loads((tmp_path / "out-w8a8" / "export.json").read_text())["keep_layers"] == [0]
    assert (tmp_path / "gap.html").is_file() and (tmp_path / "out" / "tokenizer.json").is_file()


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    content = json.loads((DOCS / "limbeck.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for cell in cells:
        exec(cell, names)
    matplotlib.pyplot.close("all")
    assert len(cells) >= 6 and names["gap"].kl["distilled"] < names["gap"].kl["pruned"]
    assert not any(cell.get("outputs") for cell in content["cells"])


@pytest.mark.parametrize(
    "options",
    ({"ema_decay": 0.9}, {"average_states": 3, "save_every": 1}, {"keep": "best", "evaluate_every": 1}),
    ids=lambda options: next(iter(options)),
)
def test_what_a_training_keeps_is_left(
    options: dict[str, Any], model: HybridLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average, the mean of the last states or the best step, and held-out figures in the records."""
    measure, measured = in_memory.held_out_figures, list[float]()

    def rising(*given: Any, **named: Any) -> dict[str, float]:
        measured.append(measure(*given, **named)["validation_kl"])
        return {"validation_kl": float(len(measured))}

    monkeypatch.setattr(in_memory, "held_out_figures", rising)
    plain, kept = copied(model), copied(model)
    for student in (plain, kept):  # what the teacher is already stays as it is
        with torch.no_grad():
            student.norm_f.weight.mul_(1.5)
    how: dict[str, Any] = {"steps": 3, "seq_len": 64, "batch": 2, "learning_rate": 0.5, "evaluate_tokens": 256}
    limbeck.distill(model, plain, TEXTS, **how)
    done = limbeck.distill(model, kept, TEXTS, held_out=TEXTS[:2], **how, **options)
    assert not same_weights(plain, kept)
    if "keep" in options:
        assert [record["validation_kl"] for record in done.records] == [1, 2, 3] and len({*measured}) == 3
        report = limbeck.evaluate(model, {"kept": kept}, TEXTS[:2], tokens=256, seq_len=64, batch=2).report
        assert report.models["kept"].kl.value == pytest.approx(measured[0], rel=0.02)  # the rows differ in their order


def test_held_out_text_of_a_list_has_to_be_given(model: HybridLM) -> None:
    with pytest.raises(InputError, match="held_out="):
        limbeck.distill(model, copied(model), TEXTS, steps=2, seq_len=64, batch=2, evaluate_every=1)


def test_hidden_states_and_layers_run_twice(model: HybridLM) -> None:
    student = copied(model)
    loss = DistillLoss(hidden=HiddenLoss(weight=1.0, fit_tokens=256))
    how: dict[str, Any] = {"steps": 2, "seq_len": 64, "batch": 2}
    found = limbeck.distill(model, student, TEXTS, loss=loss, activation_checkpointing=True, **how)
    assert found.loss >= 0 and not any(block.recompute for block in student.layers)


def test_files_are_read_as_they_are_now(model: HybridLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one name, rewritten, and in another folder."""
    for number, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        rows = [json.dumps({"text": f"{name} {n}"}) for n in range(60)]
        (tmp_path / name / "t.jsonl").write_text("\n".join(rows))
        monkeypatch.chdir(tmp_path / name)
        assert len(given.read_text(model, "t.jsonl", "all")) == 60
        first = given.read_text(model, "t.jsonl", "all")
        assert isinstance(first, Corpus)
        assert model.tokenizer is not None
        assert name in model.tokenizer.decode(first.ids[: int(first.starts[1])].tolist()), number
    (tmp_path / "two" / "t.jsonl").write_text("\n".join(json.dumps({"text": f"new {n}"}) for n in range(90)))
    assert len(given.read_text(model, "t.jsonl", "all")) == 90
