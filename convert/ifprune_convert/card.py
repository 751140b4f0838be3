"""Model cards, of IFP checkpoints and of exported models: what it is, made from what, its licence, how to run it.

A manifest does not list the card: its owner may edit the card, on the hub or here, and the checkpoint stays what it is.
"""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.selection.selection import Selection

CARD = "README.md"
_METHOD = "https://arxiv.org/abs/2501.02086"


def write_card(checkpoint: Checkpoint, name: str) -> Path:
    """Write the card into the checkpoint's folder and return its path.

    Args:
        name: what `--model` takes for this checkpoint: its folder's name, or its repository on the hub.
    """
    file = checkpoint.path / CARD
    file.write_text(model_card(checkpoint, name), encoding="utf-8")
    return file


def model_card(checkpoint: Checkpoint, name: str) -> str:
    """The card's text: front matter as the hub reads it, the checkpoint's figures, and two ways to run it."""
    layout, manifest = checkpoint.layout, checkpoint.manifest
    base = _base_model(manifest["source"])
    front = ["library_name: mlx", "pipeline_tag: text-generation", "tags: [mlx, ifprune]"]
    packing = layout.gate_up or layout.down
    if base is not None:
        front += [f"base_model: {base}", *(["base_model_relation: quantized"] if packing else [])]
    front += _licence(manifest["licence"])
    rows = {
        "made from": f"[{base}](https://huggingface.co/{base}) ({manifest['source']})" if base else manifest["source"],
        "licence": manifest["licence"] or "not stated by the source",
        "parameters": f"{checkpoint.parameters:,}, of them {checkpoint.ffn_parameters:,} in {len(layout.ffns)} FFNs",
        "quantization": "none" if packing is None else f"{packing.mode}, {packing.bits} bit",
        "selector": f"{layout.selector}, density {layout.density:g} unless told otherwise",
        "prior": checkpoint.prior_method,
        "id": checkpoint.id,
        "written by": f"ifprune-mlx {manifest['versions'].get('ifprune-mlx', '')}",
    }
    about = [
        "An IFP checkpoint: a language model whose feed-forward neurons lie in rows of their own, so that",
        f"Instruction-Following Pruning ([arXiv 2501.02086]({_METHOD})) can run each instruction on the neurons",
        "that it needs. It holds the whole model; mlx-lm alone does not read it.",
    ]
    usage = [
        *("```", "pip install ifprune-mlx", f"ifprune chat --model {name}", "```", ""),
        *("```python", "from ifprune_mlx import Session, load", ""),
        *(f"model, tokenizer = load({json.dumps(name)})", "session = Session(model, tokenizer)"),
        *('print(session.ask("What is the capital of France?"))', "```", ""),
    ]
    return _page(name, front, about, rows, usage)


def predictor_card(checkpoint: Checkpoint, name: str) -> str:
    """The card of a checkpoint's predictor without its weights: for which model it is, and how to put both together."""
    source = checkpoint.manifest["source"].partition(" + adapter ")[0]
    base = _base_model(source)
    front = ["library_name: mlx", "tags: [mlx, ifprune]"]
    front += [] if base is None else [f"base_model: {base}", "base_model_relation: adapter"]
    front += _licence(checkpoint.manifest["licence"])
    rows = {"for": source, "FFNs": len(checkpoint.layout.ffns), "from checkpoint": checkpoint.id}
    about = [
        f"A sparsity predictor for Instruction-Following Pruning ([arXiv 2501.02086]({_METHOD})), with the adapter",
        "that heals its model, if there is one, and without the model itself.",
    ]
    usage = ["```", f"ifprune convert --model {base or 'MODEL'} --predictor {name} --mlx-path mlx_model", "```", ""]
    return _page(name, front, about, rows, usage)


def plain_card(checkpoint: Checkpoint, selection: Selection, name: str) -> str:
    """The card of one selection as a plain model: where it comes from, and how to run it."""
    licence = checkpoint.manifest["licence"]
    front = ["library_name: mlx", "pipeline_tag: text-generation", "tags: [mlx]"]
    if licence is not None:
        front.append(f"license: {json.dumps(licence)}")
    kept = f"{sum(selection.keep)} of {sum(selection.widths)} neurons in {len(selection.keep)} FFNs"
    rows = {
        "source": checkpoint.manifest["source"],
        "IFP checkpoint": checkpoint.id,
        "selection": selection.hash,
        "selector": selection.selector,
        "density": f"{selection.density:.3f} ({kept})",
        "parameters": f"{checkpoint.active_parameters(selection.keep):,}",
        "written by": f"ifprune-mlx {version('ifprune-mlx')}",
    }
    about = [
        "A larger model with the feed-forward neurons of one selection and no others (Instruction-Following",
        f"Pruning, [arXiv 2501.02086]({_METHOD})), as a plain model for mlx-lm. It is meant",
        "for the instructions that the selection was made for.",
    ]
    return _page(name, front, about, rows, ["```", f'mlx_lm.generate --model {name} --prompt "..."', "```", ""])


def _page(name: str, front: list[str], about: list[str], rows: dict[str, object], usage: list[str]) -> str:
    """A card: front matter as the hub reads it, text, a table, and how to use the model."""
    table = [f"| {what} | {' '.join(str(value).split())} |" for what, value in rows.items()]
    head = ["---", *front, "---", "", f"# {name}", ""]
    return "\n".join([*head, *about, "", "| | |", "|---|---|", *table, "", *usage])


def _base_model(source: str) -> str | None:
    """The hub id in a manifest's source, such as `owner/name@commit`; None for what came from a local file."""
    match = re.match(r"(\w[\w.-]*/\w[\w.-]*)@[0-9a-f]{7,}\b", source)
    return match[1] if match else None


def _licence(licence: str | None) -> list[str]:
    """Front matter for a licence. The hub refuses cards with a `license` that it does not know the id of."""
    if licence is None:
        return []
    if re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        return [f"license: {licence}"]
    name = re.sub(r"[^a-z0-9]+", "-", licence.lower()).strip("-") or "unknown"
    return ["license: other", f"license_name: {name}"]
