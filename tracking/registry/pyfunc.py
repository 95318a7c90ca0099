"""The code of a logged MLflow model (models from code: MLflow copies this file and runs it on loading).

    model = mlflow.pyfunc.load_model("models:/faces@challenger")
    images = model.predict({"n": 16, "seed": 0, "truncation": 1.0})     # uint8 [n, H, W, C]

It stands alone in the logged model, so its imports of glann are absolute.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from glann import load_model
from glann.errors import UserError
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from numpy.typing import NDArray

DEFAULTS: dict[str, float] = {"n": 16, "seed": 0, "truncation": 1.0}
MAX_IMAGES = 4096  # per request: a request must not exhaust the server's memory


class GlannModel(PythonModel):
    """Draws images, also when served by MLflow; of a request with several rows, each row in turn."""

    def load_context(self, context: PythonModelContext) -> None:
        self.model = load_model(context.artifacts["model"])

    # MLflow infers a signature from the type hint of model_input; with DataFrame, which its servers send, it does not.
    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> NDArray[np.uint8]:
        """Draw uint8 images [n, H, W, C]; those of all rows are concatenated.

        Args:
            model_input: `n`, `seed` and `truncation`, as a dict or a table (DataFrame) of such rows.
        Raises:
            MlflowException: an invalid request; a server responds with status 400 and the reason.
        """
        try:
            return self._draw(model_input)
        except UserError as error:  # any other exception would return a traceback
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def _draw(self, model_input: Any) -> NDArray[np.uint8]:
        requests = [_request(row) for row in _rows(model_input)]
        if not requests:
            raise UserError("the request has no rows; send n, seed and truncation")
        total = sum(int(request["n"]) for request in requests)
        if total > MAX_IMAGES:
            raise UserError(f"{total} images in one request; the limit is {MAX_IMAGES}, send several requests")
        return np.concatenate(
            [self.model.sample(int(r["n"]), int(r["seed"]), float(r["truncation"])) for r in requests]
        )


def _rows(model_input: Any) -> list[dict[str, Any]]:
    if hasattr(model_input, "to_dict"):
        return model_input.to_dict(orient="records")
    if isinstance(model_input, dict):
        return [model_input]
    raise UserError(f"send n, seed and truncation as a dict or a table, not {type(model_input).__name__}")


def _request(row: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(map(str, row)) - set(DEFAULTS))
    if unknown:
        raise UserError(f"unknown input {', '.join(unknown)}; the inputs are {', '.join(DEFAULTS)}")
    given = {key: np.asarray(value).item() for key, value in row.items() if value is not None}
    # in a table, NaN stands for an optional column that a row leaves out
    return DEFAULTS | {key: value for key, value in given.items() if value == value}


set_model(GlannModel())
