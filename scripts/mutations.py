"""Shows that the tests notice mistakes: each known mutation of the code must make at least one test fail.

    python scripts/mutations.py            all mutations
    python scripts/mutations.py scales kv  those whose name contains one of the words

For each mutation the packages and tests are copied to a temporary folder, one text is replaced there (it must occur
exactly once, so that a mutation cannot rot silently), and the relevant test files run in a subprocess. Prints one line
per mutation: which test caught it, or SURVIVED. Exits with 1 if any survives. The same files run unchanged first, since
a test that fails anyway proves nothing. Takes about a minute and changes nothing in the repository.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("ifprune_mlx", "convert", "cli", "tests", "pyproject.toml")
TIMEOUT_S = 150
_SLICED = "tests/ifprune_mlx/sparse/test_sliced_equals_masked.py"
_FFN = "tests/ifprune_mlx/sparse/test_ffn.py"
_SLOTS = "tests/ifprune_mlx/sparse/test_slots.py"
_SELECTION = "tests/ifprune_mlx/selection/test_selection.py"
_GENERATION = "tests/ifprune_mlx/test_generation_history.py"
_HISTORY = "tests/ifprune_mlx/test_prompt_cache.py"


@dataclass(frozen=True)
class Mutation:
    """One mistake: in `file`, `text` becomes `mutant`; one of `tests` must fail."""

    name: str
    file: str
    text: str
    mutant: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "ids off by one in top_k",
        "ifprune_mlx/selection/selection.py",
        "return np.flatnonzero(chosen)",
        "return np.flatnonzero(np.roll(chosen, 1))",
        (_SELECTION,),
    ),
    Mutation(
        "ids off by one in plan_switch",
        "ifprune_mlx/sparse/slots.py",
        "wanted[ids] = True",
        "wanted[(ids + 1) % len(order)] = True",
        (_SLOTS,),
    ),
    Mutation(
        "ids off by one in plan_switch (seen by the logits alone)",
        "ifprune_mlx/sparse/slots.py",
        "wanted[ids] = True",
        "wanted[(ids + 1) % len(order)] = True",
        (_SLICED,),
    ),
    Mutation(
        "entering slots off by one",
        "ifprune_mlx/sparse/slots.py",
        "np.flatnonzero(wanted_slots[k:]) + k",
        "(np.flatnonzero(wanted_slots[k:]) + k + 1) % len(order)",
        (_SLOTS,),
    ),
    Mutation(
        "gate and up swapped in read_rows",
        "ifprune_mlx/checkpoint/neuron_reader.py",
        "for index, name in enumerate(names):",
        "for index, name in enumerate(names[::-1]):",
        (_SLICED,),
    ),
    Mutation(
        "gate and up swapped in the converter",
        "convert/ifprune_convert/layout.py",
        "mx.stack([gate, up], axis=1)",
        "mx.stack([up, gate], axis=1)",
        (_SLICED,),
    ),
    Mutation(
        "stale scales after a switch",
        "ifprune_mlx/sparse/slots.py",
        "for rows in movables.values():\n            if count:",
        'for rows in [rows for name, rows in movables.items() if not name.endswith(".scales")]:\n            if count:',
        (_SLOTS,),
    ),
    Mutation(
        "stale scales after a switch (seen by the logits alone)",
        "ifprune_mlx/sparse/slots.py",
        "for rows in movables.values():\n            if count:",
        'for rows in [rows for name, rows in movables.items() if not name.endswith(".scales")]:\n            if count:',
        (_SLICED,),
    ),
    Mutation(
        "down reshaped, not transposed",
        "convert/ifprune_convert/layout.py",
        "return mx.contiguous(down.T)",
        "return down.reshape(down.shape[::-1])",
        (_SLICED,),
    ),
    Mutation(
        "bias of down dropped",
        "ifprune_mlx/sparse/ffn.py",
        'bias = rows(f"{kind}.bias") if inwards else self.slots.down_bias',
        'bias = rows(f"{kind}.bias")',
        (_FFN,),
    ),
    Mutation(
        "KV provenance ignored",
        "ifprune_mlx/prompt_cache.py",
        "if span.computed_by not in names and span.read_for not in names:\n                break",
        "if span.computed_by not in names and span.read_for not in names:\n                pass",
        (_HISTORY, _GENERATION),
    ),
    Mutation(
        "KV provenance ignored (seen in generation alone)",
        "ifprune_mlx/prompt_cache.py",
        "if span.computed_by not in names and span.read_for not in names:\n                break",
        "if span.computed_by not in names and span.read_for not in names:\n                pass",
        (_GENERATION,),
    ),
    Mutation(
        "query and key rows left in llama.cpp's order",
        "convert/ifprune_convert/readers/gguf.py",
        "head_dim = tensor.shape[0] // heads[module] if module in heads else None",
        "head_dim = None",
        ("tests/convert/test_gguf_reader.py",),
    ),
)


def main(words: list[str]) -> int:
    """Run the mutations whose name contains one of `words` (all, without words)."""
    chosen = [mutation for mutation in MUTATIONS if not words or any(word in mutation.name for word in words)]
    start, survivors = time.perf_counter(), 0
    failed = failing_tests(None, sorted({test for mutation in chosen for test in mutation.tests}))
    if failed:
        raise SystemExit(f"without any mutation these fail already: {', '.join(failed)}; mend them first")
    for mutation in chosen:
        failed = failing_tests(mutation, list(mutation.tests))
        survivors += not failed
        verdict = f"caught by {len(failed)} failing test ({failed[0]})" if failed else "SURVIVED"
        print(f"{mutation.name}: {verdict}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutations caught in {time.perf_counter() - start:.0f} s")
    return 1 if survivors or not chosen else 0


def failing_tests(mutation: Mutation | None, tests: list[str]) -> list[str]:
    """The first test that fails in a mutated copy, in a list; empty if all pass.

    Raises:
        SystemExit: if the text to replace is not there exactly once, or the tests did not run at all.
    """
    name = "no mutation" if mutation is None else mutation.name
    with tempfile.TemporaryDirectory(prefix="ifprune-mutation-") as folder:
        copy = Path(folder)
        for part in COPIED:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, copy / part)
        if mutation is not None:
            _mutate(copy, mutation)
        paths = [copy, copy / "convert", copy / "cli"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        try:
            done = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as exc:
            raise SystemExit(f"{name}: the tests did not end within {TIMEOUT_S} s") from exc
    failed = re.findall(r"^FAILED tests/(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1) or bool(done.returncode) != bool(failed):
        raise SystemExit(f"{name}: the tests did not run:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return failed


def _mutate(copy: Path, mutation: Mutation) -> None:
    file = copy / mutation.file
    original = file.read_text(encoding="utf-8")
    if original.count(mutation.text) != 1:
        raise SystemExit(
            f"{mutation.name}: the text to replace is {original.count(mutation.text)} times in {mutation.file}, "
            "not once; adapt scripts/mutations.py to the code"
        )
    file.write_text(original.replace(mutation.text, mutation.mutant), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
