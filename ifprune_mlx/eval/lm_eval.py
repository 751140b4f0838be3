"""Runs tasks of lm-evaluation-harness under selections. Needs the package lm-eval.

The instruction is the context that the harness builds, with its few-shot examples. It goes through the chat template
as the user's message, if there is a template, and selects once for all requests about it. A task that puts its options
into the context (Winogrande) therefore selects for each option.

`loglikelihood_rolling` scores a whole text, without an instruction. There the text's first 128 tokens select for the
rest. They are scored under the static selection (densely in the row `dense`), since a text must not select for itself.
So all rows but `dense` agree on texts of at most 128 tokens.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import lm_eval
import mlx.core as mx
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.errors import DataError, IfpruneError, reason_of
from ifprune_mlx.eval.losses import NOT_FINITE, answer_logits, token_nll
from ifprune_mlx.eval.metrics import TaskRow
from ifprune_mlx.eval.multiple_choice import agreeing
from ifprune_mlx.eval.tasks import RowSelections, generate_answer, read_prompt
from ifprune_mlx.generation import make_sampler
from ifprune_mlx.model import Model, Progress
from ifprune_mlx.prompt_cache import History
from ifprune_mlx.selection.selectors import Instruction, Selected, make_selector

_BEGINNING = 128
_NEW_TOKENS, _CONTEXT = 256, 2048  # the harness's own defaults
_PARTS = 200  # most jackknife samples


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness, or a group of tasks."""

    name: str  # as given by the user
    tasks: dict[str, Any]  # lm-eval's task objects by name

    @property
    def texts(self) -> list[str]:
        """The first document of every task, as text."""
        return [str(next(iter(task.eval_docs))) for task in self.tasks.values()]


def load_tasks(names: Sequence[str], folders: Sequence[Path] = ()) -> list[HarnessTask]:
    """Find tasks by name and load their data sets, from the network if they are not cached.

    Args:
        names: tasks, groups, tags, or paths of YAML files.
        folders: hold the user's own YAML tasks, which take precedence. Python functions that these name will run.

    Raises:
        DataError: if a task is unknown, cannot be loaded, needs pictures, or runs code that the model writes.
    """
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"--lm-eval-tasks {folder}: no such folder; give one that holds YAML files of tasks")
    # Its warnings are about lm-eval's own models.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    result: list[HarnessTask] = []
    for name in dict.fromkeys(names):
        try:
            tasks = _found(name, tuple(folders))
            for task in tasks.values():
                next(iter(task.eval_docs))
        except DataError:
            raise
        except Exception as exc:  # data sets, YAML files and their functions may raise anything
            raise DataError(f"--lm-eval {name}: cannot be loaded ({reason_of(exc)})") from exc
        for single, task in tasks.items():
            if getattr(task, "UNSAFE_CODE", False):
                raise DataError(f"--lm-eval {name}: {single} runs code that the model writes, which is not done here")
            if getattr(task, "MULTIMODAL", False):
                raise DataError(f"--lm-eval {name}: {single} shows pictures, which no model here reads")
            if any(single in earlier.tasks for earlier in result):
                raise DataError(f"--lm-eval {name}: {single} is given twice; leave it out of one of them")
        result.append(HarnessTask(name, tasks))
    return result


def _found(name: str, folders: tuple[Path, ...]) -> dict[str, Any]:
    """The single tasks behind a name, with their data."""
    own = _manager(folders, defaults=False) if folders else None
    if own is not None and name in own.all_tasks:
        with suppress(Exception):  # a group may name tasks of lm-eval's own; other errors come again
            return dict(own.load([name])["tasks"])
    manager = _manager(folders, defaults=True)
    if name not in manager.all_tasks and not Path(name).is_file():
        raise DataError(f"--lm-eval {name}: lm-eval has no such task; `lm-eval ls tasks` lists them")
    return dict(manager.load([name])["tasks"])


@lru_cache(maxsize=2)
def _manager(folders: tuple[Path, ...], *, defaults: bool) -> TaskManager:
    """An index of tasks. Indexing lm-eval's own thousands takes seconds."""
    return TaskManager(include_path=list(folders) or None, include_defaults=defaults)


