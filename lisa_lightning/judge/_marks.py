"""Removal of layout marks, so that a judge by wording reads words alone. Start at `without_marks`."""

import html
import re
import unicodedata
from typing import Final

# A reference without a semicolon remains: "AT&T" and "a &not b" are words.
_REFERENCE: Final = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,30});")
# Invisible characters, such as a soft hyphen, and the selector that turns a character into an emoji.
# The set is smaller than that of normal_form because the published verdicts were measured with it.
_INVISIBLE: Final = re.compile("[\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe00-\ufe0f\ufeff]")
_BLANK: Final = re.compile("[\t\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_LINE_END: Final = re.compile("\r\n?|[\u0085\u2028\u2029]")
# Letters that are bold or italic by themselves, and full-width ones.
_STYLED: Final = re.compile("[\U0001d400-\U0001d7ff\uff01-\uff5e]+")
_APOSTROPHE: Final = re.compile("[\u2018\u2019\u201b\u2032\u02b9\u02bb\u02bc\u02c8\u00b4\u05f3\ua78c]")
_GRAVE: Final = re.compile(
    r"(?<![\w`*~])([a-z]*n(?=`t)|i|you|he|she|it|we|they|that|there)`(?=(?:t|m|re|ve|ll|d|s)\b(?!`))", re.I
)
_HYPHEN: Final = re.compile("[\u2010\u2011]")
_ESCAPE: Final = re.compile(r"\\(?=[!-/:-@\[-`{-~])|\\$", re.MULTILINE)
# HTML elements that only mark words, and those that begin a line. Other elements may be an answer's subject.
_INLINE: Final = (
    "a|abbr|acronym|b|bdi|bdo|big|center|cite|code|del|dfn|em|font|i|ins|kbd|mark|q|s|samp|small|span|strike|strong|"
    "sub|sup|tt|u|var"
)
_BLOCK: Final = (
    "article|aside|blockquote|body|br|caption|dd|details|div|dl|dt|footer|h[1-6]|header|hr|html|main|ol|p|pre|section|"
    "summary|table|tbody|td|tfoot|th|thead|tr|ul"
)
_TAG_END: Final = r"(?:\s[^<>]{0,300})?\s*/?>"
_MARKED: Final = re.compile(rf"</?(?:{_INLINE}){_TAG_END}|</li{_TAG_END}", re.IGNORECASE)
_LINES: Final = re.compile(rf"</?(?:{_BLOCK}){_TAG_END}", re.IGNORECASE)
_LIST_ITEM: Final = re.compile(rf"<li{_TAG_END}", re.IGNORECASE)
_LINK: Final = re.compile(r"!?\[([^\[\]\n]{1,300})\]\([^()\s]{0,2000}(?:\s+[\"'][^\"'\n]{0,300}[\"'])?\)")
# A code fence with its language, a horizontal rule, or the line under a title.
_ONLY_MARKS: Final = re.compile(r"^[ \t>]*(?:(?:`{3,}|~{3,})[ \t]*[\w+#.-]*[ \t]*|(?:[-_*=] *){3,})$", re.MULTILINE)
_LINE_MARKS: Final = re.compile(r"^[ \t]*(?:(?:>|#{1,6}|\|)[ \t]*)+", re.MULTILINE)
_BULLET: Final = re.compile(
    r"^([ \t]*)(?:[*_~`]{0,3}[+*\u2022\u2023\u25aa\u25cf\u25e6\u2043\u00b7][*_~`]{0,3}[ \t]+)(?=\S)", re.MULTILINE
)
_INLINE_MARKS: Final = re.compile(r"[*_`~]+|={2,}|\|{2,}|\+{2,}|[ \t]#+[ \t]*$", re.MULTILINE)
_ITEM: Final = re.compile("\\s*(?:(?:[-\u2013\u2014]|\\d{1,3}[.)]|\\(\\d{1,3}\\)|\\[[ x]\\])\\s+){1,3}", re.IGNORECASE)


def without_marks(text: str) -> str:
    """Return a text without Markdown, HTML and typography, and without a list marker at its beginning.

    See `strip_layout` for the treatment of each mark.
    """
    return strip_item_marker(strip_layout(text))


def strip_layout(text: str) -> str:
    """Return a text without Markdown, HTML and typography, in which list items begin with `- ` or their number.

    - Bold, italic, struck, code, linked or escaped words become the plain words.
    - Marks at the beginning of a line (heading, quotation, table) and lines of marks alone are removed.
    - Markers are removed if the entire text is a list.
    - Apostrophes and blanks of any kind become those of a keyboard.
    """
    text = _to_keyboard(_REFERENCE.sub(lambda reference: html.unescape(reference[0]), text))
    text = _MARKED.sub("", _LINES.sub("\n", _LIST_ITEM.sub("\n- ", text)))
    text = _LINE_MARKS.sub("", _ONLY_MARKS.sub("", _LINK.sub(r"\1", _ESCAPE.sub("", text))))
    text = _INLINE_MARKS.sub("", _BULLET.sub(r"\1- ", text))
    lines = [line for line in text.split("\n") if line.strip()]
    # If every line is an item, no text introduces the list: the markers are layout of the answer itself.
    return "\n".join(map(strip_item_marker, lines)) if all(map(_ITEM.match, lines)) else text


def strip_item_marker(text: str) -> str:
    """Return a text of `strip_layout` without a list marker at its beginning."""
    item = _ITEM.match(text)
    return text[item.end() :] if item else text


def _to_keyboard(text: str) -> str:
    """Return a text with straight apostrophes, plain blanks and letters, and no invisible characters."""
    text = _BLANK.sub(" ", _LINE_END.sub("\n", _INVISIBLE.sub("", text)))
    text = _STYLED.sub(lambda letters: unicodedata.normalize("NFKC", letters[0]), text)
    return _GRAVE.sub(r"\1'", _APOSTROPHE.sub("'", _HYPHEN.sub("-", text)))
