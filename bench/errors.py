"""Errors that a user of `python -m bench` can fix: shown in one line, without a traceback."""

import importlib
import importlib.util
from pathlib import Path


class UserError(Exception):
    """The message says what was expected, what came, and the fix."""


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
    """Like `need`, but without the import: for slow libraries that only other processes use."""
    try:
        found = importlib.util.find_spec(module)
    except ImportError:  # a parent package is missing
        found = None
    if found is None:
        raise UserError(
            f"{package} is needed here and is not installed; install it with: "
            'pip install "fused_sft_loss[bench]"'
        )


def writable_file(path):
    """Make the folder of `path`, check that the file can be written, and return it as a Path.

    Call it before any long work.
    """
    path = Path(path)
    writable_folder(path.parent)
    try:
        path.open("ab").close()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another path") from error
    return path


def writable_folder(path):
    """Make the folder `path`, check that files can be made in it, and return it as a Path.

    Call it before any long work.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{path.name}.writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write in {path}: {error.strerror}; choose another path") from error
    return path
