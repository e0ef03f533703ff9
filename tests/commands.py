"""A command of `tools`, called in this process, and what one in another process needs."""

import os
from types import ModuleType
from typing import Any

from configs import command
from configs.load import ROOT


def status(tool: ModuleType, *args: Any, recipe: str | None = None) -> int:
    """Its exit code; flags of an earlier call are forgotten."""
    tool.FLAGS.unparse_flags()
    for name in tool.FLAGS:
        tool.FLAGS[name].unparse()
    return command.status(tool.main, [str(arg) for arg in args], recipe, values=tool.FLAGS)


def python_path() -> str:
    """PYTHONPATH of another process: the project, then where this process finds packages."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
