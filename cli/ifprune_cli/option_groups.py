"""Option groups: a command takes dataclasses of options, and its `--help` shows the options under headings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

import typer
import typer.core

from .logs import VerboseOption, be_verbose


def with_groups(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command as typer reads it: every parameter that is a dataclass is replaced by the dataclass's fields.

    Every command also has `--verbose`.

    The fields are annotated with `typer.Option`, as parameters are. The command itself receives the dataclasses.
    """
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        group = parameter.annotation
        if not (isinstance(group, type) and is_dataclass(group)):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = group
        hints = get_type_hints(group, include_extras=True)
        for field in fields(group):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
                )
            )

    parameters.append(
        inspect.Parameter("verbose", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=VerboseOption)
    )

    def parsed(**values: Any) -> Any:
        if values.pop("verbose"):
            be_verbose()
        given = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        return command(**given, **values)

    parsed.__name__, parsed.__doc__ = command.__name__, command.__doc__
    parsed.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    parsed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return parsed


def panels(command: Any, context: typer.Context) -> dict[str, list[tuple[str, str]]]:
    """The help records (names, text) of a command's options, by the heading that they stand under."""
    found: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:  # a hidden option has none
            usual = "Options" if parameter.param_type_name == "option" else "Arguments"
            found.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(record)
    return {name: found[name] for name in dict.fromkeys(("Arguments", "Options", *found)) if name in found}


def _write_examples(command: Any, formatter: Any) -> None:
    """The lines of a command's `epilog`, to be copied, so as they are."""
    if command.epilog:
        with formatter.section("Examples"):
            for line in command.epilog.splitlines():
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Commands(typer.core.TyperGroup):
    """The commands, whose plain `--help` has a section for every `rich_help_panel`, and ends with examples."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples."""
        _write_examples(self, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the sections."""
        found: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            found.setdefault(command.rich_help_panel, []).append((name, command.get_short_help_str(limit=60)))
        for heading, records in found.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class Command(typer.core.TyperCommand):
    """A command whose plain `--help` has a section for every `rich_help_panel`, and ends with examples."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples."""
        _write_examples(self, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections."""
        for heading, records in panels(self, ctx).items():
            with formatter.section(heading):
                formatter.write_dl(records)
