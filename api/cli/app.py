"""What the commands share: the typer application, the consoles, common option types and parsers of option texts."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fewstep import __version__

OUT = Console(highlight=False)
ERR = Console(stderr=True, highlight=False)


def folder_name(text: str | Path) -> Path:
    """Parses the name of a folder. An empty one, as of a shell's unset variable, would be the current folder."""
    if not str(text):
        raise typer.BadParameter("the name is empty")
    return Path(text)


def folder(*names: str, help: str) -> Any:
    """The option of a folder, or of a file or folder, which `--help` shows as it shows a file's."""
    return typer.Option(*names, parser=folder_name, metavar="<path>", help=help)


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")]
AnyModel = Annotated[
    str,
    typer.Option(
        help="digits, digits-exact, ring, gaussian, or FILE.py:FUNCTION, which returns a fewstep.Denoiser, or a pair "
        "of one and the conditions that samples take in turn."
    ),
]
OwnShape = Annotated[
    str | None, typer.Option("--shape", help="Of one sample of FILE.py:FUNCTION, without the batch: 3x32x32, or 2.")
]


def bars(*, quiet: bool = False) -> Progress:
    """Progress bars on stderr, with the time left; they vanish at the end. No bars without a terminal, or if quiet."""
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
    disable = quiet or not ERR.is_terminal
    return Progress(TextColumn("{task.description}"), *columns, console=ERR, transient=True, disable=disable)


app = typer.Typer(
    help="Sample diffusion and flow models in few steps, and measure the error and the cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fewstep {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Sample diffusion and flow models in few steps, and measure the error and the cost."""


def check_count(flag: str, value: int, low: int = 1, high: int = 1_000_000) -> None:
    """Raises ValueError for a number out of range."""
    if not low <= value <= high:
        raise ValueError(f"{flag} must be at least {low} and at most {high}, got {value}")


def parse_options(pairs: list[str] | None) -> dict[str, Any]:
    """The values of `--option name=value` as numbers, booleans, None or text.

    Raises ValueError for a pair without a name or an equals sign.
    """
    options: dict[str, bool | int | float | str | None] = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"--option {pair!r}: write it as name=value, for example --option eta=1.0")
        options[name] = parse_value(text)
    return options


def parse_value(text: str) -> bool | int | float | str | None:
    """An int, a float, true, false or none (in any case) where the text is one, else the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_list(text: str, flag: str) -> list[str]:
    """The names of a comma-separated list. Raises ValueError for an empty one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"{flag} is empty: give a comma-separated list")
    return names


def parse_sample_shape(text: str | None) -> tuple[int, ...] | None:
    """(3, 32, 32) from "3x32x32". Raises ValueError for anything else."""
    if text is None:
        return None
    sizes = text.lower().split("x")
    if not all(size.isascii() and size.isdigit() and len(size) < 10 and int(size) >= 1 for size in sizes):
        raise ValueError(f"--shape {text[:40]!r}: write the sizes of one sample as 3x32x32, or 2")
    return tuple(map(int, sizes))


def command_line(*words: str, **options: object) -> str:
    """A command to copy: the options that are not None, with the names of flags."""
    flags = (
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in options.items() if value is not None
    )
    return " ".join([*words, *flags])


def parse_budgets(text: str) -> list[int]:
    """The positive whole numbers of a comma-separated --nfe. Raises ValueError for anything else."""
    counts = []
    for name in parse_list(text, "--nfe"):
        if not (name.isascii() and name.isdigit() and len(name) < 20 and int(name) >= 1):
            raise ValueError(f"--nfe: {name[:40]!r} is not a whole number >= 1")
        check_count("--nfe", int(name), high=10_000)
        counts.append(int(name))
    return counts
