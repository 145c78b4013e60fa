"""The commands.

Each is a few lines over the library.

May import: everything.
"""
