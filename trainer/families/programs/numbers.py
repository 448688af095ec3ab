"""A program to break: statistics of measurements."""

# ruff: noqa: E501 - lines of programs, and their broken twins, stay whole
from trainer.families.shape import Bug, Program

NUMBERS = Program(
    name="numbers",
    title="statistics of measurements",
    about="Mean, median, percentiles and histograms of @thing@.",
    choices={
        "package": ("gauges", "metrics", "survey", "weather", "probe", "sampler"),
        "module": ("stats", "figures", "summary", "numbers_"),
        "thing": ("temperatures", "delays", "weights", "scores"),
    },
    source='''
        """Statistics of @thing@."""


        def mean(values):
            """The arithmetic mean. Raises ValueError without values."""
            if not values:
                raise ValueError("no @thing@")
            return sum(values) / len(values)


        def median(values):
            """The middle value; the mean of the two in the middle, if their number is even."""
            if not values:
                raise ValueError("no @thing@")
            ordered = sorted(values)
            half = len(ordered) // 2
            if len(ordered) % 2 == 1:
                return ordered[half]
            return (ordered[half - 1] + ordered[half]) / 2


        def clamp(value, low, high):
            """The value, or the bound that it passes."""
            return max(low, min(value, high))


        def histogram(values, width):
            """How many values in each bin, by the start of the bin."""
            counts = {}
            for value in values:
                start = value // width * width
                counts[start] = counts.get(start, 0) + 1
            return counts


        def moving(values, size):
            """Means of each `size` neighbours, as many as there are full windows."""
            return [mean(values[i : i + size]) for i in range(len(values) - size + 1)]


        def outliers(values, factor=2):
            """Values further from the median than `factor` times the mean distance from it, in order."""
            middle = median(values)
            typical = mean([abs(value - middle) for value in values])
            return [value for value in values if abs(value - middle) > factor * typical]


        def ranks(values):
            """The rank of each value, 1 for the largest; equal values share a rank."""
            ordered = sorted(values, reverse=True)
            return [ordered.index(value) + 1 for value in values]
        ''',
    visible='''
        from @package@.@module@ import histogram, mean


        def test_mean():
            assert mean([2, 4]) == 3


        def test_empty_histogram():
            assert histogram([], 5) == {}
        ''',
    hidden='''
        import pytest

        from @package@.@module@ import clamp, histogram, mean, median, moving, outliers, ranks


        def test_mean_is_no_whole_number():
            assert mean([1, 2]) == 1.5


        def test_mean_of_none():
            with pytest.raises(ValueError):
                mean([])


        def test_median_odd():
            assert median([9, 1, 5]) == 5


        def test_median_even():
            assert median([4, 1, 3, 10]) == 3.5


        def test_median_keeps_its_input():
            values = [3, 1, 2]
            median(values)
            assert values == [3, 1, 2]


        def test_clamp():
            assert [clamp(x, 0, 10) for x in (-3, 4, 12)] == [0, 4, 10]


        def test_histogram():
            assert histogram([1, 4, 5, 12, 14], 5) == {0: 2, 5: 1, 10: 2}


        def test_moving():
            assert moving([1, 2, 3, 4], 2) == [1.5, 2.5, 3.5]


        def test_moving_whole():
            assert moving([2, 4], 2) == [3]


        def test_outliers():
            assert outliers([1, 2, 3, 2, 40, 2]) == [40]


        def test_no_outliers():
            assert outliers([5, 5, 5]) == []


        def test_ranks():
            assert ranks([10, 30, 20, 30]) == [4, 1, 3, 1]
        ''',
    bugs=(
        Bug("whole-division", "wrong operator", "return sum(values) / len(values)", "return sum(values) // len(values)",
            "The mean of @thing@ loses what is behind the point.",
            ("test_mean_is_no_whole_number", "test_moving")),
        Bug("sorts-in-place", "API misuse", "ordered = sorted(values)\nhalf = len(ordered) // 2",
            "values.sort()\nordered = values\nhalf = len(ordered) // 2",
            "After asking for the median, my list of @thing@ is in another order.",
            ("test_median_keeps_its_input",)),
        Bug("unsorted", "API misuse", "ordered = sorted(values)\nhalf = len(ordered) // 2",
            "ordered = list(values)\nhalf = len(ordered) // 2",
            "The median depends on the order in which the @thing@ come.",
            ("test_median_odd", "test_median_even")),
        Bug("upper-middle", "missing edge case", "return (ordered[half - 1] + ordered[half]) / 2",
            "return ordered[half]", "With an even number of @thing@ the median is too large.", ("test_median_even",)),
        Bug("wrong-neighbour", "off by one", "return (ordered[half - 1] + ordered[half]) / 2",
            "return (ordered[half] + ordered[half - 2]) / 2",
            "With an even number of @thing@ the median is wrong.", ("test_median_even",)),
        Bug("no-check", "missing edge case", 'if not values:\n    raise ValueError("no @thing@")\nreturn sum(values) / len(values)',
            "return sum(values) / len(values)", "The mean of nothing ends in a ZeroDivisionError instead of a ValueError.",
            ("test_mean_of_none",)),
        Bug("last-window", "off by one",
            "return [mean(values[i : i + size]) for i in range(len(values) - size + 1)]",
            "return [mean(values[i : i + size]) for i in range(len(values) - size)]",
            "The last of the moving means is missing.", ("test_moving", "test_moving_whole")),
        Bug("overwrites", "wrong operator", "counts[start] = counts.get(start, 0) + 1", "counts[start] = 1",
            "Every bin of the histogram has a count of one.", ("test_histogram",)),
        Bug("small-default", "wrong default", "def outliers(values, factor=2):", "def outliers(values, factor=0):",
            "Almost everything is reported as an outlier.", ("test_outliers",)),
        Bug("ascending", "wrong comparison", "ordered = sorted(values, reverse=True)", "ordered = sorted(values)",
            "The largest value has the last rank instead of the first.", ("test_ranks",)),
        Bug("clamp-swapped", "wrong operator", "return max(low, min(value, high))", "return min(low, max(value, high))",
            "Every clamped value comes out as the lower bound.", ("test_clamp",)),
    ),
)  # fmt: skip
