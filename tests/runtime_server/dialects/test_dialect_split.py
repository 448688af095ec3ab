"""How many commands a text holds."""

from __future__ import annotations

import subprocess

import pytest

from runtime_server.dialects.v0_split import commands

ONE = [
    "ls",
    "ls && \\\n  pwd",
    "ls &&\npwd",
    "ls |\n wc",
    "echo 'a\nb'",
    'echo "a\nb $(echo "x\ny") z"',
    "cat <<EOF\na\nb\nEOF",
    "cat <<'END' > f && echo done\nfor x in\nEND",
    "cat <<-E\n\ta\n\tE",
    "cat <<A <<B\n1\nA\n2\nB",
    "for i in 1 2\ndo\n  echo $i\ndone",
    "if true; then\n echo a\nelse\n echo b\nfi",
    "while read l; do\n echo $l\ndone < f",
    "case $x in\n a) echo 1 ;;\n b|c) echo 2 ;;\nesac",
    "f() {\n echo 1\n echo 2\n}",
    "f()\n{\n echo 1\n}",
    "function g {\n echo 1\n}",
    "(\n cd /tmp\n ls\n)",
    "{ ls\npwd; }",
    "x=$(\n echo 1\n echo 2\n)",
    "echo `echo 1\necho 2`",
    "# a comment\nls",
    "ls\n# a comment",
    "ls # it's a comment",
    "python3 -c '\nimport os\nprint(1)\n'",
    "[[ a ==\n b ]]",
    "echo ${x:-a\nb}",
    "echo $((1 +\n2))",
    "arr=(1\n2\n3)",
    "diff <(\nls\n) <(ls)",
    "echo $'it\\'s\nx'",
    "cat <<< 'a\nb'",
    "while true; do if x; then\n break; fi\ndone",
    "echo done\n",
    "A=1 for_x=2 cmd\n",
    "if ! true; then {\n x\n}; fi",
    "echo a#b\n",
]
TWO = [
    "ls\npwd",
    "ls\n\n\npwd",
    "echo 'a'\necho \"b\"",
    "cat <<EOF\na\nEOF\nls",
    "for i in 1; do\n echo\ndone\nls",
    "f() {\n echo\n}\nf",
    "ls & \npwd",
    "ls;\npwd",
    "echo if\nls",
    "echo a # for\nls",
    "x=1\necho $x",
    "cd /x && ls\nmake |\n tee y",
]


@pytest.mark.parametrize("text", ONE)
def test_one_command_stays_one(text: str) -> None:
    assert len(commands(text)) == 1, commands(text)


@pytest.mark.parametrize("text", TWO)
def test_two_commands_are_cut_where_one_ends(text: str) -> None:
    found = commands(text)
    assert len(found) == 2, found
    for part in (text, *found):
        assert subprocess.run(["bash", "-n", "-c", part], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("text", ["", "\n \n", "# only a comment\n# and another"])
def test_nothing_is_no_command(text: str) -> None:
    assert commands(text) == []


@pytest.mark.parametrize(
    "text", ["'", '"', "$(", "${", "`", "<<", "<<'", "\\", "((", "))", "}", "fi\ndone", "<<E\n"]
)
def test_what_is_broken_ends(text: str) -> None:
    commands(text)
