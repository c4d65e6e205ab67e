"""Modules of the package with a fault planted in their source."""

import inspect
import re
import types


def with_fault(modules, right: str, wrong: str) -> types.ModuleType:
    """The modules executed as one, with `right` replaced by `wrong`.

    Each module imports from those before it; these imports are left out.
    """
    source = "\n".join(map(inspect.getsource, modules))
    assert source.count(right) == 1, "the fault no longer applies: plant it again"
    for module in modules[:-1]:
        source = re.sub(rf"from {module.__name__} import (\([^)]*\)|.*)\n", "", source)
    faulty = types.ModuleType("faulty")
    exec(compile(source.replace(right, wrong), "faulty", "exec"), faulty.__dict__)
    return faulty
