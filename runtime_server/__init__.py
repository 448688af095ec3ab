"""The sandbox server of a run, and its client."""
