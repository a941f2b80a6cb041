"""Conversations to train on, from Python's standard library or from a JSON-lines file.

A conversation is a list of (role, content). Training scores the assistant's content.
"""

import ast
import json
import os
import random
import sysconfig
import textwrap
from pathlib import Path

from ..errors import UserError

ROLES = ("system", "user", "assistant")
PER_FILE = 2  # functions of a file: a short run sees several modules
SHORTEST = 16  # lines: shorter functions would fill a batch with padding
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}


def standard_library(seed=0):
    """Yield (user, assistant) conversations: a function's signature and docstring, then its body.

    The functions come from the standard library of the running Python. They are documented and have
    more than SHORTEST lines. At most PER_FILE of a file are taken. `seed` sets the order.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(_sources(root))
    if not files:
        raise UserError(f"no Python sources in the standard library {root}; use --data FILE.jsonl")
    order = random.Random(seed)
    order.shuffle(files)
    for path in files:
        try:
            source = path.read_text(encoding="utf-8")
            functions = [
                pair for pair in functions_of(source) if "".join(pair).count("\n") > SHORTEST
            ]
        except (SyntaxError, UnicodeDecodeError):  # some files are malformed on purpose
            continue
        few = order.sample(functions, min(PER_FILE, len(functions)))
        yield from ([("user", head), ("assistant", body)] for head, body in few)


def _sources(root):
    """Yield the paths of Python files below `root`, but not in the folders LEFT_OUT."""
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in LEFT_OUT]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def functions_of(source):
    """Yield (signature and docstring, body) of each documented function in Python source text."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is None or len(node.body) < 2:
            continue
        split = node.body[0].end_lineno  # line at which the docstring ends, from 1
        if node.body[1].lineno <= split:
            continue
        # Dedent both together, so that the body stays indented below the signature.
        text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).split("\n")
        head = split - node.lineno + 1
        yield "\n".join(text[:head]) + "\n", "\n".join(text[head:])


def json_lines(path):
    """The conversations of a file with one JSON object per line. A UserError names a bad line.

    A line is {"prompt": text, "response": text} or {"messages": [{"role", "content"}, ...]}. Other
    keys are ignored. Blank lines are skipped.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read --data {path}: {error.strerror}") from error
    conversations = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                conversations.append(_conversation(line))
            except ValueError as error:
                raise UserError(f"{path}:{number}: {error}") from error
    if not conversations:
        raise UserError(f"{path}: expected one JSON object a line, got an empty file")
    return conversations


def _conversation(line):
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text, got byte {error.start} undecodable") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"expected a JSON object, got invalid JSON at column {error.colno}: {error.msg}"
        ) from error
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    if "messages" in record:
        return _messages(record["messages"])
    if not {"prompt", "response"} <= record.keys():
        raise ValueError(
            f'expected the keys "prompt" and "response", or "messages", got {sorted(record)}'
        )
    for key in ("prompt", "response"):
        if not isinstance(record[key], str):
            raise ValueError(f'expected "{key}" to be text, got {type(record[key]).__name__}')
    if not record["response"]:
        raise ValueError('expected "response" to be text to train on, got an empty string')
    return [("user", record["prompt"]), ("assistant", record["response"])]


def _messages(messages):
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'expected "messages" to be a list with entries, got {messages!r:.60}')
    turns = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise ValueError(f"expected {where} to be an object, got {type(message).__name__}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"expected {where} to have a role of {', '.join(ROLES)}, got {role!r}")
        if not isinstance(content, str):
            raise ValueError(
                f"expected {where} to have text as content, got {type(content).__name__}"
            )
        turns.append((role, content))
    if not any(role == "assistant" and content for role, content in turns):
        raise ValueError("expected an assistant message with text to train on, got none")
    return turns
