"""Stand-ins for trainers that are not installed: modules with their names and signatures."""

import sys
import types
from contextlib import contextmanager


def fake_modules(contents):
    """Install fakes of these modules and of their packages, with these attributes."""
    for name, attributes in contents.items():
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            path = ".".join(parts[:length])
            if path not in sys.modules:
                sys.modules[path] = types.ModuleType(path)
                if length > 1:
                    parent = sys.modules[".".join(parts[: length - 1])]
                    setattr(parent, parts[length - 1], sys.modules[path])
        vars(sys.modules[name]).update(attributes)


@contextmanager
def faked(contents):
    """`fake_modules`, undone at the end. Refuses a package that is installed and imported."""
    before = set(sys.modules)
    assert not {name.split(".")[0] for name in contents} & before
    fake_modules(contents)
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] in {fake.split(".")[0] for fake in contents}:
                del sys.modules[name]
