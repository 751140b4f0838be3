"""What an engine can take in: a job is checked before it waits, in the thread that asks."""

from __future__ import annotations

from ifprune_mlx.chat_template import check_prompt
from ifprune_mlx.errors import IfpruneError, PromptError
from ifprune_mlx.model import Model
from ifprune_mlx.serving.engine.request import POLICIES, Request
from ifprune_mlx.serving.engine.sampling import check_sampling

_MOST_LOGPROBS = 20


def check_request(model: Model, job: Request) -> None:
    """Raise PromptError or IfpruneError if `model` cannot answer `job`, as far as that is known before it selects."""
    check_prompt(model, job.tokens)
    vocabulary = model.config.get("vocab_size", model.config.get("text_config", {}).get("vocab_size"))
    if vocabulary is not None and not 0 <= min(job.tokens) <= max(job.tokens) < vocabulary:
        raise PromptError("the prompt holds token ids that the model does not have; encode it with its tokenizer")
    if job.max_tokens < 1:
        raise PromptError(f"max tokens is {job.max_tokens}; give a number above 0")
    if job.logprobs is not None and not 0 <= job.logprobs <= _MOST_LOGPROBS:
        raise IfpruneError(f"{job.logprobs} log-probabilities a token; give a number from 0 to {_MOST_LOGPROBS}")
    if "" in job.stop:
        raise IfpruneError("a stop string is empty; leave it out")
    if job.choice.policy not in POLICIES:
        raise IfpruneError(f"unknown policy {job.choice.policy!r}; choose one of {', '.join(POLICIES)}")
    check_sampling(job.sampling, vocabulary)
