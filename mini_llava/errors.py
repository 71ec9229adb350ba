"""What the person at the terminal can fix, as against a bug: a program ends with its sentence, without a traceback."""


class UserError(ValueError):
    """A fault in flags, data, models or the machine. Its message is a sentence that says what was found and what to do.

    The files that may be copied alone raise ValueErrors of their own in its place.
    """
