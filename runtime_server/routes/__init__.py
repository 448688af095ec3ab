"""The routes of the API, by subject. A route is a line; what it does is in the module it calls.

What it does not do
    No authentication, no limits of bodies (`gate.py`), no repeated calls (`idempotency.py`).
"""
