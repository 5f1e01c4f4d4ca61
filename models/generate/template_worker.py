"""A chat template in a process of its own, which chat.py starts: a template is a program of someone else's, and only
the system can bound what it takes. Here are no imports of ours.

In come lines of JSON, {"source": ...} and then {"variables": ...} of one rendering after another; out comes a line for
each: {"text": ...}, {"refused": ...} by the template's own raise_exception, or {"failed": ...}. A rendering that
takes more of the processor than the command line says (`SECONDS`) ends the process by SIGPROF, wherever it is; memory
is bounded by RLIMIT_AS.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

SECONDS = 5
MEMORY = 2**29
LONGEST = 2**24  # characters of a text


class Refusal(Exception):
    """The template's raise_exception."""


def refuse(message: Any) -> NoReturn:
    raise Refusal(str(message))


def as_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def compiled(source: str) -> Any:
    """A jinja2 template in the sandbox, with what transformers gives templates."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def answered(work: Callable[[], str | None], seconds: float) -> dict[str, Any]:
    """What a step gives, or why it does not. A template may raise anything."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        text = work()
        if isinstance(text, str) and len(text) > LONGEST:
            return {"failed": f"its text has {len(text):,} characters; expected {LONGEST:,} at most"}
        return {"text": text}
    except Refusal as error:
        return {"refused": str(error)[:LONGEST]}
    except MemoryError:
        return {"failed": f"it takes more than {MEMORY >> 20} MiB of memory"}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:1000]}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def serve(seconds: float) -> None:
    """Answers line by line until the input ends."""
    import jinja2.sandbox  # noqa: F401 - before memory is bounded

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    template: Any = None

    def step(given: Mapping[str, Any]) -> str | None:
        nonlocal template
        if "source" in given:
            template = compiled(given["source"])
            return None
        return str(template.render(given["variables"]))

    for line in sys.stdin:
        given = json.loads(line)
        answer = answered(lambda: step(given), seconds)  # noqa: B023 - called at once
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(float(sys.argv[1]))
