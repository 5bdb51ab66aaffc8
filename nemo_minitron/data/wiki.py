"""MediaWiki markup to readable text: mwparserfromhell makes the tree, and here is decided what each node says.

Kept: prose, headings, list items (`- `), link texts, formulas (as TeX between dollars), and the few templates that
carry words of the sentence around them (`lang`, `convert`, `nowrap`, `as of`...). Left out: references, tables,
pictures with their captions, all other templates, comments, categories, and the sections that only list links.
"""

import html
import re
from collections.abc import Iterable
from typing import Any

import mwparserfromhell
from mwparserfromhell.nodes import ExternalLink, Heading, HTMLEntity, Tag, Template, Text, Wikilink

FILE_NAMESPACES = frozenset({"file", "image", "media", "category"})
"""Lower-case names of namespaces whose links are no part of the sentence; a dump adds those of its own language."""

# fmt: off
_LINK_SECTIONS = frozenset(
    {
        "see also", "references", "external links", "further reading", "notes", "footnotes", "bibliography",
        "sources", "citations", "notes and references", "references and notes", "notes and citations",
        "works cited", "literature cited", "cited sources", "general references",
    }
)
_SILENT_TAGS = frozenset(
    {
        "ref", "references", "table", "gallery", "timeline", "score", "imagemap", "hiero", "graph",
        "inputbox", "templatedata", "categorytree", "section", "mapframe", "includeonly", "style", "script",
    }
)
_FORMULA_TAGS = frozenset({"math", "chem", "ce"})
_FIRST_ARGUMENT = frozenset(
    {
        "nowrap", "small", "smaller", "big", "nobold", "noitalic", "sc", "quote", "blockquote", "cquote",
        "vanchor", "nihongo", "tooltip", "abbr", "val", "keypress", "angbr", "chem2", "ipa", "oldstyledate",
    }
)
# fmt: on
_LAST_ARGUMENT = frozenset({"lang", "transl", "transliteration", "visible anchor"})
_JOINED_ARGUMENTS = {"chem": "", "hlist": ", ", "frac": "/", "sfrac": "/", "fraction": "/"}
_RANGE_WORDS = frozenset({"to", "and", "or", "by", "x", "-", "–", "to(-)"})  # noqa: RUF001
_BARE = {"nbsp": " ", "spaces": " ", "'s": "'s", "'": "'", "ndash": "–", "mdash": "—", "snd": " – "}  # noqa: RUF001

# Stands where something was left out, so that the punctuation around the hole, and only that, can be mended.
_HOLE = "\x00"
_HTML_NAMES = (
    "blockquote|div|span|center|small|big|sub|sup|p|br|font|poem|nowiki|onlyinclude|noinclude|ref|i|b|u|s|li|ul|ol"
)
_INTERLANGUAGE = re.compile(r"(?:[a-z]{2,3}|simple)(?:-[a-z]+)*")
_MENDING = (
    (re.compile(r"[\xa0\u2000-\u200a\u202f]"), " "),
    (re.compile(r"[\xad\u200b-\u200f\u2060\ufeff]"), ""),
    (re.compile(r"__[A-Z]+__"), ""),
    # What the parser could not close stays in the text as it was written.
    (re.compile(r"<ref\b[^<>]*>[^\n]*?(?:</ref>|$)", re.MULTILINE), _HOLE),
    (re.compile(rf"</?(?:{_HTML_NAMES})\b[^<>\n]*>"), ""),
    (re.compile(r"^[ \t]*(?:\[\[)?(?:File|Image):[^\n]*\|.*$", re.MULTILINE), ""),
    (re.compile(r"^[ \t]*(?:\{\||\|).*$|^![^\n]*(?:\|\||!!|\w=\"?).*$", re.MULTILINE), ""),
    (re.compile(r"'{2,}|\[\[|\]\]|\{\{|\}\}"), ""),
    (re.compile(r"[(\[][\s,;:/·]*(?:\x00[\s,;:/·]*)+[)\]]"), _HOLE),
    (re.compile(r"([(\[])[\s,;:]*(?:\x00[\s,;:]*)+"), r"\1"),
    (re.compile(r"[\s,;:]*(?:\x00[\s,;:]*)+([)\]])"), r"\1"),
    (re.compile(r"[ \t]*(?:\x00[ \t]*)+(?=[,.;:!?])"), ""),
    (re.compile(r"^[ \t]*(?:- |\x00|[ \t])*\x00(?:- |\x00|[ \t])*$", re.MULTILINE), ""),
    (re.compile(r"\x00+"), ""),
    (re.compile(r"[ \t]+"), " "),
    (re.compile(r"^ | $", re.MULTILINE), ""),
    (re.compile(r"^(?:- ?){2,}", re.MULTILINE), "- "),
    (re.compile(r"^[-*]?$", re.MULTILINE), ""),
    (re.compile(r"\n{3,}"), "\n\n"),
)


