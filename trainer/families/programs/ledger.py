"""A program to break: accounts."""

# ruff: noqa: E501 - lines of programs, and their broken twins, stay whole
from trainer.families.shape import Bug, Program

LEDGER = Program(
    name="ledger",
    title="accounts that hold whole @unit@",
    about="Accounts with deposits, withdrawals and transfers of @unit@.",
    choices={
        "package": ("bank", "purse", "tokens", "credits_", "vault", "till"),
        "module": ("ledger", "accounts", "book", "journal"),
        "unit": ("cents", "points", "coins", "credits"),
        "Class": ("Ledger", "Accounts", "Book"),
    },
    source='''
        """Accounts that hold whole @unit@."""


        class Insufficient(Exception):
            """There is not enough on the account."""


        class @Class@:
            """Accounts by name; one that was never used holds nothing."""

            def __init__(self, balances=None):
                self.balances = dict(balances or {})
                self.history = []

            def balance(self, name):
                """What is on an account."""
                return self.balances.get(name, 0)

            def deposit(self, name, amount):
                """Put @unit@ on an account. Raises ValueError unless the amount is positive."""
                if amount <= 0:
                    raise ValueError("an amount must be positive")
                self.balances[name] = self.balance(name) + amount
                self.history.append((name, amount))

            def withdraw(self, name, amount):
                """Take @unit@ off an account. Raises Insufficient, ValueError."""
                if amount <= 0:
                    raise ValueError("an amount must be positive")
                if amount > self.balance(name):
                    raise Insufficient(name)
                self.balances[name] = self.balance(name) - amount
                self.history.append((name, -amount))

            def transfer(self, source, target, amount):
                """Move @unit@; either both accounts change or none."""
                self.withdraw(source, amount)
                self.deposit(target, amount)

            def last(self, count=10):
                """The newest entries, oldest of them first."""
                return self.history[-count:] if count else []

            def richest(self, count):
                """Names by balance, largest first; equal ones by name."""
                ordered = sorted(self.balances, key=lambda name: (-self.balances[name], name))
                return ordered[:count]
        ''',
    visible='''
        from @package@.@module@ import @Class@


        def test_deposit():
            book = @Class@()
            book.deposit("ann", 5)
            book.deposit("ann", 2)
            assert book.balance("ann") == 7
        ''',
    hidden='''
        import pytest

        from @package@.@module@ import @Class@, Insufficient


        def test_unknown_is_empty():
            assert @Class@().balance("nobody") == 0


        def test_withdraw():
            book = @Class@({"ann": 9})
            book.withdraw("ann", 4)
            assert book.balance("ann") == 5


        def test_withdraw_everything():
            book = @Class@({"ann": 9})
            book.withdraw("ann", 9)
            assert book.balance("ann") == 0


        def test_insufficient():
            book = @Class@({"ann": 9})
            with pytest.raises(Insufficient):
                book.withdraw("ann", 10)
            assert book.balance("ann") == 9


        def test_nothing_is_no_deposit():
            with pytest.raises(ValueError):
                @Class@().deposit("ann", 0)


        def test_negative_withdrawal():
            with pytest.raises(ValueError):
                @Class@({"ann": 9}).withdraw("ann", -1)


        def test_transfer():
            book = @Class@({"ann": 9})
            book.transfer("ann", "bob", 4)
            assert (book.balance("ann"), book.balance("bob")) == (5, 4)


        def test_failed_transfer_changes_nothing():
            book = @Class@({"ann": 3})
            with pytest.raises(Insufficient):
                book.transfer("ann", "bob", 4)
            assert (book.balance("ann"), book.balance("bob")) == (3, 0)


        def test_books_share_nothing():
            first, second = @Class@(), @Class@()
            first.deposit("ann", 1)
            assert second.balance("ann") == 0
            assert second.history == []


        def test_the_given_balances_stay():
            given = {"ann": 1}
            @Class@(given).deposit("ann", 5)
            assert given == {"ann": 1}


        def test_last():
            book = @Class@()
            for amount in (1, 2, 3):
                book.deposit("ann", amount)
            assert book.last(2) == [("ann", 2), ("ann", 3)]


        def test_last_none():
            book = @Class@()
            book.deposit("ann", 1)
            assert book.last(0) == []


        def test_richest():
            assert @Class@({"a": 1, "c": 5, "b": 5}).richest(2) == ["b", "c"]
        ''',
    bugs=(
        Bug("shared-history", "state leak", "self.history = []", "self.history = HISTORY",
            "A new book begins with the history of another one.",
            ("test_books_share_nothing",), above="HISTORY = []"),
        Bug("mutable-default", "mutable default",
            "def __init__(self, balances=None):\n    self.balances = dict(balances or {})",
            "def __init__(self, balances={}):\n    self.balances = balances",
            "What is put on an account in one book is there in other books, too.",
            ("test_books_share_nothing", "test_the_given_balances_stay")),
        Bug("keeps-given", "state leak", "self.balances = dict(balances or {})",
            "self.balances = balances if balances is not None else {}",
            "The dictionary that I began a book with changes behind my back.", ("test_the_given_balances_stay",)),
        Bug("never-empty", "wrong comparison", "if amount > self.balance(name):", "if amount >= self.balance(name):",
            "I cannot take the last of the @unit@ off my account.", ("test_withdraw_everything",)),
        Bug("overdraft", "swallowed exception", "if amount > self.balance(name):\n    raise Insufficient(name)",
            "if amount > self.balance(name):\n    return",
            "Taking too much off an account looks like success.",
            ("test_insufficient", "test_failed_transfer_changes_nothing")),
        Bug("deposit-first", "wrong order",
            "self.withdraw(source, amount)\nself.deposit(target, amount)",
            "self.deposit(target, amount)\nself.withdraw(source, amount)",
            "A transfer that fails still gives the other one the @unit@.",
            ("test_failed_transfer_changes_nothing",)),
        Bug("zero-slice", "missing edge case", "return self.history[-count:] if count else []",
            "return self.history[-count:]", "Asking for the last 0 entries gives all of them.", ("test_last_none",)),
        Bug("oldest", "off by one", "return self.history[-count:] if count else []",
            "return self.history[-count - 1 :] if count else []",
            "There is one entry too many in the list of the newest.", ("test_last",)),
        Bug("no-ties", "wrong comparison", "ordered = sorted(self.balances, key=lambda name: (-self.balances[name], name))",
            "ordered = sorted(self.balances, key=lambda name: (self.balances[name], name))",
            "The list of the richest begins with the poorest.", ("test_richest",)),
        Bug("wrong-sign", "wrong operator", "self.balances[name] = self.balance(name) - amount",
            "self.balances[name] = self.balance(name) + amount",
            "Withdrawals make the balance grow.",
            ("test_withdraw", "test_withdraw_everything", "test_transfer")),
    ),
)  # fmt: skip
