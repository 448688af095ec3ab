"""Attacks on the sandbox server, from inside of sandboxes and from its clients: `make escape`."""
