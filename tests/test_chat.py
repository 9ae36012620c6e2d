"""Chats: the template of a model's tokenizer, read, kept in what is written, and run in a sandbox."""

import dataclasses
import json

import pytest

import qjax
from qjax.checkpoints import packed
from qjax.checkpoints.chat_template import folder_template
from qjax.checkpoints.huggingface import save_huggingface
from qjax.errors import QjaxError
from qjax.evaluate.corpora import load_corpus
from qjax.train.loop import packed_tokens
from tests.conftest import byte_tokenizer, random_model, tiny_config

CHATML = (
    "{% for message in messages %}\n"
    "  {{- '<|im_start|>' + message['role'] + '\\n' + message.content + '<|im_end|>' + '\\n' -}}\n"
    "{% endfor %}\n{% if add_generation_prompt %}?{% endif %}"
)
MESSAGES = [{"role": "user", "content": 'a"b'}, {"role": "assistant", "content": "c"}]
TEXT = '<|im_start|>user\na"b<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n'


def model_with(template: str | None) -> qjax.Model:
    """A model with a tokenizer of bytes."""
    model = random_model(tiny_config(vocabulary_size=257))
    return model._replace(tokenizer=dataclasses.replace(byte_tokenizer(bos=True), chat_template=template))


def render(template: str | None, chat: dict) -> str:
    pytest.importorskip("jinja2")
    from qjax.train.chat import chat_renderer

    return chat_renderer(model_with(template))(chat)


def test_a_chat_is_what_the_template_makes_of_it():
    assert render(CHATML, {"messages": MESSAGES}) == TEXT
    shared = [{"from": "human", "value": 'a"b'}, {"from": "gpt", "value": "c"}]
    assert render(CHATML, {"conversations": shared}) == TEXT
    told = render("{{ bos_token }}{{ messages | tojson }}{{ tools is none }}", {"messages": MESSAGES[:1]})
    assert told == '<s>[{"role": "user", "content": "a\\"b"}]True'


@pytest.mark.parametrize(
    ("template", "chat", "said"),
    [
        (None, {"messages": MESSAGES}, "has no chat template"),
        ("{% for %}", {"messages": MESSAGES}, "cannot be read"),
        ("{{ raise_exception('roles must alternate') }}", {"messages": MESSAGES}, "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", {"messages": MESSAGES}, "unsafe"),
        ("{{ messages.append(1) }}", {"messages": MESSAGES}, "unsafe"),
        (CHATML, {"messages": []}, "a chat is"),
        (CHATML, {"messages": [{"role": "user", "content": None}]}, "a chat is"),
        (CHATML, {"messages": "hello"}, "a chat is"),
    ],
)
def test_what_cannot_be_rendered(template, chat, said):
    with pytest.raises(QjaxError, match=said):
        render(template, chat)


def test_chats_and_texts_stand_in_one_file(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in ({"messages": MESSAGES}, {"text": "plain"})))
    with pytest.raises(QjaxError, match=r"line 1 has no string field .* `qjax train` renders them"):
        load_corpus(f"jsonl:{path}")
    found = load_corpus(f"jsonl:{path}", render=lambda chat: chat["messages"][0]["content"])
    assert found.documents == ('a"b', "plain")

    def refuse(chat):
        raise QjaxError("no")

    with pytest.raises(QjaxError, match="line 1: no"):
        load_corpus(f"jsonl:{path}", render=refuse)


def test_special_tokens_of_a_text_are_not_doubled():
    tokenizer = byte_tokenizer(bos=True)
    begin, end = "<s>", "$"
    tokenizer = dataclasses.replace(tokenizer, eos_id=int(tokenizer.encode(end)[0]))
    plain = packed_tokens(tokenizer, ["ab"])
    assert plain[0] == tokenizer.bos_id and plain[-1] == tokenizer.eos_id and len(plain) == 4
    for text in (f"{begin}ab", f"ab{end}", f"{begin}ab{end}"):
        assert packed_tokens(tokenizer, [text]).tolist() == plain.tolist()


def test_a_template_is_read_and_kept(tmp_path):
    model = model_with(CHATML)
    save_huggingface(tmp_path / "plain", model)
    packed.save(tmp_path / "packed", qjax.quantize(model, "rtn:int8-channel")[0])
    for folder in ("plain", "packed"):
        assert qjax.load(tmp_path / folder).tokenizer.chat_template == CHATML
    save_huggingface(tmp_path / "plain", model_with(None), overwrite=True)
    assert qjax.load(tmp_path / "plain").tokenizer.chat_template is None
    (tmp_path / "packed" / "chat_template.jinja").write_text("changed")
    with pytest.raises(QjaxError, match=r"chat_template\.jinja is not as"):
        qjax.load(tmp_path / "packed")


def test_templates_of_a_configuration(tmp_path):
    assert folder_template(tmp_path) is None
    several = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    for content, expected in ((CHATML, CHATML), (several, "b"), (several[:1], None), (3, None)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": content}))
        assert folder_template(tmp_path) == expected
    (tmp_path / "chat_template.jinja").write_text("c")
    assert folder_template(tmp_path) == "c"
