"""Published models and data that a person keeps in a folder: the environment variable HASTEN_DATA names it."""

import os
import pathlib

from hasten.core.errors import UsageError

VARIABLE = "HASTEN_DATA"


def data_file(name: str) -> pathlib.Path:
    """The file `name`, such as `mnist/t10k-images-idx3-ubyte.gz`, of the data folder.

    Raises:
        UsageError: the variable is not set, or the folder has no such file.
    """
    home = os.environ.get(VARIABLE)
    if not home:
        raise UsageError(f"set {VARIABLE} to the folder that holds {name}")
    file = pathlib.Path(home) / name
    if not file.is_file():
        raise UsageError(f"{VARIABLE} is {home}, which has no {name}: set it to the folder that holds this file")
    return file
