"""What `mlflow models serve` runs: requests for faces in, PNG images out.

MLflow keeps a copy of this file with a registered model and executes it there (models from code), so
nothing is pickled. It may import cvae, which lies beside it, but nothing else of this project.
"""

from __future__ import annotations

import base64
import io
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from PIL import Image

import cvae
from cvae.request import RequestError, parse_request


class Faces(PythonModel):
    """Draws one face for each row of the column `request`, such as "Male,Heavy_Makeup,!Smiling"."""

    def load_context(self, context: Any) -> None:
        """Open the exported model."""
        self.model = cvae.load(context.artifacts["model"])

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Return {"png": base64} for each row. Row i has image i of the seed.

        MLflow would check hints of these arguments against its own kinds, so there are none.
        """
        settings = params or {}
        answers = []
        for number, request in enumerate(model_input["request"]):
            try:
                drawn = self.model.sample(parse_request(request), n=1, start=number, **settings)
            except RequestError as error:
                raise MlflowException.invalid_parameter_value(str(error)) from None
            content = io.BytesIO()
            Image.fromarray(drawn[0].numpy()).save(content, "PNG")
            answers.append({"png": base64.b64encode(content.getvalue()).decode()})
        return answers


set_model(Faces())
