"""The YAML file of `ifprune train --config`: options by name, which the command line overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import typer


def read_config(context: typer.Context, value: Optional[Path]) -> Optional[Path]:
    """Take an option's value from the file where the command line gives none.

    Raises:
        IfpruneError: if the file cannot be read, or names an option that does not exist.
    """
    if value is None:
        return None
    import yaml  # type: ignore[import-untyped]

    from ifprune_mlx import IfpruneError

    try:
        found = yaml.safe_load(value.read_text(encoding="utf-8"))
    except OSError as exc:
        raise IfpruneError(f"{value}: cannot be read ({exc.strerror or exc})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise IfpruneError(f"{value}: is no YAML ({' '.join(str(exc).split())})") from None
    if not isinstance(found, dict):
        raise IfpruneError(f"{value}: must hold options by name, such as learning_rate: 5e-4")
    known = {parameter.name: parameter for parameter in context.command.params}
    defaults: dict[str, Any] = {}
    for key, given in found.items():
        name = str(key).replace("-", "_")
        if name not in known or name == "config":
            raise IfpruneError(f"{value}: {key} is no option of ifprune train; see --help for those that are")
        defaults[name] = _value(known[name], given)
    context.default_map = {**(context.default_map or {}), **defaults}
    return value


def _value(option: Any, given: Any) -> Any:
    """As the command line would give it: domains and weights may be written as a mapping, lists as lists."""
    if isinstance(given, dict):
        return [f"{key}={item}" for key, item in given.items()]
    if option.multiple and not isinstance(given, list):
        return [str(given)]
    if isinstance(given, list):
        return [str(item) for item in given] if option.multiple else ",".join(str(item) for item in given)
    return given if isinstance(given, bool) or given is None else str(given)