def score_harness(
    model: Model,
    tokenizer: TokenizerWrapper,
    harness_task: HarnessTask,
    rows: Sequence[str],
    keep: Sequence[int],
    *,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> list[TaskRow]:
    """Measure a task under every row's selections. The last selection stays active.

    Args:
        rows: from `ifprune_mlx.eval.tasks.TASK_ROWS`.
        keep: *k* per FFN.
        limit: use only the first questions of every single task, like lm-eval's `--limit`.
        seed: of the random selector and the pairing with other questions; lm-eval picks few-shot examples itself.
        progress: called with (requests answered, all requests).
        report: receives a line for everything that was cut or left out.

    Returns:
        Every metric of every row, under the harness's name (`acc`, `exact_match,strict-match`). A group's pooled
        metrics come first: means that all its tasks have. For a metric that is no mean over questions (perplexity,
        F1), each question has its jackknife value: their mean is the harness's figure, their spread its uncertainty.

    Raises:
        DataError: if a task fails, or has no two questions for `mismatched`.
        CheckpointError, PredictorError: from the selectors.
    """
    lm = HarnessLM(model, tokenizer, harness_task.name, rows, keep, seed=seed, progress=progress, report=report)
    measured: dict[str, list[TaskRow]] = {name: [] for name in harness_task.tasks}
    pooled: list[TaskRow] = []
    for row in rows:
        lm.row = row
        try:
            found = lm_eval.simple_evaluate(
                model=lm,
                tasks=list(harness_task.tasks.values()),
                limit=limit,
                task_manager=_manager((), defaults=False),  # the tasks are loaded, and the full index is slow
                bootstrap_iters=0,
                apply_chat_template=lm.chats,
                fewshot_as_multiturn=False,
                torch_random_seed=None,
            )
        except IfpruneError:
            raise
        except Exception as exc:  # a task's own functions may raise anything
            raise DataError(f"--lm-eval {harness_task.name}: the task failed ({reason_of(exc)})") from exc
        means: dict[str, list[tuple[float, ...]]] = {}
        for name, task in harness_task.tasks.items():
            for metric, values in _metrics(found["samples"][name]).items():
                try:
                    per_question, is_mean = _per_question(values, task.aggregation().get(metric.split(",")[0], np.mean))
                except (TypeError, ValueError):
                    report(f"task {name!r}: {metric} is no number, and left out")
                    continue
                measured[name].append(TaskRow(row, name, metric, per_question))
                if is_mean:
                    means.setdefault(metric, []).append(per_question)
        for metric, per_task in means.items():
            if len(per_task) == len(harness_task.tasks) > 1:
                pooled.append(TaskRow(row, harness_task.name, metric, sum(per_task, ())))
    return [*pooled, *(row for found in measured.values() for row in found)]


class HarnessLM(LM):
    """A `Model` behind lm-eval's interface.

    Attributes:
        row: from `ifprune_mlx.eval.tasks.TASK_ROWS`; its selections answer the next requests.
        chats: whether contexts go through a chat template.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: TokenizerWrapper,
        task: str,
        rows: Sequence[str],
        keep: Sequence[int],
        *,
        seed: int = 0,
        progress: Progress | None = None,
        report: Callable[[str], object] = lambda line: None,
    ) -> None:
        super().__init__()
        self._model, self.tokenizer, self._task = model, tokenizer, task
        self._rows, self._keep, self._seed = list(rows), tuple(keep), seed
        self._progress, self._report = progress or (lambda done, total: None), report
        self._static = make_selector(model, "static")
        self._context = model.context_length or _CONTEXT
        self._messages: dict[str, str] = {}
        self._selections: dict[tuple[Instruction, ...], RowSelections] = {}
        self._told: set[str] = set()
        self.row = self._rows[0]
        self.chats: bool = tokenizer.has_chat_template

    @property
    def tokenizer_name(self) -> str:
        """lm-eval needs it for its caches, which are not used."""
        return str(self._model.checkpoint.id)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat. Remembers its user message, which selects."""
        rendered: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        users = [message["content"] for message in chat_history if message["role"] == "user"]
        self._messages[rendered] = users[0]
        return rendered

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log likelihood of each continuation in nats, and whether greedy decoding gives it."""
        by_context: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_context.setdefault(request.args[0], []).append(index)
        encoded = [self._options(text, [requests[i].args[1] for i in places]) for text, places in by_context.items()]
        instructions = [
            Instruction(self._messages.get(text, text), tuple(options[0][0][: min(start for _, start in options)]))
            for text, options in zip(by_context, encoded, strict=True)
        ]
        result: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        for index, (places, selected) in enumerate(zip(by_context.values(), self._selected(instructions), strict=True)):
            history = read_prompt(self._model, instructions[index], selected)
            for place, (tokens, start) in zip(places, encoded[index], strict=True):
                # Not every kind of cache can be trimmed back to the prompt.
                result[place] = _likelihood(self._model, copy.deepcopy(history), tokens, start)
                if not math.isfinite(result[place][0]):
                    raise IfpruneError(
                        f"{self.row}, task {self._task!r}: a likelihood is not a finite number; {NOT_FINITE}"
                    )
            done += len(places)
            self._advance(done, len(requests))
        return result

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log likelihood of whole texts in nats (see above), in successive windows of the model's context."""
        prefix = self._prefix()
        texts = [self._encode(request.args[0], special=False) for request in requests]
        instructions = []
        for request, tokens in zip(requests, texts, strict=True):
            whole = len(tokens) <= _BEGINNING
            text = request.args[0] if whole else str(self.tokenizer.decode(tokens[:_BEGINNING]))
            instructions.append(Instruction(text, (prefix, *tokens[:_BEGINNING])))
        result = []
        for index, (tokens, selected) in enumerate(zip(texts, self._selected(instructions), strict=True)):
            total = 0.0
            pairs = get_rolling_token_windows(tokens, prefix, self._context, 1)
            for number, (before, wanted) in enumerate(map(make_disjoint_window, pairs)):
                start, history = len(before), None
                if number == 0 and self.row not in ("dense", "static"):
                    active, start = self._model.selection, start + min(_BEGINNING, len(wanted))
                    self._model.switch(self._static.select(instructions[index], self._keep).selection)
                    total += _likelihood(self._model, None, [*before, *wanted][:start], len(before))[0]
                    self._model.switch(active)
                    history = selected.history if selected is not None else None
                if start < len(before) + len(wanted):
                    total += _likelihood(self._model, history, [*before, *wanted], start)[0]
            result.append(total)
            self._advance(index + 1, len(requests))
        return result

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, cut before the first stop string; greedy unless the task samples."""
        prompts, limits = [], []
        for request in requests:
            limits.append(int(request.args[1].get("max_gen_toks", _NEW_TOKENS)))
            room = max(self._context - limits[-1], self._context // 2)
            prompts.append(self._cut(self._encode(request.args[0], special=not self.chats) or [self._prefix()], room))
        instructions = [
            Instruction(self._messages.get(request.args[0], request.args[0]), tuple(tokens))
            for request, tokens in zip(requests, prompts, strict=True)
        ]
        result = []
        for index, selected in enumerate(self._selected(instructions)):
            options = requests[index].args[1]
            stops, temperature = options.get("until") or [], float(options.get("temperature", 1.0))
            how: dict[str, Any] = {"stops": [stops] if isinstance(stops, str) else [stop for stop in stops if stop]}
            if options.get("do_sample") and temperature > 0:
                how["sampler"] = make_sampler(temperature, top_p=float(options.get("top_p") or 1.0))
            instruction, limit = instructions[index], limits[index]
            text, _ = generate_answer(self._model, self.tokenizer, instruction, selected, self._keep, limit, **how)
            result.append(text)
            self._advance(index + 1, len(requests))
        return result

    def _selected(self, instructions: list[Instruction]) -> Iterator[Selected | None]:
        """The row's selection for each instruction, active while the iterator is at it; None is dense."""
        key = tuple(instructions)
        if key not in self._selections:
            selections = RowSelections(self._model, self._task, instructions, self._rows, self._keep, self._seed)
            self._selections[key] = selections
        for index in range(len(instructions)):
            yield self._selections[key].switch(self.row, index)
            mx.clear_cache()

    def _options(self, context: str, continuations: Sequence[str]) -> list[tuple[list[int], int]]:
        """Token ids of the context with each continuation, and the index at which scoring begins."""
        special = not self.chats and bool(context)
        before = self._encode(context, special=special) or [self._prefix()]
        result = []
        for continuation in continuations:
            whole = self._encode(context + continuation, special=special)
            whole = whole if context else [*before, *whole]
            # Scoring begins with a token that spans the border. At least one token is read, and one scored.
            start = agreeing(before, whole)
            if len(whole) < 2:
                whole, start = [self._prefix(), *whole], start + 1
            result.append((whole, max(1, min(start, len(whole) - 1))))
        longest = max(len(whole) for whole, _ in result)
        surplus = longest - len(self._cut([0] * longest, self._context + 1))
        if surplus >= min(start for _, start in result):
            raise DataError(
                f"task {self._task!r}: an option is longer than the model's context of {self._context} tokens; "
                "give a model of a longer one, or leave the task out"
            )
        return [(whole[surplus:], start - surplus) for whole, start in result]

    def _cut(self, tokens: list[int], room: int) -> list[int]:
        """The last `room` tokens."""
        if len(tokens) > room and self._task not in self._told:
            self._told.add(self._task)
            self._report(f"task {self._task!r}: prompts longer than the model's context lose their beginnings")
        return tokens[-room:]

    def _encode(self, text: str, *, special: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=special)) if text else []

    def _prefix(self) -> int:
        """The token before a text without a context."""
        first = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if first is None else first)

    def _advance(self, done: int, total: int) -> None:
        self._progress(self._rows.index(self.row) * total + done, len(self._rows) * total)


