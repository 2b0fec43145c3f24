"""Lists of labelled videos, their entries in DATASETS.REGISTER (types video_list, video_folder), Kinetics-400."""

from video_app.data import builtin  # noqa: F401  (registers Kinetics-400)
from video_app.data.register import load_video_folder, load_video_list

__all__ = ["load_video_folder", "load_video_list"]
