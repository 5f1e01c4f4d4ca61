"""What the fuzzers share: documents that are nearly right, and a command that may refuse them but not fail."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from limbeck.models.checkpoint import load_model, save_model
from limbeck.models.errors import CheckFailed, InputError
from limbeck.tests.helpers import limbeck, make_workshop

DRAWS = int(os.environ.get("LIMBECK_DRAWS", "15"))  # of a class, in a run of the tests
SECONDS, MEMORY = 10, 2 * 2**30  # of the processor and of memory, for a draw
SAMPLE = settings(
    deadline=None, database=None, derandomize="LIMBECK_DRAWS" not in os.environ,
    suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate),
)  # fmt: skip
OUTCOMES: collections.Counter[tuple[str, int]] = collections.Counter()  # draws of each class by exit code

HUGE = (10**9, 10**12, -1, 0, 2**31, 2**63, 2**64, 10**30, -(10**18))
NUMBERS = st.one_of(
    st.sampled_from(HUGE), st.integers(-3, 70), st.integers(), st.floats(allow_subnormal=False),
    st.sampled_from((float("nan"), float("inf"), float("-inf"), 1e-320, 1e308, 0.0, -0.0)),
)  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ("", "\x00", "\ud800", "../x", "~nobody/x", "/dev/zero", "{{", "1e5", "true", "é\u202e", "a" * 5000)
    ),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
NESTED = "[" * 100_000
# What becomes of a whole text: cut, a byte changed, not UTF-8, nested, a number of 5,000 digits, said twice, no JSON.
DAMAGE: dict[str, Callable[[str, int], bytes]] = {
    "cut": lambda text, at: text.encode()[: at % (len(text) or 1)],
    "flipped": lambda text, at: flipped(text.encode(), at),
    "latin": lambda text, at: b"\xff\xfe" + text.encode(),
    "mark": lambda text, at: b"\xef\xbb\xbf" + text.encode(),
    "deep": lambda text, at: (NESTED + text).encode(),
    "deep within": lambda text, at: text.replace("{", '{"x": ' + NESTED + "]" * 100_000 + ", ", 1).encode(),
    "long": lambda text, at: text.replace("{", '{"x": ' + "9" * 5000 + ", ", 1).encode(),
    "empty": lambda text, at: b"",
    "other": lambda text, at: (b"null", b"[]", b"7", b'"x"', b"{}", b"NaN")[at % 6],
}


def flipped(content: bytes, at: int) -> bytes:
    if not content:
        return content
    place = at // 8 % len(content)
    return content[:place] + bytes([content[place] ^ 1 << at % 8]) + content[place + 1 :]


def places(content: Any, most: int = 400) -> list[tuple[Any, ...]]:
    """The ways to the values within a document, itself left out."""
    ways: list[tuple[Any, ...]] = []
    pending: list[tuple[tuple[Any, ...], Any]] = [((), content)]
    while pending and len(ways) < most:
        way, value = pending.pop(0)
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            ways.append((*way, key))
            pending.append(((*way, key), inner))
    return ways


def changed(content: Any, way: tuple[Any, ...], change: str, value: Any, key: str) -> None:
    """Changes a document in place."""
    holder = content
    for step in way[:-1]:
        holder = holder[step]
    if change == "add" and isinstance(holder, dict):
        holder[key] = value
    elif change == "drop":
        del holder[way[-1]]
    else:
        holder[way[-1]] = value


@st.composite
def documents(draw: st.DrawFn, base: Any, values: st.SearchStrategy[Any] = VALUES) -> bytes:
    """The bytes of a JSON document that differs from `base` in one or two places, or as a text."""
    content = json.loads(json.dumps(base))
    for _ in range(draw(st.integers(1, 2))):
        ways = places(content)
        if ways:
            way = ways[draw(st.integers(0, 10**6)) % len(ways)]
            changed(
                content, way, draw(st.sampled_from(("set", "set", "set", "drop", "add"))), draw(values), draw(TEXTS)
            )
    text = json.dumps(content)
    damage = draw(st.sampled_from((*[None] * 20, *DAMAGE)))
    return text.encode() if damage is None else DAMAGE[damage](text, draw(st.integers(0, 10**6)))


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """The block may take `SECONDS` of the processor, and `MEMORY` beside what the process has already."""

    def stop(number: int, frame: Any) -> None:
        raise AssertionError(f"more than {SECONDS} s")

    at_first = highest(anew=True)
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    peak = highest() - at_first
    assert peak < MEMORY, f"{peak / 2**30:.2f} GiB"


def highest(anew: bool = False) -> int:
    """The most memory that this process has had, in bytes; `anew`: from now on, where the system can count so."""
    if anew:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def judged(what: str, work: Callable[[], object]) -> int:
    """Runs `work`, the function of a command: it does what it should, or says in one line why not, or that a check says
    no. The exit code; a refusal has a text."""
    code, said = 0, ""
    with bounded(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            work()
        except InputError as error:
            code, said = 2, str(error)
        except CheckFailed as error:
            code, said = 3, str(error)
    assert code == 0 or len(said) > 20, said
    OUTCOMES[what, code] += 1
    return code


def judged_command(what: str, *words: str) -> int:
    """Runs a command line as a user would; as above."""
    with bounded():
        code, _, err = limbeck(*words)
    said = [line for line in err.splitlines() if line.startswith("limbeck: ")]
    assert code in (0, 2, 3), (code, err)
    assert code == 0 or (len(said) == 1 and len(said[0]) > 20 and "Traceback" not in err), err
    OUTCOMES[what, code] += 1
    return code


def fuzz_workshop(root: Path) -> Path:
    """A model in one file and in shards, with a template, a generation_config.json, and scores."""
    make_workshop(root)
    model = root / "model"
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "temperature": 0.5}))
    (model / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    save_model(load_model(model), root / "shards", tokenizer_from=model, max_shard_bytes=50_000)
    words = (f"model={model}", f"data={root / 'text'}", f"output={root / 'scores'}", "importance.tokens=256")
    assert limbeck("score", *words, "importance.depth_tokens=128", "seq_len=32", "batch=2")[0] == 0
    return root


def tell_outcomes() -> None:
    for (what, code), count in sorted(OUTCOMES.items()):
        print(f"\n{what}: {count} with exit code {code}", end="")
    OUTCOMES.clear()


def linked(source: Path, target: Path, files: Mapping[str, bytes]) -> Path:
    """A folder of links to another's files, but for those that are given."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.name not in files:
            (target / path.name).symlink_to(path)
    for name, content in files.items():
        (target / name).write_bytes(content)
    return target
