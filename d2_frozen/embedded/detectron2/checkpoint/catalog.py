"""``catalog://`` names of ImageNet weights that Detectron 1 published, and where the files are."""

from __future__ import annotations

from typing import IO, Any

from detectron2._outside import outside_message
from detectron2.utils.file_io import PathHandler, PathManager


class ModelCatalog:
    """Names such as "ImageNetPretrained/MSRA/R-50" to addresses."""

    S3_C2_DETECTRON_PREFIX = "https://dl.fbaipublicfiles.com/detectron"
    _IMAGENET = "ImageNetPretrained/"
    C2_IMAGENET_MODELS = {
        name: f"ImageNetPretrained/{file}.pkl"
        for name, file in {
            "MSRA/R-50": "MSRA/R-50",
            "MSRA/R-101": "MSRA/R-101",
            "FAIR/R-50-GN": "47261647/R-50-GN",
            "FAIR/R-101-GN": "47592356/R-101-GN",
            "FAIR/X-101-32x8d": "20171220/X-101-32x8d",
            "FAIR/X-101-64x4d": "FBResNeXt/X-101-64x4d",
            "FAIR/X-152-32x8d-IN5k": "25093814/X-152-32x8d-IN5k",
        }.items()
    }

    @staticmethod
    def get(name: str) -> str:
        """Address of the file.

        Raises:
            NotImplementedError: one of Detectron 1's COCO models.
            RuntimeError: an unknown name.
        """
        if name.startswith("Caffe2Detectron/COCO/"):
            raise NotImplementedError(outside_message(f"Detectron 1's COCO model {name}"))
        file = ModelCatalog.C2_IMAGENET_MODELS.get(name.removeprefix(ModelCatalog._IMAGENET))
        if file is None or not name.startswith(ModelCatalog._IMAGENET):
            known = ", ".join(ModelCatalog._IMAGENET + key for key in ModelCatalog.C2_IMAGENET_MODELS)
            raise RuntimeError(f"no model {name!r} in the catalog; there are {known}.")
        return f"{ModelCatalog.S3_C2_DETECTRON_PREFIX}/{file}"


class ModelCatalogHandler(PathHandler):
    """Opens ``catalog://NAME``."""

    PREFIX = "catalog://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _address(self, path: str) -> str:
        return ModelCatalog.get(path.removeprefix(self.PREFIX))

    def _get_local_path(self, path: str, **kwargs: Any) -> str:
        return PathManager.get_local_path(self._address(path), **kwargs)

    def _open(self, path: str, mode: str = "r", **kwargs: Any) -> IO[Any]:
        return PathManager.open(self._address(path), mode, **kwargs)


PathManager.register_handler(ModelCatalogHandler())
