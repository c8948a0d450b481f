"""Defines the command line: one module for each group of commands, and `app.main`, where errors end."""
