"""From a trained draft to a repository on the Hugging Face Hub: a checked folder, a model card, an upload."""

from deepspec.publishing.errors import PublishError
from deepspec.publishing.folder import build_folder
from deepspec.publishing.source import find_source
from deepspec.publishing.upload import PushOptions, push

__all__ = ["PublishError", "PushOptions", "build_folder", "find_source", "push"]
