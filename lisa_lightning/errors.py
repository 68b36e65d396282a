"""The one exception whose message is meant for the person at the terminal."""


class UserError(Exception):
    """Something the user can put right: a wrong value, bad data, a full disk. Ends with exit status 2."""
