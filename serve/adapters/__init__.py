"""Aliases, their versions, and where those come from."""
