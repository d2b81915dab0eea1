#!/usr/bin/env bash
# xgrammar's structural tag for Qwen3-Coder refuses a call without arguments as the model's own chat
# template writes it.
#
# Versions: xgrammar 0.2.8, Python 3.11.
#
# Behaviour: the chat template of Qwen3-Coder (and of Qwen 3.5) writes `<function=NAME>`, a line break,
# each parameter with a line break behind it, `</function>`. So a call without arguments is
# `<function=now>\n</function>`, and that is what the model has seen in training. The tag that
# `get_model_structural_tag("qwen_3_coder", ...)` gives refuses it, and takes only one more line break,
# `<function=now>\n\n</function>`. With arguments the tag and the template agree. A model held to the
# tag is pushed off its own form in every call of a tool that takes none. One would expect a tag for a
# family to take what the family's template writes.
#
# Output seen:
#   with arguments, as the template writes it: True
#   without, as the template writes it: False
#   without, with one more line break: True
#
# Exits 0 while the behaviour is as described, 1 when it changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "xgrammar==0.2.8"
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import sys

from jinja2 import Template
from xgrammar import Grammar, get_model_structural_tag
from xgrammar.testing import _is_grammar_accept_string as accepts

# The part of the template that writes a call.
TEMPLATE = Template(
    "<tool_call>\n<function={{ name }}>\n"
    "{% for key, value in arguments.items() %}<parameter={{ key }}>\n{{ value }}\n</parameter>\n"
    "{% endfor %}</function>\n</tool_call>"
)
schema = {"type": "object", "properties": {"city": {"type": "string"}}}
tools = [
    {"type": "function", "function": {"name": "weather", "parameters": schema}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
tag = get_model_structural_tag("qwen_3_coder", tools=tools, tool_choice="required", reasoning=False)
grammar = Grammar.from_structural_tag(tag)
full = TEMPLATE.render(name="weather", arguments={"city": "Graz"})
bare = TEMPLATE.render(name="now", arguments={})
seen = [
    ("with arguments, as the template writes it", accepts(grammar, full)),
    ("without, as the template writes it", accepts(grammar, bare)),
    ("without, with one more line break", accepts(grammar, bare.replace("now>\n", "now>\n\n"))),
]
for what, taken in seen:
    print(f"{what}: {taken}")
sys.exit([taken for _, taken in seen] != [True, False, True])
PYTHON
