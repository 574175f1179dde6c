"""Names of classes and files, looked at before training: what can't be written down can't be reported."""

from collections.abc import Sequence

from gradmix.ssl.data.images import ImageSet

UNKNOWN_NAME = "unknown"  # what an unknown image is called, instead of a class


def check_names(classes: Sequence[str], *sets: ImageSet) -> None:
    """
    Raises:
        ValueError: of the known classes as :func:`check_class_names`; or an image's path that is not UTF-8, which the
            files of a run and its detector could not hold.
    """
    check_class_names(classes, "data")
    wrong = [name for images in sets for name in images.files or () if not _is_text(name)]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"data: {wrong[0]!a}{more}: the name is not UTF-8; rename the file")


def check_class_names(classes: Sequence[str], where: str) -> None:
    """
    Raises:
        ValueError: a name is empty, not UTF-8, there twice, or the one that unknown images are given.
    """
    for name in classes:
        if not name or not _is_text(name):
            raise ValueError(f"{where}: {name!a} is no name of a class; rename it to text in UTF-8")
    if UNKNOWN_NAME in classes:
        raise ValueError(f"{where}: a known class is called {UNKNOWN_NAME!r}, as unknown images are; rename it")
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if list(classes).count(name) > 1)
        raise ValueError(f"{where}: two classes are called {twice!a}")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
