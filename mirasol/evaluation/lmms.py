"""What lmms-eval finds under its entry point: `lmms_eval --model mirasol --model_args pretrained=run/ --tasks ...`."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """lmms-eval's `ModelManifest` of the model in `lmms_model`, which lmms-eval imports when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="mirasol", simple_class_path="mirasol.evaluation.lmms_model.Mirasol", aliases=("mirasol3b",)
    )
