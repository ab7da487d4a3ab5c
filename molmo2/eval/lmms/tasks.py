"""Which tasks of lmms-eval cannot run on this model: those that want something else than generated text.

    python -m molmo2.eval.lmms.tasks                 # all of them, with the type of their requests
    python -m molmo2.eval.lmms.tasks mvbench mmlu    # exit code 1 if one of these is among them

The plugin checks the tasks of lmms-eval's command line in the same way before it loads the model.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from loguru import logger

SUPPORTED: Final = "generate_until"


@functools.cache
def _manager(include_path: str | None) -> TaskManager:
    return TaskManager("ERROR", include_path=include_path)  # it reads every YAML file of lmms-eval


def leaves(manager: TaskManager, member: Any) -> Iterator[str]:
    """The tasks of a task, group or tag, given by name or as a member of a group's YAML file."""
    if isinstance(member, list):
        for one in member:
            yield from leaves(manager, one)
    elif isinstance(member, dict):
        yield from leaves(manager, member.get("task"))
    elif member in manager.task_index:
        entry = manager.task_index[member]
        if entry["type"] not in ("group", "tag"):
            yield member
        else:
            yield from leaves(manager, entry["task"] if entry["task"] != -1 else _config(manager, member).get("task"))


def _config(manager: TaskManager, name: str) -> dict[str, Any]:
    """The YAML file of a task without its functions, which may need libraries that are not installed."""
    path = manager.task_index[name]["yaml_path"]
    return {} if path == -1 else load_yaml_config(path, mode="simple")


def refused_tasks(names: Sequence[str] | None = None, include_path: str | None = None) -> dict[str, str]:
    """The tasks that cannot run -> the type of their requests.

    Args:
        names: tasks, groups, tags or patterns with `*`; unknown ones are left to lmms-eval. None means all tasks.
        include_path: a folder with further tasks.
    """
    manager = _manager(include_path)
    chosen = manager.all_tasks if names is None else manager.match_tasks(list(names))
    tasks = dict.fromkeys(task for name in chosen for task in leaves(manager, name))
    types = {task: str(_config(manager, task).get("output_type") or SUPPORTED) for task in tasks}
    return {task: kind for task, kind in sorted(types.items()) if kind != SUPPORTED}


def check_command_line(argv: Sequence[str]) -> None:
    """Refuse a command line of lmms-eval with a task that cannot run.

    Raises:
        ValueError: the message lists these tasks.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tasks", default="")
    parser.add_argument("--include_path")
    known, _ = parser.parse_known_args(argv)
    if refused := refused_tasks(known.tasks.split(","), known.include_path) if known.tasks else {}:
        lines = "\n  ".join(f"{task}: {kind}" for task, kind in refused.items())
        raise ValueError(f"nanomolmo2 runs tasks of type {SUPPORTED}; leave out of --tasks:\n  {lines}")


def main() -> int:
    """Print the tasks that cannot run, all of them or among those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help="tasks, groups or patterns (all)")
    parser.add_argument("--include_path", help="a folder with further tasks")
    args = parser.parse_args()
    logger.remove()  # lmms-eval reports each YAML file that is only a template
    refused = refused_tasks(args.tasks or None, args.include_path)
    sys.stdout.writelines(f"{task}  {kind}\n" for task, kind in refused.items())
    return 1 if args.tasks and refused else 0


if __name__ == "__main__":
    sys.exit(main())
