"""A program to break: words of a text."""

# ruff: noqa: E501 - lines of programs, and their broken twins, stay whole
from trainer.families.shape import Bug, Program

WORDS = Program(
    name="words",
    title="words of a text",
    about="Counts, wraps and shortens @thing@.",
    choices={
        "package": ("prose", "texts", "copyedit", "reader_", "press", "letters"),
        "module": ("words", "text", "layout", "wording"),
        "thing": ("headlines", "letters", "notes", "captions"),
    },
    source='''
        """Words of @thing@."""

        import re


        def words(text):
            """Words in lower case; an apostrophe belongs to its word."""
            return re.findall(r"[a-z0-9']+", text.lower())


        def common(text, count=3):
            """The most frequent words, the more frequent first, then by name."""
            found = {}
            for word in words(text):
                found[word] = found.get(word, 0) + 1
            return sorted(found, key=lambda word: (-found[word], word))[:count]


        def shorten(text, width, mark="..."):
            """At most `width` letters; what was cut off is shown by the mark."""
            if len(text) <= width:
                return text
            if width < len(mark):
                raise ValueError("no room for the mark")
            return text[: width - len(mark)].rstrip() + mark


        def wrap(text, width):
            """Lines of at most `width` letters; a longer word has a line of its own."""
            lines, line = [], ""
            for word in text.split():
                if line and len(line) + 1 + len(word) > width:
                    lines.append(line)
                    line = word
                else:
                    line = f"{line} {word}" if line else word
            if line:
                lines.append(line)
            return lines


        def slug(title, seen=None):
            """A name for addresses; one that is in `seen` gets a number. `seen` learns it."""
            seen = set() if seen is None else seen
            base = "-".join(words(title.replace("'", ""))) or "untitled"
            name, number = base, 2
            while name in seen:
                name = f"{base}-{number}"
                number += 1
            seen.add(name)
            return name


        def initials(name):
            """The first letters of all parts, also those with a hyphen."""
            return "".join(part[0].upper() for part in re.split(r"[ -]+", name.strip()) if part)
        ''',
    visible='''
        from @package@.@module@ import shorten, words


        def test_words():
            assert words("Big Red") == ["big", "red"]
            assert shorten("short", 10) == "short"
        ''',
    hidden='''
        import pytest

        from @package@.@module@ import common, initials, shorten, slug, words, wrap


        def test_apostrophe():
            assert words("Don't go, 2 cats!") == ["don't", "go", "2", "cats"]


        def test_common():
            assert common("b a b c a b d", 2) == ["b", "a"]


        def test_common_ties():
            assert common("z y x y x z", 3) == ["x", "y", "z"]


        def test_shorten():
            assert shorten("a long sentence", 9) == "a long..."


        def test_shorten_exactly():
            assert shorten("exact", 5) == "exact"


        def test_shorten_no_room():
            with pytest.raises(ValueError):
                shorten("sentence", 2)


        def test_wrap():
            assert wrap("aa bb cc dd", 5) == ["aa bb", "cc dd"]


        def test_wrap_last_line():
            assert wrap("aa bb cc", 5) == ["aa bb", "cc"]


        def test_wrap_long_word():
            assert wrap("a enormous b", 4) == ["a", "enormous", "b"]


        def test_wrap_long_word_at_first():
            assert wrap("enormous b", 4) == ["enormous", "b"]


        def test_wrap_nothing():
            assert wrap("  ", 4) == []


        def test_slug():
            assert slug("It's  a Title!") == "its-a-title"


        def test_slug_twice():
            seen = set()
            assert [slug("a b", seen) for _ in range(3)] == ["a-b", "a-b-2", "a-b-3"]


        def test_slugs_apart():
            slug("c d")
            assert slug("c d") == "c-d"


        def test_slug_of_nothing():
            assert slug("???") == "untitled"


        def test_initials():
            assert initials("anna-maria  von berg ") == "AMVB"
        ''',
    bugs=(
        Bug("apostrophes", "API misuse", 'return re.findall(r"[a-z0-9\']+", text.lower())',
            'return re.findall(r"[a-z0-9]+", text.lower())', "Words like don't are cut in two.", ("test_apostrophe",)),
        Bug("ascending", "wrong comparison",
            "return sorted(found, key=lambda word: (-found[word], word))[:count]",
            "return sorted(found, key=lambda word: (found[word], word))[:count]",
            "The rarest words are reported as the most common ones.", ("test_common",)),
        Bug("ties-backwards", "wrong comparison",
            "return sorted(found, key=lambda word: (-found[word], word))[:count]",
            "return sorted(found, key=lambda word: (found[word], word), reverse=True)[:count]",
            "Words that are equally common come in the wrong order.", ("test_common_ties",)),
        Bug("too-long", "off by one", "return text[: width - len(mark)].rstrip() + mark",
            "return text[:width].rstrip() + mark", "A shortened text is longer than it may be.", ("test_shorten",)),
        Bug("too-early", "off by one", "if len(text) <= width:", "if len(text) < width:",
            "A text that fits exactly is shortened nevertheless.", ("test_shorten_exactly",)),
        Bug("no-room", "swallowed exception", 'if width < len(mark):\n    raise ValueError("no room for the mark")',
            "if width < len(mark):\n    return text",
            "A text that cannot be shortened comes back whole, although it is too long.", ("test_shorten_no_room",)),
        Bug("narrow", "wrong comparison", "if line and len(line) + 1 + len(word) > width:",
            "if line and len(line) + 1 + len(word) >= width:",
            "Lines that would fit exactly are broken.", ("test_wrap", "test_wrap_last_line")),
        Bug("empty-line", "missing edge case", "if line and len(line) + 1 + len(word) > width:",
            "if len(line) + 1 + len(word) > width:",
            "A long word at the start gives an empty line before it.", ("test_wrap_long_word_at_first",)),
        Bug("last-line", "missing edge case", "if line:\n    lines.append(line)\nreturn lines", "return lines",
            "The last line of the @thing@ is missing.",
            ("test_wrap", "test_wrap_last_line", "test_wrap_long_word", "test_wrap_long_word_at_first")),
        Bug("always-last", "missing edge case", "if line:\n    lines.append(line)\nreturn lines",
            "lines.append(line)\nreturn lines", "An empty text becomes one empty line.", ("test_wrap_nothing",)),
        Bug("mutable-default", "mutable default",
            "def slug(title, seen=None):\n"
            '    """A name for addresses; one that is in `seen` gets a number. `seen` learns it."""\n'
            "    seen = set() if seen is None else seen",
            "def slug(title, seen=set()):\n"
            '    """A name for addresses; one that is in `seen` gets a number. `seen` learns it."""',
            "The same title gets a number, although it is for another site.", ("test_slugs_apart",)),
        Bug("falsy-seen", "API misuse", "seen = set() if seen is None else seen", "seen = seen or set()",
            "The first title is forgotten, so the second one gets the same name.", ("test_slug_twice",)),
        Bug("first-number", "off by one", "name, number = base, 2", "name, number = base, 1",
            "The second of two equal titles gets the number 1.", ("test_slug_twice",)),
        Bug("no-name", "missing edge case", 'base = "-".join(words(title.replace("\'", ""))) or "untitled"',
            'base = "-".join(words(title.replace("\'", "")))', "A title of signs only gets an empty name.",
            ("test_slug_of_nothing",)),
        Bug("empty-part", "missing edge case",
            'return "".join(part[0].upper() for part in re.split(r"[ -]+", name.strip()) if part)',
            'return "".join(part[0].upper() for part in name.split(" "))',
            "Two spaces in a name are an IndexError.", ("test_initials",)),
    ),
)  # fmt: skip
