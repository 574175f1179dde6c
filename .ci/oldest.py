"""Prints `name==version`, pip's constraints, for the lowest version that pyproject.toml allows of each requirement.

Usage: python .ci/oldest.py [extra ...]; the extras' requirements are listed with the others.
"""

import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def lowest(project, extras):
    """{name: version}. A requirement that stands in several lists gets the highest of its bounds."""
    from packaging.version import Version

    found = {}
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    for requirement in map(Requirement, lines):
        if requirement.name == project["name"]:  # name[extra] of the project itself
            inner = lowest(project, requirement.extras)
        else:
            bounds = [s.version for s in requirement.specifier if s.operator == ">="]
            if len(bounds) != 1:
                raise SystemExit(f"pyproject.toml: '{requirement}' has no lower bound; write it as name>=version")
            inner = {requirement.name: bounds[0]}
        for name, version in inner.items():
            found[name] = max(found.get(name, version), version, key=Version)
    return found


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    for name, version in sorted(lowest(project, sys.argv[1:]).items()):
        print(f"{name}=={version}")
