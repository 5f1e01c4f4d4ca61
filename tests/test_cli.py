"""The command line as a user meets it: help, wrong input, and every stage on a small model."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from limbeck.models.checkpoint import load_config, load_model, open_checkpoint, save_model
from limbeck.models.tokenizer import load_tokenizer
from limbeck.scripts import pretrain
from limbeck.scripts.run.main import COMMANDS
from limbeck.tests.helpers import compress_command, limbeck, make_workshop, random_model, tiny_config
from limbeck.tests.processes_helpers import processor_seconds
from safetensors.torch import load_file, save_file

CONF = Path(__file__).parents[1] / "conf"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of its own tokenizer and a text, nothing of which may change."""
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def snapshot(folder: Path) -> dict[str, tuple[int, float]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime) for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(*arguments: str, says: str) -> None:
    """Exit code 2, one line on the error output that says what is wrong, no traceback."""
    code, _, err = limbeck(*arguments)
    assert code == 2, (code, err)
    assert err.startswith("limbeck: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert says in err, err


def test_help_is_quick_and_complete() -> None:
    before = processor_seconds(children=True)
    done = subprocess.run([sys.executable, "-m", "limbeck.scripts.run.main", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and processor_seconds(children=True) - before < 1.0
    assert all(command in done.stdout for command in COMMANDS)
    code = "import sys, limbeck.scripts.run.main; sys.exit(any(m in sys.modules for m in ('torch', 'hydra', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    for command in COMMANDS:
        code, out, _ = limbeck(command, "--help")
        assert not code and f"limbeck {command}" in out and "Options" in out
    assert "tiny-long" in limbeck("compress", "--help")[1] and "tiny" not in limbeck("prune", "--help")[1]


def test_misspelt_words() -> None:
    refused("compres", says="compress")
    refused("score", "modl=zoo", says="did you mean 'model'")
    refused("score", "importance.tokns=3", "model=zoo", says="importance.tokens")
    refused("score", "zoo", says="KEY=VALUE")
    refused("compress", "recipe=tinny", says="did you mean 'tiny'")
    refused("score", "importance=best", says="activation")
    refused("score", "model=zoo", says="data is missing")
    refused("score", "model=zoo", "recipe=null", says="data is missing")
    refused("score", "model=nemotron-nano-9b-v2", "data=stdlib", "output=x", says="without weights")
    refused("score", "model=no-such", "data=stdlib", "output=x", says="no-such")
    refused("memory-fit", "model=zoo", "fit.context=many", says="fit.context")
    refused("memory-fit", "model=zoo", "fit.batch=0", says="batch")
    refused("memory-fit", "model=zoo", "context=9000", says="context=8192 or less")
    refused("memory-fit", "model=zoo", "hardware=a11g", says="a10g")
    refused("score", "model=zoo", "data=stdlib", "output=x", "dtype=int4", says="int4")


def break_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def edit_config(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return apply


NORM = "backbone.norm_f.weight"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing file": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "truncated file": (lambda f: os.truncate(f / "model.safetensors", 5000), "truncated"),
    "empty file": (lambda f: os.truncate(f / "model.safetensors", 0), "empty"),
    "no safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"hello" * 100) and None, "safetensors"),
    "wrong shape": (break_weights(lambda w: w.update({NORM: torch.ones(31)})), "[31]"),
    "wrong dtype": (break_weights(lambda w: w.update({NORM: torch.ones(32, dtype=torch.int32)})), "I32"),
    "missing tensor": (break_weights(lambda w: w.__delitem__(NORM)), NORM),
    "unexpected tensor": (break_weights(lambda w: w.update({"backbone.extra": torch.ones(3)})), "backbone.extra"),
    "foreign tensor": (break_weights(lambda w: w.update({"stranger": torch.ones(3)})), "stranger"),
    "NaN": (break_weights(lambda w: w.update({NORM: w[NORM] * float("nan")})), "NaN"),
    "infinity": (break_weights(lambda w: w.update({NORM: w[NORM] + float("inf")})), "infinity"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{") and None, "config.json"),
    "no pattern": (edit_config(hybrid_override_pattern=None), "no layer pattern"),
    "unknown letter": (edit_config(hybrid_override_pattern="M-M*-X"), "'X'"),
    "heads and groups": (edit_config(n_groups=3), "divisible"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}") and None, "tokenizer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints(name: str, workshop: Path, tmp_path: Path) -> None:
    damage, says = BROKEN[name]
    broken = tmp_path / "broken"
    shutil.copytree(workshop / "model", broken)
    damage(broken)
    before = snapshot(tmp_path)
    data = f"data={workshop / 'text'}"
    refused("score", f"model={broken}", data, f"output={tmp_path / 'out'}", "seq_len=32", says=says)
    assert snapshot(tmp_path) == before and not (tmp_path / "out").exists()


def test_tokenizer_larger_than_the_model(workshop: Path, tmp_path: Path) -> None:
    small = random_model(dataclasses.replace(load_config(workshop / "model"), vocab_size=100), dtype=torch.float32)
    save_model(small, tmp_path / "small", tokenizer_from=workshop / "model")
    arguments = (f"model={tmp_path / 'small'}", f"data={workshop / 'text'}", f"output={tmp_path / 'out'}")
    refused("score", *arguments, says="320")


def test_wrong_data(workshop: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "short.txt").write_text("a b c\n")
    for name, says in (
        ("nothing", "no text"),
        ("missing", "does not exist"),
        ("latin", "UTF-8"),
        ("lines.jsonl", "line 2"),
        ("bad.jsonl", "line 1"),
    ):
        out = f"output={tmp_path / 'out'}"
        refused("score", f"model={workshop / 'model'}", f"data={tmp_path / name}", out, says=says)
    if os.geteuid() != 0:  # root reads everything
        (tmp_path / "latin" / "a.txt").chmod(0)
        out = f"output={tmp_path / 'out'}"
        refused("score", f"model={workshop / 'model'}", f"data={tmp_path / 'latin'}", out, says="cannot be read")
    assert not (tmp_path / "out").exists()


def test_counts_of_nothing(workshop: Path, tmp_path: Path) -> None:
    """Rows of no token, and the like: known before anything is read."""
    model, data, out = f"model={workshop / 'model'}", f"data={workshop / 'text'}", f"output={tmp_path / 'out'}"
    refused("score", model, data, out, "batch=0", says="batch is 0; expected at least 1")
    refused("score", model, data, out, "seq_len=-4", says="seq_len is -4")
    refused("prune", model, data, out, "scores=none", "seq_len=0", says="seq_len is 0")
    refused("pretrain", f"init={workshop / 'model'}", data, out, "evaluate_tokens=0", says="evaluate_tokens is 0")
    refused("compress", model, data, out, "target.layers=5", "evaluate_tokens=0", says="evaluate_tokens is 0")
    assert not (tmp_path / "out").exists()


def test_stages_one_by_one(workshop: Path, tmp_path: Path) -> None:
    """score, prune, distill, evaluate, export, memory-fit and generate, each on its own, on a folder of text."""
    model, data = f"model={workshop / 'model'}", f"data={workshop / 'text'}"
    untouched = snapshot(workshop)
    quick = ("seq_len=32", "importance.tokens=256", "importance.depth_tokens=128", "importance.remove_layers=2")
    scores = tmp_path / "scores"
    assert limbeck("score", model, data, f"output={scores}", *quick)[0] == 0
    refused("prune", model, f"scores={scores}", f"output={tmp_path / 'p'}", "target.hidden_size=99", says="99")
    refused("prune", model, f"scores={tmp_path / 'none'}", f"output={tmp_path / 'p'}", says="none")
    refused("prune", model, f"scores={scores}", f"output={workshop / 'text'}", says="exists")
    pruned = tmp_path / "pruned"
    target = ("target.layers=4", "target.hidden_size=24", "target.intermediate_size=40", "target.mamba_num_heads=6")
    assert limbeck("prune", model, f"scores={scores}", f"output={pruned}", *target)[0] == 0
    config = load_config(pruned)
    assert (config.num_layers, config.hidden_size, config.mamba_num_heads) == (4, 24, 6)
    again = snapshot(pruned)
    assert limbeck("prune", model, f"scores={scores}", f"output={pruned}", *target)[0] == 0
    weights = str(pruned / "model.safetensors")
    assert snapshot(pruned)[weights] == again[weights], "a finished stage was done again"
    refused("prune", model, f"scores={scores}", f"output={pruned}", "target.layers=5", says="exists already")
    steps = ("distill.train.steps=3", "distill.seq_len=32", "distill.batch=2", "distill.train.evaluate_every=2")
    teacher, student = f"teacher={workshop / 'model'}", f"student={pruned}"
    distilled = tmp_path / "distilled"
    refused("distill", teacher, student, data, f"output={distilled}", "distill.loss.divergence=odd", says="odd")
    assert limbeck("distill", teacher, student, data, f"output={distilled}", *steps)[0] == 0
    records = [json.loads(line) for line in (distilled / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 3 and "validation_kl" in records[-1]
    assert not (distilled / "training").exists()
    gap = tmp_path / "gap"
    students = (f"+student.pruned={pruned}", f"+student.distilled={distilled}")
    assert (
        limbeck("evaluate", teacher, *students, data, f"output={gap}", "seq_len=32", "split=all", "tokens=512")[0] == 0
    )
    found = json.loads((gap / "gap.json").read_text())
    assert found["models"]["teacher"]["kl"]["value"] == 0 and found["models"]["pruned"]["kl"]["value"] > 0
    page = (gap / "gap.html").read_text()
    assert "<svg" in page and "src=" not in page and "@import" not in page and "<link" not in page
    exported = tmp_path / "exported"
    assert limbeck("export", f"model={distilled}", f"output={exported}", "max_shard_bytes=20000")[0] == 0
    assert len(list(exported.glob("model-*.safetensors"))) > 1
    assert {place.dtype for place in open_checkpoint(exported).stored.values()} == {torch.bfloat16}
    assert json.loads((exported / "export.json").read_text())["transformers"]["relative_rms"] < 1e-4
    fit = ("hardware=custom", "fit.context=1000")
    assert limbeck("memory-fit", f"model={exported}", *fit, "hardware.usable_gib=1")[0] == 0
    code, _, err = limbeck("memory-fit", f"model={exported}", *fit, "hardware.usable_gib=0.00002")
    assert code == 3 and "does not fit" in err
    code, out, _ = limbeck("generate", f"model={exported}", "prompt=def name", "max_new_tokens=4")
    assert code == 0 and "def name" in out
    refused("generate", f"model={exported}", "prompt=hello", "chat=true", says="chat template")
    shutil.rmtree(exported / "no", ignore_errors=True)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    (exported / "chat_template.jinja").write_text(template)
    wanted = ("generate", f"model={exported}", "prompt=hello", "chat=true", "reasoning=true")
    refused(*wanted, says="leave reasoning= out")
    (exported / "chat_template.jinja").write_text(template + "{# /no_think #}")
    assert limbeck(*wanted)[0] == 0
    assert snapshot(workshop) == untouched


def weights_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("model.safetensors")}


def test_compress_and_again(workshop: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, err = limbeck(*compress_command(workshop, out))
    assert code == 0, err
    assert "report.html" in text and "recovered" in text
    before = weights_of(out)
    clock = processor_seconds()
    assert limbeck(*compress_command(workshop, out))[0] == 0
    assert processor_seconds() - clock < 5 and weights_of(out) == before
    refused(*compress_command(workshop, out), "seed=5", says="exists already")
    refused(*compress_command(workshop, workshop / "text"), says="exists already")
    page = (out / "report" / "report.html").read_text()
    for title in (
        "Teacher and students on held-out text",
        "Distillation",
        "Importance of units",
        "Importance of layers",
        "Memory",
        "Provenance",
    ):
        assert title in page
    model = load_model(out / "exported")
    assert model.config.pattern == load_config(out / "pruned").pattern

    # A late option makes anew only what reads it.
    early, late = ("scores", "pruned", "distilled"), ("gap", "exported", "report")
    times = {name: (out / name / "limbeck.json").stat().st_mtime_ns for name in (*early, *late)}
    code, _, err = limbeck(*compress_command(workshop, out), "export_dtype=fp16", "dtype=fp32")
    assert code == 0, err
    assert json.loads((out / "exported" / "export.json").read_text())["dtype"] == "float16"
    changed = {name for name in times if (out / name / "limbeck.json").stat().st_mtime_ns != times[name]}
    assert changed == {"exported", "report"} and not [path for path in out.iterdir() if path.name.startswith(".")]
    refused(*compress_command(workshop, out), "seed=3", says="made otherwise")


def test_compress_refuses_before_it_writes(workshop: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = compress_command(workshop, out)
    (tmp_path / "nothing").mkdir()
    for change, says in (
        ("target.hidden_size=999", "999"),
        ("target.layers=99", "layers is 99"),
        ("importance.remove_layers=0", "remove"),
        ("target.mamba_num_heads=5", "multiple"),
        (f"data={tmp_path / 'nothing'}", "no text"),
        (f"model={tmp_path / 'nothing'}", "config.json"),
    ):
        refused(*[word for word in command if word.split("=")[0] != change.split("=")[0]], change, says=says)
        assert not out.exists()


def test_prune_with_repair(workshop: Path, tmp_path: Path) -> None:
    data = [f"data={workshop / 'text'}", "seq_len=32", "batch=2"]
    model = f"model={workshop / 'model'}"
    assert limbeck("score", model, *data, f"output={tmp_path / 'scores'}", "importance.tokens=256")[0] == 0
    command = ["prune", model, f"scores={tmp_path / 'scores'}", "target.hidden_size=24", "target.mamba_num_heads=6"]
    repair = ["repair.rotate=true", "repair.least_squares=true", "repair.norms=measured"]
    out = tmp_path / "repaired"
    refused(*command, *repair, f"output={out}", says="need data=")
    refused(*command, "repair.norms=some", f"output={out}", says="none, count, measured")
    refused(*command, *repair, *data, f"output={out}", "repair.tokens=0", says="repair.tokens")
    assert not out.exists()
    code, _, err = limbeck(*command, *repair, *data, f"output={out}", "repair.tokens=512")
    assert code == 0, err
    assert load_model(out).config.hidden_size == 24
    selection = json.loads((out / "selection.json").read_text())
    assert selection["principal_directions"] == 24 and "hidden" not in selection["kept"]
    assert limbeck(*command, f"output={tmp_path / 'plain'}")[0] == 0
    assert len(json.loads((tmp_path / "plain" / "selection.json").read_text())["kept"]["hidden"]) == 24


def test_pretrain_and_go_on(workshop: Path, tmp_path: Path) -> None:
    few = [
        f"data={workshop / 'text'}", "model=zoo-small", "seq_len=32", "batch=2", "evaluate_tokens=256",
        "train.warmup_steps=1", "train.save_every=2", "train.evaluate_every=3", "train.log_every=1",
    ]  # fmt: skip
    refused("pretrain", *few, f"output={tmp_path / 'big'}", "train.steps=3", says="smaller vocab_size")
    trained, more = tmp_path / "trained", tmp_path / "more"
    init = f"init={workshop / 'model'}"
    code, _, err = limbeck("pretrain", *few, init, f"output={trained}", "train.steps=6")
    assert code == 0, err
    losses = [
        json.loads(line)["validation_loss"] for line in (trained / "metrics.jsonl").read_text().splitlines()[2::3]
    ]
    assert losses[1] < losses[0]
    assert (trained / "tokenizer.json").read_bytes() == (workshop / "model" / "tokenizer.json").read_bytes()
    code, _, err = limbeck("pretrain", *few, f"init={trained}", f"output={more}", "train.steps=3")
    assert code == 0, err
    assert json.loads((more / "metrics.jsonl").read_text().splitlines()[-1])["validation_loss"] < losses[1]
    refused("pretrain", *few, init, f"output={more}", "train.steps=3", says="init has changed")


def test_pretrain_from_nothing(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "model_config", lambda name: tiny_config(vocab_size=320, pad_token_id=0))
    words = [f"data={workshop / 'text'}", "seq_len=32", "batch=2", "evaluate_tokens=256", f"output={tmp_path / 'out'}"]
    code, _, err = limbeck("pretrain", *words, "train.steps=3", "train.warmup_steps=1")
    assert code == 0, err
    assert load_tokenizer(tmp_path / "out").vocab_size == load_model(tmp_path / "out").config.vocab_size == 320


ROUNDS = (
    "rounds=[{name: depth, target: {layers: 5}}, {name: width, target: {hidden_size: 24, mamba_num_heads: 6},"
    " distill: {stages: [{steps: 6}, {steps: 6, seq_len: 64, batch: 1}]}}]"
)


@pytest.mark.slow
@pytest.mark.parametrize(("rounds", "checkpoints", "kills"), [("", 3, 20), (ROUNDS, 5, 6)])
def test_killed_at_random_points(rounds: str, checkpoints: int, kills: int, workshop: Path, tmp_path: Path) -> None:
    """SIGKILL at random points of compress, then to the end: the same bytes as undisturbed."""
    calm, rough = tmp_path / "calm", tmp_path / "rough"

    def command(out: Path) -> list[str]:
        words = compress_command(workshop, out)
        words = [*(word for word in words if not word.startswith("target.")), rounds] if rounds else words
        return [sys.executable, "-m", "limbeck.scripts.run.main", *words]

    clock = time.perf_counter()
    subprocess.run(command(calm), check=True, capture_output=True)
    length = time.perf_counter() - clock
    generator = torch.Generator().manual_seed(0)
    killed = 0
    for _ in range(kills):
        moment = (0.2 + 0.6 * torch.rand((), generator=generator).item()) * length
        process = subprocess.Popen(command(rough), stdout=subprocess.DEVNULL)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
        if (rough / "result.json").exists():  # it got through: begin again, so that every kill meets work
            assert weights_of(rough) == weights_of(calm)
            shutil.rmtree(rough)
    assert killed >= kills * 3 // 4
    subprocess.run(command(rough), check=True, capture_output=True)
    assert weights_of(rough) == weights_of(calm) and len(weights_of(calm)) == checkpoints
