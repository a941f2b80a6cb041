"""Parse PTX text into a list of instructions."""

import re
from dataclasses import dataclass, field

from .values import size_of

_STATEMENT = re.compile(r"^(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$.]+)\[(\d*)\]")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s.*\s)?([\w$]+)(?:\[(\d+)\])?$", re.S
)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)[^{]*\{", re.S)


@dataclass(frozen=True)
class Instruction:
    name: str  # "ld"
    modifiers: tuple[str, ...]  # ("global", "v4", "b32")
    operands: tuple[str, ...]
    guard: str | None  # predicate register
    guard_is_inverted: bool
    text: str

    @property
    def kind(self) -> str:
        """The type at the end of the opcode."""
        return self.modifiers[-1] if self.modifiers else ""


@dataclass(frozen=True)
class Parameter:
    offset: int
    kind: str
    size: int  # bytes; a struct is an array of bytes


@dataclass
class Kernel:
    """A kernel of a PTX module: parameters, shared memory, instructions, labels.

    `name` may be empty if the module has one entry.
    """

    text: str
    name: str = ""
    parameters: dict[str, Parameter] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)  # name -> offset
    shared_bytes: int = 0
    dynamic: list[str] = field(default_factory=list)  # arrays in dynamic shared memory
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        text = re.sub(r"/\*.*?\*/", "", self.text, flags=re.S)
        text = re.sub(r"//[^\n]*", "", text)
        text = re.sub(r"^\s*\.(loc|file|section|b8|b16|b32|b64)\s[^\n]*$", "", text, flags=re.M)
        entries = {entry[1]: entry for entry in _ENTRY.finditer(text)}
        if not self.name:
            (self.name,) = entries
        entry = entries[self.name]
        self._read_parameters(entry[2])
        body = _up_to_closing_brace(text[entry.end() :])
        first = min(other.start() for other in entries.values())
        self._read_shared(text[:first] + body)  # the module's arrays and the kernel's
        for statement in _statements(body):
            self._read_statement(statement)

    def _read_parameters(self, text: str) -> None:
        offset = 0
        for parameter in filter(None, map(str.strip, text.split(","))):
            align, kind, name, length = _PARAMETER.match(parameter).groups()
            size = size_of(kind) * int(length or 1)
            unit = int(align or size)
            offset = -(-offset // unit) * unit
            self.parameters[name] = Parameter(offset, kind, size)
            offset += size

    def _read_shared(self, text: str) -> None:
        for align, name, length in _SHARED.findall(text):
            start = -(-self.shared_bytes // int(align)) * int(align)
            self.shared[name] = start
            if length:
                self.shared_bytes = start + int(length)
            else:
                self.dynamic.append(name)
        for name in self.dynamic:  # dynamic memory follows all static arrays
            self.shared[name] = -(-self.shared_bytes // 128) * 128

    def _read_statement(self, statement: str) -> None:
        if label := re.fullmatch(r"([\w$]+):", statement):
            self.labels[label[1]] = len(self.code)
            return
        inverted, guard, opcode, operands = _STATEMENT.match(statement).groups()
        name, *modifiers = opcode.split(".")
        self.code.append(
            Instruction(
                name,
                tuple(modifiers),
                tuple(_OPERAND.findall(operands)),
                guard,
                inverted == "!",
                statement,
            )
        )


def entries(text: str) -> list[str]:
    """Names of the kernels in a module."""
    return [entry[1] for entry in _ENTRY.finditer(text)]


def _up_to_closing_brace(text: str) -> str:
    depth = 1
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[: brace.start()]
    raise ValueError("expected a closing brace after the kernel's body, found none")


def _statements(body: str):
    """Labels (with their colon) and instructions, without directives and scopes."""
    body = re.sub(r"^\s*([\w$]+:)", r"\1;", body, flags=re.M)
    for statement in body.split(";"):
        statement = " ".join(statement.split())
        # A scope's brace begins a statement; a vector's brace follows an opcode or a comma.
        while statement[:1] in ("{", "}"):
            statement = statement[1:].lstrip()
        if statement and not statement.startswith("."):
            yield statement
