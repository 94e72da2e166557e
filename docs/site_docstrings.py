"""A griffe extension: what our sources have that reading them without running them stumbles on."""

from __future__ import annotations

import re
from typing import Any

import griffe

#: a subscript's bracket after another one, as in out[k][j], which Markdown takes for a reference
SECOND = re.compile(r"(?<=\w)(\[[^\]\n]*\])\[")


class Sources(griffe.Extension):
    """Escapes second subscripts, and lets a module be found that has a function of its own name."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = SECOND.sub(r"\1\\[", obj.docstring.value)

    def on_module_members(self, *, mod: griffe.Module, **kwargs: Any) -> None:
        for name, member in list(mod.members.items()):
            if member.is_alias and member.target_path.startswith(f"{mod.path}.{name}."):
                del mod.members[name]
