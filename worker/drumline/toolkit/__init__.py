"""Files and images in requests and responses.

Their JSON is ``{"url", "content_type", "file_name", "file_size"}``, for images also ``"width"`` and ``"height"``.
"""

from drumline.toolkit.files import File, Image
from drumline.toolkit.repositories import DataRepository, DirectoryRepository, Repository, S3Repository

__all__ = ["DataRepository", "DirectoryRepository", "File", "Image", "Repository", "S3Repository"]
