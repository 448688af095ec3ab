"""A program to break: goods in a store."""

# ruff: noqa: E501 - lines of programs, and their broken twins, stay whole
from trainer.families.shape import Bug, Program

STOCK = Program(
    name="stock",
    title="goods in a store",
    about="What is in stock, what runs low, what an order costs.",
    choices={
        "package": ("shop", "depot", "pantry", "warehouse", "kiosk", "larder"),
        "module": ("stock", "goods", "inventory", "supplies"),
        "low": ("3", "5", "10"),
    },
    source='''
        """Goods in a store, and orders of them."""

        LOW = @low@


        def add(stock, name, count, tags=None):
            """A new stock with so many more; `tags` are remembered with the goods."""
            if count < 0:
                raise ValueError("a count cannot be negative")
            changed = {key: dict(value) for key, value in stock.items()}
            entry = changed.setdefault(name, {"count": 0, "tags": []})
            entry["count"] += count
            entry["tags"] = sorted(set(entry["tags"]) | set(tags or []))
            return changed


        def low(stock, limit=LOW):
            """Names of goods with fewer than `limit`, in order."""
            return sorted(name for name, entry in stock.items() if entry["count"] < limit)


        def cost(order, prices, discount_from=100):
            """What an order costs; 10 % less from `discount_from` on. Unknown goods raise KeyError."""
            total = sum(prices[name] * count for name, count in order.items())
            if total >= discount_from:
                total = total * 9 / 10
            return total


        def fill(stock, order):
            """What is missing for an order, by name; nothing when all of it is there."""
            missing = {}
            for name, count in order.items():
                have = stock.get(name, {"count": 0})["count"]
                if have < count:
                    missing[name] = count - have
            return missing


        def fullest(stock):
            """Names by count, largest first, equal ones by name."""
            return sorted(stock, key=lambda name: (-stock[name]["count"], name))


        def parse(text):
            """An order from lines `name count`; empty lines are left out. Bad ones raise ValueError."""
            order = {}
            for line in text.splitlines():
                if not line.strip():
                    continue
                name, count = line.rsplit(maxsplit=1)
                order[name] = order.get(name, 0) + int(count)
            return order
        ''',
    visible='''
        from @package@.@module@ import add, cost


        def test_add():
            assert add({}, "tea", 2)["tea"]["count"] == 2
            assert cost({"tea": 2}, {"tea": 3}) == 6
        ''',
    hidden='''
        import pytest

        from @package@.@module@ import LOW, add, cost, fill, fullest, low, parse


        def test_add_twice():
            assert add(add({}, "tea", 2), "tea", 3)["tea"]["count"] == 5


        def test_add_changes_no_other_stock():
            stock = add({}, "tea", 2)
            add(stock, "tea", 3)
            assert stock["tea"]["count"] == 2


        def test_tags():
            stock = add(add({}, "tea", 1, ["hot"]), "tea", 1, ["dry", "hot"])
            assert stock["tea"]["tags"] == ["dry", "hot"]


        def test_tags_of_others():
            add({}, "tea", 1, ["hot"])
            assert add({}, "ice", 1)["ice"]["tags"] == []


        def test_negative():
            with pytest.raises(ValueError):
                add({}, "tea", -1)


        def test_low():
            stock = add(add({}, "tea", LOW), "ice", LOW - 1)
            assert low(stock) == ["ice"]


        def test_cost_of_unknown():
            with pytest.raises(KeyError):
                cost({"tea": 1}, {})


        def test_discount():
            assert cost({"tea": 20}, {"tea": 10}) == 180


        def test_discount_begins():
            assert cost({"tea": 10}, {"tea": 10}) == 90


        def test_no_discount():
            assert cost({"tea": 9}, {"tea": 11}) == 99


        def test_fill():
            stock = add({}, "tea", 2)
            assert fill(stock, {"tea": 5, "ice": 1}) == {"tea": 3, "ice": 1}


        def test_fill_exactly():
            assert fill(add({}, "tea", 2), {"tea": 2}) == {}


        def test_fullest():
            assert fullest(add(add(add({}, "b", 1), "a", 1), "c", 9)) == ["c", "a", "b"]


        def test_parse():
            assert parse("green tea 2\\n\\nice 1\\ngreen tea 3\\n") == {"green tea": 5, "ice": 1}


        def test_parse_rubbish():
            with pytest.raises(ValueError):
                parse("tea two")
        ''',
    bugs=(
        Bug("shallow", "API misuse", "changed = {key: dict(value) for key, value in stock.items()}",
            "changed = dict(stock)", "Adding goods to a copy of the stock changes the original.",
            ("test_add_changes_no_other_stock",)),
        Bug("mutable-default", "mutable default",
            'entry = changed.setdefault(name, {"count": 0, "tags": []})\nentry["count"] += count\n'
            'entry["tags"] = sorted(set(entry["tags"]) | set(tags or []))\nreturn changed',
            'SEEN.update(tags or [])\nentry = changed.setdefault(name, {"count": 0, "tags": []})\n'
            'entry["count"] += count\nentry["tags"] = sorted(set(entry["tags"]) | SEEN)\nreturn changed',
            "Goods get tags that were given to other goods.", ("test_tags_of_others",),
            above="SEEN = set()"),
        Bug("low-equal", "off by one",
            'return sorted(name for name, entry in stock.items() if entry["count"] < limit)',
            'return sorted(name for name, entry in stock.items() if entry["count"] < limit + 1)',
            "Goods that are exactly at the limit are reported as low.", ("test_low",)),
        Bug("limit", "wrong default", "def low(stock, limit=LOW):", "def low(stock, limit=0):",
            "Nothing is ever reported as low.", ("test_low",)),
        Bug("discount-late", "wrong comparison", "if total >= discount_from:", "if total > discount_from:",
            "An order of exactly 100 gets no discount.", ("test_discount_begins",)),
        Bug("discount-wrong", "wrong operator", "total = total * 9 / 10", "total = total / 9 * 10",
            "Large orders cost more than without the discount.", ("test_discount", "test_discount_begins")),
        Bug("free", "swallowed exception", "total = sum(prices[name] * count for name, count in order.items())",
            "total = sum(prices.get(name, 0) * count for name, count in order.items())",
            "Goods that have no price cost nothing.", ("test_cost_of_unknown",)),
        Bug("missing-all", "wrong operator", "missing[name] = count - have", "missing[name] = count",
            "What is missing counts what we have, too.", ("test_fill",)),
        Bug("unknown-goods", "missing edge case", 'have = stock.get(name, {"count": 0})["count"]',
            'have = stock[name]["count"]', "An order of goods that we never had is a KeyError.", ("test_fill",)),
        Bug("by-name", "wrong comparison", 'return sorted(stock, key=lambda name: (-stock[name]["count"], name))',
            'return sorted(stock, key=lambda name: (stock[name]["count"], name))',
            "The emptiest goods come first instead of the fullest.", ("test_fullest",)),
        Bug("two-words", "API misuse", "name, count = line.rsplit(maxsplit=1)", "name, count = line.split()",
            "Goods with two words in their name cannot be ordered.", ("test_parse",)),
        Bug("last-line-wins", "wrong operator", "order[name] = order.get(name, 0) + int(count)",
            "order[name] = int(count)", "Of two lines for the same goods only the last one counts.", ("test_parse",)),
        Bug("ignored", "swallowed exception",
            "name, count = line.rsplit(maxsplit=1)\norder[name] = order.get(name, 0) + int(count)",
            "try:\n    name, count = line.rsplit(maxsplit=1)\n    order[name] = order.get(name, 0) + int(count)\n"
            "except ValueError:\n    continue",
            "A line that makes no sense is left out without a word.", ("test_parse_rubbish",)),
        Bug("empty-lines", "missing edge case", "if not line.strip():\n    continue\n", "",
            "An empty line in an order is an error.", ("test_parse",)),
    ),
)  # fmt: skip
