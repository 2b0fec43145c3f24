"""Action recognition on the frozen image backbone. It may import d2_frozen and detectron2, never seg_app."""
