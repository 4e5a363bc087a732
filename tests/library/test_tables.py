"""Columns are as wide as what is in them."""

from library.tables import table


def test_a_table_is_as_wide_as_its_widest_cells():
    assert table([("a", "1"), ("bbb", "22")], ("x", "y")) == ["x     y", "a     1", "bbb  22"]


def test_columns_on_the_left_leave_no_spaces_at_the_end():
    assert table([("a", "b"), ("a", "")], ("x", "long"), left=(0, 1)) == ["x  long", "a  b", "a"]
