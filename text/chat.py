"""Dialogues: messages to the prompt that a model was trained on, through its chat template."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from text.kinds import Tokenizer

SANDBOX = Path(__file__).with_name("sandbox.py")
LONGEST_MESSAGE = 300  # characters of what a template says went wrong

Message = dict[str, Any]  # {"role": "user", "content": "Hello"} and what else templates know


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    specials: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    limit_s: float = 5,
    limit_mb: int = 256,
) -> str:
    """The text of a dialogue, by default up to where the model is to answer.

    `specials` are further variables of the template: the special tokens ("bos_token") first of
    all. `tools` are JSON schemas of functions. The template runs in a process of its own, which
    is killed after `limit_s` seconds. ValueError if it is damaged, refuses the messages, or
    needs more time or memory (`limit_mb`) than it may.
    """
    known = {"messages": list(messages), "tools": tools and list(tools), "documents": None}
    variables = {**(specials or {}), **known, "add_generation_prompt": add_generation_prompt}
    request = {"template": template, "variables": variables, "seconds": int(limit_s)}
    try:
        asked = json.dumps(request | {"megabytes": limit_mb})
    except TypeError as error:
        raise ValueError(f"messages must be JSON values: {error}") from None
    # -I: nothing of the user's environment or folder is imported.
    command = [sys.executable, "-I", "-X", "utf8", str(SANDBOX)]
    try:
        done = subprocess.run(command, input=asked.encode(), capture_output=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise ValueError(f"the chat template took more than {limit_s} s") from None
    try:
        reply = json.loads(done.stdout)
    except ValueError:  # killed, or out of memory where Python cannot say so
        raise ValueError(
            f"the chat template needs more than {limit_mb} MB or {limit_s} s "
            f"(its process ended with {done.returncode})"
        ) from None
    if "error" in reply:
        said = "".join(c if c.isprintable() else " " for c in reply["error"])
        raise ValueError(f"the chat template cannot be rendered: {said[:LONGEST_MESSAGE]}")
    return reply["text"]


def prompt(tokenizer: Tokenizer, messages: Sequence[Message], **options: Any) -> list[int]:
    """Ids of a dialogue. `options` as of `render`.

    Special tokens in the text are read as such, and none are added: the template writes its own.
    """
    if tokenizer.template is None:
        raise ValueError("this checkpoint has no chat template; give a plain prompt")
    text = render(tokenizer.template, messages, specials=tokenizer.specials, **options)
    return tokenizer.prompt(text, whole=False)


class Dialogue:
    """What was said so far, for one answer after the other."""

    def __init__(self, tokenizer: Tokenizer, system: str | None = None):
        self._tokenizer = tokenizer
        self.messages: list[Message] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def ask(self, text: str) -> list[int]:
        """Ids of the whole dialogue with this question. A ValueError leaves it as it was."""
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = prompt(self._tokenizer, asked)
        self.messages = asked
        return ids

    def answer(self, text: str) -> None:
        """Keep what the model said."""
        self.messages.append({"role": "assistant", "content": text})
