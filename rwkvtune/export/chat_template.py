"""Chat templates in Jinja, for programs that know no other."""

from __future__ import annotations

from rwkvtune.data.chat import LABELS, RWKVTemplate, Template

# What RWKVTemplate.pieces writes, and what of it is trained. A loop over the lines that are not
# blank takes the place of its regular expression, which Jinja has none of.
_RWKV = """\
{%- macro without_blank_lines(text) -%}
{%- for line in text.split('\\n') if line.strip(' \\t') -%}
{{- line }}{{ '' if loop.last else '\\n' -}}
{%- endfor -%}
{%- endmacro -%}
{%- set labels = LABELS -%}
{%- for message in messages -%}
{%- set text = message['content'].replace('\\r\\n', '\\n').strip() -%}
{%- if message['role'] != 'assistant' -%}
{{- labels[message['role']] + ': ' + without_blank_lines(text) + '\\n\\n' -}}
{%- else -%}
{{- 'Assistant:' -}}
{%- generation -%}
{%- if KEEPS_BLANK_LINES -%}
{{- ' ' + text + (eos_token if loop.last else '\\n\\n') -}}
{%- else -%}
{{- ' ' + without_blank_lines(text) + '\\n\\n' -}}
{%- endif -%}
{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""


def as_jinja(template: Template) -> str | None:
    """A template that transformers renders to the same text; None for one that has no such form."""
    if isinstance(template, RWKVTemplate):
        keeps = str(template.keeps_blank_lines).lower()
        return _RWKV.replace("KEEPS_BLANK_LINES", keeps).replace("LABELS", repr(LABELS))
    content = template.to_json()
    source: str | None = content.get("source")
    return source if content.get("kind") == "jinja" else None
