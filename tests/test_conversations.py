"""Conversations to tokens and masks, beside transformers' own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from limbeck.distill.text.conversations import ANSWER, KIND, PROMPT, THOUGHT, Renderer, read_conversation
from limbeck.distill.text.notes import Notes
from limbeck.models.generate.chat import ChatTemplate
from limbeck.models.tokenizer import load_tokenizer
from limbeck.tests.chat_helpers import TEMPLATES, chat_folder, drawn_row, unmarked

DRAWN = 200


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_and_masks_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Of the template with {% generation %} blocks as it marks them, and of the same without them alike."""
    transformers = pytest.importorskip("transformers")
    folder, bare = chat_folder(tmp_path / "a", TEMPLATES[name]), chat_folder(tmp_path / "b", unmarked(TEMPLATES[name]))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    marked, cut = (Renderer(load_tokenizer(path), None) for path in (folder, bare))
    prompts = ChatTemplate(folder)
    for seed in range(DRAWN):
        row = drawn_row(seed, tools=name in ("tools", "plain"))
        reasoning = (None, True, False)[seed % 3] if name in ("tools", "reasons") else None
        options: dict[str, Any] = {"tools": row.get("tools")}
        if reasoning is not None:
            options["enable_thinking"] = reasoning
        expected = theirs.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True, **options
        )
        conversation = read_conversation(row, "row")
        assert conversation is not None
        (rendered,) = marked.template.renderings([(conversation.messages, False)], reasoning, row.get("tools"))
        assert rendered.text == theirs.apply_chat_template(row["messages"], tokenize=False, **options)
        if reasoning is not False:  # which takes thoughts away before
            ids, parts = marked.tokens(conversation, reasoning)
            assert ids.tolist() == expected["input_ids"]
            assert (parts & KIND >= ANSWER).astype(int).tolist() == expected["assistant_masks"], row
            same, cut_parts = cut.tokens(conversation, reasoning)
            assert np.array_equal(same, ids)
            # What the header of an answer has opened is the template's, where no block says otherwise.
            opened = np.flatnonzero((cut_parts & KIND >= ANSWER) != (parts & KIND >= ANSWER))
            said = re.sub(r"<think>?\n?(</think>)?", "", theirs.decode(ids[opened]))
            assert not said and (name in ("nemotron", "reasons") or not len(opened)), (said, row)
            assert (cut_parts[opened] & KIND == PROMPT).all()
        prompt = theirs.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True, **options)
        assert prompts.render(row["messages"][:-1], reasoning, row.get("tools")) == prompt


@pytest.mark.parametrize("opened", ("<think>", "<think>\n"))
def test_thoughts_that_the_header_has_opened_are_thoughts(opened: str, tmp_path: Path) -> None:
    """And it is not said that the template leaves them out; what a question spells opens nothing."""
    header = "'[a]" + opened.replace("\n", "\\n") + "'"
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ " + header + " + m.reasoning_content + '</think>' +"
        " m.content + '</s>' }}{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ " + header + " }}{% endif %}"
    )
    messages = [
        {"role": "user", "content": "q <think>"},
        {"role": "assistant", "content": "yes", "reasoning_content": "hm, so"},
    ] * 2
    tokenizer, notes = load_tokenizer(chat_folder(tmp_path / "f", template)), Notes()
    conversation = read_conversation({"messages": messages}, "row")
    assert conversation is not None
    ids, parts = Renderer(tokenizer, None).tokens(conversation, None, notes)
    assert tokenizer.decode(ids[parts & KIND == THOUGHT].tolist()) == "hm, so</think>" * 2
    assert tokenizer.decode(ids[parts & KIND == ANSWER].tolist()).count("yes") == 2 and not list(notes)
