"""A program to break: jobs that need each other."""

# ruff: noqa: E501 - lines of programs, and their broken twins, stay whole
from trainer.families.shape import Bug, Program

SCHEDULE = Program(
    name="schedule",
    title="jobs that need each other",
    about="Orders @thing@ by what they need, and says when each can begin.",
    choices={
        "package": ("planner", "builder", "flow", "workshop", "pipeline", "factory"),
        "module": ("schedule", "order", "graph", "plan"),
        "thing": ("jobs", "steps", "tasks", "stages"),
    },
    source='''
        """Order of @thing@: `needs` maps each to those that must be done before it."""

        import heapq


        class Cycle(ValueError):
            """Some @thing@ need each other."""


        def names(needs):
            """All @thing@, also those that are only needed, in order."""
            found = set(needs)
            for others in needs.values():
                found.update(others)
            return sorted(found)


        def order(needs):
            """Every one after what it needs; by name where there is a choice. Raises Cycle."""
            waiting = {name: set(needs.get(name, ())) for name in names(needs)}
            ready = [name for name, others in waiting.items() if not others]
            heapq.heapify(ready)
            done = []
            while ready:
                name = heapq.heappop(ready)
                done.append(name)
                for other, others in waiting.items():
                    if name in others:
                        others.remove(name)
                        if not others:
                            heapq.heappush(ready, other)
            if len(done) < len(waiting):
                raise Cycle(sorted(set(waiting) - set(done)))
            return done


        def starts(needs, durations):
            """When each can begin, if everything begins as soon as it can."""
            found = {}
            for name in order(needs):
                found[name] = max((found[n] + durations[n] for n in needs.get(name, ())), default=0)
            return found


        def total(needs, durations):
            """When the last one is done; 0 for none."""
            begins = starts(needs, durations)
            return max((begins[name] + durations[name] for name in begins), default=0)


        def levels(needs):
            """Groups of @thing@ that can run side by side, one group after the other."""
            depth = {}
            for name in order(needs):
                depth[name] = max((depth[n] + 1 for n in needs.get(name, ())), default=0)
            return [sorted(n for n in depth if depth[n] == d) for d in range(max(depth.values(), default=-1) + 1)]


        def affected(needs, changed, seen=None):
            """What must be done again when one changes: it, and all that need it."""
            seen = set() if seen is None else seen
            if changed not in seen:
                seen.add(changed)
                for name, others in needs.items():
                    if changed in others:
                        affected(needs, name, seen)
            return seen
        ''',
    visible='''
        from @package@.@module@ import names, order


        def test_chain():
            assert order({"c": ["b"], "b": ["a"], "a": []}) == ["a", "b", "c"]
            assert names({}) == []
        ''',
    hidden='''
        import pytest

        from @package@.@module@ import Cycle, affected, levels, names, order, starts, total

        HOUSE = {"roof": ["walls"], "walls": ["floor"], "garden": [], "paint": ["walls", "door"]}
        TIMES = {"roof": 3, "walls": 4, "floor": 2, "garden": 1, "paint": 1, "door": 8}


        def test_names():
            assert names(HOUSE) == ["door", "floor", "garden", "paint", "roof", "walls"]


        def test_by_name():
            assert order({"b": [], "a": [], "c": []}) == ["a", "b", "c"]


        def test_order():
            assert order(HOUSE) == ["door", "floor", "garden", "walls", "paint", "roof"]


        def test_order_leaves_its_input():
            needs = {"b": {"a"}}
            order(needs)
            assert needs == {"b": {"a"}}


        def test_cycle():
            with pytest.raises(Cycle):
                order({"a": ["b"], "b": ["a"], "c": []})


        def test_itself():
            with pytest.raises(Cycle):
                order({"a": ["a"]})


        def test_starts():
            assert starts(HOUSE, TIMES) == {
                "door": 0, "floor": 0, "garden": 0, "walls": 2, "paint": 8, "roof": 6,
            }


        def test_total():
            assert total(HOUSE, TIMES) == 9


        def test_total_of_none():
            assert total({}, {}) == 0


        def test_levels():
            assert levels(HOUSE) == [["door", "floor", "garden"], ["walls"], ["paint", "roof"]]


        def test_no_levels():
            assert levels({}) == []


        def test_affected():
            assert affected(HOUSE, "floor") == {"floor", "walls", "roof", "paint"}


        def test_affected_twice():
            affected(HOUSE, "floor")
            assert affected(HOUSE, "garden") == {"garden"}
        ''',
    bugs=(
        Bug("only-keys", "missing edge case", "for others in needs.values():\n    found.update(others)\n", "",
            "Of the @thing@ those that need nothing and are only needed by others are missing.",
            ("test_names", "test_order", "test_starts", "test_total", "test_levels", "test_order_leaves_its_input")),
        Bug("a-list-is-no-heap", "API misuse", "name = heapq.heappop(ready)", "name = ready.pop()",
            "Where there is a choice, the @thing@ come in a strange order.", ("test_by_name", "test_order")),
        Bug("changes-input", "state leak",
            "waiting = {name: set(needs.get(name, ())) for name in names(needs)}",
            "waiting = {name: needs.get(name, set()) for name in names(needs)}",
            "After ordering the @thing@ nothing needs anything any more.",
            ("test_order_leaves_its_input", "test_affected", "test_levels", "test_starts", "test_total")),
        Bug("no-cycle", "swallowed exception",
            "if len(done) < len(waiting):\n    raise Cycle(sorted(set(waiting) - set(done)))\n", "",
            "Some @thing@ that need each other are just left out.", ("test_cycle", "test_itself")),
        Bug("one-left", "off by one", "if len(done) < len(waiting):", "if len(done) < len(waiting) - 1:",
            "One of the @thing@ that needs itself is left out without an error.", ("test_itself",)),
        Bug("earliest", "wrong operator",
            "found[name] = max((found[n] + durations[n] for n in needs.get(name, ())), default=0)",
            "found[name] = min((found[n] + durations[n] for n in needs.get(name, ())), default=0)",
            "Some @thing@ begin before everything that they need is done.", ("test_starts",)),
        Bug("no-default", "missing edge case",
            "return max((begins[name] + durations[name] for name in begins), default=0)",
            "return max(begins[name] + durations[name] for name in begins)",
            "The total of no @thing@ at all is an error.", ("test_total_of_none",)),
        Bug("last-start", "wrong operator",
            "return max((begins[name] + durations[name] for name in begins), default=0)",
            "return max((begins[name] for name in begins), default=0)",
            "The total time leaves out how long the last of the @thing@ takes.", ("test_total",)),
        Bug("last-level", "off by one",
            "return [sorted(n for n in depth if depth[n] == d) for d in range(max(depth.values(), default=-1) + 1)]",
            "return [sorted(n for n in depth if depth[n] == d) for d in range(max(depth.values(), default=0))]",
            "The last group of @thing@ is missing.", ("test_levels",)),
        Bug("mutable-default", "mutable default",
            "def affected(needs, changed, seen=None):\n"
            '    """What must be done again when one changes: it, and all that need it."""\n'
            "    seen = set() if seen is None else seen",
            "def affected(needs, changed, seen=set()):\n"
            '    """What must be done again when one changes: it, and all that need it."""',
            "Asked a second time, the list of what must be done again is far too long.",
            ("test_affected_twice",)),
        Bug("direct-only", "missing edge case", "affected(needs, name, seen)", "seen.add(name)",
            "What depends on a changed one of the @thing@ through another one is not done again.",
            ("test_affected",)),
    ),
)  # fmt: skip
