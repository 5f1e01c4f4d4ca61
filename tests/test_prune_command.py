"""`limbeck prune`: streamed and repaired, killed and taken up again, on a disk that is full."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.models import checkpoint
from limbeck.models.checkpoint import open_checkpoint
from limbeck.models.tensors import TensorFile
from limbeck.scripts.run.resolve import corpus
from limbeck.tests.helpers import TIMES, lasting, limbeck, make_workshop

SHARD = 16_000
MODES = {"plain": [], "repaired": ["seq_len=32", "batch=2", "repair.tokens=1024", "repair.local_steps=2"]}
RUN = [sys.executable, "-m", "limbeck.scripts.run.main"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_workshop(tmp_path_factory.mktemp("workshop"))
    words = [f"model={root / 'model'}", f"data={root / 'text'}", f"output={root / 'scores'}"]
    assert limbeck("score", *words, "seq_len=32", "batch=2", "importance.tokens=256")[0] == 0
    for mode in MODES:
        code, _, err = limbeck(*command(root, mode, root / f"calm-{mode}"))
        assert code == 0, err
    return root


def command(root: Path, mode: str, output: Path) -> list[str]:
    words = [f"model={root / 'model'}", f"scores={root / 'scores'}", f"output={output}", f"max_shard_bytes={SHARD}"]
    data = [f"data={root / 'text'}"] if mode == "repaired" else []
    return [
        "prune",
        *words,
        *data,
        *MODES[mode],
        "target.layers=5",
        "target.hidden_size=24",
        "target.mamba_num_heads=6",
    ]


def contents(folder: Path) -> dict[str, bytes]:
    """All but what holds times."""
    return {path.name: lasting(path) for path in folder.iterdir() if path.name not in TIMES}


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


class Killed(BaseException):
    """As if by a signal that nothing can catch: what lies on the disk stays."""


@pytest.mark.parametrize("mode", MODES)
def test_an_interrupted_run_goes_on_after_its_last_shard(
    mode: str, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, out = workshop / f"calm-{mode}", tmp_path / "rough"
    total = len(shards(calm))
    assert total > 4
    partial = tmp_path / ".rough.partial"
    kept: dict[str, int] = {}
    fitted = []
    real_write, real_fit = TensorFile.write, checkpoint.Checkpoint.rows

    def counted(self: checkpoint.Checkpoint, name: str, start: int, stop: int | None) -> torch.Tensor:
        fitted.append((self.path, name))
        return real_fit(self, name, start, stop)

    monkeypatch.setattr(checkpoint.Checkpoint, "rows", counted)
    for number in (2, total - 1):

        def write(self: TensorFile, *rows: Any, stop: int = number) -> None:
            if self.path.name.startswith(f"model-{stop:05d}"):
                raise Killed
            real_write(self, *rows)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(TensorFile, "write", write)
            limbeck(*command(workshop, mode, out))
        assert not out.exists() and [path.name for path in shards(partial)] == [
            path.name for path in shards(calm)[: number - 1]
        ]
        now = {path.name: path.stat().st_mtime_ns for path in shards(partial)}
        assert kept.items() <= now.items()
        kept = now
    fitted.clear()
    code, _, err = limbeck(*command(workshop, mode, out))
    assert code == 0, err
    assert contents(out) == contents(calm)
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in shards(out)}.items()
    if mode == "plain":  # what is in a finished shard is not read again
        assert {path for path, _ in fitted} == {workshop / "model"}
        assert "embeddings.weight" not in {name for _, name in fitted}
    else:  # the layers in finished shards are read from there
        assert {path for path, _ in fitted} == {workshop / "model", partial}


def test_unfinished_work_of_other_options_is_not_taken_up(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TensorFile.write

    def write(self: TensorFile, *rows: Any) -> None:
        if self.path.name.startswith("model-00003"):
            raise Killed
        real(self, *rows)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TensorFile, "write", write)
        limbeck(*command(workshop, "plain", tmp_path / "out"), "repair.norms=none")
    partial = tmp_path / ".out.partial"
    for wrong in ([], ["repair.norms=none", f"scores={workshop / 'words'}"]):  # exit code 2, for other reasons
        code, _, err = limbeck(*command(workshop, "plain", tmp_path / "out"), *wrong)
        assert code == 2 and err.count("\n") == 1 and len(shards(partial)) == 2, err
        assert wrong or "begun otherwise (repair.norms was 'none', now 'count'); remove it, or" in err, err
    shutil.rmtree(partial)
    assert limbeck(*command(workshop, "plain", tmp_path / "out"))[0] == 0
    assert contents(tmp_path / "out") == contents(workshop / "calm-plain")


def test_the_same_weights_in_one_file_or_in_shards(workshop: Path, tmp_path: Path) -> None:
    words = [word for word in command(workshop, "plain", tmp_path / "one") if "max_shard" not in word]
    assert limbeck(*words)[0] == 0
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(workshop / "calm-plain")
    assert (tmp_path / "one" / "model.safetensors").exists() and one.names() == many.names()
    assert all(torch.equal(one.tensor(name), many.tensor(name)) for name in one.names())


def test_a_broken_weight_leaves_nothing(workshop: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(workshop / "model", source)
    file = source / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4:] = b"\xff\xff\xff\x7f"  # NaN
    file.write_bytes(content)
    words = command(workshop, "plain", tmp_path / "out")
    code, _, err = limbeck(*[f"model={source}" if word.startswith("model=") else word for word in words])
    assert code == 2 and "holds NaN" in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("score", "distill", "export")]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
@pytest.mark.parametrize("name", ["prune", *OTHERS])
def test_a_disk_that_takes_no_more_is_said_in_a_line(name: str, workshop: Path, tmp_path: Path) -> None:
    """A real refusal by the system: no file of the process may pass so many bytes."""
    model, data = f"model={workshop / 'model'}", f"data={workshop / 'text'}"
    out, words = tmp_path / "out", ["seq_len=32", "batch=2"]
    commands = {
        "prune": command(workshop, "plain", out),
        "score": ["score", model, data, f"output={out}", *words, "importance.tokens=256"],
        "export": ["export", model, f"output={out}", "dtype=float32"],
        "distill": ["distill", f"teacher={workshop / 'model'}", f"student={workshop / 'model'}", data, f"output={out}",
                    "distill.batch=2", "distill.seq_len=32", "distill.train.steps=2", "distill.train.save_every=1",
                    "distill.evaluate_tokens=64"],
    }  # fmt: skip
    for split in ("train", "validation"):  # the text's tokens are in their cache, which has another place
        corpus(str(workshop / "text"), split, workshop / "model")
    before = {path: path.stat().st_mtime_ns for path in workshop.rglob("*") if path.is_file()}

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    done = subprocess.run([*RUN, *commands[name]], capture_output=True, text=True, preexec_fn=limit)
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("limbeck: ") and "File too large" in lines[0] and str(tmp_path) in lines[0]
    assert not out.exists()
    assert before == {path: path.stat().st_mtime_ns for path in workshop.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_killed_at_random_points(mode: str, workshop: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as a drawn number of shards is there, ten times: the same bytes as undisturbed."""
    draw, met, out, partial = random.Random(0), set(), tmp_path / "rough", tmp_path / ".rough.partial"
    for _ in range(10):
        wanted = len(shards(partial)) + draw.randint(0, 2)
        process = subprocess.Popen([*RUN, *command(workshop, mode, out)], stdout=subprocess.DEVNULL)
        while process.poll() is None and not (partial.exists() and len(shards(partial)) >= wanted):
            time.sleep(0.001)
        process.kill()
        process.wait()
        met.add(len(shards(partial)))
        if out.exists():
            assert contents(out) == contents(workshop / f"calm-{mode}")
            shutil.rmtree(out)
    assert len(met) > 2, met
    subprocess.run([*RUN, *command(workshop, mode, out)], check=True, capture_output=True)
    assert contents(out) == contents(workshop / f"calm-{mode}")


def test_data_that_no_repair_reads_is_said(workshop: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = [*command(workshop, "plain", tmp_path / "out"), f"data={workshop / 'text'}", "repair=plain"]
    code, out, err = limbeck(*words)
    assert code == 0 and "data= is not read" in out + err
    folders = tmp_path / "out", workshop / "calm-plain"
    assert len({(folder / "selection.json").read_bytes() for folder in folders}) == 1


def test_a_path_of_the_home_folder(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within quotes, where no shell resolves it; for what is read and what is written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workshop / "scores", tmp_path / "sc")
    words = command(workshop, "plain", Path("~/out"))
    given = ["scores=~/sc" if word.startswith("scores=") else word for word in words]
    code, _, err = limbeck(*given)
    assert code == 0, err
    assert (tmp_path / "out" / "config.json").is_file() and not (tmp_path / "~").exists()
