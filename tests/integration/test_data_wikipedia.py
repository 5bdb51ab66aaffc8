"""The texts of the demo: a real Wikipedia dump out of a package, read and cleaned."""

import re

import pytest

from nemo_minitron.data.assets import resolve
from nemo_minitron.data.documents import read_documents

DUMP = (
    "package:gensim==4.4.0/gensim/test/test_data/"
    "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    "#sha256=a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
)
LEFTOVERS = re.compile(r"\[\[|\]\]|\{\{|\}\}|\{\||</?ref|<!--|&nbsp;|'''|\|thumb|\bcolspan=|^\s*\|", re.MULTILINE)


@pytest.mark.model
def test_articles_come_out_whole_and_clean():
    articles = {document.id.rsplit(":", 1)[-1]: document.text for document in read_documents(resolve(DUMP))}
    assert len(articles) == 106, "pages of namespace 0 that are no redirects"
    assert sum(map(len, articles.values())) == pytest.approx(2.83e6, rel=0.02)
    dirty = {title: found for title, text in articles.items() if (found := LEFTOVERS.findall(text))}
    assert not dirty
    # As the page reads in a browser, without its infobox, notes, pronunciation and pictures.
    assert articles["Anarchism"].startswith(
        "Anarchism\n\nAnarchism is a political philosophy that advocates self-governed societies based on voluntary "
        "institutions. These are often described as stateless societies,"
    )
    assert "\n\nEtymology and terminology\n\nThe term anarchism is a compound word" in articles["Anarchism"]
    assert "(from ἄναρχος, anarchos, meaning" in articles["Anarchism"]
    assert not re.search(r"\n(References|External links|See also)\n", articles["Anarchism"])
