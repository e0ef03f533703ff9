import json
import os
import time

import pytest

from tests.text import small, templates
from text import chat, pretrained
from text.chat import Dialogue, render
from text.kinds import Bytes

HI = [{"role": "user", "content": "hi"}]
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}


def test_a_dialogue_reads_as_the_template_writes_it():
    assert render(templates.SMOLLM2, HI) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(templates.GEMMA, HI, specials={"bos_token": "<bos>"}) == (
        "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
    )
    assert render(templates.PHI3, HI, specials=SPECIALS, add_generation_prompt=False) == (
        "<|user|>\nhi<|end|>\n</s>"
    )
    assert render(templates.MISTRAL, [*HI, templates.MODEL], specials=SPECIALS) == (
        "<s> [INST] hi [/INST] <think>\nhm\n</think>\n\nHi!  </s>"
    )
    thinking = render(templates.QWEN3, HI, specials={"enable_thinking": False})
    assert thinking.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert "weather <here>." in render(templates.QWEN3, HI, tools=templates.TOOLS).lower()
    assert "hm" not in render(templates.QWEN3, templates.DIALOGUES[1])  # an earlier thought


def test_loops_blocks_and_filters_are_those_that_templates_are_written_for():
    assert render(templates.MARKED, templates.DIALOGUES[3]) == (
        "\n Hello ☃ <b> & 'you'\n\n" + '{"a":[1,2.5,null,true],"b":"<é>"}'
    )
    assert render("{{ strftime_now('%Y') }}", HI) == time.strftime("%Y")
    assert render("{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}", HI) == "2"
    assert render("{{ dict(a=1) | tojson }}\n\n", HI) == '{"a": 1}\n'
    assert render("{{ documents is none }} {{ tools is none }}", HI) == "True True"
    assert render("\ud800{{ '\\u00e9' }}", HI) == "\ud800é"


REFUSED = {
    "a syntax error": ("a\n{% if %}", "line 2: Expected an expression"),
    "an open block": ("{% for m in messages %}", "line 1: Unexpected end of template"),
    "its own refusal": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "colours": ("{{ raise_exception('a\x1b[31mb\nc') }}", r"rendered: a \[31mb c$"),
    "nothing": ("{{ nothing.at_all }}", "'nothing' is undefined"),
    "division": ("{{ 1 // 0 }}", "by zero"),
    "another template": ("{% include 'x' %}", "no loader"),
    "attributes": ("{{ ''.__class__.__mro__ }}", "attribute '__class__' of 'str' object is unsafe"),
    "globals": ("{{ cycler.__init__.__globals__ }}", "attribute '__init__'"),
    "format": ("{{ '{0.__class__.__mro__}'.format(1) }}", "attribute '__class__'"),
    "a namespace": ("{{ namespace(__class__=1) }}", "'__class__' is no name"),
    "subclasses": ("{{ dict.mro() }}", "no attribute 'mro'"),
    "changes": ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "depth": ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "recursion"),
    "range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "a long string": ("{{ 'x' * 10**9 }}", "too much memory"),
    "doubling": (
        "{% set n = namespace(x='ab') %}"
        "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "too much memory",
    ),
    "padding": ("{{ '%0999999999d' % 1 }}", "too much memory"),
    "a long text": ("{% for i in range(99) %}{{ 'x' * 10**6 }}{% endfor %}", "more than 10000000"),
    "files": ("{{ lipsum() }}", "Too many open files|cannot be rendered"),  # would read one
}


@pytest.mark.parametrize(("template", "message"), REFUSED.values(), ids=REFUSED)
def test_a_hostile_template_is_a_value_error(template, message):
    with pytest.raises(ValueError, match=message) as error:
        render(template, HI)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 9) }}",
    ],
)
def test_a_template_that_never_ends_is_killed(template):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"the chat template took more than 0.7 s"):
        render(template, HI, limit_s=0.7)
    assert time.monotonic() - start < 5


def test_memory_is_bounded_by_the_limit_that_is_given():
    many = "{% set x = 'x' * 30000000 %}{{ x | length }}"
    assert render(many, HI) == "30000000"
    with pytest.raises(ValueError, match=r"memory|40 MB"):
        render(many, HI, limit_mb=40)


def test_a_template_learns_nothing_of_the_folder_or_the_environment(tmp_path, monkeypatch):
    (tmp_path / "jinja2.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert render("{{ 1 + 1 }}", HI) == "2"
    assert sorted(os.listdir(tmp_path)) == ["jinja2.py"]


def test_messages_that_are_no_json_are_refused():
    with pytest.raises(ValueError, match=r"messages must be JSON values: .* bytes"):
        render("", [{"role": "user", "content": b"hi"}])


def folder(path, template, first=None):
    small.write(
        path,
        tokenizer_json=small.byte_level(first=first),
        tokenizer_config_json={"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"},
        chat_template_jinja=template,
    )
    return pretrained.open_folder(path)


def test_the_prompt_of_a_dialogue_has_the_special_tokens_of_the_template_and_no_others(tmp_path):
    """A tokenizer that begins prompts with a token does not add it to the template's own."""
    made = folder(tmp_path, "{{ bos_token }}" + templates.SMOLLM2, first="<|endoftext|>")
    ids = chat.prompt(made, HI)
    assert ids.count(0) == 1 and ids[0] == 0
    assert (ids.count(1), ids.count(2)) == (3, 2)
    assert made.prompt("hi").count(0) == 1
    plain = folder(tmp_path / "plain", templates.SMOLLM2, first="<|endoftext|>")
    assert 0 not in chat.prompt(plain, HI)


def test_a_dialogue_keeps_what_was_said(tmp_path):
    made = folder(tmp_path, templates.GEMMA.replace("bos_token", "'<|im_start|>'"))
    dialogue = Dialogue(made)
    first = dialogue.ask("hi")
    dialogue.answer("Hello!")
    second = dialogue.ask("more")
    assert made.decode(second) == (
        "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
        "<start_of_turn>user\nmore<end_of_turn>\n<start_of_turn>model\n"
    )
    assert second[: len(first)] == first
    assert [message["role"] for message in dialogue.messages] == ["user", "assistant", "user"]
    with pytest.raises(ValueError, match="roles must alternate"):
        dialogue.ask("two in a row")
    assert len(dialogue.messages) == 3
    with pytest.raises(ValueError, match="System role not supported"):
        Dialogue(made, system="Be brief.").ask("hi")


def test_a_checkpoint_without_a_template_has_no_dialogue():
    with pytest.raises(ValueError, match="no chat template"):
        Dialogue(Bytes()).ask("hi")


def test_the_variables_of_a_template_are_all_json():
    """What a template sees has no methods but those of strings, numbers, lists and dicts."""
    seen = render("{{ messages | tojson }} {{ bos_token }}", HI, specials=SPECIALS)
    assert seen == json.dumps(HI) + " <s>"
