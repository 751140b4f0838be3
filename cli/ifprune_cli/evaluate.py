"""`ifprune evaluate`: what do selections cost, by domain, beside their controls?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .console import note, progress, result_json
from .loading import load_model, open_checkpoint
from .options import DataOption, DensityOption, DtypeOption, ModelOption, TrustOption, named_files

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ifprune_mlx import Model
    from ifprune_mlx.evaluate import Evaluation
    from ifprune_mlx.train.encoding import Encoded
    from ifprune_mlx.train.records import Record

Records = dict[str, list["Record"]]
Examples = dict[str, list["Encoded"]]

MaxLengthOption = Annotated[
    int, typer.Option("--max-length", min=2, help="Tokens of a chat that are read; the rest is cut off.")
]


def evaluate(
    data: DataOption = None,
    model: ModelOption = None,
    selectors: Annotated[
        Optional[str],
        typer.Option(
            "--selectors",
            metavar="LIST",
            help="Rows, separated by commas: dense, learned, static, static-own, activation, activation-sliced, "
            "random, mismatched, cross-domain, oracle.  [default: all that the checkpoint and the data allow]",
        ),
    ] = None,
    density: DensityOption = None,
    healed_static: Annotated[
        Optional[str],
        typer.Option(
            "--healed-static", metavar="FOLDER", help="A checkpoint tuned on its static selection: one row more."
        ),
    ] = None,
    healed_dense: Annotated[
        Optional[str],
        typer.Option("--healed-dense", metavar="FOLDER", help="A checkpoint tuned with all neurons: one row more."),
    ] = None,
    limit: Annotated[
        Optional[int],
        typer.Option("--limit", metavar="N", min=1, help="Prompts per domain, picked by the seed.  [default: all]"),
    ] = None,
    max_length: MaxLengthOption = 512,
    seed: Annotated[
        int, typer.Option("--seed", help="Seed of the pick, the random rows, the other prompts and the bootstrap.")
    ] = 0,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    json: Annotated[
        Optional[Path], typer.Option("--json", metavar="FILE", help="Write one JSON line to FILE; - is stdout.")
    ] = None,
) -> None:
    """Measure the loss of given answers under every kind of selection, with paired intervals."""
    from ifprune_mlx import DataError, IfpruneError
    from ifprune_mlx.evaluate import available_rows, compare
    from ifprune_mlx.files import write_atomic

    if not data:
        raise DataError("evaluate needs data; give --data NAME=FILE.jsonl, once for every domain")
    # Whatever can be wrong is better found before hours of measuring than after them.
    if json is not None and not json.parent.is_dir():
        raise IfpruneError(f"--json {json}: no such folder; make it first")
    records = read_data(data)
    for folder in (healed_static, healed_dense):
        if folder is not None:
            open_checkpoint(folder)
    loaded, tokenizer = load_model(model, dtype, trust_remote_code)
    names = available_rows(loaded, len(records)) if selectors is None else _names(selectors)
    share = loaded.checkpoint.layout.density if density is None else density
    keep = loaded.keep(share)
    examples = sample(loaded, tokenizer, records, limit, max_length, seed, note)
    with progress("evaluate", "tokens") as update:
        result = compare(loaded, examples, names, keep, seed=seed, progress=update)
    loaded.close()
    healed = {"healed-static": (healed_static, "static"), "healed-dense": (healed_dense, "dense")}
    for name, (folder, row) in healed.items():
        if folder is None:
            continue
        arm, arm_tokenizer = load_model(folder, dtype, trust_remote_code)
        _check_same(folder, examples, sample(arm, arm_tokenizer, records, limit, max_length, seed, lambda line: None))
        with progress(f"evaluate {name}", "tokens") as update:
            other = compare(arm, examples, [row], arm.keep(share), seed=seed, progress=update)
        arm.close()
        result = result.with_rows(other, {name: row})
    value = result.to_dict()
    if json is None or str(json) != "-":
        print("\n".join([*_table(result), *_difference_table(result)]), flush=True)
    _notes(result)
    if json is None:
        return
    if str(json) == "-":
        result_json(value)
        return
    import json as encoder

    text = encoder.dumps(value) + "\n"
    write_atomic(json, lambda file: file.write_text(text, encoding="utf-8"), IfpruneError)


def read_data(given: Sequence[str]) -> Records:
    """Chats by domain, each prompt once, from `NAME=FILE` options. Lines that cannot be used are reported.

    Raises:
        DataError: if an option is malformed, a name comes twice, or a file cannot be used.
    """
    from ifprune_mlx.train.records import read_records

    result: Records = {}
    for name, path in named_files(given).items():
        records = read_records(path, name, report=note)
        result[name] = list({record.key: record for record in reversed(records)}.values())[::-1]
        if len(result[name]) < len(records):
            note(f"{path}: {len(records) - len(result[name])} chats left out, which repeat the prompt of another")
    return result


def sample(
    model: Model,
    tokenizer: TokenizerWrapper,
    records: Mapping[str, Sequence[Record]],
    limit: int | None,
    max_length: int,
    seed: int,
    report: Callable[[str], object],
) -> Examples:
    """Encode up to `limit` chats a domain, in an order that only the seed and the prompts fix, whatever the file's.

    Args:
        report: is told how many chats were passed over, by reason.

    Raises:
        DataError: if a domain has no usable chat, or holds plain text.
    """
    from ifprune_mlx.train.encoding import encode_all

    length = min(max_length, model.context_length or max_length)
    examples: Examples = {}
    for domain, given in records.items():
        ordered = sorted(given, key=lambda record: hashlib.sha256(f"{seed}/{record.key}".encode()).digest())
        examples[domain] = encode_all(tokenizer, ordered, length, report, limit=limit)
    return examples


def _names(selectors: str) -> list[str]:
    """The rows asked for.

    Raises:
        IfpruneError: for a name that is none.
    """
    from ifprune_mlx import IfpruneError
    from ifprune_mlx.evaluate import ROWS

    known = [name for name in ROWS if name != "matched"]
    names = [name.strip() for name in selectors.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise IfpruneError(f"--selectors: unknown selector {name!r}; choose from {', '.join(known)}")
    if not names:
        raise IfpruneError(f"--selectors is empty; choose from {', '.join(known)}")
    return names


def _check_same(folder: str, ours: Examples, theirs: Examples) -> None:
    from ifprune_mlx import CheckpointError

    for domain, examples in ours.items():
        others = theirs[domain]
        if [e.tokens.tolist() for e in examples] != [e.tokens.tolist() for e in others]:
            raise CheckpointError(
                f"{folder}: reads the same chats as other tokens, so that losses do not compare; "
                "give a checkpoint of the same base model"
            )


def _table(result: Evaluation) -> list[str]:
    """Losses, a line per selector."""
    from ifprune_mlx.bootstrap import POOLED

    domains = list(result.keys)
    columns = [*domains, POOLED] if len(domains) > 1 else domains
    counts = ", ".join(f"{len(keys)} {domain}" for domain, keys in result.keys.items())
    lines = [f"nats per answer token, mean over prompts ({counts}), density {result.density:.3f}"]
    lines.append(_line("", [f"{name:>9}" for name in columns]))
    for selector in result.selectors:
        lines.append(_line(selector, [f"{result.nll(selector, name):>{max(9, len(name))}.3f}" for name in columns]))
    return lines


def _difference_table(result: Evaluation) -> list[str]:
    """The differences that matter: everything against static, the matched selector against its controls."""
    from ifprune_mlx.bootstrap import POOLED

    present = result.selectors
    own = {"activation": "activation-sliced"}.get(result.matched or "", result.matched or "")
    pairs = [(name, "static") for name in present if name not in ("dense", "static", "random")]
    pairs += [(own, name) for name in ("healed-static", "mismatched", "cross-domain")]
    columns = [*result.keys, POOLED] if len(result.keys) > 1 else list(result.keys)
    lines = []
    for a, b in pairs:
        if a not in present or b not in present:
            continue
        found = [result.difference(a, b, name) for name in columns]
        cells = ["" if d is None else f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" for d in found]
        lines.append(_line(f"{a} - {b}", [f"{cell:>24}" for cell in cells], 32))
    if not lines:
        return []
    head = _line("", [f"{name:>24}" for name in columns], 32)
    return ["", "differences, mean [95 % interval]; below 0 the first is better", head, *lines]


def _line(label: str, cells: Sequence[str], width: int = 18) -> str:
    return f"{label:<{width}}" + " ".join(cells)


def _notes(result: Evaluation) -> None:
    """What a reader of the table must know, on stderr."""
    if len(result.keys) > 1:
        note("all: the mean of the domains' means")
    if "activation" in result.selectors:
        note("activation reads the prompt densely, as it does when generating; every other row computes it pruned")
    if {"mismatched", "cross-domain"} & set(result.selectors):
        note(f"mismatched, cross-domain: selections that {result.matched} made from another prompt")
    for name, overlap in result.overlap.items():
        shares = [("within a domain", overlap.within), ("across domains", overlap.across)]
        told = [
            f"{share:.3f} {where} ({overlap.agreement(share):.3f} beyond chance)"
            for where, share in shares
            if share is not None
        ]
        if told:
            note(f"overlap of {name}'s selections: {', '.join(told)}")
