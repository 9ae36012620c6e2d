"""Chats against transformers: the same text from the same template."""

import dataclasses

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("jinja2")

from qjax.train.chat import chat_renderer  # noqa: E402
from tests.conftest import byte_tokenizer, random_model, tiny_config  # noqa: E402
from tests.test_chat import CHATML, MESSAGES  # noqa: E402

pytestmark = pytest.mark.peer
LLAMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{% for message in messages %}
    {%- if loop.index0 > 5 %}{% break %}{% endif %}
    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if not tools is none %}{{- tools | tojson(indent=4) }}{% endif %}
{{- messages | tojson }}
"""


@pytest.mark.parametrize("template", [CHATML, LLAMA])
def test_text_of_a_chat(template):
    tokenizer = byte_tokenizer(bos=True)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.inner, bos_token="<s>", chat_template=template)
    model = random_model(tiny_config(vocabulary_size=257), dataclasses.replace(tokenizer, chat_template=template))
    chat = [{"role": "system", "content": " <ä> 'be' \"kind\" "}, *MESSAGES]
    expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
    assert chat_renderer(model)({"messages": chat}) == expected
