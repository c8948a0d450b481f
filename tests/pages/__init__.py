"""Renders the pages of reports in a browser, and measures whether they can be read."""
