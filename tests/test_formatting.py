"""Texts from outside, escaped for the documents that they are written into."""

import pytest

from drelu_timm.formatting import escape_html, escape_latex, escape_markdown


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("dense_drelu, 8/255", "dense_drelu, 8/255"),
        ("-4 fell", "-4 fell"),
        ("a | b\nc", r"a \| b c"),
        ("<script>", "&lt;script>"),
        ("[x](javascript:y) `z` *b*", r"\[x\](javascript:y) \`z\` \*b\*"),
        ("AT&T &lt; &#60;", "AT&T &amp;lt; &amp;#60;"),
        ("# title", r"\# title"),
        ("--- title", r"\--- title"),
        ("1. first", r"1\. first"),
        ("> quote", r"\> quote"),
    ],
)
def test_markdown(text, escaped):
    assert escape_markdown(text) == escaped


def test_html():
    assert escape_html('<a href="x">\'&') == "&lt;a href=&quot;x&quot;&gt;&#x27;&amp;"


def test_latex():
    assert escape_latex("50 % of a_b\n\\input{x}") == r"50 \% of a\_b \textbackslash{}input\{x\}"
