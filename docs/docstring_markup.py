"""Gives the docstrings, which have Sphinx's markup for roles and equations, to mkdocstrings.

mkdocs.yml names it. An equation, ``.. math::`` or ``:math:`x```, becomes MathML, which
browsers show without a script. ``:class:`UBN``` and the like become code, with a link where the
API page has what they name.
"""

import re
import textwrap
from html import escape

import griffe
from latex2mathml.converter import convert

_BLOCK = re.compile(r'^( *)\.\. math::\n((?:\n|\1 +.*(?:\n|$))+)', re.MULTILINE)
_ROLE = re.compile(r':(\w+):`~?([^`]+)`')
_LINKED = ('class', 'data', 'func', 'meth', 'mod')


class DocstringMarkup(griffe.Extension):
    """Rewrites every docstring that is shown."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Called by griffe for each module, class, function and attribute that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value, obj)


def to_markdown(text: str, obj: griffe.Object) -> str:
    """The docstring ``text`` of ``obj`` in Markdown."""

    def block(match: re.Match) -> str:
        lines = textwrap.dedent(match[2]).strip()
        return f'{match[1]}<div>{_mathml(lines, "block")}</div>\n\n'

    def role(match: re.Match) -> str:
        kind, name = match.groups()
        if kind == 'math':
            return f'<span>{_mathml(name, "inline")}</span>'
        if kind not in _LINKED:
            raise ValueError(f'{obj.path}: docs/docstring_markup.py does not know :{kind}:')
        try:
            target = obj.resolve(name)
        except griffe.NameResolutionError:  # a full path
            target = name
        code = f'<code>{escape(name)}</code>'
        return f'<autoref identifier="{escape(target)}" optional>{code}</autoref>'

    return _ROLE.sub(role, _BLOCK.sub(block, text))


def _mathml(latex: str, display: str) -> str:
    """On one line, in which Markdown finds nothing to change."""
    latex = ' '.join(latex.split()).replace(r'\Big', '')  # which the converter shows as text
    if '&' in latex:
        latex = rf'\begin{{split}}{latex}\end{{split}}'
    return convert(latex, display=display)
