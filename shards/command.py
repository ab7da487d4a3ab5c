"""How a command begins and ends. Parsing arguments is the command's own part."""

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

# Loggers that report what no user can act on: no GPU was found, an operator was built.
CHATTY_LOGGERS = ("DeepSpeed", "torch.utils.cpp_extension")


def quiet_libraries() -> None:
    """Keep what libraries say to errors, and to each warning once; to be called before they are imported.

    Python's option -W and PYTHONWARNINGS still show all warnings.
    """
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).addFilter(_is_error)  # libraries set the level of their loggers themselves
    if sys.warnoptions:
        return
    warnings.simplefilter("once" if os.environ.get("RANK", "0") == "0" else "ignore")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=PendingDeprecationWarning)
    warnings.filterwarnings("ignore", message="This DataLoader will create")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def plain(text: str) -> str:
    """The text with escapes in place of control characters, except for line breaks; it may quote somebody's data."""
    from shards.format import printable  # imported here, after `quiet_libraries`

    return "\n".join(map(printable, text.split("\n")))


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's main function and leave with the exit code that it returns, None being 0.

    An error that a user can mend is printed in one line after the command's name, and the code is then 1.
    """
    name = Path(sys.argv[0]).stem
    quiet_libraries()
    try:
        code = main()
    except (ValueError, OSError, ImportError, subprocess.CalledProcessError) as error:
        sys.exit(f"{name}: {plain(str(error))}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted; run the same command again, finished work is kept")
    sys.exit(code)
