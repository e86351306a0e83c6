"""What stands around prompts and responses before a model reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

from palcache.configs import EmbedConfig
from palcache.encoders.protocols import Role
from palcache.errors import InputError, PalcacheError


@final
@dataclass(frozen=True, slots=True)
class Templates:
    """Writes items as the model reads them: plain templates with `{text}`, or the tokenizer's chat template.

    With a chat template a prompt is the user's turn and the opening of the answer, and a joint item is the user's turn
    and the whole answer; a response by itself is no chat and stays as it is.

    Attributes:
        prompt: around a prompt.
        response: around a response.
        tokenizer: its chat template is used; None for plain templates.
    """

    prompt: str
    response: str
    tokenizer: Any = None

    @classmethod
    def of(cls, config: EmbedConfig, tokenizer: Any) -> Templates:
        """Return the templates that a configuration asks for.

        Raises:
            InputError: the tokenizer has no chat template.
        """
        if config.chat_template and not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"The tokenizer of {config.model} has no chat template; write one with --prompt-template, for example "
                "'Human: {text} Assistant:'."
            )
        return cls(config.prompt_template, config.response_template, tokenizer if config.chat_template else None)

    def is_chat(self, role: Role) -> bool:
        """Return whether items of a role are written by the chat template, special tokens included."""
        return self.tokenizer is not None and role != "response"

    def write(self, text: str, role: Role) -> str:
        """Return a prompt or a response as the model reads it."""
        if self.is_chat(role):
            return self._chat([{"role": "user", "content": text}], opening=True)
        return (self.prompt if role == "prompt" else self.response).replace("{text}", text)

    def write_pair(self, prompt: str, response: str) -> tuple[str, int]:
        """Return a joint item as the model reads it, and how many of its characters are the prompt's.

        Raises:
            InputError: the chat template does not begin the answer as it begins the opening of an answer.
        """
        asked = self.write(prompt, "prompt")
        if self.tokenizer is None:
            return asked + self.write(response, "response"), len(asked)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        whole = self._chat(turns, opening=False)
        if not whole.startswith(asked):
            raise InputError(
                "The chat template writes a prompt otherwise before an answer than before the opening of one, so the "
                "prompt's end cannot be told; use --prompt-template and --response-template."
            )
        return whole, len(asked)

    def write_all(self, texts: Sequence[str], role: Role) -> tuple[list[str], dict[int, str]]:
        """Return prompts or responses as the model reads them, and by row why the chat template refused some."""
        written, _, broken = _each(lambda row: (self.write(texts[row], role), 0), len(texts))
        return written, broken

    def write_pairs(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> tuple[list[str], list[int], dict[int, str]]:
        """Return joint items as the model reads them, the prompts' ends, and by row why the chat template refused some.

        Raises:
            InputError: the chat template does not begin the answer as it begins the opening of an answer.
        """
        return _each(lambda row: self.write_pair(prompts[row], responses[row]), len(prompts))

    def _chat(self, turns: list[dict[str, str]], *, opening: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opening)
        return text

    def spec(self, role: Role) -> str | list[str]:
        """Return what identifies the text around items of a role."""
        if self.is_chat(role):
            template = self.tokenizer.chat_template
            return ["chat", template if isinstance(template, str) else str(template)]
        return {"prompt": self.prompt, "response": self.response, "joint": self.prompt + self.response}[role]


def _each(write: Callable[[int], tuple[str, int]], count: int) -> tuple[list[str], list[int], dict[int, str]]:
    """Return what is written for each row, the second value that goes with it, and what went wrong by row."""
    written, seconds, broken = [""] * count, [0] * count, dict[int, str]()
    for row in range(count):
        try:
            written[row], seconds[row] = write(row)
        except PalcacheError:
            raise
        except Exception as error:  # templates are programs of their authors, and refuse in their own ways
            broken[row] = f"chat template: {type(error).__name__}: {error}"
    return written, seconds, broken
