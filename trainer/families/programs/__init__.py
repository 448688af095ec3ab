"""The programs that repositories are made of: each right as it stands, with its tests and its bugs.

What it does not do
    It breaks nothing (`trainer.families.repositories` does), and says nothing of sandboxes.
"""

from trainer.families.programs.cache import CACHE
from trainer.families.programs.ledger import LEDGER
from trainer.families.programs.numbers import NUMBERS
from trainer.families.programs.schedule import SCHEDULE
from trainer.families.programs.settings import SETTINGS
from trainer.families.programs.spans import SPANS
from trainer.families.programs.stock import STOCK
from trainer.families.programs.words import WORDS

PROGRAMS = (SPANS, NUMBERS, LEDGER, CACHE, STOCK, SCHEDULE, SETTINGS, WORDS)
