"""Lists of labelled videos, and their entries in DATASETS.REGISTER (types video_list and video_folder)."""

from video_app.data.register import load_video_folder, load_video_list

__all__ = ["load_video_folder", "load_video_list"]
