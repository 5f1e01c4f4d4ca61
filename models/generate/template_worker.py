"""A chat template in a process of its own, which chat.py starts: a template is a program of someone else's, and only
the system can bound what it takes. Here are no imports of ours.

In come lines of JSON, {"source": ...} and then {"variables": [...]} of some renderings at once; out comes a line for
each, with a list of {"text": ..., "spans": ...}, {"refused": ...} by the template's own raise_exception, or
{"failed": ...}. Spans are where in the text the contents of {% generation %} blocks begin and end. A rendering that
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


def as_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Output:
    """The text of a rendering as it comes, and where in it {% generation %} blocks are. A block says how long it is
    when it ends, before its text comes: it begins after what there is by then (as transformers counts)."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.length = 0
        self.spans: list[tuple[int, int]] = []

    def generated(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.spans.append((self.length, self.length + len(text)))
        return text

    def render(self, template: Any, variables: Mapping[str, Any]) -> str:
        for block in template.generate({**variables, GENERATED: self.generated}):
            self.blocks.append(block)
            self.length += len(block)
            if self.length > LONGEST:
                raise ValueError(f"its text has more than {LONGEST:,} characters")
        return "".join(self.blocks)


GENERATED = "limbeck_generated"  # the variable that {% generation %} calls


def compiled(source: str) -> Any:
    """A jinja2 template in the sandbox, with what transformers gives templates."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - so declared there

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = nodes.Call(nodes.Name(GENERATED, "load"), [], [], None, None)
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def answered(work: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What a step gives, or why it does not. A template may raise anything."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return work()
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

    def begin(source: str) -> dict[str, Any]:
        nonlocal template
        template = compiled(source)
        return {}

    def render(variables: Mapping[str, Any]) -> dict[str, Any]:
        output = Output()
        return {"text": output.render(template, variables), "spans": output.spans}

    for line in sys.stdin:
        given = json.loads(line)
        if "source" in given:
            answers = [answered(lambda: begin(given["source"]), seconds)]  # noqa: B023 - called at once
        else:
            answers = [answered(lambda: render(variables), seconds) for variables in given["variables"]]  # noqa: B023
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    serve(float(sys.argv[1]))
