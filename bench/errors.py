"""What a user of `python -m bench` can put right: one line, no traceback."""

import importlib
import importlib.util
from pathlib import Path


class UserError(Exception):
    """The message names what was expected, what came and the fix."""


def need(module, package=None):
    """Import an optional library, or say what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.split(".")[0]
        raise UserError(
            f"{package} is needed here and cannot be imported ({error}); install it with: "
            'pip install "fused_sft_loss[bench]"'
        ) from error


def need_installed(module, package):
    """As `need`, without importing: for what is slow to import and used by other processes."""
    try:
        found = importlib.util.find_spec(module)
    except ImportError:  # of a parent package
        found = None
    if found is None:
        raise UserError(
            f"{package} is needed here and is not installed; install it with: "
            'pip install "fused_sft_loss[bench]"'
        )


def writable_file(path):
    """`path` as a Path that can be written, its folder made; checked before any long work."""
    path = Path(path)
    writable_folder(path.parent)
    try:
        path.open("ab").close()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another path") from error
    return path


def writable_folder(path):
    """`path` as an existing Path in which files can be made; checked before any long work."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{path.name}.writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write in {path}: {error.strerror}; choose another path") from error
    return path
