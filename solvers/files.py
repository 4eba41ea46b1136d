"""Files: read within bounds, written whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


def shown(path: str | Path) -> str:
    """A path for an error message."""
    text = str(path) if str(path).isprintable() else ascii(str(path))
    return text if len(text) <= 500 else f"{text[:200]}...{text[-100:]}"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then rename it to `path`, so that `path` is never half written.

    A link is followed. A new file has the mode that the umask leaves, another keeps its own.

    Raises OSError with the path.
    """
    real = Path(os.path.realpath(path))
    temporary = real.with_name(f".fewstep-{uuid.uuid4().hex[:12]}{real.suffix[:16]}")
    try:
        _check_kind(real, shown(path))
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        write(temporary)
        if real.exists():
            temporary.chmod(stat.S_IMODE(real.stat().st_mode))
        os.replace(temporary, real)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), shown(path)) from None
        raise


def keep_previous(path: Path) -> None:
    """Copy a file that is about to be replaced to <stem>.previous<suffix>, if it exists."""
    if path.is_file():
        write_whole(path.with_suffix(f".previous{path.suffix}"), lambda to: shutil.copyfile(path, to))


def check_target(path: Path, suffixes: Sequence[str], name: str = "path") -> None:
    """Raise an error that starts with `name` and the path unless a file of one of these suffixes can be written there.

    ValueError for a bad name or what is no regular file, FileNotFoundError for a missing folder, OSError for a place
    that takes no bytes.
    """
    what = f"{name} {shown(path)}"
    if "\0" in str(path):
        raise ValueError(f"{what}: the name holds a null character")
    if path.suffix not in suffixes:
        raise ValueError(f"{what}: the file must end in {' or '.join(suffixes)}")
    _check_kind(path, what)
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{what}: there is no folder {shown(folder)}; create it first")
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        raise OSError(f"{what} cannot be written: {error.strerror}") from None


def make_folder(path: Path, name: str = "folder", *, parents: bool = True) -> None:
    """Make a folder, and those above it, where they are missing.

    Raises an error that starts with `name` and the path: FileNotFoundError for a missing one above it without
    `parents`, else ValueError.
    """
    what = f"{name} {shown(path)}"
    if "\0" in str(path):
        raise ValueError(f"{what}: the name holds a null character")
    try:
        path.mkdir(parents=parents, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"{what}: that is a file; name a folder") from None
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not path.parent.is_dir():
            raise FileNotFoundError(f"{what}: there is no folder {shown(path.parent)}; create it first") from None
        raise ValueError(f"{what} cannot be made: {error.strerror}") from None


@contextlib.contextmanager
def made_folder(path: Path, name: str = "folder") -> Iterator[None]:
    """`make_folder` for a block that fills it. After an error in it, or Ctrl-C, new folders that are empty go again."""
    new = [each for each in (path, *path.parents) if not os.path.exists(each)]
    try:
        make_folder(path, name)
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # what holds something stays
            for each in new:
                each.rmdir()
        raise


def read_whole(path: str | Path, limit: int) -> bytes:
    """The bytes of a regular file. Raises FileNotFoundError; ValueError for anything else, or above `limit` bytes."""
    what = shown(path)
    if "\0" in str(path):
        raise ValueError(f"{what}: the name holds a null character")
    if not _check_kind(Path(path), what):
        raise FileNotFoundError(f"there is no file {what}")
    with Path(path).open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{what} has more than {limit} bytes")
    return data


def _check_kind(path: Path, what: str) -> bool:
    """Whether the file exists. Raises ValueError unless it is a regular file, or could be."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError:
        raise
    except OSError as error:  # a name that is too long, a loop of links
        raise ValueError(f"{what}: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise ValueError(f"{what}: that is a folder; name a file in it")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{what}: that is no regular file")
    return True
