"""The ops, one file each: schema, rules, fake, autograd and the public function."""

import importlib
import pkgutil

#: every op has a file of its name here
__all__ = sorted(file.name for file in pkgutil.iter_modules(__path__) if file.name != "define")

for _name in __all__:
    importlib.import_module(f"{__name__}.{_name}")  # registers the op
