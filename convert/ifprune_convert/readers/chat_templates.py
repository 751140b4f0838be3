"""The chat templates of a source, wherever they lie, in the one place where a checkpoint has them.

A checkpoint keeps in tokenizer_config.json those that are used: the default, and one for conversations with tools.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ifprune_mlx.errors import SourceError, reason_of
from ifprune_mlx.tokenizer import DEFAULT, TOOL_USE

MORE_TEMPLATES = "additional_chat_templates"
_SETTINGS, _JINJA, _JSON = "tokenizer_config.json", "chat_template.jinja", "chat_template.json"
_LONGEST = 2_000_000


def gather_templates(source: Path, folder: Path) -> None:
    """Put all of a source folder's chat templates into tokenizer_config.json in `folder`, if it has not just one.

    Where one has two texts, transformers' order counts: chat_template.jinja and additional_chat_templates/*.jinja come
    before tokenizer_config.json. chat_template.json, which is a processor's, counts where there is no other.

    Raises:
        SourceError: if one of the files cannot be read.
    """
    settings = _read_json(source / _SETTINGS)
    more = {file.stem: _read(file) for file in sorted((source / MORE_TEMPLATES).glob("*.jinja")) if file.is_file()}
    found = _named(settings.get("chat_template"), source / _SETTINGS) | more
    copied = isinstance(settings.get("chat_template"), str)  # as it is, and found by transformers
    if (source / _JINJA).is_file():
        found[DEFAULT], copied = _read(source / _JINJA), True
    if not found and (source / _JSON).is_file():
        found = _named(_read_json(source / _JSON).get("chat_template"), source / _JSON)
    if found and not (copied and set(found) == {DEFAULT}):
        put_templates(found, folder)


def put_templates(templates: dict[str, str], folder: Path) -> None:
    """Write chat templates by name into tokenizer_config.json, in place of all others in the folder."""
    for name in (_JINJA, _JSON):
        (folder / name).unlink(missing_ok=True)
    settings = _read_json(folder / _SETTINGS)
    every = [{"name": name, "template": text} for name, text in templates.items()]
    settings["chat_template"] = templates[DEFAULT] if set(templates) == {DEFAULT} else every
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def keep_used_templates(folder: Path) -> list[str]:
    """Drop the chat templates that are not used; returns their names. Without a default, one takes its place.

    Raises:
        SourceError: if tokenizer_config.json cannot be read.
    """
    templates = _named(_read_json(folder / _SETTINGS).get("chat_template"), folder / _SETTINGS)
    if not templates or set(templates) == {DEFAULT}:
        return []
    if DEFAULT not in templates:
        templates[DEFAULT] = templates.get(TOOL_USE) or next(iter(templates.values()))
    put_templates({name: templates[name] for name in (DEFAULT, TOOL_USE) if name in templates}, folder)
    return sorted(templates.keys() - {DEFAULT, TOOL_USE})


def _named(value: Any, file: Path) -> dict[str, str]:
    """Templates by name, of one text, a list of named ones, or an object of them."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if value is None or isinstance(value, str):
        value = {} if value is None else {DEFAULT: value}
    if not isinstance(value, dict) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise SourceError(f"{file}: its chat_template is neither a text nor a list of named ones; download it again")
    return dict(value)


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > _LONGEST:
            raise SourceError(f"{file}: has {file.stat().st_size} bytes, too many for a chat template; remove it")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise SourceError(f"{file}: cannot be read ({reason_of(exc)}); download it again") from exc


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_bytes())
    except OSError as exc:
        raise SourceError(f"{file}: cannot be read ({reason_of(exc)})") from exc
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise SourceError(f"{file}: is not a JSON object; copy or download it again")
    return value
