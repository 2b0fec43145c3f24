"""Semantic segmentation on the frozen backbone. It may import d2_frozen and detectron2, never video_app."""
