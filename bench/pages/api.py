"""docs/api.md: the docstrings of the public names, read from the source without an import."""

import ast
import re
import textwrap

NAMES = {  # heading -> (module, names)
    "PyTorch": (
        "fused_sft_loss",
        (
            "sft_loss",
            "linear_sft_loss",
            "SFTLoss",
            "token_logprobs",
            "token_metrics",
            "TokenMetrics",
            "shift_targets",
        ),
    ),
    "Hugging Face": ("fused_sft_loss.hf", ("compute_loss_func",)),
    "Megatron": (
        "fused_sft_loss.megatron",
        (
            "sft_loss_func",
            "make_forward_step",
            "fused_cross_entropy",
            "vocab_parallel_cross_entropy",
            "ResponseOnlyHead",
            "LinearHead",
            "shift_packed_targets",
        ),
    ),
}
SECTIONS = ("Args", "Returns", "Raises", "Yields")
WIDTH = 88  # of a signature on one line
ENTRY = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*):(?: (.*))?$")


def blocks(root):
    """{"api": the Markdown of all public names}."""
    found = definitions(root / "fused_sft_loss")
    parts = []
    for heading, (module, names) in NAMES.items():
        parts.append(f"## {heading}\n\nImport these from `{module}`.")
        parts += [entry(name, *found[name]) for name in names]
    return {"api": "\n\n".join(parts)}


def definitions(package):
    """{name: (node, lines of its file)} of all functions and classes in the package."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))]
    trees = [ast.parse(source) for source in sources]
    spelled_out = SpelledOut(trees)
    found = {}
    for tree, source in zip(trees, sources, strict=True):
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.setdefault(node.name, (spelled_out.visit(node), source.splitlines()))
    return found


class SpelledOut(ast.NodeTransformer):
    """Replaces constants, type aliases and the defaults of fields by their values for the page."""

    def __init__(self, trees):
        self.values = {
            ast.unparse(node.targets[0]): node.value
            for tree in trees
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.UnaryOp | ast.Subscript | ast.BinOp)
        }
        self.values |= {
            f"{node.name}.{field.target.id}": self.visit(field.value)
            for tree in trees
            for node in tree.body
            if isinstance(node, ast.ClassDef)
            for field in node.body
            if isinstance(field, ast.AnnAssign) and field.value is not None
        }

    def visit_Name(self, node):
        return self.values.get(node.id, node) if isinstance(node.ctx, ast.Load) else node

    def visit_Attribute(self, node):
        return self.values.get(ast.unparse(node)) or self.generic_visit(node)


def entry(name, node, lines):
    """The Markdown of one public name: heading, signature, docstring, and methods or fields."""
    parts = [f"### `{name}`"]
    if isinstance(node, ast.ClassDef):
        methods = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
        if "__init__" in methods:
            parts.append(signature(f"class {name}", methods["__init__"], skip=1))
        parts += [described(node), fields(node, lines)]
        public = (part for part in methods.values() if part.name == "forward")
        for part in public:
            parts += [signature(f"{name}.{part.name}", part, skip=1), described(part)]
    else:
        parts += [signature(name, node), described(node)]
    return "\n\n".join(part for part in parts if part)


def signature(name, node, skip=0):
    """The call on one line if it fits, else with one argument per line."""
    parts = arguments(node.args)[skip:]
    result = _result(node)
    line = f"{name}({', '.join(parts)}){result}"
    if len(line) > WIDTH:
        each = ",\n    ".join(parts)
        line = f"{name}(\n    {each},\n){result}"
    return f"```python\n{line}\n```"


def _result(node):
    """The annotation of the result, as a caller sees it."""
    if node.returns is None or node.name == "__init__":
        return ""
    text = _source(node.returns)
    if any(ast.unparse(decorator) == "contextmanager" for decorator in node.decorator_list):
        text = text.replace("Iterator", "ContextManager")
    return f" -> {text}"


def arguments(args):
    """All arguments as a signature writes them, including `*`."""
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
    parts = [_argument(*pair) for pair in zip(plain, defaults, strict=True)]
    if args.vararg:
        parts.append(f"*{args.vararg.arg}")
    elif args.kwonlyargs:
        parts.append("*")
    parts += [_argument(*pair) for pair in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return [*parts, f"**{args.kwarg.arg}"] if args.kwarg else parts


def _argument(argument, default):
    typed = argument.annotation is not None
    text = argument.arg + (f": {_source(argument.annotation)}" if typed else "")
    if default is None:
        return text
    return f"{text}{' = ' if typed else '='}{_source(default)}"


def _source(node):
    """The source of a node, in the style of ruff. A quoted annotation loses its quotes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
        return node.value
    return ast.unparse(node).replace("'", '"')


def described(node):
    """A docstring as Markdown. A section ends at the first line without indentation."""
    text = ast.get_docstring(node)
    if not text:
        return ""
    parts = [["", []]]
    for line in text.splitlines():
        if line.endswith(":") and line[:-1] in SECTIONS:
            parts.append([line[:-1], []])
            continue
        if parts[-1][0] and line and not line.startswith(" "):
            parts.append(["", []])
        parts[-1][1].append(line)
    out = []
    for heading, lines in parts:
        block = "\n".join(lines).strip("\n")
        out.append(
            f"**{heading}**\n\n{_entries(textwrap.dedent(block))}" if heading else _prose(block)
        )
    return "\n\n".join(out)


def _prose(text):
    """Text as Markdown paragraphs. An indented block is code."""
    out = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        if paragraph.startswith("    "):
            out.append(f"```python\n{textwrap.dedent(paragraph)}\n```")
        else:
            out.append(_words(paragraph.replace("::", ":")))
    return "\n\n".join(out)


def _entries(text):
    """Make list items of `name: text` at the left margin, and append their indented lines."""
    out = []
    for line in text.splitlines():
        match = ENTRY.match(line)
        if match:
            names = ", ".join(f"`{name}`" for name in match[1].split(", "))
            out.append(f"- {names}: {match[2] or ''}".rstrip())
        elif line.strip().startswith("- "):
            out.append(line)
        elif line.startswith("    ") and out:
            out[-1] += " " + line.strip()
        elif out and out[-1] and not out[-1].startswith("-") and line.strip():
            out[-1] += " " + line.strip()
        else:
            out.append(line)
    return _words("\n".join(out))


def _words(text):
    """Turn Sphinx roles and double backticks into Markdown."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    return text.replace("``", "`")


def fields(node, lines):
    """The fields of a NamedTuple, with their comments."""
    rows = []
    for part in node.body:
        if isinstance(part, ast.AnnAssign):
            comment = lines[part.lineno - 1].partition("#")[2].strip()
            rows.append(f"- `{part.target.id}`: {comment}")
    return "\n".join(rows)
