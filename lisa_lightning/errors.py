"""`UserError`, whose message a person sees instead of a traceback, and the line that it quotes of a library's error."""


class UserError(Exception):
    """Something the user can put right: a wrong value, bad data, a full disk. Ends with exit status 2."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that says something; the exception's name where none does."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
