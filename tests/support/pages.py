"""A page of the report, read as text: what it says, what it would load, and whether it is there for everyone."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Collects text, addresses and elements, and checks that every element is closed.

    Attributes:
        open: Elements that are not closed.
        addresses: What `src`, `srcset` and `href` name.
        words: Text between tags.
        unnamed: Elements that someone who does not see the page cannot make out: pictures without words, cells of a
            heading without a scope or without text, scrolled regions that no key reaches or nothing names.
        headings: Levels of headings in order.
        language: Of the page.
    """

    VOID = ("meta", "img", "br", "link", "source")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.unnamed: list[str] = []
        self.headings: list[int] = []
        self.language: str | None = None
        self._heading_cell: str | None = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.addresses += [value for name, value in attributes if name in ("src", "srcset", "href")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "html":
            self.language = given.get("lang")
        if tag == "img" and len(given.get("alt", "").split()) < 5:
            self.unnamed.append(f"img alt={given.get('alt')!r}")
        if tag == "th":
            self._heading_cell = ""
            if given.get("scope") not in ("col", "row"):
                self.unnamed.append("th without scope")
        if (given.get("class") == "scroll" or tag == "pre") and not ("tabindex" in given and given.get("aria-label")):
            self.unnamed.append(f"{tag} that scrolls")
        if len(tag) == 2 and tag[0] == "h" and tag[1].isdigit():
            self.headings.append(int(tag[1]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "th":
            if not self._heading_cell:
                self.unnamed.append("th without text")
            self._heading_cell = None

    def handle_data(self, data):
        self.words.append(" ".join(data.split()))
        if self._heading_cell is not None:
            self._heading_cell += data.strip()
