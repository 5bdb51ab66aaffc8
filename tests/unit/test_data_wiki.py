"""MediaWiki markup as a reader of the page would see it."""

import pytest

from nemo_minitron.data.wiki import plain_text


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Bold''' and ''italic'' and '''''both'''''.", "Bold and italic and both."),
        ("A [[river]], the [[Danube|blue one]], [[bank]]s.", "A river, the blue one, banks."),
        ("See [http://a.org the site] and [http://b.org].", "See the site and."),
        ("Salt &amp; pepper&nbsp;&ndash; 5&times;2.", "Salt & pepper – 5×2."),  # noqa: RUF001
        ("One<!-- never\nseen --> two.", "One two."),
        ("It is so.<ref>{{cite book|title=X|{{nested}}}}</ref> And<ref name=a/> so.", "It is so. And so."),
        ("{{Infobox|a={{b|c={{d}}}}|e=[[f]]}}\nText.", "Text."),
        ("Before.\n{| class=wikitable\n|-\n! h\n|-\n| a || {| \n| inner\n|}\n|}\nAfter.", "Before.\n\nAfter."),
        ("[[File:A.jpg|thumb|A [[caption]] with {{x}}]]\nText.[[Category:Things]]\n[[de:Sache]]", "Text."),
        ("[[:Category:Things|the category]] of [[wikt:word|words]]", "the category of words"),
        ("E = <math>m  c^2</math>, 10<sup>6</sup> m<sup>2</sup>, the 4<sup>th</sup>, H<sub>2</sub>O.",
         "E = $m c^2$, 10^6 m^2, the 4th, H2O."),
        ("Old ({{IPAc-en|x}}; {{lang|el|παλιό}}) {{nowrap|New York}} ({{lang-fr|vieux}}).",
         "Old (παλιό) New York (vieux)."),
        ("Plato ({{IPAc-en|p}}) was {{convert|5|to|6|ft|m}} or {{convert|2|m|abbr=on}}.",
         "Plato was 5 to 6 ft or 2 m."),
        ("{{As of|2014|lc=y}}, {{as of|1999|12}}.", "as of 2014, As of 1999."),
        ("* one\n* [[two]]\n** three\n# four\n* <ref>gone</ref>\n", "- one\n- two\n- three\n- four"),
        ("__NOTOC__\nText {{unknown}} , here.", "Text, here."),
        ("<div class='x'>In <span>a</span> box</div>", "In a box"),
        ("<gallery>\nA.jpg|x\n</gallery>Text.", "Text."),
        ("", ""),
    ],
)  # fmt: skip
def test_markup_becomes_what_a_reader_sees(markup, text):
    assert plain_text(markup) == text


def test_headings_stay_and_empty_or_linking_sections_go():
    markup = (
        "Lead.\n== History ==\n=== Early ===\nOld times.\n=== Pictures ===\n<gallery>a.jpg</gallery>\n"
        "== Data ==\n{| \n| x\n|}\n== See also ==\n* [[Other]]\n=== Even deeper ===\n* [[More]]\n"
        "== Legacy ==\nStill read.\n== References ==\n{{reflist}}\n"
    )
    assert plain_text(markup) == "Lead.\n\nHistory\n\nEarly\n\nOld times.\n\nLegacy\n\nStill read."


def test_namespaces_of_another_language_are_silent_too():
    markup = "[[Datei:A.jpg|mini|Bild]]Wien ist [[Stadt|eine Stadt]]."
    assert plain_text(markup, {"datei"}) == "Wien ist eine Stadt."


@pytest.mark.parametrize("markup", ["{{open", "[[open", "{| open\n| a", "<ref>open", "'''open", "}}]]|}", "=== ", "<"])
def test_unclosed_markup_does_not_break(markup):
    assert "Text" in plain_text(f"Text before.\n{markup}") or markup == "<ref>open"
