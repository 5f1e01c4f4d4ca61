"""A folder that is written: by one process at a time, to the same bytes each time, and known when it is damaged."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from limbeck import load
from limbeck.distill.options import TrainOptions
from limbeck.distill.state import is_whole, states
from limbeck.distill.trainer import train
from limbeck.models.errors import InputError
from limbeck.models.fingerprint import PROVENANCE, check_files, fingerprint_of, summed
from limbeck.models.folder import atomic_folder, cache_folder, file_sum, owned, sha256_file
from limbeck.scripts.run.stage import stage
from limbeck.tests.helpers import TIMES, compress_command, lasting, limbeck, make_pair
from limbeck.tests.training_helpers import batches_from, model_of, teach, weights

DISTILL = ("distill.train.steps=12", "distill.train.save_every=2", "distill.train.log_every=1", "distill.seq_len=32",
           "distill.train.warmup_steps=2", "distill.train.evaluate_every=6", "distill.batch=2", "device=cpu",
           "distill.evaluate_tokens=64", "wandb=off")  # fmt: skip


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("workshop"))


def distill_words(work: Path, out: Path, *more: str) -> list[str]:
    places = [f"teacher={work / 'model'}", f"student={work / 'student'}", f"data={work / 'text'}", f"output={out}"]
    return ["distill", *places, *DISTILL, *more]


def holder(folder: str, told: Any) -> None:
    with owned(Path(folder)):
        told.put(os.getpid())
        time.sleep(600)


def test_a_lock_is_one_process_s_and_dies_with_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    told: Any = context.Queue()
    other = context.Process(target=holder, args=(str(tmp_path / "out"), told))
    other.start()
    number = told.get(timeout=60)
    for attempt in (owned, atomic_folder):
        with (
            pytest.raises(
                InputError, match=rf"out is being written by another process \(process {number} on .*, since"
            ),
            attempt(tmp_path / "out"),
        ):
            pass
    assert number == other.pid
    os.kill(number, signal.SIGKILL)
    other.join()
    with owned(tmp_path / "out") as left:
        assert left, "the dead process's lock was not seen"
    with owned(tmp_path / "out") as left:
        assert not left
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder in which nobody makes files")
def test_a_place_where_nothing_can_be_written_is_not_said_to_be_locked() -> None:
    for place in (Path("/proc/x"), Path("/proc/self/x")):
        with pytest.raises(InputError, match=f"{place} cannot be written: "), owned(place):
            pass


def test_an_output_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder where one is, the one above it, the root."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep")
    for name, beside in (("", tmp_path), ("er/..", tmp_path), (".", tmp_path), ("er/.", tmp_path / "deep")):
        with owned(Path(name)):
            own = "er" if name == "er/." else "deep"
            assert [path.name for path in beside.glob(".*.writing")] == [f".{own}.writing"]
    with pytest.raises(InputError, match="/ is no folder to write"), owned(Path("/")):
        pass
    monkeypatch.chdir(tmp_path / "deep" / "er")
    for line, says in (("compress recipe=tiny data=/nowhere output=.", "/nowhere does not exist"),
                       ("compress recipe=tiny output=/", "/ is no folder to write"),
                       ("distill teacher=zoo student=zoo data=/nowhere distill.teacher_correction.tokens=9 output=.",
                        "/nowhere does not exist"),
                       ("score --multirun model=zoo data=/nowhere output=. seed=0", "/nowhere does not")):  # fmt: skip
        code, _, err = limbeck(*line.split())
        assert code == 2 and says in err and err.count("\n") == 1, err


def test_the_cache_of_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LIMBECK_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(InputError, match="set LIMBECK_CACHE"):
        cache_folder()


def test_a_folder_that_is_not_ours_is_not_cleared(tmp_path: Path) -> None:
    own = tmp_path / ".out.partial"
    own.mkdir()
    (own / "mine").write_text("x")
    with pytest.raises(InputError, match=r"\.out\.partial is not of limbeck"), atomic_folder(tmp_path / "out"):
        pass
    with (
        pytest.raises(InputError, match=r"\.out\.partial is not of limbeck"),
        stage(tmp_path / "out", "test", inputs={}, options={}),
    ):
        pass
    assert (own / "mine").read_text() == "x" and not (tmp_path / "out").exists()


def test_output_within_an_input(workshop: Path) -> None:
    for place in (workshop / "model" / "out", workshop / "text" / "deep" / "out"):
        code, _, err = limbeck(*distill_words(workshop, place))
        assert code == 2 and err.count("\n") == 1 and "lies within" in err, err
        assert not place.parent.exists() or place.parent == workshop / "model"
        assert not list(place.parent.glob(".*"))


def race(commands: list[list[str]], delays: list[float]) -> list[tuple[int, str]]:
    """Commands that start one shortly after the other: exit codes, and what they say on their error output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    begun = []
    for words, delay in zip(commands, delays, strict=True):
        time.sleep(delay)
        begun.append(subprocess.Popen([sys.executable, "-m", "limbeck", *words], stdout=subprocess.DEVNULL,
                                      stderr=subprocess.PIPE, env=environment, text=True))  # fmt: skip
    ended = [process.communicate(timeout=300)[1] for process in begun]
    return [(process.returncode, err) for process, err in zip(begun, ended, strict=True)]


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("pairs", (1, pytest.param(20, marks=pytest.mark.slow)))
def test_two_processes_at_one_output(pairs: int, workshop: Path, tmp_path: Path) -> None:
    """Whatever the second one's seed, and when it starts: one result, of one seed, and the other command is told."""
    draw = random.Random(pairs)
    for pair in range(pairs):
        out, seeds = tmp_path / str(pair), (0, draw.choice((0, 1)))
        commands = [distill_words(workshop, out, f"seed={seed}") for seed in seeds]
        ended = race(commands, [0, draw.uniform(0, 3)])
        codes = sorted(code for code, _ in ended)
        made = json.loads((out / "limbeck.json").read_text())["options"]["seed"]
        if codes == [0, 0]:  # the second came when all was done
            assert seeds[0] == seeds[1]
        else:
            assert codes == [0, 2]
            (line,) = [err for code, err in ended if code == 2]
            assert line.count("\n") == 1 and ("another process" in line or "made otherwise" in line), line
            assert made == seeds[[code for code, _ in ended].index(0)]
        steps = [json.loads(text)["step"] for text in (out / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 13))
        calm = tmp_path / f"calm-{made}"
        if not calm.exists():
            assert limbeck(*distill_words(workshop, calm, f"seed={made}"))[0] == 0
        assert same_files(out, calm)


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders have the same files, those that hold times aside, to the byte."""
    contents = [
        {
            path.relative_to(folder).as_posix(): lasting(path)
            for path in folder.rglob("*")
            if path.is_file() and path.name not in TIMES
        }
        for folder in (one, other)
    ]
    assert contents[0].keys() == contents[1].keys()
    differing = [name for name in contents[0] if contents[0][name] != contents[1][name]]
    assert not differing, differing
    return True


@pytest.mark.slow
def test_two_undisturbed_runs_are_the_same(workshop: Path, tmp_path: Path) -> None:
    """Of the whole chain: every file but those that hold times. (result.json names the folder.)"""
    for name in ("one", "two"):
        code, _, err = limbeck(*compress_command(workshop, tmp_path / name))
        assert code == 0, err
    assert same_files(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one" / "distilled" / "speed.jsonl").stat().st_size > 0


def damaged(path: Path, draw: random.Random, how: str) -> None:
    """One bit of a file flipped, or the file cut."""
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(bytes(content[: draw.randrange(len(content))]))
        return
    place = draw.randrange(len(content))
    content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(("how", "count"), [
    ("flip", 3), ("cut", 3), pytest.param("flip", 20, marks=pytest.mark.slow),
    pytest.param("cut", 20, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_damaged_state_is_not_used(how: str, count: int, tmp_path: Path) -> None:
    """Training falls back to the state before, says so, and comes to the same weights; with none left, anew."""
    options = TrainOptions(steps=9, learning_rate=0.01, warmup_steps=2, save_every=2, log_every=1)
    calm = model_of(1)
    train(calm, teach(), batches_from, options, tmp_path / "calm")
    train(model_of(1), teach(), batches_from, options, tmp_path / "rough", stop_after=7)
    draw = random.Random(count)
    for number in range(count):
        folder = shutil.copytree(tmp_path / "rough", tmp_path / str(number))
        both = draw.random() < 0.3
        for state in states(folder)[0 if both else -1 :]:
            damaged(draw.choice(sorted(state.iterdir())), draw, how)
            assert not is_whole(state)
        said: list[str] = []
        rough = model_of(1)
        train(rough, teach(), batches_from, options, folder, say=said.append)
        assert len(said) == 1 + both and "state-00000006 is damaged and not used" in said[-1]
        assert all((weights(rough)[name] == weight).all() for name, weight in weights(calm).items())
        lines = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("calm", str(number))]
        assert lines[0] == lines[1]


def test_a_cut_line_of_the_log_is_written_again(tmp_path: Path) -> None:
    options = TrainOptions(steps=6, learning_rate=0.01, warmup_steps=2, save_every=2, log_every=1)
    train(model_of(1), teach(), batches_from, options, tmp_path / "calm")
    train(model_of(1), teach(), batches_from, options, tmp_path / "rough", stop_after=4)
    for name in ("metrics.jsonl", "speed.jsonl"):
        log = tmp_path / "rough" / name
        log.write_bytes(log.read_bytes()[:-9])
    train(model_of(1), teach(), batches_from, options, tmp_path / "rough")
    assert (tmp_path / "rough" / "metrics.jsonl").read_bytes() == (tmp_path / "calm" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(("how", "count"), [
    ("flip", 3), ("cut", 3), pytest.param("flip", 20, marks=pytest.mark.slow),
    pytest.param("cut", 20, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_damaged_folder_is_noticed_by_the_next_stage(how: str, count: int, workshop: Path, tmp_path: Path) -> None:
    """By whoever reads it next, and by the command that made it: a line, exit code 2, and nothing is made of it."""
    scores, pruned = tmp_path / "scores", tmp_path / "pruned"
    score = ["score", f"model={workshop / 'model'}", f"data={workshop / 'text'}", "seq_len=32", "batch=2",
             "importance.tokens=64", "importance.depth_tokens=64", "device=cpu", f"output={scores}"]  # fmt: skip
    prune = ["prune", f"model={workshop / 'model'}", f"scores={scores}", "target.hidden_size=24", "device=cpu"]
    assert limbeck(*score)[0] == 0 and limbeck(*prune, f"output={pruned}")[0] == 0
    export = ["export", f"model={pruned}", "dtype=float32", f"output={tmp_path / 'out'}"]
    draw = random.Random(f"{how}{count}")
    before = json.loads((pruned / "limbeck.json").read_text())
    for number in range(count):
        source, commands = draw.choice(
            [
                (scores, [[*prune, f"output={tmp_path / 'out'}"], score]),
                (pruned, [export, [*prune, f"output={pruned}"]]),
            ]
        )
        kept = shutil.copytree(source, tmp_path / f"kept-{number}")
        path = draw.choice([file for file in sorted(source.iterdir()) if file.name != "result.json"])
        damaged(path, draw, how)
        for words in commands:
            code, _, err = limbeck(*words)
            if path.name == "limbeck.json" and is_same_json(path, kept / path.name):
                continue  # without effect
            assert code == 2 and err.startswith("limbeck: ") and err.count("\n") == 1, (path, err)
            assert not (tmp_path / "out").exists()
        shutil.rmtree(source)
        kept.rename(source)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert json.loads((pruned / "limbeck.json").read_text()) == before


def is_same_json(one: Path, other: Path) -> bool:
    try:
        return json.loads(one.read_text()) == json.loads(other.read_text())
    except ValueError:
        return False


@pytest.mark.slow
def test_what_only_reads_a_folder_notices_damage_too(workshop: Path, tmp_path: Path) -> None:
    """Of the weights where they are read, and of the config where that is all."""
    folder = tmp_path / "merged"
    model = f"model={folder}"
    assert limbeck("merge", f"model={workshop / 'model'}", f"other={workshop / 'model'}", f"output={folder}")[0] == 0
    write = ("generate", model, "prompt=def", "max_new_tokens=2", "context=64", "device=cpu")
    fit = ("memory-fit", model, "hardware=cpu", "hardware.usable_gib=1", "context=64", "fit.weight_dtype=float32",
           "fit.kv_dtype=float32", "steps=2")  # fmt: skip
    speed = ("bench", model, "lengths=[8/2]", "steps=2", "rounds=1", "device=cpu")
    commands = {"weights": (write, (*fit, "method=measurement"), speed), "config": (fit, (*speed, "measure=false"))}
    for words in (*commands["weights"], *commands["config"]):
        code, _, err = limbeck(*words)
        assert code == 0, (words, err)
    for what, name in (("weights", "model.safetensors"), ("config", "config.json")):
        path = folder / name
        whole = path.read_bytes()
        content = bytearray(whole)
        content[-1] ^= 1
        path.write_bytes(bytes(content) if what == "weights" else whole + b" ")
        for words in commands[what]:
            code, _, err = limbeck(*words)
            assert code == 2 and f"{name} is not as it was left" in err and err.count("\n") == 1, (words, err)
        with pytest.raises(InputError, match="not as it was left"):
            load(folder)
        path.write_bytes(whole)


def test_checksums_of_before_are_checked_too(tmp_path: Path) -> None:
    """A folder whose limbeck.json has sha256 sums, and one with sums of today."""
    for name, hashed in (("before", sha256_file), ("today", file_sum)):
        folder = tmp_path / name
        folder.mkdir()
        weights = folder / "model.safetensors"
        weights.write_bytes(bytes(range(256)) * 8192)
        files = {weights.name: hashed(weights)}
        (folder / PROVENANCE).write_text(json.dumps(summed({"made_by": "limbeck prune", "files": files})))
        check_files(folder)
        whole = fingerprint_of(folder)
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        for check in (check_files, fingerprint_of):
            with pytest.raises(InputError, match=r"model\.safetensors is not as it was left"):
                check(folder)
        content[-1] ^= 1
        weights.write_bytes(content)
        assert fingerprint_of(folder) == whole
