"""How many commands a text holds, as a shell would read it line after line. Pure.

What it is
    OpenHands V0 takes one top-level command at a time, which may be long: a loop, a here-document, a chain.
    `commands` cuts a text where one ends at a newline and another begins.

What it does not do
    It is no parser: what it does not understand stays in one piece, and `v0_shell.py` asks the shell itself
    before it refuses anything.
"""

from __future__ import annotations

import re

_OPEN = {"if": "fi", "case": "esac", "for": "done", "while": "done", "until": "done", "select": "done"}
_OPEN |= {"{": "}", "[[": "]]"}
_KEEP = {"then", "do", "else", "elif", "!", "time", "{", "if", "while", "until"}
"""Words after which a command begins."""
_FUNCTION = re.compile(r"\s*(function\s+[^\s()]+\s*(\(\s*\))?|[^\s()$'\"=]+\s*\(\s*\))\s*")
_HEREDOC = re.compile(r"<<(-?)[ \t]*((?:'[^'\n]*'|\"[^\"\n]*\"|\\.|[^\s;&|<>()'\"\\])+)")


def commands(text: str) -> list[str]:
    """The top-level commands; one when there is nothing to cut, none for an empty text."""
    return [piece for piece in _Scan(text).pieces() if piece]


class _Scan:
    """One pass over a text, with what is open at each place."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.begun = text, 0, 0
        self.open: list[str] = []  # what would close what is open, the innermost last
        self.awaited: list[tuple[str, bool]] = []  # here-documents whose body comes at the next newline
        self.word, self.first = "", True  # the word so far; whether it would name a command
        self.joined = False  # whether the last operator wants more
        self.named = False  # whether the next word is the name of a function
        self.found: list[str] = []

    def pieces(self) -> list[str]:
        while self.at < len(self.text):
            self._step(self.text[self.at])
        self._end_word()
        self._cut()
        return self.found

    def _step(self, char: str) -> None:
        if char in "\\'\"`":
            self._quoted(char)
        elif char == "$":
            self._dollar()
        elif char == "#" and not self.word:
            end = self.text.find("\n", self.at)
            self.at = len(self.text) if end < 0 else end
        elif char == "<" and self._heredoc():
            pass
        elif char in " \t\r":
            self._end_word()
            self.at += 1
        elif char == "\n":
            self._newline()
        elif char in ";&|()<>":
            self._operator(char)
        else:
            self._take(char)

    def _take(self, text: str) -> None:
        self.word += text
        self.joined = False
        self.at += len(text)

    # --- what is quoted ---

    def _quoted(self, char: str) -> None:
        if char == "\\":
            if self.text[self.at : self.at + 2] == "\\\n":
                self.at += 2
            else:
                self._take(self.text[self.at : self.at + 2])
        elif char == "'":
            self._through(self.text.find("'", self.at + 1))
        else:
            self._through(self._closing(char))

    def _through(self, end: int) -> None:
        self._take(self.text[self.at : end + 1 if end >= 0 else len(self.text)])

    def _closing(self, quote: str) -> int:
        """Where a double quote or a backtick ends: escapes count, and so does what `$(` opens in it."""
        at = self.at + 1
        while at < len(self.text) and self.text[at] != quote:
            if self.text[at] == "\\":
                at += 2
            elif self.text.startswith("$(", at):
                at = _closed(self.text, at + 1, "(", ")") + 1
            else:
                at += 1
        return at if at < len(self.text) else -1

    def _dollar(self) -> None:
        rest = self.text[self.at + 1 : self.at + 2]
        if rest == "(":
            self._through(_closed(self.text, self.at + 1, "(", ")"))
        elif rest == "{":
            self._through(_closed(self.text, self.at + 1, "{", "}"))
        elif rest == "'":
            at = self.at + 2
            while at < len(self.text) and self.text[at] != "'":
                at += 2 if self.text[at] == "\\" else 1
            self._through(at)
        else:
            self._take("$")

    # --- here-documents ---

    def _heredoc(self) -> bool:
        if self.text.startswith("<<<", self.at):
            self._end_word()
            self.at += 3
            return True
        found = _HEREDOC.match(self.text, self.at)
        if not found:
            return False
        self._end_word()
        self.awaited.append((re.sub(r"['\"\\]", "", found[2]), bool(found[1])))
        self.at = found.end()
        return True

    def _bodies(self) -> None:
        for end, tabs in self.awaited:
            while self.at < len(self.text):
                line, newline, _ = self.text[self.at :].partition("\n")
                self.at += len(line) + len(newline)
                if (line.lstrip("\t") if tabs else line) == end:
                    break
        self.awaited.clear()

    # --- words, operators, lines ---

    def _end_word(self) -> None:
        word, self.word = self.word, ""
        if not word:
            return
        if (self.first and word == "function") or self.named:
            self.named = not self.named  # the word after it is a name, and what it names comes then
            return
        if self.first and word in _OPEN:
            self.open.append(_OPEN[word])
        elif self.open and word == self.open[-1] and (self.first or word == "]]"):
            self.open.pop()
        assignment = self.first and re.match(r"\w+\+?=", word)
        self.first = bool(assignment) or (self.first and word in _KEEP) or word in ("then", "do", "else")

    def _operator(self, char: str) -> None:
        self._end_word()
        pair = self.text[self.at : self.at + 2]
        if char == "(":
            self.open.append(")")
        elif char == ")" and ")" in self.open[-1:]:
            self.open.pop()
        if char not in "<>":
            self.first = True
        self.joined = pair in ("&&", "||") or (char == "|" and pair != "||")
        self.at += 2 if pair in ("&&", "||", ";;", "|&", ">>", "<<", "&>", ">&", "<&") else 1

    def _newline(self) -> None:
        self._end_word()
        end = self.at
        self.at += 1
        if self.awaited:
            self._bodies()
            end = self.at
        self.first = True
        if self.open or self.joined or _FUNCTION.fullmatch(self.text[self.begun : end]):
            return
        self._cut(end)

    def _cut(self, end: int | None = None) -> None:
        piece = self.text[self.begun : len(self.text) if end is None else end].strip()
        lines = [line for line in piece.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        if lines:
            self.found.append(piece)
        self.begun = self.at


def _closed(text: str, at: int, opens: str, closes: str) -> int:
    """Where the bracket at `at` is closed; quotes inside count. The end when it is not."""
    depth = 0
    while at < len(text):
        char = text[at]
        if char == "\\":
            at += 1
        elif char == "'" and opens == "(":
            at = max(text.find("'", at + 1), at)
        elif char == '"':
            at += 1
            while at < len(text) and text[at] != '"':
                at += 2 if text[at] == "\\" else 1
        elif char == opens:
            depth += 1
        elif char == closes:
            depth -= 1
            if not depth:
                return at
        at += 1
    return len(text)
