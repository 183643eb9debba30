"""Numbers, words and colours of a page: three digits, characters that XML can hold, a fixed order of methods."""

from __future__ import annotations

import math
import re

import pytest

from drrho_clip.report.style import PALETTE, clean, css_class, figures, number, ordered, percent

DASH = "\N{EN DASH}"


class TestNumbersAndWords:
    def test_shares_are_written_in_per_cent(self) -> None:
        assert percent(0.5196) == "52.0\N{NO-BREAK SPACE}%"
        assert percent(math.nan) == DASH

    @pytest.mark.parametrize(
        ("value", "short", "full"),
        [
            (0.0, "0", "0.00"),
            (1.0, "1", "1.00"),
            (0.2281, "0.228", "0.228"),
            (-12.3456, "\N{MINUS SIGN}12.3", "\N{MINUS SIGN}12.3"),
            (123.4, "123", "123"),
            (12345.6, "12,346", "12,346"),
            (3.2e9, "3.2e9", "3.2e9"),
            (4e-7, "4e\N{MINUS SIGN}7", "4e\N{MINUS SIGN}7"),
            (math.inf, DASH, DASH),
        ],
    )
    def test_numbers_have_three_digits(self, value: float, short: str, full: str) -> None:
        assert (number(value), figures(value)) == (short, full)

    def test_characters_that_xml_cannot_hold_are_replaced(self) -> None:
        assert clean("a\x00b\x1bc\ud800d\ufffee\nf<&") == "a\ufffdb\ufffdc\ufffdd\ufffde\nf<&"

    def test_no_two_names_have_one_colour(self) -> None:
        # The charts are drawn with these colours, and each is then replaced by its name.
        assert len(set(PALETTE.values())) == len(PALETTE)

    def test_methods_have_a_fixed_order_and_colour(self) -> None:
        assert ordered(["siglip", "drrho", "clip", "siglip", "reference"]) == ["reference", "clip", "drrho", "siglip"]
        assert css_class("drrho") == "drrho"
        assert css_class("siglip") == css_class("siglip") != css_class("drrho")
        assert re.fullmatch("other-[0-3]", css_class('" onload="x'))
