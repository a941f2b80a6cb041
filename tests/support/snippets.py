"""The Python snippets of the README and docs/, as printed."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"```(\w*)")
MARK = re.compile(r"<!-- example: ([\w ]+) -->")


@dataclass(frozen=True)
class Snippet:
    page: str
    name: str
    line: int  # number of the first line of code
    code: str

    def run(self, names):
        """Execute the code with these global names; new names are added to them."""
        lines = "\n" * (self.line - 1) + self.code
        exec(compile(lines, str(ROOT / self.page), "exec"), names)
        return names


def pages():
    """Every page with snippets. docs/api.md has none: its code is the signatures."""
    found = sorted((ROOT / "docs").glob("*.md"))
    return ["README.md", *(f"docs/{path.name}" for path in found if path.name != "api.md")]


def of(page):
    """The snippets of a page, in order. Raises ValueError for a Python fence without a name."""
    found, name, block, language = [], None, None, ""
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if block is None and (fence := FENCE.fullmatch(line)):
            block, language, first = [], fence[1], number + 1
        elif block is not None and line == "```":
            if language == "python":
                if name is None:
                    raise ValueError(
                        f"{page}:{first}: expected a line <!-- example: NAME --> above the snippet"
                    )
                found.append(Snippet(page, name, first, "\n".join(block)))
            block, name = None, None
        elif block is not None:
            block.append(line)
        elif mark := MARK.fullmatch(line):
            name = mark[1]
    return found


def everything():
    return {(snippet.page, snippet.name): snippet for page in pages() for snippet in of(page)}
