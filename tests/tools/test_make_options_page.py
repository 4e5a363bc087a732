"""docs/options.md says what the programs do: it is made from their own tables."""

from __future__ import annotations

from tools.make_options_page import PAGE, page


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tools/make_options_page.py"
