"""Objects of one's own by name: "mine.py:make_teacher" is what the function make_teacher of mine.py returns."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from fewstep.solvers.files import shown


def is_factory(text: str) -> bool:
    """Whether a text names a function in a Python file."""
    return ".py:" in text


def made_by(text: str, flag: str) -> Any:
    """What the named function returns.

    Raises ValueError that starts with `flag` for a name of another form, a missing file or function, or one that fails
    or returns None.
    """
    path, _, name = text.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise ValueError(f"{flag} {text!r}: write it as FILE.py:FUNCTION, for example mine.py:make_teacher")
    module = _module(Path(path), flag)
    function = getattr(module, name, None)
    if not callable(function):
        have = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_")) or "none"
        raise ValueError(f"{flag}: {shown(path)} has no function {name!r}; it has: {have}")
    try:
        with _importing_from(Path(path)):
            result = function()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{flag}: {name}() of {shown(path)} raised {type(error).__name__}: {error}") from error
    if result is None:
        raise ValueError(f"{flag}: {name}() of {shown(path)} returned None: is its return missing?")
    return result


def digest(text: str) -> str:
    """SHA-256 of the file in a factory's name."""
    return hashlib.sha256(Path(text.rpartition(":")[0]).read_bytes()).hexdigest()


@contextlib.contextmanager
def _importing_from(path: Path) -> Iterator[None]:
    """The folder of a file on the import path, as where Python runs that file."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the file's own code may have taken it off
            sys.path.remove(folder)


def _module(path: Path, flag: str) -> ModuleType:
    """The file as a module, loaded once."""
    real = path.resolve()
    if not real.is_file():
        raise ValueError(f"{flag}: there is no file {shown(path)}")
    name = f"fewstep_user_{hashlib.sha256(str(real).encode() + real.read_bytes()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, real)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up
    try:
        with _importing_from(real):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"{flag}: {shown(path)} raised {type(error).__name__}: {error}") from error
    return module
