"""A program to break: spans on a line."""

# ruff: noqa: E501 - lines of programs, and their broken twins, stay whole
from trainer.families.shape import Bug, Program

SPANS = Program(
    name="spans",
    title="spans on a line of whole numbers",
    about="Spans `(start, end)` of @thing@, end excluded: merged, measured, searched.",
    choices={
        "package": ("bookings", "timeline", "regions", "shifts", "reserve", "segments"),
        "module": ("spans", "ranges", "blocks", "slots"),
        "thing": ("bookings", "shifts", "regions", "rentals"),
    },
    source='''
        """Spans of @thing@: (start, end) with the end excluded."""


        def merge(spans):
            """Overlapping and touching spans joined, in order of their starts."""
            merged = []
            for start, end in sorted(spans):
                if merged and start <= merged[-1][1]:
                    last = merged.pop()
                    merged.append((last[0], max(last[1], end)))
                else:
                    merged.append((start, end))
            return merged


        def covered(spans):
            """How many whole numbers lie in at least one span."""
            return sum(end - start for start, end in merge(spans))


        def gaps(spans):
            """The spans between the merged spans."""
            merged = merge(spans)
            return [(merged[i][1], merged[i + 1][0]) for i in range(len(merged) - 1)]


        def contains(spans, point):
            """Whether a point lies in any span; ends are excluded."""
            return any(start <= point < end for start, end in spans)


        def split(span, size):
            """Pieces of at most `size`; the last one may be shorter."""
            start, end = span
            if size < 1:
                raise ValueError("size must be at least 1")
            return [(at, min(at + size, end)) for at in range(start, end, size)]


        def longest(spans):
            """The longest merged span; the first of several; None without any."""
            merged = merge(spans)
            if not merged:
                return None
            return max(merged, key=lambda span: span[1] - span[0])
        ''',
    visible='''
        from @package@.@module@ import contains, covered, merge


        def test_nothing():
            assert merge([]) == []
            assert covered([]) == 0


        def test_apart():
            assert merge([(5, 6), (1, 2)]) == [(1, 2), (5, 6)]
            assert contains([(1, 4)], 2)
        ''',
    hidden='''
        import pytest

        from @package@.@module@ import contains, covered, gaps, longest, merge, split


        def test_overlapping():
            assert merge([(1, 4), (2, 6)]) == [(1, 6)]


        def test_touching():
            assert merge([(1, 3), (3, 5)]) == [(1, 5)]


        def test_inside():
            assert merge([(1, 9), (2, 3)]) == [(1, 9)]


        def test_covered():
            assert covered([(0, 3), (1, 4), (10, 11)]) == 5


        def test_gaps():
            assert gaps([(7, 8), (0, 2), (3, 4)]) == [(2, 3), (4, 7)]


        def test_no_gaps():
            assert gaps([(0, 2)]) == []


        def test_contains_start():
            assert contains([(2, 5)], 2)


        def test_contains_not_end():
            assert not contains([(2, 5)], 5)


        def test_split():
            assert split((0, 7), 3) == [(0, 3), (3, 6), (6, 7)]


        def test_split_size():
            with pytest.raises(ValueError):
                split((0, 7), 0)


        def test_longest():
            assert longest([(0, 2), (5, 9), (20, 22)]) == (5, 9)


        def test_longest_of_none():
            assert longest([]) is None
        ''',
    bugs=(
        Bug("touching", "off by one", "if merged and start <= merged[-1][1]:", "if merged and start < merged[-1][1]:",
            "Two @thing@ where one starts when the other ends are not joined into one.", ("test_touching",)),
        Bug("shrinks", "wrong operator", "merged.append((last[0], max(last[1], end)))",
            "merged.append((last[0], min(last[1], end)))",
            "When @thing@ overlap, the joined one ends too early.", ("test_overlapping", "test_inside", "test_covered", "test_touching")),
        Bug("last-wins", "missing edge case", "merged.append((last[0], max(last[1], end)))",
            "merged.append((last[0], end))",
            "A short one of the @thing@ that lies inside of a long one cuts the long one off.", ("test_inside",)),
        Bug("gap-range", "off by one",
            "return [(merged[i][1], merged[i + 1][0]) for i in range(len(merged) - 1)]",
            "return [(merged[i][1], merged[i + 1][0]) for i in range(len(merged) - 2)]",
            "The last gap is missing from the list of gaps.", ("test_gaps",)),
        Bug("end-included", "wrong comparison", "return any(start <= point < end for start, end in spans)",
            "return any(start <= point <= end for start, end in spans)",
            "A point right at the end is said to be inside.", ("test_contains_not_end",)),
        Bug("start-excluded", "wrong comparison", "return any(start <= point < end for start, end in spans)",
            "return any(start < point < end for start, end in spans)",
            "A point right at the start is said to be outside.", ("test_contains_start",)),
        Bug("piece-too-long", "missing edge case", "return [(at, min(at + size, end)) for at in range(start, end, size)]",
            "return [(at, at + size) for at in range(start, end, size)]",
            "The last piece of a split reaches over the end.", ("test_split",)),
        Bug("empty-longest", "missing edge case", "if not merged:\n    return None\n", "",
            "Asking for the longest of no @thing@ at all ends in a ValueError.", ("test_longest_of_none",)),
    ),
)  # fmt: skip
