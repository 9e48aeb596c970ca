"""The exception for a mistake that the user can mend: jobs print it and exit with 2."""


class InputError(ValueError):
    """Something handed in by a person is wrong: a flag, a file, a checkpoint.

    The message says where, what is wrong (what was found), and what to do.
    """
