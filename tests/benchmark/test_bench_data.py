"""The demo's data: which tokens are scored, and the errors for a bad file."""

import ast
import itertools
import json

import pytest
import torch

from bench.errors import UserError
from bench.sft import data
from bench.sft.tokenizer import make_batches

BAD_LINES = {
    "{": "expected a JSON object, got invalid JSON at column 2",
    '["a"]': "expected a JSON object, got list",
    '{"prompt": "a"}': 'expected the keys "prompt" and "response", or "messages", got [\'prompt\']',
    '{"prompt": "a", "response": 3}': 'expected "response" to be text, got int',
    '{"prompt": "a", "response": ""}': 'expected "response" to be text to train on',
    '{"messages": []}': 'expected "messages" to be a list with entries, got []',
    '{"messages": ["hi"]}': "expected messages[0] to be an object, got str",
    '{"messages": [{"role": "bot", "content": ""}]}': (
        "expected messages[0] to have a role of system, user, assistant, got 'bot'"
    ),
    '{"messages": [{"role": "user"}]}': "expected messages[0] to have text as content, got None",
    '{"messages": [{"role": "user", "content": "a"}]}': "expected an assistant message with text",
}


@pytest.fixture(scope="module")
def tekken():
    from bench.sft.tokenizer import Tekken

    return Tekken()


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        data.json_lines(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert BAD_LINES[line] in str(caught.value)


def test_bytes_that_are_not_text_are_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "\xff", "response": "b"}')
    with pytest.raises(UserError, match=r"data.jsonl:1: expected UTF-8 text, got byte 12"):
        data.json_lines(path)


def test_no_file_and_nothing_in_it(tmp_path):
    with pytest.raises(UserError, match="cannot read --data .*missing.jsonl: No such file"):
        data.json_lines(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="expected one JSON object a line, got an empty file"):
        data.json_lines(tmp_path / "empty.jsonl")


def test_both_forms_of_a_line(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]
    lines = [{"prompt": "p", "response": "r", "id": 7}, {"messages": messages}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert data.json_lines(path) == [
        [("user", "p"), ("assistant", "r")],
        [("system", "s"), ("assistant", "a")],
    ]


def test_functions_split_after_the_docstring():
    source = '''
class A:
    def f(self, x):
        """Doc
        string."""
        if x:
            return 1

    def no_doc(self):
        return 2

    def only_doc(self):
        """Doc."""

    def one_line(self): "Doc."; return 3

async def g():
    """Doc."""
    pass
'''
    assert sorted(data.functions_of(source)) == [
        ('async def g():\n    """Doc."""\n', "    pass"),
        (
            'def f(self, x):\n    """Doc\n    string."""\n',
            "    if x:\n        return 1",
        ),
    ]


def test_the_standard_library_gives_whole_functions():
    conversations = list(itertools.islice(data.standard_library(seed=3), 20))
    assert len(conversations) == 20
    for (asked, head), (answers, body) in conversations:
        assert (asked, answers) == ("user", "assistant")
        (function,) = ast.parse(head + body).body
        assert ast.get_docstring(function, clean=False) is not None
        assert len(ast.parse(head).body[0].body) == 1  # the prompt has only the docstring
    again = list(itertools.islice(data.standard_library(seed=3), 20))
    assert conversations == again
    assert conversations != list(itertools.islice(data.standard_library(seed=4), 20))


def test_exactly_the_assistants_tokens_are_scored(tekken):
    conversation = [
        ("system", "Be brief."),
        ("user", "What is 2 + 2?"),
        ("assistant", "It is 4."),
        ("user", "Sure?"),
        ("assistant", ""),
        ("user", "Well?"),
        ("assistant", "Yes, 4."),
    ]
    ids, scored = tekken.encode(conversation)
    assert len(ids) == len(scored) and set(scored) == {0, 1}
    inner = tekken._tekken
    pieces, run = [], []
    for token, counts in zip([*ids, 0], [*scored, 0], strict=True):
        if counts:
            run.append(token)
        elif run:
            pieces.append(run)
            run = []
    answers = [text for role, text in conversation if role == "assistant" and text]
    assert [inner.decode(p[:-1]) for p in pieces] == answers
    assert all(p[-1] == inner.eos_id for p in pieces)
    assert ids[0] == inner.bos_id and ids.count(inner.eos_id) == 3  # the empty turn ends too
    assert tekken.vocab == 131072


def test_batches_cut_pad_and_repeat(tekken):
    short = [("user", "a"), ("assistant", "b")]
    long = [("user", "a"), ("assistant", "b " * 100)]
    late = [("user", "a " * 100), ("assistant", "b")]
    batches, used, left_out = make_batches([late, short, long], tekken, 3, 2, 16)
    assert (len(batches), used, left_out) == (3, 2, 1)
    ids, scored = tekken.encode(short)
    for batch in batches:
        assert batch.tokens.shape == batch.loss_mask.shape == (2, 16)
        assert batch.used == len(ids) + 16
        rows = [row for row in range(2) if batch.tokens[row, -1] == tekken.pad]
        assert len(rows) == 1
        row = rows[0]
        assert batch.tokens[row].tolist() == ids + [tekken.pad] * (16 - len(ids))
        assert batch.loss_mask[row].tolist() == scored + [0] * (16 - len(ids))
        assert batch.scored == 2 + int(batch.loss_mask[1 - row].sum())
        assert torch.equal(batch.for_megatron()["position_ids"][1], torch.arange(16))


def test_nothing_scored_before_the_cut_is_an_error(tekken):
    late = [("user", "a " * 100), ("assistant", "b")]
    with pytest.raises(UserError, match="raise --seq-length"):
        make_batches([late], tekken, 1, 1, 16)
