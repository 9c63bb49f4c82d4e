"""How every command is typed and explained: groups of options, examples, variables, completion.

typer's plain help knows neither, and its rich help draws boxes. What is typed wrong is a
UsageError, one line like every other mistake.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import Annotated, Any, ClassVar

import typer
from typer import completion as shells
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption
from typer.exceptions import TyperException
from typer.models import CommandFunctionType

from quant import interrupt
from quant.errors import QuantError, UsageError
from quant.interrupt import Interrupted

NAME = "quantserve"
SHELLS = ("bash", "zsh", "fish")
COMPLETE = f"_{NAME.upper()}_COMPLETE"  # set by the shell's script where it asks
# What stands for a value, by the type of one.
_VALUES = {"int": "N", "float": "NUMBER", "str": "TEXT", "Path": "PATH"}
_WIDEST_NAME = 30  # columns; the text of a longer one begins in the next line


class Asked:
    """Of this process: what holds for every command."""

    traceback: ClassVar[bool] = False  # of an error that nobody foresaw
    json: ClassVar[bool] = False


class _Page:
    """The parts of a help page that a command and a group of commands share.

    Groups are the options' `rich_help_panel`; examples are the lines of `epilog`.
    """

    epilog: str | None
    get_params: Any

    def variable(self, parameter: Any) -> str:
        """The environment variable that says the same as a parameter, or an empty string."""
        return str(parameter.envvar or "")

    def variables(self) -> list[tuple[str, str]]:
        """What else is read from the environment: names, and what they say."""
        return []

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What has to be given, in full, before what can be."""
        given = self.get_params(ctx)
        arguments = [each for each in given if isinstance(each, TyperArgument)]
        needed = [each.display_name_raw for each in arguments if each.required]
        needed += [_spelled(each) for each in given if _is_option(each) and each.required]
        others = [f"[{each.display_name_raw}]" for each in arguments if not each.required]
        return [*needed, "[OPTIONS]", *others]

    def format_parameters(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for each in self.get_params(ctx):
            if each.hidden:
                continue
            if not _is_option(each):
                sections.setdefault("Arguments", []).append((each.display_name_raw, each.help))
                continue
            row = (_spelled(each), _explained(each, self.variable(each)))
            sections.setdefault(each.rich_help_panel or "Options", []).append(row)
        sections["Variables"] = self.variables()
        for title, rows in sections.items():
            _list(formatter, title, rows)

    def format_epilog(self, _ctx: Any, formatter: Any) -> None:
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.splitlines():
                    formatter.write(f"{' ' * formatter.current_indent}{line}\n")


class Command(_Page, TyperCommand):
    """A command with such a page."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        self.format_parameters(ctx, formatter)


class Computing(Command):
    """One that opens models and computes with them."""

    def variables(self) -> list[tuple[str, str]]:
        return [
            ("OMP_NUM_THREADS", "threads of the work on CPU [every core]"),
            (
                "HF_TOKEN, HF_HUB_OFFLINE, HF_HOME",
                "how models come from the hub, as for its own tools",
            ),
            ("NO_COLOR", "no colours in a terminal"),
        ]


class Commands(_Page, TyperGroup):
    """A group with such a page. Alone it shows it, with exit status 0.

    The outermost takes `--debug` in front of a command's name and behind it.
    """

    def main(self, *args: Any, standalone_mode: bool = True, **more: Any) -> Any:
        shells.completion_init()  # type: ignore[attr-defined]
        more |= {"complete_var": COMPLETE, "standalone_mode": False}
        try:
            status = super().main(*args, **more)
        except TyperException as fault:
            page = getattr(fault, "ctx", None)
            where = f"; `{page.command_path} --help` shows what it takes" if page else ""
            said = " ".join(fault.format_message().split()).rstrip(".")
            raise UsageError(f"{said}{where}") from fault
        return sys.exit(status) if standalone_mode else status

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [*super().collect_usage_pieces(ctx), self.subcommand_metavar]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        named = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        rows = [(name, each.get_short_help_str(1000)) for name, each in named if not each.hidden]
        _list(formatter, "Commands", rows)
        self.format_parameters(ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            ctx.exit()
        if ctx.parent is not None:
            return super().parse_args(ctx, args)
        ours = args[: args.index("--")] if "--" in args else args
        Asked.json = "--json" in ours
        interrupt.tell_programs(Asked.json)
        others = [word for word in ours if word != "--debug"]
        asked = ["--debug"] if len(others) < len(ours) else []
        return super().parse_args(ctx, [*asked, *others, *args[len(ours) :]])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as fault:
            foreseen = QuantError | Interrupted | TyperException | typer.Exit
            if ctx.parent is None and not isinstance(fault, foreseen):
                fault.add_note(f"in `{ctx.command_path} {ctx.invoked_subcommand}`")
            raise


class App(typer.Typer):
    """Commands of the house: `command` and groups have such pages, and nothing is coloured."""

    def __init__(self, **given: Any) -> None:
        super().__init__(
            cls=Commands,
            add_completion=False,  # `completion` prints the script, and changes no file
            rich_markup_mode=None,
            pretty_exceptions_enable=False,
            **given,
        )

    def command(
        self, name: str | None = None, *, cls: type[TyperCommand] | None = Command, **given: Any
    ) -> Callable[[CommandFunctionType], CommandFunctionType]:
        return super().command(name, cls=cls, **given)


def _version(asked: bool) -> None:  # noqa: FBT001 # typer calls it
    if asked:
        typer.echo(f"{NAME} {version(NAME)}")
        raise typer.Exit


def first(
    *,
    debug: Annotated[
        bool, typer.Option("--debug", help="show a traceback of an error that nobody foresaw")
    ] = False,
    _asked: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="print the version and leave"
        ),
    ] = False,
) -> None:
    """What stands before every command."""
    Asked.traceback = debug


def completion(
    shell: Annotated[str, typer.Argument(metavar="SHELL", help=f"one of {', '.join(SHELLS)}")],
) -> None:
    """Print a script that completes commands and options in a shell, for its start-up file."""
    if shell not in SHELLS:
        raise UsageError(f"shell {shell!r} is not known; take one of {', '.join(SHELLS)}")
    script = shells.get_completion_script  # type: ignore[attr-defined]
    typer.echo(script(prog_name=NAME, complete_var=COMPLETE, shell=shell))


def _is_option(parameter: Any) -> bool:
    return isinstance(parameter, TyperOption)


def _spelled(option: Any) -> str:
    """As it is typed; of two opposites the one that changes something."""
    names = list(option.opts)
    if option.is_flag:
        names += option.secondary_opts if option.default is None else []
        return " / ".join(names)
    return f"{', '.join(names)} {_value(option)}"


def _value(option: Any) -> str:
    if option.metavar:
        return str(option.metavar)
    kind = option.type_descriptor
    if kind.is_choice:
        return "|".join(map(str, kind.choices))
    return _VALUES.get(option.bare_type().removeprefix("list[").rstrip("]"), "VALUE")


def _explained(option: Any, variable: str) -> str:
    more = "(required)" if option.required else ""
    if not option.is_flag and option.default is not None:
        more = f"[{option.default}]"
    return " ".join(filter(None, [option.help, more, variable and f"({variable})"]))


def _list(formatter: Any, title: str, rows: Iterable[Sequence[str]]) -> None:
    if rows := list(rows):
        with formatter.section(title):
            formatter.write_dl(rows, col_max=_WIDEST_NAME)
