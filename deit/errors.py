"""The one exception for what a user can put right: `main.py` and the tools print it as one line and exit 1."""


class UserError(Exception):
    """Bad input: the message names the field or path, its value and the rule."""