def plain_text(markup: str, namespaces: Iterable[str] = FILE_NAMESPACES) -> str:
    """Readable text of a page; paragraphs and headings are divided by blank lines.

    Args:
        markup: MediaWiki source of the page.
        namespaces: Lower-case namespace names whose links are left out complete.
    """
    silent = frozenset(namespaces)
    sections: list[tuple[int, str, list[str]]] = [(0, "", [])]
    for node in mwparserfromhell.parse(markup).nodes:
        if isinstance(node, Heading):
            sections.append((node.level, _mend(_render(node.title.nodes, silent)), []))
        else:
            sections[-1][2].append(_render_node(node, silent))
    return _join([(level, title, _mend("".join(parts))) for level, title, parts in sections])


def _join(sections: list[tuple[int, str, str]]) -> str:
    """Put sections together, leaving out link lists and headings that nothing stands below."""
    said: list[tuple[int, str, str]] = []
    silent_below: int | None = None
    for level, title, body in sections:
        if silent_below is not None and level > silent_below:
            continue
        silent_below = level if title.lower() in _LINK_SECTIONS else None
        if silent_below is None:
            said.append((level, title, body))
    blocks: list[str] = []
    deepest = 0  # level of the section that follows, if it was kept: 0 when there is none
    for level, title, body in reversed(said):
        if body or deepest > level:
            blocks += [block for block in (body, title) if block]
            deepest = level
    return "\n\n".join(reversed(blocks))


def _mend(text: str) -> str:
    text = html.unescape(text)
    for pattern, replacement in _MENDING:
        text = pattern.sub(replacement, text)
    return text.strip()


def _render(nodes: Iterable[Any], silent: frozenset[str]) -> str:
    return "".join(_render_node(node, silent) for node in nodes)


def _render_node(node: Any, silent: frozenset[str]) -> str:  # noqa: PLR0911 one return for each kind of node
    if isinstance(node, Text):
        return str(node.value)
    if isinstance(node, HTMLEntity):
        return str(node.normalize())
    if isinstance(node, Wikilink):
        return _render_link(node, silent)
    if isinstance(node, Tag):
        return _render_tag(node, silent)
    if isinstance(node, Template):
        return _render_template(node, silent)
    if isinstance(node, ExternalLink):
        return _render(node.title.nodes, silent) if node.title is not None else _HOLE
    return _HOLE


def _render_link(link: Any, silent: frozenset[str]) -> str:
    title = str(link.title).strip()
    namespace, colon, _ = title.partition(":")
    if colon and namespace.strip().lower() in silent:
        # A floating picture stands between paragraphs, an icon inside one.
        return "\n\n" if link.text is not None and link.text.startswith(("thumb", "frame")) else _HOLE
    if link.text is not None:
        return _render(link.text.nodes, silent)
    if colon and _INTERLANGUAGE.fullmatch(namespace):
        return _HOLE
    return title.removeprefix(":")


def _render_tag(tag: Any, silent: frozenset[str]) -> str:
    name = str(tag.tag).strip().lower()
    if tag.wiki_markup in ("*", "#"):
        return "- "
    if name in _SILENT_TAGS:
        return _HOLE
    if name in ("br", "hr"):
        return "\n"
    if tag.contents is None:
        return ""
    if name in _FORMULA_TAGS:
        return f"${' '.join(str(tag.contents).split())}$"
    text = _render(tag.contents.nodes, silent)
    # 10<sup>6</sup> must not become 106.
    return f"^{text}" if name == "sup" and text[:1] in "0123456789-−+" and text else text  # noqa: RUF001


def _render_template(template: Any, silent: frozenset[str]) -> str:  # noqa: PLR0911
    name = str(template.name).strip().lower().replace("_", " ")
    if name in _BARE:
        return _BARE[name]
    words = [_render(item.value.nodes, silent).strip() for item in template.params if not item.showkey]
    if not words:
        return _HOLE
    if name in ("convert", "cvt"):
        ranged = len(words) > 3 and words[1] in _RANGE_WORDS
        return " ".join(words[:4] if ranged else words[:2])
    if name == "as of":
        return f"{'as' if template.has('lc') else 'As'} of {words[0]}"
    if name in _JOINED_ARGUMENTS:
        return _JOINED_ARGUMENTS[name].join(words)
    if name in _LAST_ARGUMENT:
        return words[-1]
    return words[0] if name in _FIRST_ARGUMENT or name.startswith("lang-") else _HOLE
