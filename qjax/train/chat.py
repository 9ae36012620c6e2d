"""Chats as text: messages through the chat template of the model's tokenizer, a Jinja text that came with the model.

It runs in Jinja's sandbox, without reach to anything but the messages and the special tokens, as transformers runs it.
"""

import functools
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from qjax.errors import QjaxError
from qjax.models.model import Model
from qjax.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import jinja2

ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names -> the usual ones


def chat_renderer(model: Model) -> Callable[[Mapping[str, object]], str]:
    """chat, {"messages": [{"role": ..., "content": ...}]} or ShareGPT's {"conversations": [{"from": ..., "value": ...}]}, ->
    its text. What is wrong is told when a chat is rendered: QjaxError for a model without template, a template that fails, and
    chats of other shapes.
    """
    compiled = functools.cache(_compiled)

    def render(chat: Mapping[str, object]) -> str:
        template, messages, tokenizer = compiled(model.name, model.tokenizer), _messages(chat), model.tokenizer
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        special = {name: "" if i is None else tokenizer.inner.id_to_token(i) or "" for name, i in ids.items()}
        try:
            return template.render(messages=messages, tools=None, documents=None, add_generation_prompt=False, **special)
        except Exception as error:  # whatever the template does
            raise QjaxError(f"the chat template of {model.name} fails, {type(error).__name__}: {error}") from error

    return render


def _compiled(name: str, tokenizer: Tokenizer | None) -> "jinja2.Template":
    if tokenizer is None or not tokenizer.chat_template:
        raise QjaxError(
            f'{name} has no chat template; write what its chats look like into the field "text", or take the chat model'
        )
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise QjaxError("chats need jinja2; install qjax[train]") from error
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(tokenizer.chat_template)
    except Exception as error:  # jinja2.TemplateError, RecursionError
        raise QjaxError(f"the chat template of {name} cannot be read: {error}") from error


def _refuse(message: str) -> None:
    raise QjaxError(str(message))


def _messages(chat: Mapping[str, object]) -> list[dict[str, str]]:
    list_of, role, content = ("messages", "role", "content") if "messages" in chat else ("conversations", "from", "value")
    messages = chat.get(list_of)
    fits = isinstance(messages, list) and messages and all(isinstance(each, dict) for each in messages)
    if not fits or not all(isinstance(each.get(name), str) for each in messages for name in (role, content)):
        raise QjaxError(f'a chat is {{"messages": [{{"role": "user", "content": "..."}}, ...]}}, got {str(chat)[:80]}')
    return [{"role": ROLES.get(each[role], each[role]), "content": each[content]} for each in messages]
