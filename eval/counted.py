"""How many there are of something, in words that fit one and many."""


def counted(count: int, what: str) -> str:
    """``1 image``, ``2 images``, ``0 known classes``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}{'es' if what.endswith('s') else 's'}"
