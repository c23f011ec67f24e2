"""Where a model is: a folder, the hub, or the box that ships with the package."""

from __future__ import annotations

from pathlib import Path

from semipd.core.errors import ConfigError


def model_folder(model: str | None) -> Path:
    """The local folder of a model: a path, or a hub id that is fetched (or found in the hub's cache).

    None means the box. Raises ConfigError."""
    if model is None:
        return default_model()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConfigError(f"no model folder at {model}")
    return _fetch(model)


def default_model() -> Path:
    """The model that ships with the package."""
    return Path(__file__).parents[1] / "box"


def _fetch(model: str) -> Path:
    # Imported here: it takes a quarter of a second, and a local folder does not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"])
        )
    except HFValidationError:
        raise ConfigError(f"no model folder at {model}, and it is not a hub id") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].removeprefix("Got: ")
        if isinstance(error, LocalEntryNotFoundError):
            message = f"no folder {model}; the hub cannot be reached, and its cache has no such model"
            raise ConfigError(f"{message}: {reason}") from error
        raise ConfigError(f"no folder {model}, and the hub gave no model of that name: {reason}") from error
