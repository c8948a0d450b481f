"""The tutorials of the documentation, executed: in full by hand, and in a small form in every test run."""
