"""How a command line ends. Parsing arguments is the command's own part."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's main function and leave with the exit code that it returns, None being 0.

    An error that a user can mend is printed in one line after the command's name, and the code is then 1.
    """
    name = Path(sys.argv[0]).stem
    try:
        code = main()
    except (ValueError, OSError, ImportError, subprocess.CalledProcessError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted; run the same command again, finished work is kept")
    sys.exit(code)
