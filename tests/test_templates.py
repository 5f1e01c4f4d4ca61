"""Chat templates as programs of someone else's: what they may take, and what is said of those that take more."""

from __future__ import annotations

from pathlib import Path

import pytest
from limbeck.models.errors import InputError
from limbeck.models.generate.chat import ChatTemplate, TemplateProcess

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
LARGE = (
    "{{ 'a' * 10 ** 10 }}", "{{ '%1000000000d' % 1 }}", "{{ 'a'.ljust(10 ** 9) }}", "{{ '{:>999999999}'.format(1) }}",
    "{% set s = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set s.x = s.x ~ s.x %}{% endfor %}",
    "{% set s = namespace(x=[1]) %}{% for i in range(99) %}{% set s.x = s.x + s.x %}{% endfor %}",
    "{{ messages | tojson(indent=10 ** 9) }}", "{{ (['a' * 10 ** 6] * 10 ** 6) | join }}", "{{ 'a' * 3 * 10 ** 7 }}",
)  # fmt: skip


@pytest.mark.parametrize("source", (LOOP, "{{ x ** (x ** x) }}"))
def test_time_is_bounded(source: str) -> None:
    process = TemplateProcess(source, "folder", 0.3)
    for _ in range(2):  # and what comes after is told the same
        with pytest.raises(InputError, match=r"folder: the chat template fails: it takes more than 0\.3 s$"):
            process.render({"x": 9})


def test_a_rendering_that_took_too_long_is_one() -> None:
    """Those after it have a process of their own, which ends with the template as the first does."""
    template = TemplateProcess(f"{{% if x == 'slow' %}}{LOOP}{{% endif %}}{{{{ x }}}}", "folder", 0.3)
    processes = [template.process]
    for _ in range(2):
        assert template.render({"x": "a"}) == "a"
        with pytest.raises(InputError, match="takes more than"):
            template.render({"x": "slow"})
        assert [each.text for each in template.renderings([{"x": "b"}, {"x": "c"}])] == ["b", "c"]
        processes.append(template.process)
    del template
    assert len(set(processes)) == 3 and all(process.poll() is not None for process in processes)


@pytest.mark.parametrize("source", LARGE)
def test_memory_is_bounded(source: str) -> None:
    """Constants are computed when a template is compiled, the others when it is rendered."""
    with pytest.raises(InputError, match=r"chat template .*: it(s text has| takes more than 512 MiB)|OverflowError"):
        TemplateProcess(source, "folder").render({"messages": [{"role": "user", "content": "x"}]})


def test_what_is_odd_in_a_text_is_no_error_of_ours() -> None:
    process = TemplateProcess("{{ x }}{{ '\\ud800' }}", "folder")
    assert process.render({"x": "\ud83d"}) == "??"
    assert process.render({"x": "\N{GRINNING FACE}\n"}) == "\N{GRINNING FACE}\n?"
    recursive = TemplateProcess("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "folder")
    with pytest.raises(InputError, match="RecursionError"):
        recursive.render({})


@pytest.mark.parametrize(
    ("content", "says"),
    ((b"\xff{{ 1 }}", "is not UTF-8"), (b" " * (2**20 + 1), "expected 1,048,576 at most"), (b"(" * 9000, None)),
)
def test_files_that_hold_no_template(content: bytes, says: str | None, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(content)
    if says is None:
        assert ChatTemplate(tmp_path).render([]) == content.decode()
        return
    with pytest.raises(InputError, match=says):
        ChatTemplate(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ " + "(" * 5000 + ")" * 5000 + " }}")
    with pytest.raises(InputError, match="cannot be read"):
        ChatTemplate(tmp_path)


def test_the_process_ends_with_its_template() -> None:
    template = TemplateProcess("{{ 1 }}", "folder")
    process = template.process
    assert template.render({}) == "1" and process.poll() is None
    del template
    assert process.poll() == 0
