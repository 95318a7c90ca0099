"""What is in a page: every address, every element, and whether elements close as they opened."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """What a page holds.

    addresses: what it loads. links: where a click leads. elements: in order. open: those not closed at its end.
    """

    VOID = ("meta", "img", "link", "br", "wbr", "input")

    def __init__(self, text):
        super().__init__()
        self.addresses, self.links, self.elements, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        named = self.links if tag == "a" else self.addresses
        named += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
