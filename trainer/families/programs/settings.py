"""A program to break: settings from text."""

# ruff: noqa: E501 - lines of programs, and their broken twins, stay whole
from trainer.families.shape import Bug, Program

SETTINGS = Program(
    name="settings",
    title="settings from text",
    about="Reads `name = value` lines with sections, comments and quotes for @thing@.",
    choices={
        "package": ("conf", "options", "prefs", "knobs", "setup_", "tuning"),
        "module": ("settings", "reader", "parse", "loader"),
        "thing": ("a printer", "a robot", "a server", "a lamp"),
    },
    source='''
        """Settings of @thing@, from text."""


        class Malformed(ValueError):
            """A line that is no setting; it says which one."""


        def parse(text, defaults=None):
            """Settings by name; those of a section are named section.name. Raises Malformed."""
            found = dict(defaults or {})
            section = ""
            for number, line in enumerate(text.splitlines(), start=1):
                line = without_comment(line).strip()
                if not line:
                    continue
                if line.startswith("[") and line.endswith("]"):
                    section = line[1:-1].strip() + "."
                    continue
                name, equals, value = line.partition("=")
                if not equals:
                    raise Malformed(f"line {number}: {line}")
                found[section + name.strip()] = typed(value.strip())
            return found


        def without_comment(line):
            """A line up to the first # that is not within quotes."""
            quoted = False
            for place, letter in enumerate(line):
                if letter == '"':
                    quoted = not quoted
                if letter == "#" and not quoted:
                    return line[:place]
            return line


        def typed(value):
            """true and false, whole numbers, text in quotes, lists with commas, or plain text."""
            if value in ("true", "false"):
                return value == "true"
            if value.lstrip("-").isdigit():
                return int(value)
            if len(value) >= 2 and value[0] == value[-1] == '"':
                return value[1:-1]
            if "," in value:
                return [typed(part.strip()) for part in value.split(",")]
            return value


        def dump(settings):
            """Text that `parse` reads back, sorted by name, without sections."""
            return "".join(f"{name} = {shown(settings[name])}\\n" for name in sorted(settings))


        def shown(value):
            """A value as it is written."""
            if isinstance(value, bool):
                return "true" if value else "false"
            if isinstance(value, list):
                return ", ".join(shown(part) for part in value)
            if isinstance(value, int):
                return str(value)
            return f'"{value}"'
        ''',
    visible='''
        from @package@.@module@ import parse


        def test_one():
            assert parse("name = value") == {"name": "value"}
            assert parse("name = other")["name"] == "other"
        ''',
    hidden='''
        import pytest

        from @package@.@module@ import Malformed, dump, parse, typed, without_comment


        def test_section():
            assert parse("a = 1\\n[net]\\nport = 80\\n") == {"a": 1, "net.port": 80}


        def test_two_sections():
            assert parse("[a]\\nx = 1\\n[ b ]\\nx = 2") == {"a.x": 1, "b.x": 2}


        def test_equals_in_value():
            assert parse("formula = a=b") == {"formula": "a=b"}


        def test_comment():
            assert without_comment("a = 1 # one # more") == "a = 1 "


        def test_comment_in_quotes():
            assert parse('colour = "#fff" # white') == {"colour": "#fff"}


        def test_empty_lines():
            assert parse("\\n  \\n# only this\\na = 1\\n") == {"a": 1}


        def test_malformed():
            with pytest.raises(Malformed, match="line 3"):
                parse("a = 1\\n\\nrubbish\\n")


        def test_defaults():
            defaults = {"a": 1, "b": 2}
            assert parse("b = 3", defaults) == {"a": 1, "b": 3}
            assert defaults == {"a": 1, "b": 2}


        def test_parses_share_nothing():
            parse("a = 1")
            assert parse("b = 2") == {"b": 2}


        def test_booleans():
            assert [typed("true"), typed("false")] == [True, False]


        def test_negative():
            assert typed("-12") == -12


        def test_list():
            assert typed("1, two, true") == [1, "two", True]


        def test_comma_in_quotes():
            assert typed('"a, b"') == "a, b"


        def test_one_quote():
            assert typed('"') == '"'


        def test_round_trip():
            settings = {"b": True, "a": "x, y", "c": [1, "z"], "d": -4}
            assert parse(dump(settings)) == settings


        def test_dump_is_sorted():
            assert dump({"b": 1, "a": False}) == "a = false\\nb = 1\\n"
        ''',
    bugs=(
        Bug("split", "API misuse",
            'name, equals, value = line.partition("=")', 'name, equals, value = line.rpartition("=")',
            "A value with an equals sign in it is cut in two.", ("test_equals_in_value",)),
        Bug("line-numbers", "off by one", "for number, line in enumerate(text.splitlines(), start=1):",
            "for number, line in enumerate(text.splitlines()):",
            "The error message names the line before the wrong one.", ("test_malformed",)),
        Bug("quoted-comment", "missing edge case", 'if letter == "#" and not quoted:', 'if letter == "#":',
            "A colour like #fff disappears, although it stands in quotes.", ("test_comment_in_quotes",)),
        Bug("last-comment", "API misuse",
            "quoted = False\nfor place, letter in enumerate(line):\n    if letter == '\"':\n"
            "        quoted = not quoted\n    if letter == \"#\" and not quoted:\n        return line[:place]\nreturn line",
            "if line.count('\"') < 2:\n    return line.rpartition(\"#\")[0] or line\nquoted = False\n"
            "for place, letter in enumerate(line):\n    if letter == '\"':\n"
            "        quoted = not quoted\n    if letter == \"#\" and not quoted:\n        return line[:place]\nreturn line",
            "Of a comment with two # in it, half becomes part of the value.",
            ("test_comment", "test_empty_lines")),
        Bug("skips", "swallowed exception", 'if not equals:\n    raise Malformed(f"line {number}: {line}")',
            "if not equals:\n    continue", "A line that is no setting is left out without a word.",
            ("test_malformed",)),
        Bug("mutable-default", "mutable default",
            "def parse(text, defaults=None):\n"
            '    """Settings by name; those of a section are named section.name. Raises Malformed."""\n'
            "    found = dict(defaults or {})",
            "def parse(text, defaults={}):\n"
            '    """Settings by name; those of a section are named section.name. Raises Malformed."""\n'
            "    found = defaults",
            "Settings of a file that was read before show up in the next one.",
            ("test_parses_share_nothing", "test_defaults", "test_section", "test_two_sections",
             "test_equals_in_value", "test_comment_in_quotes", "test_empty_lines", "test_round_trip")),
        Bug("changes-defaults", "state leak", "found = dict(defaults or {})",
            "found = defaults if defaults is not None else {}",
            "The defaults that I hand over are changed by reading.", ("test_defaults",)),
        Bug("sections-add-up", "wrong operator", 'section = line[1:-1].strip() + "."',
            'section += line[1:-1].strip() + "."', "The second section has the name of the first in front.",
            ("test_two_sections",)),
        Bug("spaces-in-section", "missing edge case", 'section = line[1:-1].strip() + "."',
            'section = line[1:-1] + "."', "Spaces within the brackets of a section end up in the names.",
            ("test_two_sections",)),
        Bug("all-true", "wrong operator", 'return value == "true"', "return bool(value)",
            "A setting that says false comes out as true.", ("test_booleans",)),
        Bug("minus", "missing edge case", 'if value.lstrip("-").isdigit():', "if value.isdigit():",
            "Negative numbers stay text.", ("test_negative", "test_round_trip")),
        Bug("lonely-quote", "wrong comparison", "if len(value) >= 2 and value[0] == value[-1] == '\"':",
            "if value and value[0] == value[-1] == '\"':", "A value that is one quote becomes nothing.",
            ("test_one_quote",)),
        Bug("list-first", "wrong order",
            "if len(value) >= 2 and value[0] == value[-1] == '\"':\n    return value[1:-1]\n"
            'if "," in value:\n    return [typed(part.strip()) for part in value.split(",")]',
            'if "," in value:\n    return [typed(part.strip()) for part in value.split(",")]\n'
            "if len(value) >= 2 and value[0] == value[-1] == '\"':\n    return value[1:-1]",
            "Text in quotes that has a comma becomes a list.", ("test_comma_in_quotes", "test_round_trip")),
        Bug("bool-is-int", "wrong order",
            'if isinstance(value, bool):\n    return "true" if value else "false"\n'
            'if isinstance(value, list):\n    return ", ".join(shown(part) for part in value)\n'
            "if isinstance(value, int):\n    return str(value)",
            'if isinstance(value, int):\n    return str(value)\n'
            'if isinstance(value, list):\n    return ", ".join(shown(part) for part in value)\n'
            'if isinstance(value, bool):\n    return "true" if value else "false"',
            "What is written for true cannot be read back.", ("test_round_trip", "test_dump_is_sorted")),
    ),
)  # fmt: skip
