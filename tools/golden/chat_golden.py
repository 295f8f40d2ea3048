"""Writes crates/text/tests/golden/chat.json: chat templates, conversations, and what transformers
makes of them.

    python tools/golden/chat_golden.py [--smollm2 FILE.gguf]

The templates are our own. They use what the templates of well-known models use, each in its style.
With --smollm2, SmolLM2's own template is rendered too; it is not stored, only its results are.
"""

import argparse
import datetime
import json
import pathlib

import jinja2
from transformers.utils import chat_template_utils

OUT = pathlib.Path(__file__).resolve().parents[2] / "crates/text/tests/golden/chat.json"
NOW = datetime.datetime(2025, 7, 4, 15, 6, 7)

TEMPLATES = {
    # System message taken out first, a date, tools as indented JSON in the first user message.
    "llama3": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|head|>system<|/head|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: tools\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|end|>" }}
{%- if tools is not none %}
    {%- set first_user_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
    {{- '<|head|>user<|/head|>\\n\\n' -}}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- first_user_message + "<|end|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n' + message['content'] | trim + '<|end|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("only one tool call at a time") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|head|>assistant<|/head|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|end|>" }}
    {%- elif message.role == "tool" %}
        {{- "<|head|>tool<|/head|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\\n\\n' }}
{%- endif %}
""",
    # Thinking taken out of older turns, searched for backwards through a reversed slice.
    "qwen3": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    # Roles must alternate; content may be a list of parts; the assistant is called model.
    "gemma": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\\n'}}
{%- endif -%}
""",
    # Spaces that matter, filters on lists, a macro, a loop that is left early.
    "mistral": """{%- set user_messages = messages | selectattr("role", "equalto", "user") | list %}
{%- set loop_messages = messages | rejectattr("role", "equalto", "system") | list %}
{%- macro call(name, arguments, id='none') %}[{{ name }}|{{ arguments | tojson }}|{{ id }}]{% endmacro %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {%- for c in message.tool_calls %}{{ call(c.function.name, c.function.arguments, id=c.id) }}{% endfor %}
        {{- eos_token }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- "[TOOL_RESULTS] " ~ {"content": message.content | string} ~ "[/TOOL_RESULTS]" }}
    {%- else %}
        {%- break %}
    {%- endif %}
{%- endfor %}
""",
    # Whitespace as the tags leave it: trimmed and stripped blocks, and values of all kinds.
    "layout": """{% set x = 'é' %}
{% for m in messages %}
  {% if loop.first %}
First: {{ m.role }} ({{ loop.length }}, {{ loop.revindex }})
  {% else %}
    then {{ m['role'] | upper }}{{ ', ' if not loop.last }}
  {% endif %}
  {# a comment #}
{% endfor %}
{{ x }} {{ none }} {{ true }} {{ 1.5 }} {{ 3 // 2 }} {{ 7 / 2 }} {{ 2 ** 5 }} {{ [1, 'a', none] }} {{ {'k': 'v', 'n': 1.0} }}
{{ 'a' ~ 1 ~ none ~ true }} {{ missing }} {{ missing is defined }} {{ messages[0].nothing }}
{{ "q'q" }} {{ ["q'q", 'd"d', '\\n'] }} {{ 'abc'[1] }} {{ 'abc'[-2:] }} {{ 'x' * 3 }} {{ '%s' % 'y' if false else 'z' }}
{{ messages | map(attribute='role') | join(', ') }} {{ messages | length }} {{ [3, 1, 2] | sort }}
{{ 'Hello World' | lower | replace('o', '0') }} {{ '  s  ' | trim }}. {{ 'a,b' .split(',') }} {{ 1 == 1.0 }}
{{ [1e20, 1e-7, 123456789.125, -0.0, 1e16] }} {{ [1e20, 0.1] | tojson }} {{ 'é"<>&' | tojson }}
{{ {'b': [], 'a': {}} | tojson(indent=2) }} {{ 'title case' | title }} {{ 'cap' | capitalize }}
  {%- generation %} in {% endgeneration %}
{{ 'end' }}
""",
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather <now> & \"here\" — é",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer", "default": 1},
                },
                "required": ["city"],
                "extra": [],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {}}},
]

CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2.0}},
}
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": " What's 2 < 3?\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "日本語 🎉 'x' \"y\""},
    ],
    [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny.", "reasoning_content": "so"},
    ],
    [{"role": "user", "content": [{"type": "text", "text": " hello "}, {"type": "image"}]}],
    [{"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}],
    [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "r"},
    ],
]
OPTIONS = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False},
    {"add_generation_prompt": True, "tools": TOOLS, "extra": {"enable_thinking": False}},
]


def render(source, messages, option):
    """What apply_chat_template makes of it, or the message of its refusal."""
    template = chat_template_utils._compile_jinja_template(source)
    try:
        text = template.render(
            messages=messages,
            tools=option.get("tools"),
            documents=None,
            add_generation_prompt=option["add_generation_prompt"],
            bos_token="<s>",
            eos_token="</s>",
            strftime_now=NOW.strftime,
            **option.get("extra", {}),
        )
        return {"text": text}
    except (jinja2.exceptions.TemplateError, TypeError) as error:
        return {"error": str(error)}


def results(source):
    rows = []
    for at, messages in enumerate(CONVERSATIONS):
        for number, option in enumerate(OPTIONS):
            rows.append({"conversation": at, "option": number, **render(source, messages, option)})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2")
    arguments = parser.parse_args()
    out = {
        "conversations": CONVERSATIONS,
        "options": OPTIONS,
        "templates": {
            name: {"source": source, "results": results(source)}
            for name, source in TEMPLATES.items()
        },
    }
    if arguments.smollm2:
        import gguf

        field = gguf.GGUFReader(arguments.smollm2).fields["tokenizer.chat_template"]
        out["smollm2"] = results(field.contents())
    OUT.write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
