"""Every command of the README and of docs/recipes.md runs as it stands, in its order, with fewer tokens; of blocks that
begin with what they need, the options have to compose."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest
from limbeck.scripts.run.compose import build, compose_config
from limbeck.scripts.run.main import COMMANDS, by_mode
from limbeck.tests.helpers import limbeck
from limbeck.tests.processes_helpers import launch

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/recipes.md")
ELSEWHERE = ("make demo", "make test", ". .venv/bin/activate")  # the installation, and what `recipe=tiny` is run for
FEWER = "distill.evaluate_tokens=1024 distill.batch=2 distill.seq_len=256"
SHORT = {  # what makes a command short, where it does not say so itself
    "compress": f"{FEWER} evaluate_tokens=2048 repair.tokens=2048 importance.tokens=2048 importance.depth_tokens=1024",
    "score": "importance.tokens=2048 importance.depth_tokens=1024",
    "prune": "repair.tokens=2048",
    "distill": FEWER,
    "cache-teacher": FEWER,
    "evaluate": "tokens=2048 details.prompts=2 details.new_tokens=8 details.probe_count=1",
    "generate": "max_new_tokens=4",
    "pretrain": "evaluate_tokens=1024 batch=2 seq_len=256",
}
ONLY = {"loss": "only=[KL,CE]", "aggregation": "'only=[\"l2, mean\"]'", "all": "only=[score-source,repair]"}


@dataclasses.dataclass(frozen=True)
class Line:
    document: str
    words: tuple[str, ...]
    needs: bool
    code: int  # as a comment says, else 0

    @property
    def command(self) -> str:
        return self.words[1] if self.words[0] == "limbeck" else ""


def lines_of(document: str) -> list[Line]:
    found = []
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / document).read_text(), re.S):
        needs = block.startswith("# needs ")
        for line in block.replace("\\\n", " ").splitlines():
            words = tuple(shlex.split(line, comments=True))
            if words and " ".join(words) not in ELSEWHERE:
                code = re.search(r"#.*exit code (\d)", line)
                found.append(Line(document, words, needs, int(code[1]) if code else 0))
    return found


def test_lines_are_of_a_kind_that_is_known() -> None:
    for document in DOCUMENTS:
        lines = lines_of(document)
        assert sum(not line.needs for line in lines) >= 5
        for line in lines:
            assert line.words[0] in ("limbeck", "torchrun", "accelerate", "vllm"), line
            if not line.needs:
                assert line.words[0] != "vllm" and not any("=/" in word for word in line.words), line
            elif line.words[0] != "vllm":
                command, overrides = by_mode(*command_of(line.words))
                module = importlib.import_module(f"limbeck.scripts.{command.replace('-', '_')}")
                build(module.Options, compose_config(command, overrides))


def command_of(words: tuple[str, ...]) -> tuple[str, list[str]]:
    """The command and its options, also where a launcher starts it or several jobs are requested."""
    rest = [word for word in words[1:] if word != "--multirun" and not word.startswith("hydra")]
    if "-m" in rest:
        module, *rest = rest[rest.index("-m") + 1 :]
        if module != "limbeck" and not module.endswith(".main"):
            return module.rpartition(".")[2], rest
    return rest[0], rest[1:]


def shortened(line: Line) -> list[str]:
    """The words with fewer steps and tokens."""
    words = [re.sub(r"(steps|limit)(=|: )\d+", r"\1\g<2>2", word) for word in line.words[1:]]
    words = [re.sub(r"tokens: [\de.]+", "tokens: 512", word) for word in words]
    if words[0].startswith("experiment="):
        name = words[0].partition("=")[2]
        also = next((word for word in words if word.startswith("also=")), "also=")
        words = [word for word in words if not word.startswith(("also=", "seeds="))]
        return [*words, "seeds=[0]", *shlex.split(ONLY[name]), f"{also} distill.train.steps=1 {SHORT['compress']}"]
    if "dry_run=true" in words or words[0] not in SHORT:
        return words
    stages = any("stages" in word or "train.steps" in word for word in words)
    more = SHORT[words[0]].split()
    if words[0] in ("compress", "distill", "cache-teacher") and not stages:
        more.append("distill.train.steps=2")
    own = {word.partition("=")[0] for word in words}
    return [*words, *(word for word in more if word.partition("=")[0] not in own)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_run_as_they_are_written(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for line in lines_of(document):
        if line.needs:
            continue
        print(shlex.join(line.words))
        if line.words[0] == "torchrun":
            module = line.words.index("-m")
            words = [
                *line.words[module:],
                *SHORT["distill" if "distill" in line.words[module + 1] else "score"].split(),
            ]
            if "distill" in line.words[module + 1]:
                words.append("distill.train.steps=2")
            done = launch(words, processes=2)
            assert done.returncode == 0, (line, done.stderr[-3000:])
            continue
        code, out, err = limbeck(*shortened(line))
        assert code == line.code, (line, err, out[-2000:])
    if document == "docs/recipes.md":
        card = (tmp_path / "exported" / "README.md").read_text()
        assert "forward KL" in card and 'license: "apache-2.0"' in card and "does not name them" not in card


def test_every_command_is_documented() -> None:
    named = {line.command.partition("=")[0] for document in DOCUMENTS for line in lines_of(document)}
    assert set(COMMANDS) - named <= set(), set(COMMANDS) - named
