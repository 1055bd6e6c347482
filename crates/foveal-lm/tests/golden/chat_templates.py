"""Writes chat_templates.json: what Jinja2 makes of real chat templates, run as transformers runs them.

    python chat_templates.py FOLDER_OF_TEMPLATES > chat_templates.json        (needs jinja2)

The templates are those that llama.cpp keeps in models/templates (the source package of llama-cpp-python 0.3.36). A
rendering is null where the template refuses the conversation.
"""

import datetime
import json
import pathlib
import re
import sys

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

NOW = datetime.datetime(2026, 11, 24, 17, 5, 9)
MARKS = {"bos_token": "<BOS>", "eos_token": "<EOS>"}
ASK = {"role": "user", "content": "  Which rivers cross Paris?\n"}
ANSWER = {"role": "assistant", "content": "The Seine \"alone\" does."}
MORE = {"role": "user", "content": "Café <b>& more</b>?"}
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = [[ASK], [SYSTEM, ASK, ANSWER, MORE]]


def raise_exception(message):
    raise ValueError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(source, messages):
    source = re.sub(r"(\{%-?\s*)generation(\s*-?%\})", r"\1if true\2", source)
    source = re.sub(r"(\{%-?\s*)endgeneration(\s*-?%\})", r"\1endif\2", source)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = NOW.strftime
    try:
        return environment.from_string(source).render(messages=messages, add_generation_prompt=True, **MARKS)
    except Exception as error:
        print("refused:", error, file=sys.stderr)
        return None


folder = pathlib.Path(sys.argv[1])
out = {}
for path in sorted(folder.glob("*.jinja")):
    source = path.read_text(encoding="utf-8")
    out[path.stem] = [render(source, messages) for messages in CONVERSATIONS]
json.dump({"conversations": CONVERSATIONS, "renderings": out}, sys.stdout, ensure_ascii=False, indent=0)
print()