def _likelihood(model: Model, history: History | None, tokens: Sequence[int], start: int) -> tuple[float, bool]:
    """Log likelihood of the tokens from `start` on in nats, and whether each is the likeliest.

    Args:
        history: has read at most `start - 1` tokens; it is consumed.
    """
    total, greedy = 0.0, True
    wanted = np.arange(len(tokens)) >= start
    for logits, targets in answer_logits(model, np.array(tokens, np.int32), wanted, history=history):
        total -= float(token_nll(logits, targets).sum())
        greedy &= bool((logits.argmax(axis=-1) == targets).all().item())
    return total, greedy


def _metrics(samples: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Each question's values by metric; a filter of the harness is part of the metric's name."""
    result: dict[str, list[Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            result.setdefault(name, []).append(sample[metric])
    return result


def _per_question(values: Sequence[Any], aggregate: Callable[[Sequence[Any]], Any]) -> tuple[tuple[float, ...], bool]:
    """One value per question, with the aggregate as their mean, and whether these are the questions' own values.

    Raises:
        TypeError, ValueError: if the aggregate is no number.
    """
    whole = float(aggregate(values))
    if all(isinstance(value, (bool, int, float, np.number)) for value in values):
        own = tuple(float(value) for value in values)
        if math.isclose(float(np.mean(own)), whole, rel_tol=1e-6, abs_tol=1e-9):
            return own, True
    count = len(values)
    if count == 1:
        return (whole,), False
    # The jackknife (Efron 1982): leave out one question, or one part of many questions, at a time.
    parts = np.array_split(np.arange(count), min(count, _PARTS))
    without = [float(aggregate([values[i] for i in range(count) if not part[0] <= i <= part[-1]])) for part in parts]
    moved = np.repeat(np.mean(without) - np.array(without), [len(part) for part in parts])
    moved *= math.sqrt((len(parts) - 1) * (count - 1))
    return tuple(float(value) for value in whole + moved - moved.mean()), False
