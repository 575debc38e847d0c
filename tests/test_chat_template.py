"""Chat templates: variables, text parts and resource limits. The values are those of transformers 4.57.6."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.text import jinja_sandbox, template_worker
from dsmoe_jax.text.chat_template import DEEPSEEK_TEMPLATE, read_chat_templates, render

USER = {"role": "user", "content": "Hi"}
CHAT = [USER, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "2"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "now", "arguments": {}}}]}
TOOL = {"role": "tool", "tool_call_id": "a1", "name": "now", "content": "12:00"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %},{% endfor %}", "Hi,Yo,2,"),
        ("{% generation %}{% set x = 1 %}{% endgeneration %}{{ x is defined }}", "False"),
        ("{{ strftime_now('%Y') }}", time.strftime("%Y")),
        ("{{ tools is none and documents is none }}{{ add_generation_prompt }}", "TrueFalse"),
        ("{{ messages[0] | tojson(sort_keys=true) }}", '{"content": "Hi", "role": "user"}'),
        ("{{ messages[0] | tojson(separators=(',', ':')) }}", '{"role":"user","content":"Hi"}'),
        ("{{ {'a': '<é>'} | tojson }}{{ {'a': 'é'} | tojson(ensure_ascii=true) }}", '{"a": "<é>"}{"a": "\\u00e9"}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}{{ m.content }}{% endfor %}", "HiYo"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}", "Yo2"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{{ unset_token }}|{{ unset_token is defined }}", "|False"),
    ],
)
def test_template_features_of_transformers(template: str, text: str):
    assert render(template, CHAT) == text


def test_tools_and_documents_reach_the_template():
    template = "{{ tools[0].function.name }}{{ documents[0].title }}{{ think }}"

    text = render(template, CHAT, tools=[{"function": {"name": "f"}}], documents=[{"title": "t"}], think=True)

    assert text == "ftTrue"


def test_other_fields_and_roles_reach_the_template():
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content or m.tool_calls[0].function.name }}:{{ m.name }};{% endfor %}"
    )

    assert render(template, [USER, CALL, TOOL]) == "user:Hi:;assistant:now:;tool:12:00:now;"


@pytest.mark.parametrize(
    "template", [DEEPSEEK_TEMPLATE, "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"]
)
def test_role_ignored_by_the_template_is_an_error(template: str):
    with pytest.raises(ValueError, match="message 1 has role 'tool', which the chat template ignores; allowed are sys"):
        render(template, [USER, TOOL])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (DEEPSEEK_TEMPLATE, "User: Hi there\n\n"),
        ("{{ messages[0].content | trim }}", "Hi there"),
        ("{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}", "[Hi][ there]"),
        ("{% for part in messages[0]['content'] | list %}[{{ part.text }}]{% endfor %}", "[Hi][ there]"),
        (
            "{% macro show(content) %}{% for p in content %}[{{ p.text }}]{% endfor %}{% endmacro %}"
            "{{ show(messages[0].content) }}",
            "[Hi][ there]",
        ),
        ("{% set c = messages[0].content %}{% for p in c %}[{{ p.text }}]{% endfor %}", "[Hi][ there]"),
        (
            "{% macro f(c) %}{% for p in c %}[{{ p.text }}]{% endfor %}{% endmacro %}{{ f(messages[0].content) }}",
            "[Hi][ there]",
        ),
        ("{% for p in messages[0].get('content') %}[{{ p['text'] }}]{% endfor %}", "[Hi][ there]"),
        ("{% set n = namespace(c=messages[0].content) %}{% for p in n.c %}[{{ p.text }}]{% endfor %}", "[Hi][ there]"),
        ("{{ messages[0]['content'][0]['text'] }}", "Hi"),
        ("{% set c = messages[0].content %}{{ c if c is string else (c | last).text }}", " there"),
        ("{{ messages[0].content | map(attribute='text') | join('|') }}", "Hi| there"),
        ("{{ messages[0].content | join('|', attribute='text') }}", "Hi| there"),
        ("{{ messages[0].content[0] }}{{ messages[0].content[1:] }}", "Hi there"),
        ("{% for line in messages[0].content.split(' ') %}{{ line }};{% endfor %}", "Hi;there;"),
    ],
)
def test_text_parts_are_joined_unless_a_template_reads_them(template: str, text: str):
    assert render(template, [PARTS]) == text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'a' * 10**9 }}", "it needed more than 512 MB of memory"),
        ("{{ 'a' | center(10**9) }}", "it needed more than 512 MB of memory"),
        ("{{ '%0999999999d' % 1 }}", "it needed more than 512 MB of memory"),
        ("{{ '{:>999999999}'.format(1) }}", "it needed more than 512 MB of memory"),
        ("{{ [1] * 10**9 }}", "it needed more than 512 MB of memory"),
        ("{{ range(10**9) | list }}", "Range too big"),
        ("{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "512 MB"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "its recursion is too deep"),
        ("{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}", "its recursion is too deep"),
        ("{{ 9**99999 }}", "Exceeds the limit"),
        ("{{ 'x' * 17 * 10**6 }}", "it wrote more than 16000000 characters"),
        ("{{ raise_exception('a\n' * 10**6) }}", "a a a"),
    ],
)
def test_template_beyond_a_limit_is_an_error(template: str, reason: str):
    with pytest.raises(ValueError, match=r"^the chat template failed: ") as caught:
        render(template, CHAT)

    assert reason in str(caught.value)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",  # one multiplication in C, not interruptible from Python
    ],
)
def test_template_beyond_the_time_limit_is_killed(template: str, monkeypatch: pytest.MonkeyPatch):
    template_worker._stop()
    monkeypatch.setattr(jinja_sandbox, "SECONDS", 0.3)

    with pytest.raises(ValueError, match=r"the chat template failed: it took more than 0.3 s"):
        render(template, CHAT)

    assert render("{{ messages[0].content }}", CHAT) == "Hi"  # in a new worker
    template_worker._stop()  # has the short limit too


def test_killed_worker_is_restarted():
    render("x", CHAT)
    worker = template_worker._worker
    assert worker is not None

    worker.kill()
    worker.wait()

    assert render("y", CHAT) == "y"


def test_concurrent_renders_do_not_mix():
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: render("{{ n }}" * 99, CHAT, n=i)})) for i in range(16)
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == {i: str(i) * 99 for i in range(16)}


def test_worker_ends_with_its_parent():
    program = (
        "from dsmoe_jax.text import template_worker as w; w.render('x', {}); print(w._worker.pid, flush=True);"
        "import os; os._exit(0)"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)

    pid = int(done.stdout)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists()


def test_variables_must_be_json():
    with pytest.raises(ValueError, match="failed: its variables must be JSON: Object of type object is not JSON"):
        render("x", CHAT, thing=object())
    with pytest.raises(ValueError, match="tools must be a list of JSON objects, got"):
        render("x", CHAT, tools=[print])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("files", "config", "templates"),
    [
        ({}, {}, {"default": DEEPSEEK_TEMPLATE}),
        ({}, {"chat_template": "a"}, {"default": "a"}),
        ({}, {"chat_template": [{"name": "rag", "template": "r"}]}, {"rag": "r"}),
        ({}, {"chat_template": {"default": "a", "rag": "r"}}, {"default": "a", "rag": "r"}),
        ({"chat_template.jinja": "j"}, {"chat_template": "a"}, {"default": "j"}),
        ({"additional_chat_templates/tool_use.jinja": "t"}, {"chat_template": "a"}, {"default": "a", "tool_use": "t"}),
        ({"chat_template.json": '{"chat_template": "p"}'}, {}, {"default": "p"}),
        ({"chat_template.json": '{"chat_template": "p"}'}, {"chat_template": "a"}, {"default": "a"}),
    ],
)
def test_templates_are_found_by_name(
    files: dict[str, str], config: dict[str, Any], templates: dict[str, str], tmp_path: Path
):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    assert read_chat_templates(tmp_path, config) == templates


def test_template_file_size_is_limited(tmp_path: Path):
    with (tmp_path / "chat_template.jinja").open("wb") as file:
        os.truncate(file.fileno(), 10**9)

    with pytest.raises(ValueError, match=r"chat_template.jinja has 1000000000 bytes; at most 1000000"):
        read_chat_templates(tmp_path, {})
