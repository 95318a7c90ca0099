"""The packages of the wheel: every folder with an `__init__.py`, as `glann.<folder>`; pyproject.toml has the rest."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildPackage(build_py):
    """The root of the repository is the package, and this file lies there without being part of it."""

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if module[:2] != ("glann", "setup")]


rooms = find_packages(exclude=["build*", "tests*", "benchmarks*", "docs*"])
setup(packages=["glann", *(f"glann.{room}" for room in rooms)], cmdclass={"build_py": BuildPackage})
