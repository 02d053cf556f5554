"""The folder of a model that is named by its id: below the base folder of models, or shipped with the recipes."""

from pathlib import Path

from diffsynth_core.config.recipes import recipe_folder

SHIPPED = "models"
"""Folder of the models that are shipped, next to the recipes."""


def model_folder(model_id: str, base: Path) -> Path:
    """Return the folder of a model; that of a shipped one does not depend on `base`."""
    return shipped_folder(model_id) if is_shipped(model_id) else base / model_id


def is_shipped(model_id: str) -> bool:
    """Return whether a model is shipped, so that nothing of it is downloaded."""
    parts = model_id.split("/")
    return len(parts) == 2 and not {"", ".", ".."} & set(parts) and shipped_folder(model_id).is_dir()


def shipped_folder(model_id: str) -> Path:
    """Return the folder that a shipped model of this id has."""
    return recipe_folder() / SHIPPED / model_id
