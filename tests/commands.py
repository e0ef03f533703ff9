"""A command of `tools`, called in this process."""

from types import ModuleType
from typing import Any

from configs import command


def status(tool: ModuleType, *args: Any, recipe: str | None = None) -> int:
    """Its exit code; flags of an earlier call are forgotten."""
    tool.FLAGS.unparse_flags()
    for name in tool.FLAGS:
        tool.FLAGS[name].unparse()
    return command.status(tool.main, [str(arg) for arg in args], recipe, values=tool.FLAGS)
