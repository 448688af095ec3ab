"""A program to break: a cache."""

# ruff: noqa: E501 - lines of programs, and their broken twins, stay whole
from trainer.families.shape import Bug, Program

CACHE = Program(
    name="cache",
    title="a cache that forgets what was not used for longest",
    about="Keeps the newest @thing@, up to a capacity.",
    choices={
        "package": ("recent", "memo", "shelf", "hot", "keeper", "buffer_"),
        "module": ("lru", "cache", "store", "recently"),
        "thing": ("pages", "results", "images", "answers"),
        "Class": ("Cache", "Recent", "Memory"),
    },
    source='''
        """A cache of @thing@ with a capacity."""

        from collections import OrderedDict


        class @Class@:
            """Forgets what was not read or written for longest."""

            def __init__(self, capacity=4):
                if capacity < 1:
                    raise ValueError("a capacity must be at least 1")
                self.capacity = capacity
                self.hits = self.misses = 0
                self._items = OrderedDict()

            def __len__(self):
                return len(self._items)

            def get(self, key, default=None):
                """What was put; it counts as used now."""
                if key not in self._items:
                    self.misses += 1
                    return default
                self.hits += 1
                self._items.move_to_end(key)
                return self._items[key]

            def put(self, key, value):
                """Keep a value; the oldest goes when there is no room."""
                self._items[key] = value
                self._items.move_to_end(key)
                while len(self._items) > self.capacity:
                    self._items.popitem(last=False)

            def call(self, key, make):
                """The value of a key, made when it is not there. What `make` raises is raised."""
                if key in self._items:
                    return self.get(key)
                self.misses += 1
                value = make(key)
                self.put(key, value)
                return value

            def rate(self):
                """Hits per look, 0.0 before the first one."""
                looks = self.hits + self.misses
                return self.hits / looks if looks else 0.0
        ''',
    visible='''
        from @package@.@module@ import @Class@


        def test_put_and_get():
            cache = @Class@(2)
            cache.put("a", 1)
            assert cache.get("a") == 1
        ''',
    hidden='''
        import pytest

        from @package@.@module@ import @Class@


        def filled(capacity, keys):
            cache = @Class@(capacity)
            for key in keys:
                cache.put(key, key.upper())
            return cache


        def test_capacity():
            cache = filled(2, "abc")
            assert len(cache) == 2
            assert cache.get("a") is None


        def test_full_is_full():
            assert len(filled(3, "abc")) == 3


        def test_reading_counts_as_use():
            cache = filled(2, "ab")
            cache.get("a")
            cache.put("c", 1)
            assert cache.get("a") == "A"
            assert cache.get("b") is None


        def test_writing_counts_as_use():
            cache = filled(2, "ab")
            cache.put("a", 2)
            cache.put("c", 1)
            assert cache.get("a") == 2


        def test_none_is_a_value():
            cache = @Class@()
            cache.put("a", None)
            assert cache.get("a", "default") is None


        def test_default():
            assert @Class@().get("a", 5) == 5


        def test_capacity_must_be_positive():
            with pytest.raises(ValueError):
                @Class@(0)


        def test_rate():
            cache = filled(2, "a")
            cache.get("a")
            cache.get("b")
            assert cache.rate() == 0.5


        def test_rate_before_the_first_look():
            assert @Class@().rate() == 0.0


        def test_call():
            made = []
            cache = @Class@()
            for _ in range(2):
                assert cache.call("a", lambda key: made.append(key) or len(made)) == 1
            assert made == ["a"]


        def test_call_that_fails():
            cache = @Class@()
            with pytest.raises(KeyError):
                cache.call("a", lambda key: {}[key])
            assert len(cache) == 0


        def test_caches_share_nothing():
            first, second = @Class@(), @Class@()
            first.put("a", 1)
            assert len(second) == 0
        ''',
    bugs=(
        Bug("too-many", "off by one", "while len(self._items) > self.capacity:",
            "while len(self._items) > self.capacity + 1:",
            "The cache holds one more of the @thing@ than its capacity.",
            ("test_capacity", "test_reading_counts_as_use")),
        Bug("too-few", "wrong comparison", "while len(self._items) > self.capacity:",
            "while len(self._items) >= self.capacity:",
            "The cache never gets full.",
            ("test_capacity", "test_full_is_full", "test_reading_counts_as_use", "test_writing_counts_as_use")),
        Bug("pops-newest", "API misuse", "self._items.popitem(last=False)", "self._items.popitem()",
            "What was put last is gone at once when the cache is full.",
            ("test_capacity", "test_reading_counts_as_use")),
        Bug("reads-do-not-count", "missing edge case",
            "self.hits += 1\nself._items.move_to_end(key)", "self.hits += 1",
            "Entries of @thing@ that are read all the time are thrown out.", ("test_reading_counts_as_use",)),
        Bug("truthy", "missing edge case",
            "if key not in self._items:\n    self.misses += 1\n    return default",
            "if not self._items.get(key):\n    self.misses += 1\n    return default",
            "An entry that is None counts as missing.", ("test_none_is_a_value",)),
        Bug("swallows", "swallowed exception", "value = make(key)\nself.put(key, value)",
            "try:\n    value = make(key)\nexcept Exception:\n    value = None\nself.put(key, value)",
            "When making an entry fails, nobody hears of it, and None is remembered.", ("test_call_that_fails",)),
        Bug("zero-capacity", "wrong operator", "if capacity < 1:", "if capacity < 0:",
            "A cache for nothing at all can be made.", ("test_capacity_must_be_positive",)),
        Bug("rate-of-misses", "wrong operator", "return self.hits / looks if looks else 0.0",
            "return self.hits / self.misses if looks else 0.0",
            "The rate of hits goes above what is possible.", ("test_rate",)),
        Bug("rate-of-nothing", "missing edge case", "return self.hits / looks if looks else 0.0",
            "return self.hits / looks", "Asking a new cache for its rate is a ZeroDivisionError.",
            ("test_rate_before_the_first_look",)),
        Bug("default-lost", "wrong default", "def get(self, key, default=None):",
            "def get(self, key, default=None):\n    default = None",
            "The default that I give for @thing@ that are missing is not used.", ("test_default",)),
    ),
)  # fmt: skip
