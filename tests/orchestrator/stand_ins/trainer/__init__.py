"""A stand-in: see __main__.py."""
