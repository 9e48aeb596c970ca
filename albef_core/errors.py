"""The exception for a mistake that the user can mend: jobs print it and exit with 2."""


class InputError(ValueError):
    """Something handed in by a person is wrong: a flag, a file, a checkpoint.

    The message says where, what is wrong (what was found), and what to do.
    """


class Preempted(RuntimeError):  # noqa: N818  # being stopped is no error
    """Training was asked to stop and left a good checkpoint: jobs exit with 75.

    The message says which checkpoint, and how to go on.
    """
