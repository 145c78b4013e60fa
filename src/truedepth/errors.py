"""The one exception type that a user's mistake raises."""


class TruedepthError(Exception):
    """Something the user can put right.

    The message is one sentence that holds the actual values and the way out; the command line
    prints it alone and exits with `exit_code`: 2 for wrong usage or input, 1 where the input was
    fine and something else failed (a full disk, logits that are not numbers).
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code
