"""What a user of the bench can do wrong, or meet."""


class BenchError(Exception):
    """Bad input: an unknown name, a file that is no result, results that cannot be compared. The text says what to do."""
