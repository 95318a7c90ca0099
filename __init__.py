"""glann: Generative Latent Nearest Neighbors (Hoshen, Li & Malik, CVPR 2019) on a Ray cluster.

    import glann

    run = glann.train("digits", name="mine", glo={"epochs": 10})       # the folder of the run
    images = glann.load_model(run).sample(16, seed=0)                   # uint8 [16, H, W, C]

These names are stable: `train`, `load_model`, `Config` and `__version__`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from .config.run import Config
    from .tracking.source import load_model

__version__ = "0.1.0"
__all__ = ["Config", "__version__", "load_model", "train"]


def train(recipe: str | Path, **overrides: Any) -> Path:
    """Train a recipe, or resume where an interrupted run of it stopped: what `glann train` does.

    Shows one bar, in a terminal or in a notebook. Ctrl-C, or interrupting the kernel, saves and stops.

    Args:
        recipe: the name of a recipe that ships with glann, or a YAML file.
        overrides: sections and keys of the recipe: `name="mine", glo={"epochs": 10}`.
    Returns:
        The folder of the run; `load_model` takes it.
    Raises:
        UserError: something given is wrong.
        EnvironmentFault: workers, storage or a server failed for longer than the configured patience.
        RunStopped: interrupted, and saved.
    """
    from rich.console import Console

    from .config.parse import flatten
    from .trainers.plan.own_images import load_recipe
    from .trainers.run.driver import train as run

    config, console = load_recipe(recipe, changes=flatten(overrides)), Console()
    console.print(run(config, console), soft_wrap=True)
    return config.run_dir


def __getattr__(name: str) -> Any:
    """The other public names, imported when they are asked for: the command must start at once."""
    if name == "Config":
        from .config.run import Config

        return Config
    if name == "load_model":
        from .tracking.source import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
