"""Chat prompts through a model that mlx-lm runs: load it, stream the reply, keep what is needed to compare replies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from . import DemoError

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
)


@dataclass
class Reply:
    """A greedy reply: its tokens (the end token included), its text, and how it went.

    ``margins`` holds, for each token, how far its log-probability was above that of the runner-up.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    margins: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    prompt_tokens_per_s: float = 0.0
    tokens_per_s: float = 0.0


def load_model(folder: Path) -> tuple[Any, Any]:
    """The model and tokenizer of an mlx-lm model folder on this machine.

    Raises:
        DemoError: mlx-lm is not installed, or cannot load the folder.
    """
    try:
        import mlx_lm
    except ModuleNotFoundError as error:
        raise DemoError(f"the demo needs {error.name}; install mlx-lm with: pip install mlx-lm") from None
    if not (folder / "config.json").is_file():  # mlx-lm would take the path for the name of a model to download
        raise DemoError(f"{folder} is no model folder: it has no config.json")
    try:
        return mlx_lm.load(str(folder))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise DemoError(f"mlx-lm cannot load {folder}: {lines[0]}") from error


def chat_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of one user message in the model's chat template, or of the bare text if it has none."""
    if getattr(tokenizer, "chat_template", None) is None:
        return list(tokenizer.encode(prompt))
    messages = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


def generate(
    model: Any,
    tokenizer: Any,
    tokens: list[int],
    max_tokens: int,
    on_text: Callable[[str], None] = lambda _text: None,
) -> Reply:
    """Continue ``tokens`` greedily for at most ``max_tokens``; ``on_text`` gets each piece of text as it is made."""
    import mlx_lm

    reply = Reply()
    for step in mlx_lm.stream_generate(model, tokenizer, tokens, max_tokens=max_tokens):
        reply.tokens.append(int(step.token))
        second, first = np.partition(np.array(step.logprobs.astype(mx.float32)), -2)[-2:]
        reply.margins.append(float(first - second))
        reply.text += step.text
        reply.prompt_tokens, reply.prompt_tokens_per_s = step.prompt_tokens, step.prompt_tps
        reply.tokens_per_s = step.generation_tps
        on_text(step.text)
    return reply


@dataclass(frozen=True)
class Agreement:
    """How far two greedy replies to one prompt agree: the first ``equal`` tokens of ``total``.

    ``margin`` is the distance between the reference's two best log-probabilities where they part (None if they do not):
    a small one means that rounding decided.
    """

    equal: int
    total: int
    margin: float | None

    def __str__(self) -> str:
        counted = f"{self.equal} of {self.total} greedy tokens equal"
        if self.margin is None:
            return counted
        return f"{counted}; they part where the best two tokens are {self.margin:.3f} apart in log-probability"


def agreement(reference: Reply, other: Reply) -> Agreement:
    """Compare ``other`` with ``reference``; a reply that ends early disagrees from there on."""
    total = max(len(reference.tokens), len(other.tokens))
    equal = 0
    for ours, theirs in zip(reference.tokens, other.tokens, strict=False):
        if ours != theirs:
            break
        equal += 1
    margin = reference.margins[equal] if equal < min(total, len(reference.margins)) else None
    return Agreement(equal, total, margin)
